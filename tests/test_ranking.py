"""align/ranking.py and the RankingTrainer: K completions of a prompt are one element, whatever the batching."""

import copy
import dataclasses
import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import align.ranking
from align import packing
from align.errors import UserError
from align.models import load_scalar_model
from align.ranking import (
    RankedTokens,
    RankingCollator,
    batch_ranking_loss,
    by_prompt,
    encode_rankings,
    held_out_loss,
    normalise_on,
    places,
    score_demonstrations,
    score_rankings,
    split_pairs,
)
from align.trainer import LengthGroups, PairTrainer, RankingTrainer
from align.types import Demonstration, Ranking

PAD = 0


@pytest.fixture(params=[None, "eager"], ids=["packed", "padded"])
def scalar(request, tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "policy")
    torch.manual_seed(1)
    return load_scalar_model(str(tmp_path / "policy"), request.param, fresh_head=True)


def element(k: int, seed: int, ties: bool = False) -> dict:
    rng = random.Random(seed)
    query = tuple(rng.randrange(2, 64) for _ in range(rng.randint(1, 4)))
    responses = tuple((*(rng.randrange(2, 64) for _ in range(rng.randint(1, 5))), 1) for _ in range(k))
    ranks = [float(r) for r in range(k)]
    rng.shuffle(ranks)
    return {"ranking": RankedTokens(query, responses, tuple(r // 2 if ties else r for r in ranks))}


def rows_of(ranking: RankedTokens) -> list[tuple[int, ...]]:
    return [(*ranking.query, *response) for response in ranking.responses]


def row_score(model, row) -> torch.Tensor:
    """At the row's last token, by transformers' backbone on the whole row."""
    state = model.inner.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
    return model.head.weight[0] @ state + model.head.bias[0]


def naive_loss(model, ranking: RankedTokens) -> torch.Tensor:
    """-log sigmoid(better - worse), averaged over all C(K, 2) pairs; a row at a time, float64."""
    scores = [row_score(model, row).double() for row in rows_of(ranking)]
    k, total = len(scores), 0.0
    for i in range(k):
        for j in range(k):
            if ranking.ranks[i] < ranking.ranks[j]:
                total = total + torch.log(1 + torch.exp(-(scores[i] - scores[j])))
    return total / math.comb(k, 2)


def gradient(loss, model) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for p in model.parameters()])])


@pytest.mark.parametrize("ties", [False, True])
def test_R1_kwise_gradient_is_the_mean_of_pairwise_gradients(scalar, ties):
    ranking = element(5, 3, ties)
    whole = gradient(batch_ranking_loss(scalar, RankingCollator(PAD)([ranking]))[0], scalar)
    query, rows, ranks = ranking["ranking"].query, ranking["ranking"].responses, ranking["ranking"].ranks
    pairs = []
    for i in range(5):
        for j in range(i + 1, 5):
            pair = {"ranking": RankedTokens(query, (rows[i], rows[j]), (ranks[i], ranks[j]))}
            pairs.append(gradient(batch_ranking_loss(scalar, RankingCollator(PAD)([pair]))[0], scalar))
    assert len(pairs) == 10 and float(whole.abs().max()) > 1e-3
    assert float((whole - sum(pairs) / 10).abs().max()) < 1e-5 * max(1.0, float(whole.abs().max()))
    alone = gradient(naive_loss(scalar, ranking["ranking"]), scalar)
    assert float((whole - alone).abs().max()) < 1e-5 * max(1.0, float(whole.abs().max()))


def test_R2_a_completion_is_one_forward_row(scalar):
    """Each completion's tokens are computed once; packed, each prompt's once for all its completions."""
    seen = []
    scalar.inner.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    elements = [element(4, 1), element(9, 2), element(2, 3)]
    batch_ranking_loss(scalar, RankingCollator(PAD)(elements))
    assert len(seen) == 1
    rankings = [e["ranking"] for e in elements]
    if scalar.packed:
        assert seen[0] == (1, sum(len(r.query) + sum(map(len, r.responses)) for r in rankings))
        assert seen[0][1] == sum(r.tokens for r in rankings)
    else:
        assert seen[0] == (15, max(len(row) for r in rankings for row in rows_of(r)))


def test_collator_and_by_prompt():
    a = {"ranking": RankedTokens((5,), ((6, 1), (1,)), (1.0, 0.0))}
    b = {"ranking": RankedTokens((7,), ((8, 9, 1), (1,), (2, 1)), (0.0, 2.0, 1.0))}
    batch = RankingCollator(PAD)([a, b])
    pack = batch["pack"]
    # `starts` and `last_index` are those of the completions, prompt by prompt.
    assert pack.input_ids.tolist() == [5, 6, 1, 1, 7, 8, 9, 1, 1, 2, 1]
    assert pack.position_ids.tolist() == [0, 1, 2, 1, 0, 1, 2, 3, 1, 1, 2]
    assert pack.starts.tolist() == [1, 3, 5, 8, 9]
    assert batch["last_index"].tolist() == [2, 3, 7, 8, 10] and batch["group"].tolist() == [0, 0, 1, 1, 1]
    assert batch["ranks"].tolist() == [1, 0, 0, 2, 1] and a["ranking"].tokens == 4 and b["ranking"].tokens == 7
    scores, ranks, mask = by_prompt(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), batch["ranks"], batch["group"])
    assert scores.tolist() == [pytest.approx([0.1, 0.2, 0.0]), pytest.approx([0.3, 0.4, 0.5])]
    assert ranks.tolist() == [[1, 0, 0], [0, 2, 1]] and mask.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("junk", [17, 1, 63])
def test_R8_junk_in_the_padding_changes_no_loss_and_no_gradient(scalar, monkeypatch, junk):
    monkeypatch.setattr(packing, "MAX_PADDING", 0.99)  # all completions of a prompt in one padded group
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 0)
    elements = [element(3, 1), element(6, 2)]
    batch = RankingCollator(PAD)(elements)
    ids, past = batch["pack"].input_ids, torch.ones(len(batch["pack"].input_ids), dtype=torch.bool)
    for row in batch["pack"].rows:
        past[row.start : row.start + row.length] = False
        past[row.prefix_start : row.prefix_start + row.prefix_length] = False
    assert past.any() and int((~past).sum()) == sum(e["ranking"].tokens for e in elements)
    dirty = batch | {"pack": dataclasses.replace(batch["pack"], input_ids=ids.masked_fill(past, junk))}
    clean_loss, dirty_loss = batch_ranking_loss(scalar, batch)[0], batch_ranking_loss(scalar, dirty)[0]
    assert torch.equal(clean_loss, dirty_loss)
    assert torch.equal(gradient(clean_loss, scalar), gradient(dirty_loss, scalar))
    alone = sum(naive_loss(scalar, e["ranking"]) for e in elements)
    assert float(dirty_loss.detach()) == pytest.approx(float(alone.detach()), abs=1e-5)


def trainer_of(model, elements, folder, cls=RankingTrainer, **changes):
    values = {
        "num_train_epochs": 1, "per_device_train_batch_size": 2, "learning_rate": 0.5, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **(values | changes))
    held = elements if args.eval_strategy != "no" else None
    return cls(model=model, args=args, train_dataset=elements, eval_dataset=held, data_collator=RankingCollator(PAD))


def trained(scalar, elements, folder, **changes):
    model = copy.deepcopy(scalar)
    trainer = trainer_of(model, elements, folder, **changes)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return weights, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_R3_each_prompt_weighs_the_same_whatever_its_k(scalar, tmp_path):
    """One SGD step through the trainer, against the mean of the two prompts' losses by a loop."""
    elements = [element(4, 1), element(9, 2)]
    weights, losses = trained(scalar, elements, tmp_path, learning_rate=0.5)
    each = [naive_loss(scalar, e["ranking"]) for e in elements]
    before = torch.cat([p.detach().flatten() for p in scalar.parameters()])
    expected = before - 0.5 * (gradient(each[0], scalar) + gradient(each[1], scalar)) / 2
    assert float((weights - expected).abs().max()) < 1e-5
    assert float((weights - before).abs().max()) > 1e-3
    assert losses == pytest.approx([float((each[0] + each[1]).detach()) / 2], abs=1e-4)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_step_and_keeps_its_batches(scalar, tmp_path, max_grad_norm):
    """transformers' Trainer goes on with weights of NaN, as the second half shows."""
    elements = [element(k, k) for k in (4, 3, 2, 5)]
    model = copy.deepcopy(scalar)
    model.head.weight.data[0, 0] = float("nan")
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": max_grad_norm}
    trainer = trainer_of(model, elements, tmp_path, **changes)
    with pytest.raises(UserError, match="grad_norm is nan at step 1; .* its batch is in ") as error:
        trainer.train()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0)) and len(str(error.value).splitlines()) == 1
    kept = load_file(tmp_path / "stopped-0" / "batch.safetensors")
    about = json.loads((tmp_path / "stopped-0" / "batch.json").read_text(encoding="utf-8"))
    assert about["step"] == 1 and about["why"].startswith("grad_norm is nan")
    for number, batch in enumerate(trainer.step_batches):
        assert torch.equal(kept[f"{number}.ranks"], batch["ranks"])
        assert torch.equal(kept[f"{number}.pack.input_ids"], batch["pack"].input_ids)
    assert number == 1, "both batches of the step"

    plain = trainer_of(model, elements, tmp_path, cls=Unguarded, **changes)
    plain.train()
    assert all(p.isnan().any() for p in model.parameters() if p.requires_grad)


class Unguarded(RankingTrainer):
    """Without the check."""

    def _get_grad_norm(self, model, grad_norm=None):
        return Trainer._get_grad_norm(self, model, grad_norm=grad_norm)


def test_R3_gradient_accumulation_is_the_bigger_batch(scalar, tmp_path):
    elements = [element(k, k) for k in (4, 9, 2, 6, 5)]  # the last step holds one prompt only
    whole, losses = trained(scalar, elements, tmp_path, learning_rate=0.1)
    cut, cut_losses = trained(
        scalar, elements, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.1
    )
    assert float((whole - cut).abs().max()) < 1e-5
    assert len(losses) == 3 and losses == pytest.approx(cut_losses, abs=1e-4)


def test_R10_each_prompt_once_and_its_pairs_together(scalar, tmp_path):
    seen = []

    class Spy(RankingTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            pack = inputs["pack"]
            rows = [
                tuple(pack.input_ids[a : a + n].tolist() + pack.input_ids[b : last + 1].tolist())
                for (a, n, b, _), last in zip(pack.rows, inputs["last_index"].tolist(), strict=True)
            ]
            seen.append((self.state.global_step, rows, inputs["group"].tolist()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    elements = [element(2 + i % 8, i) for i in range(11)]
    trainer = trainer_of(copy.deepcopy(scalar), elements, tmp_path, Spy, per_device_train_batch_size=3)
    trainer.train()
    prompts = []
    for _, rows, group in seen:
        for g in range(max(group) + 1):
            prompts.append(tuple(row for row, at in zip(rows, group, strict=True) if at == g))
    assert sorted(prompts) == sorted(tuple(rows_of(e["ranking"])) for e in elements)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]


@pytest.mark.parametrize("ties", [False, True])
def test_a_pair_as_element_weighs_1(scalar, tmp_path, ties):
    """One SGD step on all pairs of two prompts, against the mean of the pairs' own losses by a loop."""
    elements = [element(4, 1, ties), element(3, 2)]
    pairs = split_pairs(elements)
    assert len(pairs) == (4 if ties else 6) + 3
    for pair in (e["ranking"] for e in pairs):
        whole = next(e["ranking"] for e in elements if e["ranking"].query == pair.query)
        order = {r: rank for r, rank in zip(whole.responses, whole.ranks, strict=True)}
        assert tuple(order[r] for r in pair.responses) == pair.ranks and pair.ranks[0] != pair.ranks[1]
    weights, losses = trained(scalar, pairs, tmp_path, per_device_train_batch_size=9, learning_rate=0.1)
    total = sum(naive_loss(scalar, e["ranking"]) for e in pairs) / len(pairs)
    before = torch.cat([p.detach().flatten() for p in scalar.parameters()])
    assert float((weights - (before - 0.1 * gradient(total, scalar))).abs().max()) < 1e-5
    assert losses == pytest.approx([float(total.detach())], abs=1e-4)


def test_shuffled_pairs_of_a_prompt_do_not_meet_again(scalar, tmp_path):
    """Prompts of very different length: grouped, a batch holds few prompts' pairs; shuffled, many prompts'."""
    elements = []
    for i in range(12):
        query, responses = tuple([2 + i] * (3 * i + 1)), tuple((a, 1) for a in range(2, 7))
        elements.append({"ranking": RankedTokens(query, responses, (0.0, 1.0, 2.0, 3.0, 4.0))})
    pairs = split_pairs(elements)

    def prompts_a_batch(cls, epoch):
        sampler = trainer_of(scalar, pairs, tmp_path, cls, per_device_train_batch_size=10)._get_train_sampler()
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(120))
        found = [len({pairs[i]["ranking"].query for i in order[k : k + 10]}) for k in range(0, 120, 10)]
        return order, sum(found) / len(found)

    assert prompts_a_batch(RankingTrainer, 0)[1] < 5 < 6.5 < prompts_a_batch(PairTrainer, 0)[1]
    assert (
        prompts_a_batch(PairTrainer, 0)[0] == prompts_a_batch(PairTrainer, 0)[0] != prompts_a_batch(PairTrainer, 1)[0]
    )


@pytest.mark.parametrize("size", [1, 2, 64])
def test_held_out_loss_is_a_mean_over_prompts_however_they_are_batched(scalar, size):
    elements = [element(4, 1, ties=True), element(9, 2), element(2, 3)]
    found = held_out_loss(scalar, elements, PAD, size)
    expected = sum(float(naive_loss(scalar, e["ranking"]).detach()) for e in elements) / 3
    assert found["loss"] == pytest.approx(expected, abs=1e-5)
    right = pairs = margin = 0.0
    for ranking in (e["ranking"] for e in split_pairs(elements)):
        with torch.no_grad():
            one, other = (float(row_score(scalar, row)) for row in rows_of(ranking))
        gap = one - other if ranking.ranks[0] < ranking.ranks[1] else other - one
        right, pairs, margin = right + (gap > 0), pairs + 1, margin + gap
    assert found["accuracy"] == pytest.approx(right / pairs)
    assert found["margin"] == pytest.approx(margin / pairs, abs=1e-5)


@pytest.mark.parametrize("cls", [RankingTrainer, PairTrainer])
def test_evaluation_while_training_is_by_prompt_and_leaves_the_training_alone(scalar, tmp_path, cls):
    elements, held = [element(4, 1), element(3, 2), element(5, 3)], [element(4, 8), element(6, 9)]
    rows = split_pairs(elements) if cls is PairTrainer else elements
    plain_run, model = copy.deepcopy(scalar), copy.deepcopy(scalar)
    trainer_of(plain_run, rows, tmp_path / "plain", cls).train()
    trainer = trainer_of(model, rows, tmp_path / "eval", cls, eval_strategy="steps", eval_steps=2)
    trainer.eval_dataset = held
    trainer.train()
    log = trainer.state.log_history
    evaluated = [row for row in log if "eval_loss" in row]
    steps = trainer.state.global_step
    assert [row["step"] for row in evaluated] == sorted({*range(2, steps + 1, 2), steps})
    assert evaluated[-1]["eval_loss"] == pytest.approx(held_out_loss(model, held, PAD, 8)["loss"], abs=1e-6)
    assert "accuracy" not in evaluated[0] and all("accuracy" in row for row in log if "loss" in row)
    for one, other in zip(plain_run.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def planted(count: int, seed: int, flip: bool = False) -> list[dict]:
    """Completions are better the more of their tokens lie below 32."""
    rng, elements = random.Random(seed), []
    while len(elements) < count:
        query = tuple(rng.randrange(2, 64) for _ in range(2))
        responses = [tuple(rng.randrange(2, 64) for _ in range(4)) for _ in range(4)]
        ranks = [float(sum(token >= 32 for token in response)) for response in responses]
        if len(set(ranks)) > 1:
            responses = tuple((*response, 1) for response in responses)
            elements.append({"ranking": RankedTokens(query, responses, tuple(-r if flip else r for r in ranks))})
    return elements


@pytest.mark.parametrize("flip", [False, True])
def test_R11_planted_reward(scalar, tmp_path, flip):
    trainer = trainer_of(
        scalar, planted(400, 1, flip), tmp_path, per_device_train_batch_size=10, learning_rate=3e-3, optim="adamw_torch"
    )
    trainer.train()
    right = total = 0
    for e in planted(60, 2):
        ranking = e["ranking"]
        with torch.no_grad():
            scores = [float(row_score(scalar, row)) for row in rows_of(ranking)]
        for i in range(4):
            for j in range(4):
                if ranking.ranks[i] < ranking.ranks[j]:
                    right, total = right + (scores[i] > scores[j]), total + 1
    accuracy = right / total
    assert accuracy < 0.3 if flip else accuracy > 0.7, accuracy


def test_logged_accuracy_and_margin_are_those_of_the_batches(scalar, tmp_path):
    elements = [element(4, 5), element(3, 6)]
    trainer = trainer_of(copy.deepcopy(scalar), elements, tmp_path)
    trainer.add_callback(TrainerCallback())
    trainer.train()
    right = pairs = margin = 0.0
    for e in elements:
        ranking = e["ranking"]
        with torch.no_grad():
            scores = [float(row_score(scalar, row)) for row in rows_of(ranking)]
        for i, a in enumerate(ranking.ranks):
            for j, b in enumerate(ranking.ranks):
                if a < b:
                    right, pairs, margin = right + (scores[i] > scores[j]), pairs + 1, margin + scores[i] - scores[j]
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["accuracy"] == pytest.approx(right / pairs) and row["margin"] == pytest.approx(margin / pairs, abs=1e-4)


def test_a_row_of_the_log_is_of_the_steps_since_the_last_one(scalar, tmp_path):
    """Without a learning rate: a prompt a step, whose own accuracy and margin the row has."""
    elements = [element(2, 5), element(3, 6), element(4, 7)]
    trainer = trainer_of(copy.deepcopy(scalar), elements, tmp_path, learning_rate=0.0, per_device_train_batch_size=1)
    trainer.train()
    logged = [(row["accuracy"], row["margin"]) for row in trainer.state.log_history if "loss" in row]
    expected = []
    for ranking in (e["ranking"] for e in elements):
        with torch.no_grad():
            scores = [float(row_score(scalar, row)) for row in rows_of(ranking)]
        gaps = [
            scores[i] - scores[j] for i, a in enumerate(ranking.ranks) for j, b in enumerate(ranking.ranks) if a < b
        ]
        expected.append((sum(gap > 0 for gap in gaps) / len(gaps), sum(gaps) / len(gaps)))
    assert len(logged) == 3 and len({margin for _, margin in logged}) == 3
    for ours, theirs in zip(sorted(logged), sorted(expected), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("attention", [None, "eager"])
def test_encoding_and_scoring_rankings(tiny_codec, tmp_path, attention, batch_size):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_codec.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_scalar_model(str(tmp_path), attention, fresh_head=True).eval()
    rankings = [
        Ranking("hot?", ("cold", "用中文", "a"), (0, 1, 1)),
        Ranking("a farm", ("cow", "a dog and a bird"), (1, 0)),
        Ranking("?", ("the same", "the same", "cold"), (0, 2, 1)),
    ]
    encoded = encode_rankings(rankings, tiny_codec)
    scored = score_rankings(model, rankings, tiny_codec, batch_size)
    demonstrations = [Demonstration(r.prompt, c) for r in rankings for c in r.completions]
    flat = iter(score_demonstrations(model, demonstrations, tiny_codec, batch_size=3))
    for ranking, element_, (same, scores) in zip(rankings, encoded, scored, strict=True):
        assert same is ranking and element_["ranking"].ranks == ranking.ranks
        for completion, row, score in zip(ranking.completions, rows_of(element_["ranking"]), scores, strict=True):
            assert list(row) == tiny_codec.prompt(ranking.prompt) + tiny_codec.response(completion)
            with torch.no_grad():
                expected = float(row_score(model, row))
            assert score == pytest.approx(expected, abs=1e-5) and next(flat) == pytest.approx(expected, abs=1e-5)


def test_the_mean_after_is_read_of_the_demonstrations_that_are_scored_again(scalar, monkeypatch):
    """Scores 1, 2 and 6 have the mean 3; shifted by it, the first two lie 3 lower, and so does the mean."""
    scores = [[1.0, 2.0, 6.0], [-2.0, -1.0]]
    asked = []

    def scored(model, demonstrations, *rest):
        asked.append(len(demonstrations))
        return scores[len(asked) - 1]

    monkeypatch.setattr(align.ranking, "SCORED_AGAIN", 2)
    monkeypatch.setattr(align.ranking, "score_demonstrations", scored)
    scalar.head.bias.data.fill_(0.5)
    found = normalise_on(scalar, [Demonstration("hot", "cold")] * 3, None, 8)
    assert asked == [3, 2] and found == {"demonstration_mean_before": 3.0, "demonstration_mean": 0.0}
    assert scalar.head.bias.item() == -2.5


def test_batches_hold_like_lengths_in_mixed_order_and_every_row_once():
    lengths = torch.randint(5, 60, (1003,), generator=torch.Generator().manual_seed(1)).tolist()
    order = list(LengthGroups(lengths, 10, seed=3))
    assert sorted(order) == list(range(1003))
    batches = [[lengths[i] for i in order[start : start + 10]] for start in range(0, 1000, 10)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    assert padded < 1.08 * sum(map(sum, batches))  # 1.7 times as many tokens in random batches
    longest = [max(batch) for batch in batches]
    falls = sum(one > two for one, two in zip(longest, longest[1:], strict=False))
    assert 0.35 < falls / len(longest) < 0.65  # neighbours are not sorted
    assert order != list(LengthGroups(lengths, 10, seed=4))


def test_ranks_may_be_any_numbers():
    """Two time stamps a second apart are one number in float32."""
    assert places((1732700002.0, 1732700001.0, 1732700002.0)) == (1.0, 0.0, 1.0)
    assert places((3.0, -1.0, 7.5)) == (1.0, 0.0, 2.0)
