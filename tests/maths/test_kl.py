"""KL estimators and the adaptive coefficient, against exact categorical distributions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from align.maths.kl import ESTIMATORS, adapt_kl_coef, kl_estimate


def test_goldens():
    # u = ln 2: k1 = 0.693147, k2 = 0.480453 / 2 = 0.240227, k3 = 1/2 - 1 + 0.693147 = 0.193147
    logprobs, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    got = [kl_estimate(logprobs, ref, k).item() for k in ESTIMATORS]
    assert got == pytest.approx([0.693147, 0.240227, 0.193147], abs=1e-6)
    assert kl_estimate(logprobs, ref).item() == pytest.approx(0.693147)  # the default is k1
    # u = -ln 2: k1 = -0.693147, k2 = 0.240227, k3 = 2 - 1 - 0.693147 = 0.306853
    got = [kl_estimate(ref, logprobs, k).item() for k in ESTIMATORS]
    assert got == pytest.approx([-0.693147, 0.240227, 0.306853], abs=1e-6)


def test_unknown_estimator():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_P3_equal_policies_have_kl_0(estimator):
    logprobs = torch.randn(4, 5)
    assert not kl_estimate(logprobs, logprobs.clone(), estimator).any()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_K1_mean_is_the_exact_kl(estimator):
    policy = Categorical(logits=torch.randn(10, dtype=torch.float64))
    ref = Categorical(logits=torch.randn(10, dtype=torch.float64))
    tokens = policy.sample((100_000,))
    k = kl_estimate(policy.log_prob(tokens), ref.log_prob(tokens), estimator)
    error = k.std().item() / math.sqrt(len(k))
    assert abs(k.mean().item() - kl_divergence(policy, ref).item()) < 4 * error
    # And with no sampling error at all: the sum over the vocabulary.
    every = torch.arange(10)
    exact = (policy.probs * kl_estimate(policy.log_prob(every), ref.log_prob(every), estimator)).sum()
    assert exact.item() == pytest.approx(kl_divergence(policy, ref).item(), abs=1e-12)


@given(st.floats(-20, 20, width=32))
def test_K1_k3_is_never_negative(u):
    assert kl_estimate(torch.tensor([u]), torch.tensor([0.0]), "k3").item() >= 0


def test_K1_k3_is_never_negative_near_zero():
    """Where the policy has hardly moved, exp(-u) - 1 + u loses all its digits in float32 unless it is written well."""
    u = torch.logspace(-8, 0, 2000)
    for signed in (u, -u):
        k3 = kl_estimate(signed, torch.zeros_like(u), "k3")
        assert (k3 >= 0).all(), f"lowest {k3.min().item():.2g} at u = {signed[k3.argmin()].item():.2g}"


def test_k3_is_accurate_near_zero():
    # k3 = u^2/2 - u^3/6 + ...: at 1e-3, 5e-7 - 1.7e-10
    got = kl_estimate(torch.tensor([1e-3]), torch.tensor([0.0]), "k3").item()
    assert got == pytest.approx(4.998333e-7, rel=1e-2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_K2_expected_gradient(estimator):
    """k1: 0 (score function); k2: gradient of KL(policy || ref); k3: gradient of KL(ref || policy)."""
    theta = torch.randn(8, dtype=torch.float64, requires_grad=True)
    ref = Categorical(logits=torch.randn(8, dtype=torch.float64))
    policy = Categorical(logits=theta)
    every = torch.arange(8)
    k = kl_estimate(policy.log_prob(every), ref.log_prob(every), estimator)
    (got,) = torch.autograd.grad((policy.probs.detach() * k).sum(), theta)
    policy = Categorical(logits=theta)
    target = {
        "k1": torch.zeros_like(theta),
        "k2": torch.autograd.grad(kl_divergence(policy, ref), theta, retain_graph=True)[0],
        "k3": torch.autograd.grad(kl_divergence(ref, policy), theta, retain_graph=True)[0],
    }
    torch.testing.assert_close(got, target[estimator], atol=1e-12, rtol=0)
    if estimator != "k1":
        assert got.abs().max() > 1e-3  # the check above is not 0 = 0


def test_P18_without_a_target_it_stays():
    assert adapt_kl_coef(0.02, 50.0, target=None, episodes=512, horizon=10_000) == 0.02


def test_P18_no_change_at_the_target():
    assert adapt_kl_coef(0.2, 6.0, target=6.0, episodes=512, horizon=10_000) == 0.2


def test_P18_goldens():
    # kl/target - 1 = 0.1; 0.2 * (1 + 0.1 * 256 / 10000) = 0.2 * 1.00256
    assert adapt_kl_coef(0.2, 6.6, 6.0, 256, 10_000) == pytest.approx(0.200512, abs=1e-12)
    # far above and far below: the error is clipped to 0.2, and 0.2 * 512 / 10000 = 0.01024
    assert adapt_kl_coef(1.0, 600.0, 6.0, 512, 10_000) == pytest.approx(1.01024, abs=1e-12)
    assert adapt_kl_coef(1.0, 0.0, 6.0, 512, 10_000) == pytest.approx(0.98976, abs=1e-12)


@given(st.floats(-10, 1e6), st.floats(0.01, 1e3))
def test_P18_one_update_of_512_episodes_is_bounded(kl, target):
    assert 0.98976 - 1e-12 <= adapt_kl_coef(1.0, kl, target, 512, 10_000) <= 1.01024 + 1e-12


@given(st.floats(0, 100), st.floats(0, 100))
def test_P18_more_kl_never_lowers_the_coefficient(a, b):
    low, high = sorted((a, b))
    assert adapt_kl_coef(0.1, low, 6.0, 64, 10_000) <= adapt_kl_coef(0.1, high, 6.0, 64, 10_000)
