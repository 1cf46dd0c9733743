"""Masked sums, means, variances and whitening against hand arithmetic, plain Python and scipy."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.maths.reduce import masked_mean, masked_sum, masked_var, whiten

JUNK = [float("nan"), float("inf"), -float("inf"), 1e30]
X = torch.tensor([[1.0, 2.0, 100.0], [3.0, 100.0, 100.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])  # selects 1, 2, 3


def test_goldens():
    # 1 + 2 + 3 = 6; 6 / 3 = 2; ((-1)^2 + 0 + 1^2) / 3 = 2/3, not 2/2
    assert masked_sum(X, MASK).item() == 6
    assert masked_mean(X, MASK).item() == 2
    assert masked_var(X, MASK).item() == pytest.approx(2 / 3)


def test_nothing_selected():
    none = torch.zeros_like(MASK)
    for function in (masked_sum, masked_mean, masked_var):
        assert function(X, none).item() == 0
    assert torch.equal(whiten(X, none), torch.zeros_like(X))


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("function", [masked_sum, masked_mean])
def test_junk_changes_neither_value_nor_gradient(function, junk):
    clean = X.clone().requires_grad_()
    dirty = torch.where(MASK, X, torch.full_like(X, junk)).requires_grad_()
    values = [function(x, MASK) for x in (clean, dirty)]
    for value in values:
        value.backward()
    assert torch.equal(values[0], values[1])
    assert torch.equal(clean.grad, dirty.grad)
    assert not dirty.grad[~MASK].any()


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("function", [masked_var, whiten, lambda x, m: whiten(x, m, shift_mean=False)])
def test_junk_changes_no_value(function, junk):
    dirty = torch.where(MASK, X, torch.full_like(X, junk))
    assert torch.equal(function(X, MASK), function(dirty, MASK))


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        masked_sum(X, MASK[:, :2])


def test_P10_whitened_advantages_have_mean_0_and_biased_variance_1():
    out = whiten(X, MASK)
    # 1, 2, 3 -> (x - 2) / sqrt(2/3) = -1.224745, 0, 1.224745
    assert out[MASK].tolist() == pytest.approx([-1.2247449, 0, 1.2247449], abs=1e-6)
    assert not out[~MASK].any()
    x = torch.randn(40, 30) * 3 + 5
    mask = torch.rand(40, 30) < 0.6
    chosen = [float(v) for v in whiten(x, mask)[mask]]
    mean = math.fsum(chosen) / len(chosen)
    assert mean == pytest.approx(0, abs=1e-6)
    assert math.fsum((v - mean) ** 2 for v in chosen) / len(chosen) == pytest.approx(1, abs=1e-5)
    assert chosen == pytest.approx(scipy.stats.zscore(x[mask].double().numpy(), ddof=0).tolist(), abs=1e-5)


def test_P10_whitened_rewards_keep_their_mean():
    # the mean 2 is put back: 2 - 1.224745, 2, 2 + 1.224745
    out = whiten(X, MASK, shift_mean=False)
    assert out[MASK].tolist() == pytest.approx([0.7752551, 2, 3.2247449], abs=1e-6)
    assert not out[~MASK].any()


def test_whiten_far_from_zero():
    """It is float64 inside: float32 knows the mean of these to 1/16 alone and would give -1.5667, .5222, .5222."""
    x = torch.tensor([[1e6, 1e6 + 0.25, 1e6 + 0.25]])
    out = whiten(x, torch.ones_like(x, dtype=torch.bool))
    # from the mean -1/6, 1/12, 1/12; variance (1/36 + 1/144 + 1/144) / 3 = 1/72; -sqrt(72) / 6, sqrt(72) / 12 twice
    assert out[0].tolist() == pytest.approx([-1.4142136, 0.7071068, 0.7071068], abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_whiten_of_equal_numbers_is_0(value):
    x = torch.full((2, 3), value)
    assert whiten(x, MASK)[MASK].tolist() == [0, 0, 0]
    assert whiten(x, MASK, shift_mean=False)[MASK].tolist() == pytest.approx([value] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_whiten_keeps_the_dtype(dtype):
    assert whiten(X.to(dtype), MASK).dtype == dtype


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12), st.floats(0.5, 20), st.floats(-50, 50))
def test_whitening_ignores_scale_and_shift(numbers, scale, shift):
    x = torch.tensor([numbers], dtype=torch.float64)
    mask = torch.ones_like(x, dtype=torch.bool)
    if x.std() < 0.5:  # the 1e-8 under the root is felt only near 0
        return
    assert torch.allclose(whiten(x, mask), whiten(x * scale + shift, mask), atol=1e-6)
