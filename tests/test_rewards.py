"""align/rewards.py: a model, a function, a sum of them, and what is refused."""

import asyncio
import math
import signal
import sys
import threading
import types

import pytest
import torch

import align.rewards
from align.errors import UserError
from align.judge import GoldJudge
from align.models import ScalarModel, load_scalar_model
from align.rewards import (
    FunctionReward,
    ModelReward,
    RewardSum,
    Term,
    combine,
    deviations,
)
from align.types import Episode, Prompt, contents, pad_rows
from align.user_code import import_function

EPISODES = [Episode((5, 6), (7, 1), True), Episode((9,), (10, 11, 12), False), Episode((30, 31, 32), (1,), True)]
PROMPTS = [Prompt("a", {"id": "x"}), Prompt("b", {"id": "y", "extra": 3}), Prompt("c")]


@pytest.fixture
def functions(monkeypatch):
    module = types.ModuleType("some_rewards")
    monkeypatch.setitem(sys.modules, "some_rewards", module)
    return module


@pytest.mark.parametrize("attention", [None, "eager"])
def test_R8_model_reward_reads_eos_also_behind_a_response_that_was_cut_off(tiny_llama, tmp_path, attention):
    tiny_llama.save_pretrained(tmp_path)
    model = load_scalar_model(str(tmp_path), attention, fresh_head=True).eval()
    for size in (1, 2, 8):
        scores = ModelReward(model, 0, 1, size)(PROMPTS, EPISODES)
        for episode, score in zip(EPISODES, scores, strict=True):
            with torch.no_grad():
                ids = torch.tensor([[*episode.query, *episode.response, *([] if episode.finished else [1])]])
                expected = float(model.head(model.inner.base_model(input_ids=ids).last_hidden_state[0, -1]))
            assert score == pytest.approx(expected, abs=1e-5)


def test_a_row_that_eos_would_lengthen_over_the_context_loses_its_first_token(tiny_llama, tmp_path):
    tiny_llama.config.max_position_embeddings = 4
    tiny_llama.save_pretrained(tmp_path)
    model = load_scalar_model(str(tmp_path), None, fresh_head=True).eval()
    full, cut = ModelReward(model, 0, 1, 1)([Prompt("b")] * 2, [EPISODES[1], Episode((10, 11), (12, 1), True)])
    assert full == pytest.approx(cut, abs=1e-6)  # 9 10 11 12 EOS


def test_a_row_of_exactly_the_context_is_not_cut(tiny_llama, tmp_path):
    tiny_llama.config.max_position_embeddings = 4
    tiny_llama.save_pretrained(tmp_path)
    reward = ModelReward(load_scalar_model(str(tmp_path), None, fresh_head=True).eval(), 0, 1, 8)
    reward(PROMPTS, [EPISODES[0], EPISODES[2], EPISODES[1]])  # 4, 4 and, with EOS, 5 tokens
    assert reward.notes == {"cut": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    "tokens, batches", [(None, [[5, 4, 4, 2]]), (8, [[2, 4], [4], [5]]), (3, [[2], [4], [4], [5]])]
)
def test_model_reward_reads_at_most_so_many_tokens_at_once(tiny_llama, tmp_path, monkeypatch, tokens, batches):
    tiny_llama.save_pretrained(tmp_path)
    model = load_scalar_model(str(tmp_path), None, fresh_head=True).eval()
    episodes, prompts = [*EPISODES, Episode((8,), (1,), True)], [*PROMPTS, Prompt("d")]
    expected = ModelReward(model, 0, 1, 1)(prompts, episodes)
    forward, read = ScalarModel.forward, []

    def spy(self, pack, at):
        read.append(sorted(row.length for row in pack.rows))
        return forward(self, pack, at)

    monkeypatch.setattr(ScalarModel, "forward", spy)
    assert ModelReward(model, 0, 1, 8, tokens)(prompts, episodes) == pytest.approx(expected, abs=1e-5)
    assert read == [sorted(batch) for batch in batches]


def test_function_reward_has_trls_signature(functions, tiny_codec):
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [len(text) for text in completions]

    functions.reward = reward
    episodes = [
        Episode(tuple(tiny_codec.prompt("hot")), tuple(tiny_codec.response(text)), True) for text in ("cold", "苹果")
    ]
    episodes.append(Episode((5,), tuple(tiny_codec.response("a bird")[:-1]), False))
    scores = FunctionReward("some_rewards:reward", tiny_codec)(PROMPTS, episodes)
    assert scores == [4.0, 2.0, 6.0] and all(isinstance(score, float) for score in scores)
    assert seen["prompts"] == ["a", "b", "c"] and seen["completions"] == ["cold", "苹果", "a bird"]
    assert seen["id"] == ["x", "y", None] and seen["extra"] == [None, 3, None]


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """Seconds slept between tries, none of them really."""
    slept: list[float] = []
    monkeypatch.setattr(align.rewards.time, "sleep", slept.append)
    return slept


def function_reward(codec, **limits) -> FunctionReward:
    return FunctionReward("some_rewards:reward", codec, "reward[1].function", **limits)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "returned 1 scores for 3 episodes"),
        (None, "returned NoneType that is no list of numbers"),
        ([1.0, None, 2.0], "returned list that is no list of numbers"),
        (["a", "b", "c"], "returned list that is no list of numbers"),
        ([1.0, math.nan, 2.0], "gave nan for prompt 'y'"),
        ([1.0, 2.0, math.inf], "gave inf for prompt 'number 2 of the batch'"),
    ],
)
def test_what_is_no_score_an_episode(functions, tiny_codec, returned, words):
    functions.reward = lambda prompts, completions, **columns: returned
    with pytest.raises(UserError, match=words) as error:
        function_reward(tiny_codec)(PROMPTS, EPISODES)
    assert str(error.value) == f"reward[1].function: some_rewards:reward {words}; mend the function"


def test_a_function_that_fails_is_called_again(functions, tiny_codec, naps, capsys):
    outcomes = [OSError("no route\nto host"), [1.0], [4, 5, 6], [7, 8, 9]]

    def reward(prompts, completions, **columns):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    functions.reward = reward
    scorer = function_reward(tiny_codec, retries=2)
    assert scorer(PROMPTS, EPISODES) == [4.0, 5.0, 6.0] and scorer.notes == {"failures": 2.0}
    assert naps == [1.0, 2.0]
    lines = capsys.readouterr().err.splitlines()
    name = "warning: reward[1].function: some_rewards:reward"
    assert lines == [
        f"{name} raised OSError: no route; failure 1, called again",
        f"{name} returned 1 scores for 3 episodes; failure 2, called again",
    ]
    assert scorer(PROMPTS, EPISODES) == [7.0, 8.0, 9.0] and scorer.notes == {"failures": 0.0}


def test_a_function_that_always_fails_is_named_after_the_limit(functions, tiny_codec, naps):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(1)
        return 1 / 0

    functions.reward = reward
    with pytest.raises(UserError) as error:
        function_reward(tiny_codec, retries=2)(PROMPTS, EPISODES)
    assert str(error.value) == (
        "reward[1].function: some_rewards:reward raised ZeroDivisionError: division by zero, the last of 3 tries; "
        "mend the function"
    )
    assert len(calls) == 3 and naps == [1.0, 2.0]


def test_a_function_that_hangs_is_left_behind_and_called_again(functions, tiny_codec, naps, capsys):
    released, calls = threading.Event(), []

    def reward(prompts, completions, **columns):
        calls.append(torch.is_grad_enabled())
        if len(calls) != 2:
            released.wait(30)
        return [1, 2, 3]

    functions.reward = reward
    try:
        scorer = function_reward(tiny_codec, timeout=1.0, retries=1)  # within which the second call must answer
        assert scorer(PROMPTS, EPISODES) == [1.0, 2.0, 3.0] and scorer.notes == {"failures": 1.0}
        assert "returned nothing within 1 s (reward_timeout); failure 1" in capsys.readouterr().err
        hasty = function_reward(tiny_codec, timeout=0.2, retries=1)
        with pytest.raises(UserError, match=r"returned nothing within 0.2 s \(reward_timeout\), the last of 2 tries"):
            hasty(PROMPTS, EPISODES)
        assert calls == [False] * 4, "no call builds a graph"
    finally:
        released.set()


def test_what_a_function_raises_in_its_thread_is_what_the_user_reads(functions, tiny_codec):
    functions.reward = lambda prompts, completions, **columns: {}["missing"]
    with pytest.raises(UserError, match="raised KeyError: 'missing'"):
        function_reward(tiny_codec, timeout=30)(PROMPTS, EPISODES)


def test_a_function_may_be_async(functions, tiny_codec):
    """What it keeps between calls belongs to one loop: a semaphore that had waiters, as a client's connections."""
    limit = asyncio.Semaphore(1)

    async def one(prompt: str) -> float:
        async with limit:
            await asyncio.sleep(0.001)
            return float(len(prompt))

    async def reward(prompts, completions, **columns):
        return await asyncio.gather(*map(one, prompts))

    functions.reward = reward
    scorers = [function_reward(tiny_codec, **limits) for limits in ({}, {"timeout": 30})]
    for _ in range(2):
        assert [scorer(PROMPTS, EPISODES) for scorer in scorers] == [[1.0, 1.0, 1.0]] * 2

    async def in_a_notebook():
        return scorers[0](PROMPTS, EPISODES)

    assert asyncio.run(in_a_notebook()) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("limits", [{"timeout": None}, {"timeout": 60.0}])
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_model_in_a_function_computes_in_float32_and_keeps_no_graph(functions, tiny_codec, limits, kind):
    """In whichever thread it is called: bfloat16 knows a score of 20 to 1/8 only."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 20.06)
    seen = []

    def plain(prompts, completions, **columns):
        out = model(torch.ones(len(prompts), 1))
        seen.append((out.dtype, out.requires_grad))
        return out[:, 0].tolist()

    async def waited(prompts, completions, **columns):
        return plain(prompts, completions)

    functions.reward = {"plain": plain, "async": waited}[kind]
    with torch.autocast("cpu", torch.bfloat16):
        assert function_reward(tiny_codec, **limits)(PROMPTS, EPISODES) == [pytest.approx(20.06)] * 3
    assert seen == [(torch.float32, False)]


def test_a_function_that_needs_the_main_thread_is_told_how_to_get_it(functions, tiny_codec):
    def reward(prompts, completions, **columns):
        before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, before)
        return [0.0] * len(prompts)

    functions.reward = reward
    with pytest.raises(UserError, match="main thread.*set reward_timeout: null"):
        function_reward(tiny_codec, timeout=30)(PROMPTS, EPISODES)
    assert function_reward(tiny_codec)(PROMPTS, EPISODES) == [0.0] * 3


def constant(*scores: float):
    return lambda prompts, episodes: list(scores)


def test_sum_is_weighted_and_its_terms_are_kept_apart():
    terms = [Term("a", 0.5, [constant(1.0, 2.0, 3.0)]), Term("b", 2.0, [constant(10.0, 0.0, -10.0)])]
    scored = RewardSum(terms)(PROMPTS, EPISODES)
    assert scored.total == [20.5, 1.0, -18.5]
    assert scored.parts == {"scores/a": [1.0, 2.0, 3.0], "scores/b": [10.0, 0.0, -10.0]}


def test_ensembles_by_hand():
    # Episode 1: 1, 3, 5, mean 3, variance (4 + 0 + 4) / 3. Episode 2: 0, 0, 6, mean 2, variance (4 + 4 + 16) / 3 = 8.
    members = [[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]]
    first, second = (8 / 3) ** 0.5, 8**0.5
    assert deviations(members) == pytest.approx([first, second])
    assert combine(members, "mean", 9.0) == [3.0, 2.0]
    assert combine(members, "min", 9.0) == [1.0, 0.0]
    assert combine(members, "mean_minus_std", 0.5) == pytest.approx([3 - first / 2, 2 - second / 2])
    assert combine(members[:1], "mean_minus_std", 5.0) == [1.0, 0.0], "one model does not deviate"


def test_an_ensemble_in_the_sum():
    members = [constant(1.0, 0.0, 2.0), constant(3.0, 0.0, -2.0)]
    scored = RewardSum([Term("e", 10.0, members, "min"), Term("f", 1.0, [constant(1.0, 1.0, 1.0)])])(PROMPTS, EPISODES)
    assert scored.total == [11.0, 1.0, -19.0]
    assert scored.parts["scores/e"] == [1.0, 0.0, -2.0] and scored.parts["deviation/e"] == [1.0, 0.0, 2.0]
    assert "deviation/f" not in scored.parts


def test_failed_tries_reach_the_log(functions, tiny_codec, naps):
    outcomes = [[], [1, 2, 3]]
    functions.reward = lambda prompts, completions, **columns: outcomes.pop(0)
    terms = [Term("f", 1.0, [function_reward(tiny_codec, retries=1)])]
    assert RewardSum(terms)(PROMPTS, EPISODES).parts["failures/f"] == [1.0, 1.0, 1.0]


def test_a_note_of_one_model_is_shared_among_its_ensemble():
    first, second = (constant(1.0, 2.0, 3.0) for _ in range(2))
    first.notes = {"cut": 0.5}  # the other reads any length and notes nothing: (0.5 + 0) / 2
    assert RewardSum([Term("e", 1.0, [first, second])])(PROMPTS, EPISODES).parts["cut/e"] == [0.25, 0.25, 0.25]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_names_its_term_and_prompt(bad):
    good = constant(1.0, 2.0, 3.0)
    terms = [Term("a", 1.0, [good]), Term("b", 0.0, [good, constant(1.0, bad, bad)], "min")]
    with pytest.raises(UserError, match=rf"reward: b gave {bad} for prompt 'y'"):
        RewardSum(terms)(PROMPTS, EPISODES)


@pytest.mark.parametrize("path", ["math", "no.such.module:f", "math:no_such_name", ":f", "math:"])
def test_import_paths_that_lead_nowhere(path):
    with pytest.raises(UserError, match="reward_function: ") as error:
        import_function(path, "reward_function")
    assert "\n" not in str(error.value)


def test_gold_judge_reads_each_answer_alone_and_gives_the_mean(functions, tiny_codec):
    asked = []

    def judge(row, response, finished):
        asked.append((row, response, finished))
        return types.SimpleNamespace(likert={"cold": 2, "a bird": 5}[response])

    functions.judge = judge
    prompts = [Prompt("hot", {"id": "x"}), Prompt("name one", {"extra": 3})]
    queries = tiny_codec.prompts([prompt.prompt for prompt in prompts])
    responses = [tiny_codec.response("cold"), tiny_codec.response("a bird")[:-1]]
    rollout = types.SimpleNamespace(
        input_ids=pad_rows([[*q, *r] for q, r in zip(queries, responses, strict=True)], tiny_codec.pad_id),
        query_lengths=torch.tensor([len(query) for query in queries]),
        response_lengths=torch.tensor([len(response) for response in responses]),
        finished=torch.tensor([True, False]),
    )
    scores = GoldJudge("some_rewards:judge", tiny_codec).score(prompts, rollout)
    assert scores == {"eval/gold": 3.5}, "(2 + 5) / 2"
    expected = [({"prompt": "hot", "id": "x"}, "cold", True), ({"prompt": "name one", "extra": 3}, "a bird", False)]
    assert asked == expected and [type(finished) for *_, finished in asked] == [bool, bool]
    assert GoldJudge(None, tiny_codec).score(prompts, rollout) == {}


def test_a_conversation_in_plain_text_has_blank_lines_between_its_messages():
    talk = ({"role": "user", "content": "hot?"}, {"role": "assistant", "content": "cold"})
    assert contents(talk) == "hot?\n\ncold" and contents("hot?") == "hot?"


def test_import_path():
    assert import_function("math:sqrt", "reward_function") is math.sqrt
