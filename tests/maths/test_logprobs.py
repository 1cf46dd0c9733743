"""Log-probabilities, entropy and sampling against torch.distributions, trl, scipy and float64."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical

from align.maths.logprobs import draw, entropy, token_logprobs

# Row by hand: softmax of (ln 1, ln 2, ln 5) is (1/8, 2/8, 5/8)
HAND = torch.tensor([[1.0, 2.0, 5.0]]).log()
logit_rows = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12)
uniform = st.floats(0, 1, exclude_max=True)


def test_P6_hand():
    got = [token_logprobs(HAND, torch.tensor([t])).exp().item() for t in range(3)]
    assert got == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    # temperature 1/2 squares the odds: 1, 4, 25 out of 30
    got = [token_logprobs(HAND, torch.tensor([t]), 0.5).exp().item() for t in range(3)]
    assert got == pytest.approx([1 / 30, 4 / 30, 25 / 30])


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_P6_logprobs_are_those_of_the_rollout_temperature(temperature):
    logits, tokens = torch.randn(4, 7, 50) * 5, torch.randint(50, (4, 7))
    expected = scipy.special.log_softmax(logits.double().numpy() / temperature, axis=-1)
    expected = np.take_along_axis(expected, tokens.numpy()[..., None], -1)[..., 0]
    got = token_logprobs(logits, tokens, temperature)
    assert got.shape == (4, 7)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)
    other = Categorical(logits=logits.double() / temperature).log_prob(tokens)
    torch.testing.assert_close(got.double(), other, atol=2e-5, rtol=0)


def test_logprobs_agree_with_trl():
    from trl.trainer.utils import selective_log_softmax

    logits, tokens = torch.randn(3, 5, 40), torch.randint(40, (3, 5))
    torch.testing.assert_close(token_logprobs(logits, tokens), selective_log_softmax(logits, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_in_float32_out(dtype):
    logits, tokens = (torch.randn(3, 5, 40) * 8).to(dtype), torch.randint(40, (3, 5))
    got = token_logprobs(logits, tokens, 0.7)
    assert got.dtype == entropy(logits, 0.7).dtype == torch.float32
    expected = Categorical(logits=logits.double() / 0.7)
    torch.testing.assert_close(got.double(), expected.log_prob(tokens), atol=2e-5, rtol=0)
    torch.testing.assert_close(entropy(logits, 0.7).double(), expected.entropy(), atol=2e-5, rtol=0)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert token_logprobs(logits, torch.tensor([0])).item() == 0
    assert token_logprobs(logits, torch.tensor([1])).item() == -2e4
    assert entropy(logits).item() == 0


def test_gradient_is_onehot_minus_softmax():
    logits = HAND.clone().requires_grad_()
    token_logprobs(logits, torch.tensor([1])).sum().backward()
    # d log p_1 / d logits = (0, 1, 0) - (1/8, 2/8, 5/8)
    assert logits.grad[0].tolist() == pytest.approx([-1 / 8, 6 / 8, -5 / 8])


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        token_logprobs(torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.long))


def test_entropy():
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(np.log(8))
    assert entropy(HAND).item() == pytest.approx(scipy.stats.entropy([1, 2, 5]))
    assert entropy(HAND, 0.5).item() == pytest.approx(scipy.stats.entropy([1, 4, 25]))
    logits = torch.randn(3, 4, 30)
    torch.testing.assert_close(entropy(logits), Categorical(logits=logits).entropy())


@given(logit_rows)
def test_entropy_is_between_0_and_log_v(row):
    h = entropy(torch.tensor([row])).item()
    assert -1e-6 <= h <= np.log(len(row)) + 1e-5


# Sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_P6_sampled_frequencies_agree_with_the_logprobs(temperature):
    n, logits = 20_000, torch.randn(1, 12) * 1.5
    uniforms = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    counts = np.bincount(draw(logits.expand(n, -1), uniforms, temperature).numpy(), minlength=12)
    expected = scipy.special.softmax(logits[0].double().numpy() / temperature) * n
    assert scipy.stats.chisquare(counts, expected, sum_check=False).pvalue > 1e-3
    logprobs = token_logprobs(logits.expand(12, -1), torch.arange(12), temperature)
    np.testing.assert_allclose(logprobs.exp().numpy() * n, expected, rtol=1e-4)


def test_P6_a_grid_of_uniforms_gives_the_probabilities():
    """Inverting a CDF on a regular grid: every count is n * p up to one."""
    n, logits = 10_000, torch.randn(1, 20) * 2
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = np.bincount(draw(logits.expand(n, -1), grid, 0.8).numpy(), minlength=20)
    assert np.abs(counts - n * scipy.special.softmax(logits[0].double().numpy() / 0.8)).max() <= 1.01


def test_draw_hand():
    # (1/8, 2/8, 5/8): [0, 1/8) -> 0, [1/8, 3/8) -> 1, [3/8, 1) -> 2
    uniforms = torch.tensor([0.0, 0.12, 0.13, 0.37, 0.38, 0.999], dtype=torch.float64)
    assert draw(HAND.expand(6, -1), uniforms, 1.0).tolist() == [0, 0, 1, 1, 2, 2]


@given(logit_rows, st.lists(uniform, min_size=2, max_size=20), st.floats(0.1, 5))
def test_P6_draw_is_monotone_in_u_and_in_range(row, uniforms, temperature):
    tokens = draw(torch.tensor([row] * len(uniforms)), torch.tensor(sorted(uniforms)).double(), temperature).tolist()
    assert tokens == sorted(tokens)
    assert tokens[0] >= 0 and tokens[-1] < len(row)


@given(logit_rows, uniform, st.data())
def test_P6_draw_never_picks_a_token_of_probability_0(row, u, data):
    banned = data.draw(st.sets(st.integers(0, len(row) - 1), max_size=len(row) - 1))
    logits = torch.tensor([[-float("inf") if i in banned else x for i, x in enumerate(row)]])
    assert draw(logits, torch.tensor([u], dtype=torch.float64), 1.0).item() not in banned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [3, 1000, 50_257])
def test_draw_at_the_ends(vocabulary, dtype):
    """u = 0 and the largest number under 1, with impossible tokens at both ends of the vocabulary."""
    logits = torch.randn(64, vocabulary)
    logits[:, 0] = logits[:, -1] = -float("inf")
    for u in (
        torch.tensor(0.0, dtype=dtype),
        torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(0.0).to(dtype)),
    ):
        tokens = draw(logits, u.expand(64), 1.0)
        assert tokens.min() >= 1 and tokens.max() <= vocabulary - 2


@given(st.integers(0, 1000))
def test_draw_does_not_depend_on_batch_mates(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, 30, generator=generator) * 4
    uniforms = torch.rand(9, dtype=torch.float64, generator=generator)
    together = draw(logits, uniforms, 0.9)
    alone = torch.cat([draw(logits[i : i + 1], uniforms[i : i + 1], 0.9) for i in range(9)])
    order = torch.randperm(9, generator=generator)
    assert torch.equal(together, alone)
    assert torch.equal(draw(logits[order], uniforms[order], 0.9), together[order])


def test_draw_at_temperature_0_is_the_mode():
    logits, uniforms = torch.randn(50, 30), torch.rand(50, dtype=torch.float64)
    expected = [max(range(30), key=row.__getitem__) for row in logits.tolist()]
    assert draw(logits, uniforms, 0).tolist() == expected
    assert draw(logits, uniforms, 1e-3).tolist() == expected  # and the limit agrees


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_draw_takes_half_precision(dtype):
    logits, uniforms = torch.randn(20, 30).to(dtype), torch.rand(20)
    assert torch.equal(draw(logits, uniforms, 1.0), draw(logits.float(), uniforms, 1.0))
