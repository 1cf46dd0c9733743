"""align/value_head.py: the value head as a cross-validated ridge regression, against numpy on the states themselves."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

import align.runtime
from align.config import VALUE_FOLDS, ModelTerm, PPOConfig
from align.errors import UserError
from align.learn import load_inputs
from align.lora import WithoutAdapter, add_adapter
from align.models import load_scalar_model
from align.runtime import Runtime
from align.types import Rollout
from align.value_head import RIDGES, fit_value_head, fits, solve

GAMMA, LAM = 0.9, 0.8


@pytest.fixture(scope="module")
def runtime():
    return Runtime(seed=0)


@pytest.fixture
def value_model(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    torch.manual_seed(2)
    model = load_scalar_model(str(tmp_path), fresh_head=True).eval()
    with torch.no_grad():
        model.head.bias.fill_(5.0)
    return model


def config_of(**changes) -> PPOConfig:
    values = {
        "gamma": GAMMA,
        "lam": LAM,
        "per_device_rollout_batch_size": 3,
        "whiten_advantages": False,
        "value_head_init": "fitted",
    } | changes
    return PPOConfig(output_dir="out", model_name_or_path="m", reward=(ModelTerm("r"),), ptx_coef=0.0, **values)


def episodes(count: int, rewarded=lambda ids: torch.randn(())) -> Rollout:
    """Random episodes of unlike lengths; the last token's reward is `rewarded(its row)`."""
    generator = torch.Generator().manual_seed(4)
    queries, responses = 1 + torch.arange(count) % 3, 1 + torch.arange(count) % 4
    width, longest = int((queries + responses).max()), int(responses.max())
    ids = torch.randint(2, 64, (count, width), generator=generator)
    mask = torch.arange(longest) < responses[:, None]
    rewards = torch.where(mask, 0.1 * torch.randn(mask.shape, generator=generator), 0.0)
    for i in range(count):
        rewards[i, responses[i] - 1] += rewarded(ids[i, : queries[i] + responses[i]])
    zeros = torch.zeros(mask.shape)
    return Rollout(
        input_ids=ids, query_lengths=queries, response_lengths=responses, finished=torch.ones(count, dtype=torch.bool),
        response_mask=mask, logprobs=zeros, ref_logprobs=zeros, values=torch.where(mask, 5.0, 0.0),
        scores=torch.zeros(count), raw_scores=torch.zeros(count), rewards=rewards, advantages=zeros, returns=zeros,
    )  # fmt: skip


def states_and_returns(rollout: Rollout, model) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each episode, by transformers' own forward and a loop: the states before its tokens and their returns."""
    found = []
    for i in range(len(rollout)):
        query, response = int(rollout.query_lengths[i]), int(rollout.response_lengths[i])
        with torch.no_grad():
            hidden = model.inner.model(input_ids=rollout.input_ids[i : i + 1, : query + response]).last_hidden_state[0]
        returns, ahead = np.zeros(response), 0.0
        for t in reversed(range(response)):
            ahead = float(rollout.rewards[i, t]) + GAMMA * ahead
            returns[t] = ahead
        found.append((hidden[query - 1 : query + response - 1].double().numpy(), returns))
    return found


def ridge_by_rows(features: np.ndarray, targets: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """Least squares with the ridge as d more rows, which pull on the weights alone."""
    scale = np.sqrt(ridge * features.var(0).mean() * len(features))
    centred = np.concatenate([features - features.mean(0), scale * np.eye(features.shape[1])])
    wanted = np.concatenate([targets - targets.mean(), np.zeros(features.shape[1])])
    weight = np.linalg.lstsq(centred, wanted, rcond=None)[0]
    return weight, targets.mean() - features.mean(0) @ weight


def by_loop(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, list[tuple[np.ndarray, float]]]:
    """Cross-validated over whole episodes: the best ridge's error a token, its fits without each fold and on all."""
    join = lambda chosen: (np.concatenate([x for x, _ in chosen]), np.concatenate([y for _, y in chosen]))  # noqa: E731
    tried = []
    for ridge in RIDGES:
        each, squares = [], []
        for fold in range(VALUE_FOLDS):
            each.append(ridge_by_rows(*join([p for i, p in enumerate(parts) if i % VALUE_FOLDS != fold]), ridge))
            squares += [(y - x @ each[-1][0] - each[-1][1]) ** 2 for x, y in parts[fold::VALUE_FOLDS]]
        tried.append((float(np.concatenate(squares).mean()), [*each, ridge_by_rows(*join(parts), ridge)]))
    return min(tried, key=lambda one: one[0])


def test_two_points_have_the_line_that_a_ridge_bends():
    """x 0, 2 and y 1, 5: variance 1, covariance 2, so the slope is 2 / (1 + ridge) through the means (1, 3)."""
    table = torch.tensor([[0.0, 1, 1], [2, 1, 5]], dtype=torch.float64)
    weights, biases = solve(table.T @ table, (0.0, 1.0, 3.0))
    assert weights[:, 0].tolist() == pytest.approx([2.0, 1.0, 0.5])
    assert biases.tolist() == pytest.approx([1.0, 2.0, 2.5])


def test_states_that_never_vary_leave_the_mean():
    table = torch.tensor([[3.0, 1, 1], [3, 1, 5]], dtype=torch.float64)
    weights, biases = solve(table.T @ table, (0.1,))
    assert (float(weights), float(biases)) == (0.0, 3.0)


@pytest.mark.parametrize("copies", [1, 6])
def test_the_head_is_that_of_a_loop_over_episodes(value_model, runtime, copies):
    """Returns that the states tell (a planted head) and returns that they do not; both as numpy finds them."""
    planted = torch.randn(value_model.head.in_features, generator=torch.Generator().manual_seed(1))

    def told(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return value_model.inner.model(input_ids=ids[None, :1]).last_hidden_state[0, 0] @ planted

    rollout = episodes(7 * copies, *([told] if copies > 1 else []))
    parts = states_and_returns(rollout, value_model)
    error, each = by_loop(parts)
    weight, bias = each[-1]
    fitted, numbers = fit_value_head(rollout, value_model, config_of(), runtime)
    assert np.abs(value_model.head.weight.detach().numpy()[0] - weight).max() < 1e-5
    assert value_model.head.bias.item() == pytest.approx(bias, abs=1e-5)

    returns = np.concatenate([y for _, y in parts])
    assert numbers["value_head/fitted"] == pytest.approx(1 - error / returns.var(), abs=1e-5)
    off = ((returns - 5.0) ** 2).mean()
    assert numbers["value_head/before"] == pytest.approx(1 - off / returns.var(), rel=1e-5)
    assert (numbers["value_head/fitted"] > 0.1) == (copies > 1)
    for i, (x, _) in enumerate(parts):
        assert fitted.values[i, : len(x)].numpy() == pytest.approx(x @ weight + bias, abs=1e-5)
    assert bool((fitted.values[~rollout.response_mask] == 0).all())


def test_advantages_come_of_values_that_did_not_see_their_episode(value_model, runtime):
    rollout = episodes(8)
    _, each = by_loop(parts := states_and_returns(rollout, value_model))
    fitted, _ = fit_value_head(rollout, value_model, config_of(), runtime)
    for i, (states, _) in enumerate(parts):
        weight, bias = each[i % VALUE_FOLDS]
        ahead, following = 0.0, 0.0
        for t in reversed(range(len(states))):
            value = float(states[t] @ weight + bias)
            ahead = float(rollout.rewards[i, t]) + GAMMA * following - value + GAMMA * LAM * ahead
            following = value
            assert float(fitted.advantages[i, t]) == pytest.approx(ahead, abs=1e-5)
            assert float(fitted.returns[i, t]) == pytest.approx(ahead + value, abs=1e-5)
    changed = {"values", "advantages", "returns"}
    for field in dataclasses.fields(Rollout):
        same = getattr(fitted, field.name) is getattr(rollout, field.name)
        assert same == (field.name not in changed), field.name


def test_what_is_not_finite_stops_before_the_fit(value_model, runtime, tmp_path):
    rollout = episodes(6)
    rollout.values[2, 0] = float("nan")
    with pytest.raises(UserError, match="values is nan.*its batch is in"):
        fit_value_head(rollout, value_model, dataclasses.replace(config_of(), output_dir=str(tmp_path)), runtime)
    assert (tmp_path / "stopped-0" / "batch.json").exists()


def test_how_rows_are_cut_into_batches_moves_nothing(value_model, runtime):
    rollout = episodes(9)
    other = copy.deepcopy(value_model)
    one, _ = fit_value_head(rollout, value_model, config_of(), runtime)
    small = config_of(per_device_rollout_batch_size=64, microbatch_tokens=5)
    two, _ = fit_value_head(rollout, other, small, runtime)
    assert torch.allclose(one.values, two.values, atol=1e-5)
    assert torch.allclose(value_model.head.weight, other.head.weight, atol=1e-5)


def test_with_lora_the_reward_keeps_its_head(value_model, runtime):
    add_adapter(value_model, config_of())
    reward = WithoutAdapter(value_model)
    kept = reward.adapted.inner.score.original_module.weight.clone()
    rollout = episodes(6)
    fitted, _ = fit_value_head(rollout, value_model, config_of(), runtime)
    with reward.cached_casts():
        assert torch.equal(reward.adapted.head.weight, kept)
    assert not torch.equal(value_model.head.weight, kept)
    assert float(fitted.values[rollout.response_mask].mean()) < 2  # the returns' mean, not the bias of 5
    assert value_model.head.weight.requires_grad


def test_whitened_rewards_are_what_the_values_learn(value_model, runtime):
    rollout = episodes(8)
    fitted, _ = fit_value_head(rollout, value_model, config_of(whiten_rewards=True, gamma=1.0), runtime)
    rewards = rollout.rewards[rollout.response_mask].double().numpy()
    mean, scale = rewards.mean(), rewards.std()
    rows = [rollout.rewards[i, : int(n)].double().numpy() for i, n in enumerate(rollout.response_lengths)]
    sums = np.concatenate([np.cumsum((row[::-1] - mean) / scale + mean) for row in rows])
    # An intercept makes the mean of what is predicted the mean of what was to be predicted.
    assert float(fitted.values[rollout.response_mask].mean()) == pytest.approx(sums.mean(), abs=1e-4)


def test_folds_without_tokens_are_no_error():
    products = torch.zeros(VALUE_FOLDS, 3, 3, dtype=torch.float64)
    for i in range(VALUE_FOLDS - 1):
        table = torch.tensor([[float(i), 1, 2.0 * i], [i + 0.5, 1, 2 * i + 1.0]], dtype=torch.float64)
        products[i] = table.T @ table
    weights, biases, error = fits(products)
    assert weights.shape == (VALUE_FOLDS + 1, 1) and error < 1e-4  # y = 2 x
    assert float(weights[-1, 0]) == pytest.approx(2, abs=0.01)


def test_a_head_that_lies_in_parts_is_refused(monkeypatch):
    """Before the output folder is touched: load_inputs reads nothing first."""
    monkeypatch.setattr(align.runtime, "sharding", lambda: True)
    with pytest.raises(UserError, match="value_head_init: fitted.*use kept"):
        load_inputs(config_of())


def test_returns_that_are_all_alike_have_no_variance_to_explain(value_model, runtime, capsys):
    rollout = episodes(10)
    rewards = torch.zeros(rollout.rewards.shape)
    rewards[torch.arange(10), rollout.response_lengths - 1] = -1.0  # no answer ended
    flat = dataclasses.replace(rollout, rewards=rewards)
    fitted, numbers = fit_value_head(flat, value_model, config_of(gamma=1.0), runtime)
    assert numbers == {} and "all returns of the first rollout are alike" in capsys.readouterr().out
    assert torch.allclose(fitted.values[fitted.response_mask], torch.tensor(-1.0), atol=1e-4)
