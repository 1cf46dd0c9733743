"""Ranking, policy and value losses against hand arithmetic, Python loops and torch."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, mse_loss

from align.maths.losses import policy_loss, ranking_loss, value_loss
from align.maths.reduce import whiten

JUNK = [float("nan"), float("inf"), -float("inf"), 1e30]
LN2 = math.log(2)


def rank(scores, ranks):
    """ranking_loss of one prompt whose K completions are all real."""
    scores = torch.tensor([scores], dtype=torch.float32, requires_grad=True)
    loss, stats = ranking_loss(scores, torch.tensor([ranks]).float(), torch.ones_like(scores, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, scores)
    return loss.item(), gradient[0], {name: value.item() for name, value in stats.items()}


def by_pairs(scores: list[float], ranks: list[float]) -> float:
    """Paper Eq. 1 as a loop over C(K, 2) pairs in float64."""
    total, pairs = 0.0, list(combinations(range(len(scores)), 2))
    for i, j in pairs:
        if ranks[i] != ranks[j]:
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            total += math.log1p(math.exp(-(scores[better] - scores[worse])))
    return total / len(pairs)


# Ranking loss


def test_ranking_golden():
    # gaps 1, 1, 2: -log sigmoid = 0.313262, 0.313262, 0.126928; their mean is 0.251151
    loss, _, stats = rank([2.0, 1.0, 0.0], [1, 2, 3])
    assert loss == pytest.approx(0.251151, abs=1e-6)
    assert stats == {"pairs": 3, "correct": 3, "margin": 4}
    # the worst order: 1.313262, 1.313262, 2.126928; mean 1.584484
    loss, _, stats = rank([2.0, 1.0, 0.0], [3, 2, 1])
    assert loss == pytest.approx(1.584484, abs=1e-6)
    assert stats == {"pairs": 3, "correct": 0, "margin": -4}


def test_ranking_of_two_is_binary_cross_entropy():
    scores = torch.randn(6, 2)
    ranks = torch.tensor([[1.0, 2.0]]).expand(6, -1)
    loss, _ = ranking_loss(scores, ranks, torch.ones(6, 2, dtype=torch.bool))
    expected = binary_cross_entropy_with_logits(scores[:, 0] - scores[:, 1], torch.ones(6), reduction="sum")
    torch.testing.assert_close(loss, expected)


@given(st.lists(st.tuples(st.floats(-8, 8, width=32), st.integers(1, 4)), min_size=2, max_size=9))
def test_ranking_against_a_loop(rows):
    scores, ranks = [s for s, _ in rows], [r for _, r in rows]
    assert rank(scores, ranks)[0] == pytest.approx(by_pairs(scores, ranks), abs=2e-5)


def test_R1_gradient_is_the_mean_of_the_pairwise_gradients():
    scores, ranks = [0.3, -1.2, 2.0, 0.7], [2, 4, 3, 1]
    expected = torch.zeros(4, dtype=torch.float64)
    pairs = list(combinations(range(4), 2))
    for i, j in pairs:
        better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
        leaf = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
        (-logsigmoid(leaf[better] - leaf[worse])).backward()
        expected += leaf.grad / len(pairs)
    torch.testing.assert_close(rank(scores, ranks)[1].double(), expected, atol=1e-6, rtol=0)


def test_R3_each_prompt_weighs_the_same_whatever_its_k():
    """K = 4 and K = 9 in one padded batch: each contributes half of the batch loss."""
    scores = torch.randn(2, 9, requires_grad=True)
    ranks = torch.stack([torch.randperm(9), torch.randperm(9)]).float()
    mask = torch.tensor([[True] * 4 + [False] * 5, [True] * 9])
    loss, _ = ranking_loss(scores, ranks, mask)
    parts = [by_pairs(scores[0, :4].tolist(), ranks[0, :4].tolist()), by_pairs(scores[1].tolist(), ranks[1].tolist())]
    assert loss.item() / 2 == pytest.approx((parts[0] + parts[1]) / 2, abs=1e-6)
    (both,) = torch.autograd.grad(loss, scores)
    (alone,) = torch.autograd.grad(ranking_loss(scores[:1, :4], ranks[:1, :4], mask[:1, :4])[0], scores)
    torch.testing.assert_close(both[0], alone[0])
    # Equal scores, no ties: ln 2 a prompt, though one has 6 pairs and the other 36.
    flat, _ = ranking_loss(torch.zeros(2, 9), ranks, mask)
    assert flat.item() == pytest.approx(2 * LN2)


@given(st.floats(-50, 50))
def test_R4_a_constant_added_to_all_scores_changes_nothing(constant):
    scores, ranks = [0.3, -1.2, 2.0, 0.7], [2, 4, 3, 1]
    loss, gradient, _ = rank(scores, ranks)
    moved_loss, moved_gradient, _ = rank([s + constant for s in scores], ranks)
    assert moved_loss == pytest.approx(loss, abs=1e-4)
    torch.testing.assert_close(moved_gradient, gradient, atol=1e-4, rtol=0)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-6)


def test_R5_equal_scores_cost_ln_2_and_swapping_negates_the_gradient():
    for k in (2, 4, 9):
        assert rank([1.5] * k, list(range(k)))[0] == pytest.approx(LN2)
    # at gap 0 the gradient is -sigmoid(0) = -1/2 for the preferred one
    loss, gradient, stats = rank([0.0, 0.0], [1, 2])
    assert gradient.tolist() == [-0.5, 0.5]
    assert rank([0.0, 0.0], [2, 1])[1].tolist() == [0.5, -0.5]
    assert stats["correct"] == 0.5  # equal scores order the pair half rightly


def test_R6_tied_pairs_contribute_nothing():
    # ranks 1, 1, 2, scores 0: two of three pairs count, ln 2 each, over C(3, 2) = 3
    loss, gradient, stats = rank([0.0, 0.0, 0.0], [1, 1, 2])
    assert loss == pytest.approx(2 / 3 * LN2)
    assert gradient.tolist() == pytest.approx([-1 / 6, -1 / 6, 1 / 3])
    assert stats["pairs"] == 2
    # the gap between tied scores is free: only their gaps to the third matter
    assert rank([1.0, -1.0, 0.0], [1, 1, 2])[0] == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.e)) / 3)


def test_R6_a_fully_tied_prompt_gives_0_and_no_nan():
    loss, gradient, stats = rank([3.0, -2.0, 100.0], [1, 1, 1])
    assert loss == 0 and gradient.tolist() == [0, 0, 0]
    assert stats == {"pairs": 0, "correct": 0, "margin": 0}


@pytest.mark.parametrize("size", [0, 1])
def test_a_row_without_pairs_gives_0(size):
    scores = torch.randn(1, 4, requires_grad=True)
    loss, _ = ranking_loss(scores, torch.arange(4.0)[None], torch.arange(4)[None] < size)
    loss.backward()
    assert loss.item() == 0 and not scores.grad.any()


@pytest.mark.parametrize("junk", JUNK)
def test_ranking_ignores_padding(junk):
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    scores, ranks = torch.randn(2, 5), torch.tensor([[1.0, 2, 2, 1, 3], [1, 2, 3, 4, 5]])
    results = []
    for fill in (0.0, junk):
        leaf = torch.where(mask, scores, torch.full_like(scores, fill)).requires_grad_()
        loss, stats = ranking_loss(leaf, torch.where(mask, ranks, torch.full_like(ranks, fill)), mask)
        loss.backward()
        results.append((loss.detach(), leaf.grad, stats["pairs"], stats["correct"], stats["margin"]))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert not results[1][1][~mask].any()


def test_huge_gaps_do_not_overflow():
    loss, gradient, _ = rank([1e4, -1e4], [2, 1])
    assert loss == pytest.approx(2e4) and gradient.tolist() == [1, -1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranking_is_float32_inside(dtype):
    loss, _ = ranking_loss(torch.randn(1, 4).to(dtype), torch.arange(4.0)[None], torch.ones(1, 4, dtype=torch.bool))
    assert loss.dtype == torch.float32


# Policy loss


def one_token(ratio: float, advantage: float, cliprange: float = 0.2, dual_clip: float | None = None):
    """Loss, d loss / d logprob and stats of a single token."""
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    advantages = torch.full((1, 1), advantage)
    loss, stats = policy_loss(logprobs, torch.zeros(1, 1), advantages, mask, cliprange, dual_clip=dual_clip)
    loss.backward()
    return loss.item(), logprobs.grad.item(), {name: value.item() for name, value in stats.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.3, 2.0, -2.4, 0.0),  # better, already up by more than 1.2: -1.2 * 2, clipped
        (0.7, -2.0, 1.6, 0.0),  # worse, already down by more than 0.8: 0.8 * 2, clipped
        (1.3, -2.0, 2.6, 2.6),  # worse and up: -(1.3 * -2), pushed down with -A * ratio
        (0.7, 2.0, -1.4, -1.4),  # better and down: pulled up
        (1.1, 2.0, -2.2, -2.2),  # within the range
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_P11_clipping(ratio, advantage, loss, gradient):
    got_loss, got_gradient, stats = one_token(ratio, advantage)
    assert got_loss == pytest.approx(loss, abs=1e-6)
    assert got_gradient == pytest.approx(gradient, abs=1e-6)
    assert stats["policy_clipped"] == (gradient == 0)
    assert stats["ratio"] == pytest.approx(ratio)
    assert stats["max_ratio_deviation"] == pytest.approx(abs(ratio - 1))
    assert stats["approxkl"] == pytest.approx(math.log(ratio) ** 2 / 2)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (4.0, -0.5, 1.5, 0.0),  # 3 x 0.5 instead of 4 x 0.5
        (2.0, -0.5, 1.0, 1.0),  # 2 x 0.5, under the limit: -A x ratio
        (0.5, -0.5, 0.4, 0.0),  # the first clip's, 0.8 x 0.5
        (4.0, 0.5, -0.6, 0.0),  # the first clip's, 1.2 x 0.5: what is good has no second limit
        (0.5, 0.5, -0.25, -0.25),
    ],
)
def test_K3_dual_clip(ratio, advantage, loss, gradient):
    assert one_token(ratio, advantage, dual_clip=3.0)[:2] == pytest.approx((loss, gradient))


def test_P4_first_minibatch():
    """Ratio 1: nothing clipped, KL 0, loss = -sum of advantages, gradient -A; about 0 once whitened over the set."""
    mask = torch.rand(8, 10) < 0.7
    logprobs = torch.randn(8, 10, requires_grad=True)
    advantages = torch.randn(8, 10)
    loss, stats = policy_loss(logprobs, logprobs.detach().clone(), advantages, mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-math.fsum(advantages[mask].tolist()), abs=1e-4)
    torch.testing.assert_close(logprobs.grad[mask], -advantages[mask])
    assert stats["ratio"].item() == mask.sum().item()
    assert stats["policy_clipped"].item() == stats["approxkl"].item() == stats["max_ratio_deviation"].item() == 0
    whitened, _ = policy_loss(logprobs, logprobs.detach().clone(), whiten(advantages, mask), mask, 0.2)
    assert whitened.item() / mask.sum().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("cliprange", [0.1, 0.2, 0.5])
def test_policy_loss_against_a_loop(cliprange):
    mask = torch.rand(5, 7) < 0.6
    new, old, advantages = torch.randn(5, 7) * 0.4, torch.randn(5, 7) * 0.4, torch.randn(5, 7)
    total, clipped, chosen = 0.0, 0, mask.nonzero().tolist()
    for b, t in chosen:
        ratio, a = math.exp(float(new[b, t]) - float(old[b, t])), float(advantages[b, t])
        bounded = min(max(ratio, 1 - cliprange), 1 + cliprange)
        total += min(ratio * a, bounded * a)
        clipped += bounded * a < ratio * a
    loss, stats = policy_loss(new, old, advantages, mask, cliprange)
    assert loss.item() == pytest.approx(-total, abs=1e-5)
    assert stats["policy_clipped"].item() == clipped


# Value loss


def one_value(value: float, old: float, target: float, cliprange: float | None):
    values = torch.tensor([[value]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, stats = value_loss(values, torch.tensor([[old]]), torch.tensor([[target]]), mask, cliprange)
    loss.backward()
    return loss.item(), values.grad.item(), stats["value_clipped"].item()


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient", "clipped"),
    [
        (1.0, 0.0, 2.0, 1.62, 0.0, 1),  # moved to 0.2 at most: 0.5 * 1.8^2 > 0.5 * 1^2, and no gradient
        (1.0, 0.0, -1.0, 2.0, 2.0, 0),  # the wrong way: 0.5 * 2^2 > 0.5 * 1.2^2, gradient V - R
        (0.1, 0.0, 2.0, 1.805, -1.9, 0),  # inside the range: both equal 0.5 * 1.9^2
        (-1.0, 0.0, -3.0, 3.92, 0.0, 1),  # 0.5 * 2.8^2
    ],
)
def test_P12_value_clipping(value, old, target, loss, gradient, clipped):
    got = one_value(value, old, target, 0.2)
    assert got == pytest.approx((loss, gradient, clipped), abs=1e-6)


def test_P12_value_loss_against_a_loop():
    mask = torch.rand(5, 7) < 0.6
    values, old, returns = torch.randn(5, 7), torch.randn(5, 7), torch.randn(5, 7)
    total = 0.0
    for b, t in mask.nonzero().tolist():
        v, o, r = float(values[b, t]), float(old[b, t]), float(returns[b, t])
        near = min(max(v, o - 0.2), o + 0.2)
        total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
    assert value_loss(values, old, returns, mask, 0.2)[0].item() == pytest.approx(total, rel=1e-5)


def test_P12_without_clipping_it_is_plain_squared_error():
    mask = torch.rand(5, 7) < 0.6
    values, returns = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    loss, stats = value_loss(values, torch.randn(5, 7), returns, mask, None)
    expected = 0.5 * mse_loss(values[mask], returns[mask], reduction="sum")
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, values, retain_graph=True)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert stats["value_clipped"].item() == 0


# Padding, for both


def policy(*inputs, mask):
    return policy_loss(*inputs, mask, 0.2)


def value(*inputs, mask):
    return value_loss(*inputs, mask, 0.2)


def value_unclipped(*inputs, mask):
    return value_loss(*inputs, mask, None)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("function", [policy, value, value_unclipped])
def test_token_losses_ignore_padding(function, junk):
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [True, False, False, False]])
    inputs = [torch.randn(3, 4) for _ in range(3)]
    results = []
    for fill in (0.0, junk):
        filled = [torch.where(mask, x, torch.full_like(x, fill)) for x in inputs]
        filled[0].requires_grad_()
        loss, stats = function(*filled, mask=mask)
        loss.backward()
        results.append([loss.detach(), filled[0].grad, *stats.values()])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty), f"{clean} against {dirty}"
    assert not results[1][1][~mask].any()


@pytest.mark.parametrize("function", [policy, value, value_unclipped])
def test_token_losses_of_nothing_are_0(function):
    inputs = [torch.randn(3, 4) for _ in range(3)]
    inputs[0].requires_grad_()
    loss, stats = function(*inputs, mask=torch.zeros(3, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not inputs[0].grad.any()
    assert all(value.item() == 0 for value in stats.values())


@pytest.mark.parametrize("function", [policy, value])
def test_sums_add_up_over_microbatches(function):
    """Losses are sums, so a batch in one piece equals its rows one by one."""
    inputs, mask = [torch.randn(6, 5) for _ in range(3)], torch.rand(6, 5) < 0.6
    whole, _ = function(*inputs, mask=mask)
    parts = [function(*[x[i : i + 1] for x in inputs], mask=mask[i : i + 1])[0] for i in range(6)]
    torch.testing.assert_close(whole, torch.stack(parts).sum())
