"""Log-probabilities, entropy and sampling against torch.distributions, trl, scipy and float64."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from align.maths.logprobs import draw, entropy, invert_cdf, linear_logprobs, token_logprobs

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
    counts = np.bincount(draw(logits.expand(n, -1), uniforms, temperature)[0].numpy(), minlength=12)
    expected = scipy.special.softmax(logits[0].double().numpy() / temperature) * n
    assert scipy.stats.chisquare(counts, expected, sum_check=False).pvalue > 1e-3
    logprobs = token_logprobs(logits.expand(12, -1), torch.arange(12), temperature)
    np.testing.assert_allclose(logprobs.exp().numpy() * n, expected, rtol=1e-4)


def test_P6_a_grid_of_uniforms_gives_the_probabilities():
    """Inverting a CDF on a regular grid: every count is n * p up to one."""
    n, logits = 10_000, torch.randn(1, 20) * 2
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = np.bincount(draw(logits.expand(n, -1), grid, 0.8)[0].numpy(), minlength=20)
    assert np.abs(counts - n * scipy.special.softmax(logits[0].double().numpy() / 0.8)).max() <= 1.01


def test_draw_hand():
    # (1/8, 2/8, 5/8): [0, 1/8) -> 0, [1/8, 3/8) -> 1, [3/8, 1) -> 2
    uniforms = torch.tensor([0.0, 0.12, 0.13, 0.37, 0.38, 0.999], dtype=torch.float64)
    tokens, logprobs = draw(HAND.expand(6, -1), uniforms, 1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    assert logprobs.exp().tolist() == pytest.approx([1 / 8, 1 / 8, 2 / 8, 2 / 8, 5 / 8, 5 / 8])
    # temperature 1/2: (1/30, 4/30, 25/30)
    tokens, logprobs = draw(HAND.expand(3, -1), torch.tensor([0.03, 0.04, 0.5]), 0.5)
    assert tokens.tolist() == [0, 1, 2] and logprobs.exp().tolist() == pytest.approx([1 / 30, 4 / 30, 25 / 30])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_P6_draw_gives_the_logprob_of_what_it_draws(temperature):
    logits, uniforms = torch.randn(200, 500) * 4, torch.rand(200)
    tokens, logprobs = draw(logits, uniforms, temperature)
    expected = scipy.special.log_softmax(logits.double().numpy() / temperature, axis=-1)
    np.testing.assert_allclose(logprobs.numpy(), expected[np.arange(200), tokens.numpy()], atol=2e-5)
    assert len(set(tokens.tolist())) > 50 and logprobs.dtype == torch.float32


@given(logit_rows, st.lists(uniform, min_size=2, max_size=20), st.floats(0.1, 5))
def test_P6_draw_is_monotone_in_u_and_in_range(row, uniforms, temperature):
    tokens = draw(torch.tensor([row] * len(uniforms)), torch.tensor(sorted(uniforms)).double(), temperature)[0].tolist()
    assert tokens == sorted(tokens)
    assert tokens[0] >= 0 and tokens[-1] < len(row)


@given(logit_rows, uniform, st.data())
def test_P6_draw_never_picks_a_token_of_probability_0(row, u, data):
    banned = data.draw(st.sets(st.integers(0, len(row) - 1), max_size=len(row) - 1))
    logits = torch.tensor([[-float("inf") if i in banned else x for i, x in enumerate(row)]])
    assert draw(logits, torch.tensor([u], dtype=torch.float64), 1.0)[0].item() not in banned


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
        tokens, _ = draw(logits, u.expand(64), 1.0)
        assert tokens.min() >= 1 and tokens.max() <= vocabulary - 2


@given(st.integers(0, 1000))
def test_draw_does_not_depend_on_batch_mates(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, 30, generator=generator) * 4
    uniforms = torch.rand(9, dtype=torch.float64, generator=generator)
    together = draw(logits, uniforms, 0.9)[0]
    alone = torch.cat([draw(logits[i : i + 1], uniforms[i : i + 1], 0.9)[0] for i in range(9)])
    order = torch.randperm(9, generator=generator)
    assert torch.equal(together, alone)
    assert torch.equal(draw(logits[order], uniforms[order], 0.9)[0], together[order])


def test_draw_at_temperature_0_is_the_mode():
    logits, uniforms = torch.randn(50, 30), torch.rand(50, dtype=torch.float64)
    expected = [max(range(30), key=row.__getitem__) for row in logits.tolist()]
    tokens, logprobs = draw(logits, uniforms, 0)
    assert tokens.tolist() == expected
    assert draw(logits, uniforms, 1e-3)[0].tolist() == expected  # and the limit agrees
    at_1 = Categorical(logits=logits.double()).log_prob(tokens)
    torch.testing.assert_close(logprobs.double(), at_1, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_draw_takes_half_precision(dtype):
    logits, uniforms = torch.randn(20, 30).to(dtype), torch.rand(20)
    halves, floats = draw(logits, uniforms, 1.0), draw(logits.float(), uniforms, 1.0)
    assert torch.equal(halves[0], floats[0]) and torch.equal(halves[1], floats[1])


@pytest.mark.parametrize("vocabulary", [3, 256, 257, 1000, 50_257])
def test_invert_cdf_is_a_search_in_the_cumulative_sum(vocabulary):
    """numpy's searchsorted on a float64 cumsum; half of the tokens are impossible, in one row all but one."""
    rows = 200 if vocabulary < 10_000 else 24
    generator = torch.Generator().manual_seed(vocabulary)
    scores = torch.randn(rows, vocabulary, generator=generator) * 3
    scores[torch.rand(rows, vocabulary, generator=generator) < 0.5] = -float("inf")
    scores[:, vocabulary // 2] = 0.0
    scores[0] = -float("inf")
    scores[0, vocabulary - 1] = 0.0
    probabilities = scores.softmax(-1)
    uniforms = torch.rand(rows, generator=generator)
    uniforms[:4] = torch.tensor([0.5, 0.0, 1 - 2**-24, 2**-24])
    expected = []
    for row, u in zip(probabilities.double().numpy(), uniforms.tolist(), strict=True):
        ends = np.cumsum(row)
        expected.append(int(np.searchsorted(ends, u * ends[-1], side="right")))
    assert invert_cdf(probabilities, uniforms).tolist() == expected
    assert vocabulary == 3 or len(set(expected)) > 10


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 1000))
def test_invert_cdf_does_not_depend_on_its_blocks(block, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (torch.randn(20, vocabulary, generator=generator) * 3).softmax(-1)
    uniforms = torch.rand(20, generator=generator)
    assert torch.equal(invert_cdf(probabilities, uniforms, block), invert_cdf(probabilities, uniforms, vocabulary))


def test_invert_cdf_hand():
    # Shares 1/4, 0, 1/2, 0, 1/4 (unnormalised): [0, 1/4) -> 0, [1/4, 3/4) -> 2, [3/4, 1) -> 4; block edges at 2 and 4
    shares = torch.tensor([[1.0, 0.0, 2.0, 0.0, 1.0]]).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, 0.99])
    for block in (1, 2, 3, 5, 8):
        assert invert_cdf(shares, uniforms, block).tolist() == [0, 0, 2, 2, 4, 4], block


# Log-probabilities behind a linear head


def head(rows: int, size: int, vocabulary: int, biased: bool):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, size, generator=generator)
    weight = torch.randn(vocabulary, size, generator=generator)
    bias = torch.randn(vocabulary, generator=generator) if biased else None
    tokens = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, bias, tokens, torch.randn(rows, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])  # of 23 positions; 8 chunks of 1 are fewer than all
def test_linear_logprobs_and_their_gradients_are_those_of_float64(chunk, biased, temperature):
    rows, vocabulary = 23, 40
    hidden, weight, bias, tokens, upstream = head(rows, 16, vocabulary, biased)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    wide = [x.double().detach().requires_grad_() for x in leaves]

    logprobs, entropies = linear_logprobs(
        leaves[0], leaves[1], leaves[2] if biased else None, tokens, temperature, chunk * vocabulary, True
    )
    logits = (wide[0] @ wide[1].T + (wide[2] if biased else 0)) / temperature
    table = logits.log_softmax(-1)
    expected = table[torch.arange(rows), tokens]
    assert logprobs.dtype == entropies.dtype == torch.float32 and not entropies.requires_grad
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropies.double(), Categorical(logits=logits).entropy(), atol=1e-5, rtol=1e-6)

    ours = torch.autograd.grad((logprobs * upstream).sum(), leaves)
    theirs = torch.autograd.grad((expected * upstream.double()).sum(), wide)
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.abs().max()) > 0.1 and a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_linear_logprobs_golden():
    # a head of zeros is uniform over 4: every token costs ln 4, and its entropy is ln 4
    tokens = torch.tensor([1, 3])
    logprobs, entropies = linear_logprobs(torch.randn(2, 8), torch.zeros(4, 8), None, tokens, 1.0, with_entropies=True)
    assert -logprobs.sum().item() == pytest.approx(2 * math.log(4))
    assert entropies.tolist() == pytest.approx([math.log(4)] * 2)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_linear_logprobs_are_torchs_cross_entropy(chunk):
    """Of the tokens that a mask picks; loss and gradients."""
    hidden, weight, _, tokens, _ = head(18, 16, 11, False)
    learned = torch.rand(18) < 0.6
    hidden.requires_grad_(), weight.requires_grad_()
    labels = tokens.masked_fill(~learned, -100)
    expected = cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="sum")
    loss = -linear_logprobs(hidden[learned], weight, None, tokens[learned], 1.0, chunk * 11)[0].sum()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, [hidden, weight]) for x in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_linear_logprobs_with_a_part_that_is_not_trained(frozen):
    parts = dict(zip(("hidden", "weight", "bias"), head(9, 16, 40, True)[:3], strict=True))
    tokens, upstream = head(9, 16, 40, True)[3:]
    trained = [x.requires_grad_() for name, x in parts.items() if name != frozen]
    ours = torch.autograd.grad(
        (linear_logprobs(*parts.values(), tokens, 0.7, 3 * 40)[0] * upstream).sum(), trained, retain_graph=True
    )
    logits = parts["hidden"].double() @ parts["weight"].double().T + parts["bias"].double()
    expected = (logits / 0.7).log_softmax(-1)[torch.arange(9), tokens]
    theirs = torch.autograd.grad((expected * upstream.double()).sum(), trained)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_linear_logprobs_of_no_position():
    hidden, weight, bias, tokens, _ = head(0, 16, 40, True)
    weight.requires_grad_()
    logprobs, entropies = linear_logprobs(hidden, weight, bias, tokens, 1.0, with_entropies=True)
    assert linear_logprobs(hidden, weight, bias, tokens, 1.0)[1] is None
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad is None or not weight.grad.any()


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_the_logits_of_all_positions_never_exist():
    rows, size, vocabulary, chunk = 2000, 8, 500, 10
    hidden, weight, _, tokens, upstream = head(rows, size, vocabulary, False)
    hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as plain:
        (hidden @ weight.T).log_softmax(-1)
    assert plain.elements == rows * vocabulary, "the probe sees what it should"
    with Largest() as ours:
        logprobs, _ = linear_logprobs(hidden, weight, None, tokens, 1.0, chunk * vocabulary)
        torch.autograd.grad((logprobs * upstream).sum(), [hidden, weight])
    assert ours.elements <= rows * vocabulary / 10, ours.elements
