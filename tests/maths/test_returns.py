"""Rewards, advantages and returns against hand arithmetic and scalar float64 loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.maths.returns import gae, token_rewards

JUNK = [float("nan"), float("inf"), 1e30]
LENGTHS = [4, 1, 6, 3]


def mask_of(lengths, width=6):
    return torch.tensor([[r < n for r in range(width)] for n in lengths])


def advantages_by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over l of (gamma * lam)^l * delta_{t+l}: the definition (Schulman et al. 2016), not the recursion."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]


def test_P7_golden():
    # beta 0.5, kl 2, -4, 6, score 10: -1, +2, -3 + 10; the second response ends at its first token: -0.5 + 20
    kl = torch.tensor([[2.0, -4.0, 6.0], [1.0, 99.0, 99.0]])
    got = token_rewards(torch.tensor([10.0, 20.0]), kl, mask_of([3, 1], 3), 0.5)
    assert got.tolist() == [[-1, 2, 7], [19.5, 0, 0]]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(0, 2), st.integers(0, 999))
def test_P7_rewards_sum_to_score_minus_beta_kl(lengths, kl_coef, seed):
    generator = torch.Generator().manual_seed(seed)
    kl = torch.randn(len(lengths), 6, generator=generator, dtype=torch.float64)
    scores = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    got = token_rewards(scores, kl, mask_of(lengths), kl_coef)
    for i, n in enumerate(lengths):
        assert sum(got[i].tolist()) == pytest.approx(scores[i].item() - kl_coef * sum(kl[i, :n].tolist()), abs=1e-9)


def test_P7_score_sits_on_one_position():
    got = token_rewards(torch.ones(4), torch.zeros(4, 6), mask_of(LENGTHS), 0.5)
    assert got.count_nonzero().item() == 4
    assert got.argmax(1).tolist() == [n - 1 for n in LENGTHS]


@pytest.mark.parametrize("junk", JUNK)
def test_P7_junk_after_the_end_changes_nothing(junk):
    mask = mask_of(LENGTHS)
    kl, scores = torch.randn(4, 6), torch.randn(4)
    dirty = torch.where(mask, kl, torch.full_like(kl, junk))
    assert torch.equal(token_rewards(scores, kl, mask, 0.1), token_rewards(scores, dirty, mask, 0.1))


def test_an_empty_response_is_refused():
    with pytest.raises(AssertionError, match="at least one token"):
        token_rewards(torch.ones(2), torch.zeros(2, 3), mask_of([2, 0], 3), 0.1)


def test_P9_golden():
    # gamma 1, lambda 0.95, values 0.5 each, reward 1 at the end.
    # deltas: 0 + 0.5 - 0.5 = 0, 0, 1 + 0 - 0.5 = 0.5; A_2 = 0.5, A_1 = 0.475, A_0 = 0.45125
    advantages, returns = gae(torch.tensor([[0.0, 0, 1]]), torch.full((1, 3), 0.5), mask_of([3], 3), 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.45125, 0.475, 0.5])
    assert returns[0].tolist() == pytest.approx([0.95125, 0.975, 1.0])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_P9_ragged_rows_against_the_definition(gamma, lam):
    rewards, values = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    mask = mask_of(LENGTHS)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(LENGTHS):
        r, v = rewards[i, :n].tolist(), values[i, :n].tolist()
        expected = advantages_by_definition(r, v, gamma, lam)
        assert advantages[i, :n].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[i, :n].tolist() == pytest.approx([a + b for a, b in zip(expected, v, strict=True)], abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_P9_lambda_gamma_1_is_reward_to_go_minus_value():
    rewards, values = torch.randn(4, 6), torch.randn(4, 6)
    advantages, returns = gae(rewards, values, mask_of(LENGTHS), 1.0, 1.0)
    for i, n in enumerate(LENGTHS):
        to_go = [sum(rewards[i, t:n].tolist()) for t in range(n)]
        assert returns[i, :n].tolist() == pytest.approx(to_go, abs=1e-5)
        expected = [g - v for g, v in zip(to_go, values[i, :n].tolist(), strict=True)]
        assert advantages[i, :n].tolist() == pytest.approx(expected, abs=1e-5)


def test_P9_lambda_0_is_the_td_error_and_the_last_bootstrap_is_0():
    # row: r = 1, 2, v = 3, 4, gamma 0.5: 1 + 0.5 * 4 - 3 = 0; 2 + 0.5 * 0 - 4 = -2, whatever stands in column 2
    rewards, values = torch.tensor([[1.0, 2.0, 50.0]]), torch.tensor([[3.0, 4.0, 60.0]])
    advantages, returns = gae(rewards, values, mask_of([2], 3), 0.5, 0.0)
    assert advantages[0].tolist() == [0, -2, 0]
    assert returns[0].tolist() == [3, 2, 0]


@pytest.mark.parametrize("junk", JUNK)
def test_junk_after_the_end_changes_nothing(junk):
    mask = mask_of(LENGTHS)
    rewards, values = torch.randn(4, 6), torch.randn(4, 6)
    dirty = [torch.where(mask, x, torch.full_like(x, junk)) for x in (rewards, values)]
    for clean_out, dirty_out in zip(gae(rewards, values, mask, 0.99, 0.95), gae(*dirty, mask, 0.99, 0.95), strict=True):
        assert torch.equal(clean_out, dirty_out)


def test_rows_do_not_touch_each_other():
    mask = mask_of(LENGTHS)
    rewards, values = torch.randn(4, 6), torch.randn(4, 6)
    together = gae(rewards, values, mask, 1.0, 0.95)
    for i in range(4):
        alone = gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], 1.0, 0.95)
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])


def test_the_callers_tensors_are_left_alone():
    rewards, values, kl = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6)
    before = [x.clone() for x in (rewards, values, kl)]
    gae(rewards, values, mask_of(LENGTHS), 1.0, 0.95)
    token_rewards(torch.randn(4), kl, mask_of(LENGTHS), 0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, (rewards, values, kl), strict=True))
