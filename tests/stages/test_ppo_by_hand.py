"""Stage 3 from its configuration to its weights, against a page of plain float64: one row a forward pass, transformers'
own models, torch's AdamW, loops over tokens. Every key that has a say in the numbers is set to what is not its default.

What the stage draws (tokens, pretraining documents) is taken from it; everything that follows is computed anew.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import stages.ppo

pytestmark = pytest.mark.xdist_group("stages")

KEYS = {
    "total_episodes": 24, "rollout_batch_size": 8, "num_mini_batches": 1, "num_ppo_epochs": 2,
    "per_device_train_batch_size": 3, "temperature": 0.7, "kl_estimator": "k3", "kl_coef": 0.3, "kl_target": 0.02,
    "kl_horizon": 20, "cliprange": 0.03, "cliprange_value": 0.05, "max_grad_norm": 0.4, "lr_decay": "linear",
    "warmup_iterations": 2, "gamma": 0.9, "lam": 0.8, "ema_decay": 0.6, "ptx_coef": 0.7,
    "ptx_examples_per_episode": 0.5, "ptx_max_length": 9, "missing_eos_mode": "subtract", "missing_eos_penalty": -0.4,
    "reward_clip": 0.3, "whiten_rewards": True, "learning_rate": 4e-3, "value_learning_rate": 6e-3,
    "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-4, "max_new_tokens": 6,
}  # fmt: skip
C = SimpleNamespace(**KEYS)


@pytest.fixture(scope="module")
def run(mini, tmp_path_factory):
    """The stage's run, and what it drew: (rollout, documents of each optimiser step) an iteration."""
    output, drawn, iterations = tmp_path_factory.mktemp("by-hand") / "ppo", [], []
    collect, update = stages.ppo.collect_rollout, stages.ppo.update

    def collected(*args):
        drawn.append((collect(*args), []))
        return drawn[-1][0]

    def updated(rollout, learner, next_documents, *args):
        iterations.append(args[-1])

        def documents(count):
            drawn[-1][1].append(next_documents(count))
            return drawn[-1][1][-1]

        return update(rollout, learner, documents, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.ppo, "collect_rollout", collected)
        patch.setattr(stages.ppo, "update", updated)
        mini.stage("ppo", mini.run, output_dir=output, **KEYS)
    return SimpleNamespace(output=output, drawn=drawn, base=mini.run, iterations=iterations)


def rows_of(rollout) -> list[SimpleNamespace]:
    table = zip(
        rollout.input_ids.tolist(), rollout.query_lengths.tolist(), rollout.response_lengths.tolist(),
        rollout.finished.tolist(), strict=True,
    )  # fmt: skip
    return [SimpleNamespace(ids=ids[: q + n], query=q, length=n, finished=done) for ids, q, n, done in table]


def token_logprobs(policy, row) -> torch.Tensor:
    logits = policy(input_ids=torch.tensor([row.ids])).logits[0] / C.temperature
    table = logits.log_softmax(-1)
    return torch.stack([table[t - 1, row.ids[t]] for t in range(row.query, len(row.ids))])


def token_values(value_model, row) -> torch.Tensor:
    scores = value_model(input_ids=torch.tensor([row.ids])).logits[0, :, 0]
    return scores[row.query - 1 : len(row.ids) - 1]


def score_of(reward_model, row, eos_id: int) -> float:
    ids = row.ids if row.finished else [*row.ids, eos_id]
    raw = float(reward_model(input_ids=torch.tensor([ids])).logits[0, -1, 0])
    row.raw = raw
    return min(max(raw if row.finished else raw - 0.4, -C.reward_clip), C.reward_clip)


def whitened(rows: list[torch.Tensor], keep_mean: bool) -> list[torch.Tensor]:
    every = torch.cat(rows)
    mean, deviation = every.mean(), ((every - every.mean()) ** 2).mean().add(1e-8).sqrt()
    return [(row - mean) / deviation + (mean if keep_mean else 0.0) for row in rows]


def advantages_of(rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    found, ahead = [], 0.0
    for t in reversed(range(len(rewards))):
        following = float(values[t + 1]) if t + 1 < len(values) else 0.0
        ahead = float(rewards[t]) + C.gamma * following - float(values[t]) + C.gamma * C.lam * ahead
        found.append(ahead)
    return torch.tensor(found[::-1], dtype=torch.float64)


def shaped(rows, models, kl_coef: float, eos_id: int) -> None:
    """What an update reads, on each row: old log-probabilities and values, advantages, returns; and its KL."""
    for row in rows:
        row.old, row.values = token_logprobs(models.policy, row), token_values(models.value, row)
        u = row.old - token_logprobs(models.ref, row)
        row.kl = float(u.sum())
        row.rewards = -kl_coef * (torch.exp(-u) - 1 + u)
        row.score = score_of(models.reward, row, eos_id)
        row.rewards[-1] += row.score
    for row, rewards in zip(rows, whitened([row.rewards for row in rows], keep_mean=True), strict=True):
        row.advantages = advantages_of(rewards, row.values)
        row.returns = row.advantages + row.values
    for row, advantages in zip(rows, whitened([row.advantages for row in rows], keep_mean=False), strict=True):
        row.advantages = advantages


def policy_objective(policy, rows, documents) -> torch.Tensor:
    losses = []
    for row in rows:
        ratio = (token_logprobs(policy, row) - row.old).exp()
        clipped = ratio.clamp(1 - C.cliprange, 1 + C.cliprange)
        losses.append(torch.maximum(-row.advantages * ratio, -row.advantages * clipped))
    nll = []
    for ids in documents:
        table = policy(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        nll += [-table[t - 1, ids[t]] for t in range(1, len(ids))]
    return torch.cat(losses).mean() + C.ptx_coef * torch.stack(nll).mean()


def value_objective(value_model, rows) -> torch.Tensor:
    losses = []
    for row in rows:
        values = token_values(value_model, row)
        near = row.values + (values - row.values).clamp(-C.cliprange_value, C.cliprange_value)
        losses.append(0.5 * torch.maximum((values - row.returns) ** 2, (near - row.returns) ** 2))
    return torch.cat(losses).mean()


def step(model, optimizer, loss: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), C.max_grad_norm)
    optimizer.step()
    return float(norm)


@pytest.fixture(scope="module")
def by_hand(run):
    """The same run from the same draws: models, averaged weights, a row of metrics an iteration."""

    def load(kind, folder):
        return kind.from_pretrained(run.base / folder, attn_implementation="eager").double().eval()

    models = SimpleNamespace(
        policy=load(AutoModelForCausalLM, "sft"), ref=load(AutoModelForCausalLM, "sft"),
        reward=load(AutoModelForTokenClassification, "rm"), value=load(AutoModelForTokenClassification, "rm"),
    )  # fmt: skip
    betas = (C.adam_beta1, C.adam_beta2)
    adams = [torch.optim.AdamW(m.parameters(), 0.0, betas, C.adam_epsilon, 0.0) for m in (models.policy, models.value)]
    average = {name: p.detach().clone() for name, p in models.policy.named_parameters()}
    kl_coef, log, eos_id = C.kl_coef, [], models.policy.config.eos_token_id
    for (rollout, documents), warm, decay in zip(run.drawn, (0.1, 0.55, 1.0), (1.0, 0.55, 0.1), strict=True):
        rows = rows_of(rollout)
        with torch.no_grad():
            shaped(rows, models, kl_coef, eos_id)
        adams[0].param_groups[0]["lr"] = C.learning_rate * warm * decay
        adams[1].param_groups[0]["lr"] = C.value_learning_rate * decay
        norms = []
        for drawn in documents:  # one an epoch
            norms.append(step(models.policy, adams[0], policy_objective(models.policy, rows, drawn)))
            for name, p in models.policy.named_parameters():
                average[name] = C.ema_decay * average[name] + (1 - C.ema_decay) * p.detach()
            step(models.value, adams[1], value_objective(models.value, rows))
        kl = sum(row.kl for row in rows) / len(rows)
        log.append(
            {
                "objective/kl": kl, "objective/raw_scores": sum(row.raw for row in rows) / len(rows),
                "objective/scores": sum(row.score for row in rows) / len(rows), "kl_coef": kl_coef,
                "lr": C.learning_rate * warm * decay, "policy/grad_norm": sum(norms) / len(norms),
            }
        )  # fmt: skip
        kl_coef *= 1 + min(max(kl / C.kl_target - 1, -0.2), 0.2) * 8 / C.kl_horizon
    return SimpleNamespace(models=models, average=average, log=log)


def test_the_setup_leaves_no_key_without_effect(run, by_hand):
    """Answers that end and that do not, ratios and values that are clipped, documents that are cut, norms over the
    limit: else the numbers below would agree whatever such a key did."""
    log = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    finished = torch.cat([rollout.finished for rollout, _ in run.drawn])
    assert 0 < int(finished.sum()) < len(finished)
    assert max(row["policy/clipfrac_avg"] for row in log) > 0 and max(row["val/clipfrac_avg"] for row in log) > 0
    assert max(row["policy/grad_norm"] for row in log) > C.max_grad_norm
    assert max(len(ids) for _, steps in run.drawn for step in steps for ids in step) == C.ptx_max_length
    scores = torch.cat([rollout.scores for rollout, _ in run.drawn]).abs()
    assert 0 < int((scores >= C.reward_clip - 1e-6).sum()) < len(scores), "some scores are cut"
    assert len({row["kl_coef"] for row in log}) == 3 and max(abs(row["objective/kl"]) for row in log) > 0.05
    assert all(len(steps) == 2 and len(steps[0]) == 4 and steps[0] != steps[1] for _, steps in run.drawn)


def test_the_log_is_that_of_plain_loops(run, by_hand):
    log = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(log, by_hand.log, strict=True):
        for name, expected in theirs.items():
            assert ours[name] == pytest.approx(expected, rel=2e-4, abs=2e-5), name


def test_a_row_of_the_log_counts_the_episodes_that_were_learned_from(run):
    log = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in log if "objective/scores" in row] == [8, 16, 24]


def test_P6_answers_are_drawn_at_the_temperature_of_their_log_probabilities(run):
    log = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in log) and C.temperature != 1


def test_the_averaged_policy_and_the_value_model_are_those_of_plain_loops(run, by_hand):
    start = AutoModelForCausalLM.from_pretrained(run.base / "sft").state_dict()
    saved = load_file(run.output / "model.safetensors")
    names = [name for name in by_hand.average if name in saved]
    assert len(names) > 20
    moved = max(float((by_hand.average[name] - start[name]).abs().max()) for name in names)
    for name in names:
        assert float((saved[name].double() - by_hand.average[name]).abs().max()) < 0.01 * moved, name
    value = load_file(run.output / "value_model" / "model.safetensors")
    expected = by_hand.models.value.state_dict()
    assert set(expected) <= set(value)
    begun = AutoModelForTokenClassification.from_pretrained(run.base / "rm").state_dict()
    moved = max(float((expected[name] - begun[name]).abs().max()) for name in expected)
    for name, weight in expected.items():
        assert float((value[name].double() - weight).abs().max()) < 0.01 * moved, name


def test_prompts_and_documents_are_new_each_time_until_all_were_seen(run):
    """Of more prompts than episodes none comes twice, nor a document; and each update knows its iteration."""
    prompts = [tuple(row.ids[: row.query]) for rollout, _ in run.drawn for row in rows_of(rollout)]
    documents = [tuple(ids) for _, steps in run.drawn for step in steps for ids in step]
    assert len(prompts) == 24 and len(set(prompts)) > 20, "two prompts of the file may be alike"
    assert len(documents) == 24 and len(set(documents)) > 18
    assert run.iterations == [0, 1, 2]


def test_the_first_update_learns_from_the_values_of_the_fitted_head(mini, tmp_path, monkeypatch):
    fit, update, fitted, learned = stages.ppo.fit_value_head, stages.ppo.update, [], []

    def fits(*args):
        fitted.append(fit(*args))
        return fitted[-1]

    def updated(rollout, *args):
        learned.append(rollout)
        return update(rollout, *args)

    monkeypatch.setattr(stages.ppo, "fit_value_head", fits)
    monkeypatch.setattr(stages.ppo, "update", updated)
    mini.stage("ppo", mini.run, output_dir=tmp_path / "ppo", value_head_init="fitted")
    ((rollout, numbers),) = fitted
    assert [given is rollout for given in learned] == [True, False]
    manifest = json.loads((tmp_path / "ppo" / "manifest.json").read_text(encoding="utf-8"))
    assert numbers.keys() and numbers.items() <= manifest["metrics"]["step_zero"].items()
