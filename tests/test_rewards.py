"""align/rewards.py: a model, a function, a sum of them, and what is refused."""

import math
import sys
import types

import pytest
import torch

from align.errors import UserError
from align.models import ScalarModel, load_scalar_model
from align.rewards import FunctionReward, ModelReward, SumReward, import_function, require_finite
from align.types import Episode, Prompt

EPISODES = [Episode((5, 6), (7, 1), True), Episode((9,), (10, 11, 12), False), Episode((30, 31, 32), (1,), True)]
PROMPTS = [Prompt("a", {"id": "x"}), Prompt("b", {"id": "y", "extra": 3}), Prompt("c")]


@pytest.fixture
def functions(monkeypatch):
    module = types.ModuleType("some_rewards")
    monkeypatch.setitem(sys.modules, "some_rewards", module)
    return module


@pytest.mark.parametrize("attention", [None, "eager"])
def test_R8_model_reward_reads_the_last_sampled_token(tiny_llama, tmp_path, attention):
    tiny_llama.save_pretrained(tmp_path)
    model = load_scalar_model(str(tmp_path), attention, fresh_head=True).eval()
    for size in (1, 2, 8):
        scores = ModelReward(model, 0, size)(PROMPTS, EPISODES)
        for episode, score in zip(EPISODES, scores, strict=True):
            with torch.no_grad():
                ids = torch.tensor([[*episode.query, *episode.response]])
                expected = float(model.head(model.inner.base_model(input_ids=ids).last_hidden_state[0, -1]))
            assert score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tokens, batches", [(None, [[4, 4, 4, 2]]), (8, [[2, 4], [4, 4]]), (3, [[2], [4], [4], [4]])])
def test_model_reward_reads_at_most_so_many_tokens_at_once(tiny_llama, tmp_path, monkeypatch, tokens, batches):
    tiny_llama.save_pretrained(tmp_path)
    model = load_scalar_model(str(tmp_path), None, fresh_head=True).eval()
    episodes, prompts = [*EPISODES, Episode((8,), (1,), True)], [*PROMPTS, Prompt("d")]
    expected = ModelReward(model, 0, 1)(prompts, episodes)
    forward, read = ScalarModel.forward, []

    def spy(self, pack, at):
        read.append(sorted(row.length for row in pack.rows))
        return forward(self, pack, at)

    monkeypatch.setattr(ScalarModel, "forward", spy)
    assert ModelReward(model, 0, 8, tokens)(prompts, episodes) == pytest.approx(expected, abs=1e-5)
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


def test_function_reward_that_miscounts(functions, tiny_codec):
    functions.reward = lambda prompts, completions, **columns: [1.0]
    with pytest.raises(UserError, match="returned 1 scores for 3 episodes"):
        FunctionReward("some_rewards:reward", tiny_codec)(PROMPTS, EPISODES)


def test_sum_is_weighted():
    parts = [(lambda prompts, episodes: [1.0, 2.0, 3.0], 0.5), (lambda prompts, episodes: [10.0, 0.0, -10.0], 2.0)]
    assert SumReward(parts)(PROMPTS, EPISODES) == [20.5, 1.0, -18.5]
    assert SumReward(parts[:1])(PROMPTS, EPISODES) == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_names_its_prompt(bad):
    assert require_finite([1.0, 2.0, 3.0], PROMPTS) == [1.0, 2.0, 3.0]
    with pytest.raises(UserError, match=rf"reward: returned {bad} for prompt 'y'"):
        require_finite([1.0, bad, bad], PROMPTS)


@pytest.mark.parametrize("path", ["math", "no.such.module:f", "math:no_such_name", ":f", "math:"])
def test_import_paths_that_lead_nowhere(path):
    with pytest.raises(UserError, match="reward_function: ") as error:
        import_function(path, "reward_function")
    assert "\n" not in str(error.value)


def test_import_path():
    assert import_function("math:sqrt", "reward_function") is math.sqrt
