"""align/evaluate/policies.py: what is measured of whole responses and of text, against transformers' own losses."""

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical

from align.errors import UserError
from align.evaluate.policies import (
    Setting,
    answer,
    cut_at_newline,
    few_shot_examples,
    judged,
    perplexity,
    record,
    scored,
    sequence_logprobs,
)
from align.generate import TorchSampler, uniform_numbers
from align.models import Policy
from align.runtime import Runtime
from align.types import Demonstration, Episode, Prompt, Ranking

CPU = torch.device("cpu")
QUERIES = [(5, 6), (9,), (30, 31, 32, 33), (8, 60, 2), (7,)]
RESPONSES = [(7, 8, 1), (10, 11, 12, 13, 14), (1,), (3, 4), (20, 21, 22, 23, 24, 25, 26, 1)]


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def policy(request, tiny_llama):
    return Policy(copy.deepcopy(tiny_llama), request.param)


def loss_of(model, row: tuple[int, ...], first: int) -> float:
    """Summed over the tokens from the `first` on: transformers' mean over the labels that are not -100."""
    ids = torch.tensor([row])
    labels = ids.clone()
    labels[:, :first] = -100
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * (len(row) - first)


def at_temperature(model, query: tuple[int, ...], response: tuple[int, ...], temperature: float) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([query + response])).logits[0, len(query) - 1 : -1].double()
    return float(Categorical(logits=logits / temperature).log_prob(torch.tensor(response)).sum())


def whole(episodes: list[Episode]) -> list[int]:
    return [len(episode.response) for episode in episodes]


def test_logprob_of_the_tokens_that_were_drawn(policy, tiny_llama):
    """What was added behind them, as an EOS where an answer was cut, does not count."""
    episodes = [Episode(q, r, r[-1] == 1) for q, r in zip(QUERIES, RESPONSES, strict=True)]
    drawn = [i % (len(r) + 1) for i, r in enumerate(RESPONSES)]  # 0 of the first, then more
    setting = SimpleNamespace(batch_size=2, codec=SimpleNamespace(pad_id=0))
    with torch.no_grad():
        totals = sequence_logprobs(policy, episodes, drawn, setting, CPU, 1.0)
    rows = zip(QUERIES, RESPONSES, drawn, strict=True)
    expected = [-loss_of(tiny_llama, q + r[:n], len(q)) if n else 0.0 for q, r, n in rows]
    assert totals.tolist() == pytest.approx(expected, abs=1e-4) and drawn[0] == 0 and max(drawn) > 1


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_P6_logprob_of_a_response_is_that_of_the_temperature_that_drew_it(policy, tiny_llama, temperature):
    episodes = [Episode(q, r, r[-1] == 1) for q, r in zip(QUERIES, RESPONSES, strict=True)]
    setting = SimpleNamespace(batch_size=2, codec=SimpleNamespace(pad_id=0))
    with torch.no_grad():
        totals = sequence_logprobs(policy, episodes, whole(episodes), setting, CPU, temperature)
    expected = [at_temperature(tiny_llama, q, r, temperature) for q, r in zip(QUERIES, RESPONSES, strict=True)]
    assert totals.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_logprob_of_a_response_is_the_sum_of_its_tokens(policy, tiny_llama, batch_size):
    episodes = [Episode(q, r, r[-1] == 1) for q, r in zip(QUERIES, RESPONSES, strict=True)]
    setting = SimpleNamespace(batch_size=batch_size, codec=SimpleNamespace(pad_id=0))
    with torch.no_grad():
        totals = sequence_logprobs(policy, episodes, whole(episodes), setting, CPU, 1.0)
    expected = [-loss_of(tiny_llama, q + r, len(q)) for q, r in zip(QUERIES, RESPONSES, strict=True)]
    assert totals.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_perplexity_is_a_mean_over_tokens_not_documents(policy, tiny_llama, batch_size):
    documents = [list(q + r) for q, r in zip(QUERIES, RESPONSES, strict=True)]
    total = sum(loss_of(tiny_llama, tuple(document), 1) for document in documents)
    tokens = sum(len(document) - 1 for document in documents)
    assert tokens == 25
    assert perplexity(policy, documents, batch_size, CPU) == pytest.approx(math.exp(total / 25), rel=1e-4)


@pytest.mark.parametrize(("temperature", "read_at"), [(0.7, 0.7), (2.0, 2.0), (0.0, 1.0)])
def test_P6_kl_of_an_answer_is_at_the_temperature_that_drew_it(tiny_llama, tiny_codec, temperature, read_at):
    tiny_llama.resize_token_embeddings(len(tiny_codec.tokenizer))
    models = tiny_llama, copy.deepcopy(tiny_llama)
    with torch.no_grad():
        models[0].lm_head.weight.mul_(8)
    policy, sft = (Policy(model.eval()) for model in models)
    prompts = [Prompt("Name a pet."), Prompt("Say no")]

    def nothing(prompts, episodes):
        return [0.0] * len(episodes)

    setting = Setting(tiny_codec, prompts, sft, nothing, None, max_new_tokens=5, batch_size=2, seed=0)
    rows = answer(policy, setting, temperature, Runtime(seed=0))
    queries = tiny_codec.prompts([prompt.prompt for prompt in prompts])
    uniforms = uniform_numbers(2, 5, 0, 0)
    drawn = TorchSampler(policy, tiny_codec.eos_id, tiny_codec.pad_id, 2)(queries, uniforms, temperature)
    for row, query, episode in zip(rows, queries, drawn, strict=True):
        here, there = (at_temperature(m, tuple(query), episode.response, read_at) for m in models)
        assert row["response"] == tiny_codec.decode(episode.response).strip()
        assert row["kl"] == pytest.approx(here - there, abs=1e-3) and abs(here - there) > 0.1


def test_another_seed_draws_other_answers(tiny_llama, tiny_codec):
    tiny_llama.resize_token_embeddings(len(tiny_codec.tokenizer))
    policy, prompts = Policy(tiny_llama.eval()), [Prompt("Name a pet."), Prompt("Say no")]

    def drawn(seed, temperature):
        setting = Setting(tiny_codec, prompts, policy, lambda p, e: [0.0] * len(e), None, 5, batch_size=2, seed=seed)
        return [row["response"] for row in answer(policy, setting, temperature, Runtime(seed=0))]

    assert drawn(0, 1.0) == drawn(0, 1.0) != drawn(1, 1.0)
    assert drawn(0, 0.0) == drawn(1, 0.0)


@pytest.mark.parametrize("text, kept", [("a cat\nName", "a cat"), ("\na cat\n", "\na cat"), ("a cat", "a cat")])
def test_a_prompted_answer_ends_before_its_newline(tiny_codec, text, kept):
    episode = Episode((5,), tuple(tiny_codec.response(text)[:-1]), False)
    cut = cut_at_newline(episode, tiny_codec)
    if kept == text:
        assert cut is episode
    else:
        *answer_tokens, last = cut.response
        assert tiny_codec.decode(answer_tokens).strip() == kept.strip() and last == tiny_codec.eos_id and cut.finished
        assert tuple(answer_tokens) == episode.response[: len(answer_tokens)]


def test_rewards_are_computed_in_float32(tiny_llama, tiny_codec, monkeypatch):
    """Under autocast scores of 2 to 4 would come in steps of 1/64, and tie."""
    tiny_llama.resize_token_embeddings(len(tiny_codec.tokenizer))
    policy, seen = Policy(tiny_llama.eval()), []

    def reward(prompts, episodes):
        seen.append(torch.is_autocast_enabled("cpu"))
        return [0.0] * len(episodes)

    setting = Setting(tiny_codec, [Prompt("Say no")], policy, reward, None, max_new_tokens=2, batch_size=2, seed=0)
    monkeypatch.setattr(Runtime, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    answer(policy, setting, 1.0, Runtime(seed=0))
    assert seen == [False]


def test_a_process_without_a_prompt_scores_nothing_and_has_all_rows(tiny_llama, tiny_codec, monkeypatch):
    """More processes than prompts: a reward function is not called with nothing."""
    tiny_llama.resize_token_embeddings(len(tiny_codec.tokenizer))
    policy, called, theirs = Policy(tiny_llama.eval()), [], [{"response": "the other process's"}]
    monkeypatch.setattr(Runtime, "mine", lambda self, rows: rows[len(rows) :])
    monkeypatch.setattr("align.evaluate.policies.gather_list", lambda rows: theirs + rows)
    setting = Setting(tiny_codec, [Prompt("Say no")], policy, called.append, None, 2, batch_size=2, seed=0)
    assert answer(policy, setting, 1.0, Runtime(seed=0)) == theirs and not called


def test_kl_of_a_prompted_answer_is_of_the_tokens_before_its_newline(tiny_llama, tiny_codec, monkeypatch):
    """The EOS that closes it was never drawn; an answer that ended by itself counts its own."""
    tiny_llama.resize_token_embeddings(len(tiny_codec.tokenizer))
    models = tiny_llama, copy.deepcopy(tiny_llama)
    with torch.no_grad():
        models[0].lm_head.weight.mul_(8)
    policy, sft = (Policy(model.eval()) for model in models)
    texts = "a cat\nName", "a dog"
    kept = [tiny_codec.response("a cat")[:-1], tiny_codec.response("a dog")]

    def sampler(queries, uniforms, temperature):
        drawn = [tiny_codec.response(text) for text in texts]
        return [Episode(tuple(q), tuple(r), True) for q, r in zip(queries, drawn, strict=True)]

    monkeypatch.setattr("align.evaluate.policies.make_sampler", lambda *args: sampler)
    prompts = [Prompt("Name a pet."), Prompt("Say no")]
    setting = Setting(tiny_codec, prompts, sft, lambda p, e: [0.0] * len(e), None, 9, batch_size=2, seed=0)
    rows = answer(policy, setting, 1.0, Runtime(seed=0), few_shot=[("Name a bird.", "a crow")])
    shown = tiny_codec.few_shot([("Name a bird.", "a crow")], [p.prompt for p in prompts])
    plain = tiny_codec.prompts([p.prompt for p in prompts])
    assert [row["response"] for row in rows] == ["a cat", "a dog"]
    for row, query, own, tokens in zip(rows, shown, plain, kept, strict=True):
        here = at_temperature(models[0], tuple(query), tuple(tokens), 1.0)
        there = at_temperature(models[1], tuple(own), tuple(tokens), 1.0)
        assert row["kl"] == pytest.approx(here - there, abs=1e-3)


def test_reward_and_judge_read_the_answer_behind_the_plain_prompt(tiny_llama, tiny_codec, monkeypatch):
    """Not behind the few-shot prefix, nor what followed the newline; and that an answer was cut off is told."""
    tiny_llama.resize_token_embeddings(len(tiny_codec.tokenizer))
    policy = Policy(tiny_llama.eval())
    ended, cut = tiny_codec.response("a cat\nName"), tiny_codec.response("a dog")[:-1]
    scored, judged = [], []

    def sampler(queries, uniforms, temperature):
        drawn = [(ended, True), (cut, False)]
        return [Episode(tuple(q), tuple(r), done) for q, (r, done) in zip(queries, drawn, strict=True)]

    def reward(prompts, episodes):
        scored.extend(zip(prompts, episodes, strict=True))
        return [0.25, -0.5]

    def judge(row, response, finished):
        judged.append((row, response, finished))
        likert = 2 + 3 * finished
        return SimpleNamespace(likert=likert, as_dict=lambda: {"likert": likert, "opinion": not finished})

    monkeypatch.setattr("align.evaluate.policies.make_sampler", lambda *args: sampler)
    prompts = [Prompt("Name a pet.", {"id": 7, "source": "web"}), Prompt("Say no")]
    setting = Setting(tiny_codec, prompts, policy, reward, judge, 9, batch_size=2, seed=0)
    rows = answer(policy, setting, 1.0, Runtime(seed=0), few_shot=[("Name a bird.", "a crow")])
    plain = [tuple(query) for query in tiny_codec.prompts([prompt.prompt for prompt in prompts])]
    assert scored == [
        (prompts[0], Episode(plain[0], tuple(tiny_codec.response("a cat")), True)),
        (prompts[1], Episode(plain[1], tuple(cut), False)),
    ]
    assert judged == [
        ({"prompt": "Name a pet.", "id": 7, "source": "web"}, "a cat", True),
        ({"prompt": "Say no"}, "a dog", False),
    ]
    told = [(row["proxy"], row["likert"], row["fields"], row["finished"]) for row in rows]
    assert told == [(0.25, 5, {"opinion": False}, True), (-0.5, 2, {"opinion": True}, False)]


def test_an_answer_is_as_long_as_its_tokens():
    setting = SimpleNamespace(codec=SimpleNamespace(decode=lambda ids: " a crow, a cat and a dog "), judge=None)
    row = record(Prompt("Name a pet."), Episode((5,), (7, 8, 9, 1), True), setting)
    assert row["response_tokens"] == 4 and row["response"] == "a crow, a cat and a dog"


def test_a_reward_function_reads_the_columns_of_the_rankings(tiny_codec):
    """Here it weighs the characters of a completion by its ranking's column."""

    def reward(prompts, episodes):
        texts = [tiny_codec.decode(episode.response) for episode in episodes]
        return [prompt.columns["weight"] * len(text) for prompt, text in zip(prompts, texts, strict=True)]

    rankings = [
        Ranking("p", ("a", "bbb"), (0, 1), "ann", {"weight": 2}),
        Ranking("q", ("cc", "d"), (1, 0), None, {"weight": 5}),
    ]
    setting = SimpleNamespace(reward=reward, codec=tiny_codec)
    assert scored(rankings, setting) == [(rankings[0], [2, 6]), (rankings[1], [10, 5])]


def test_the_judge_is_told_which_completions_ended():
    asked = []

    def judge(row, text, finished):
        asked.append((row, text, finished))
        return SimpleNamespace(likert={"yes": 6, "no, beca": 3}[text])

    setting = SimpleNamespace(judge=judge)
    ends = {"source": "web", "finished": [True, False]}
    assert judged([Ranking("ok?", ("yes", "no, beca"), (1, 2), "ann", ends)], setting) == [[6, 3]]
    row = {"prompt": "ok?", "source": "web", "finished": [True, False]}
    assert asked == [(row, "yes", True), (row, "no, beca", False)]
    judged([Ranking("ok?", ("no, beca", "yes"), (2, 1))], setting)  # of people, who are not asked that
    assert asked[2:] == [({"prompt": "ok?"}, "no, beca", True), ({"prompt": "ok?"}, "yes", True)]


def test_few_shot_examples_are_text_and_leave_room(tiny_llama, tiny_codec):
    talk = Demonstration("q", ({"role": "assistant", "content": "a"},))
    with pytest.raises(UserError, match="few_shot_file: row 2 is a conversation; give its prompt"):
        few_shot_examples([Demonstration("q", "a"), talk])
    examples = few_shot_examples([Demonstration("q", "a")])
    assert examples == [("q", "a")]
    tiny_llama.resize_token_embeddings(len(tiny_codec.tokenizer))
    policy = Policy(tiny_llama.eval())
    prompts, longest = [Prompt("Say no")], len(tiny_codec.few_shot(examples, ["Say no"])[0]) + 2
    for context in (longest, longest - 1):
        setting = Setting(tiny_codec, prompts, policy, lambda p, e: [0.0], None, 2, 1, seed=0, context=context)
        refused = pytest.raises(UserError, match=f"take {longest} tokens of {context}")
        with nullcontext() if context == longest else refused:
            answer(policy, setting, 1.0, Runtime(seed=0), examples)


def test_scores_that_are_no_numbers_stop_evaluation_where_they_come(tiny_llama, tiny_codec):
    tiny_llama.resize_token_embeddings(len(tiny_codec.tokenizer))
    policy = Policy(tiny_llama.eval())
    setting = Setting(tiny_codec, [Prompt("Say no")], policy, lambda p, e: [math.nan], None, 2, 1, seed=0)
    with pytest.raises(UserError, match="reward_model_path: gives scores that are NaN"):
        answer(policy, setting, 1.0, Runtime(seed=0))
