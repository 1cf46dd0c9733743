"""Importance weights and the mismatch they make up for: hand arithmetic, a float64 loop, exact enumeration."""

import itertools
import math

import pytest
import torch

from align.maths.importance import importance_weights, logprob_mismatch
from align.maths.losses import policy_loss

JUNK = [float("nan"), float("inf"), -float("inf"), 1e30]
# Trainer's and sampler's probabilities of the drawn tokens; the third column of the first row is padding.
TRAINER = torch.tensor([[0.5, 0.25, 0.9], [0.8, 0.1, 0.5]]).log()
SAMPLER = torch.tensor([[0.25, 0.5, 0.1], [0.2, 0.8, 0.5]]).log()
MASK = torch.tensor([[True, True, False], [True, True, True]])


def weigh(cap=None, band=None, level="token", trainer=TRAINER, sampler=SAMPLER, mask=MASK):
    return importance_weights(trainer, sampler, mask, cap, band, level)


@pytest.mark.parametrize(
    ("cap", "band", "level", "expected"),
    [
        (None, None, "token", [[2, 0.5, 0], [4, 0.125, 1]]),
        (3.0, None, "token", [[2, 0.5, 0], [3, 0.125, 1]]),
        (None, 3.0, "token", [[2, 0.5, 0], [0, 0, 1]]),
        (1.5, 3.0, "token", [[1.5, 0.5, 0], [0, 0, 1]]),
        (1.0, None, "token", [[1, 0.5, 0], [1, 0.125, 1]]),
        (None, None, "sequence", [[1, 1, 0], [0.5, 0.5, 0.5]]),  # 2 * 0.5; 4 * 0.125 * 1
        (None, 1.5, "sequence", [[1, 1, 0], [0, 0, 0]]),
        (0.75, None, "sequence", [[0.75, 0.75, 0], [0.5, 0.5, 0.5]]),
    ],
)
def test_weights_by_hand(cap, band, level, expected):
    torch.testing.assert_close(weigh(cap, band, level), torch.tensor(expected).float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_against_a_loop_in_float64(level):
    trainer, sampler = -3 * torch.rand(6, 9), -3 * torch.rand(6, 9)
    mask = torch.arange(9)[None] < torch.tensor([9, 1, 4, 6, 2, 8])[:, None]
    got = weigh(1.4, 2.0, level, trainer, sampler, mask)
    zeros = 0
    for b in range(6):
        chosen = [t for t in range(9) if mask[b, t]]
        for t in range(9):
            over = [t] if level == "token" else chosen
            ratio = math.exp(math.fsum(float(trainer[b, s]) - float(sampler[b, s]) for s in over))
            expected = min(ratio, 1.4) if t in chosen and 0.5 <= ratio <= 2.0 else 0.0
            zeros += t in chosen and expected == 0
            assert float(got[b, t]) == pytest.approx(expected, rel=1e-5), (b, t)
    assert zeros, "nothing fell outside the band"


@pytest.mark.parametrize("cap, band", [(1.0, None), (2.0, None), (None, 1.0), (2.0, 3.0)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_K4_equal_logprobs_weigh_exactly_1_and_change_nothing(cap, band, level):
    logprobs = (-torch.rand(2, 3) * 20).requires_grad_()
    weights = weigh(cap, band, level, logprobs, logprobs.detach().clone())
    assert torch.equal(weights, MASK.float())
    old, advantages = logprobs.detach() + torch.randn(2, 3) * 0.3, torch.randn(2, 3)
    results = []
    for given in (None, weights):
        loss, stats = policy_loss(logprobs, old, advantages, MASK, 0.2, given)
        results.append([loss.detach(), *torch.autograd.grad(loss, logprobs), *stats.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_K4_weights_carry_no_gradient_never_exceed_the_cap_and_are_0_on_pads(level, junk):
    mask = torch.rand(20, 8) < 0.7
    trainer = torch.where(mask, -10 * torch.rand(20, 8), junk).requires_grad_()
    sampler = torch.where(mask, -10 * torch.rand(20, 8), -junk)
    weights = weigh(2.0, None, level, trainer, sampler, mask)
    assert not weights.requires_grad
    assert bool((weights <= 2.0).all()) and bool((weights == 2.0).any()) and not weights[~mask].any()
    # Junk off the mask reaches neither loss nor gradient, and the gradient is a weighted token's.
    loss, _ = policy_loss(trainer, trainer.detach(), torch.ones_like(trainer), mask, 0.2, weights)
    (gradient,) = torch.autograd.grad(loss, trainer)
    assert torch.equal(gradient, torch.where(mask, -weights, torch.zeros_like(weights)))


def test_K5_the_band_zeroes_exactly_the_tokens_or_sequences_outside_it():
    generator = torch.Generator().manual_seed(5)
    steps = torch.randint(-3, 4, (50, 4), generator=generator)  # in units of log 2
    trainer, mask = steps * math.log(2), torch.ones(50, 4, dtype=torch.bool)
    sampler = torch.zeros(50, 4)
    # A band of 3 lies between 2 and 4: it keeps ratios of 1/2, 1 and 2, and nothing else.
    tokens = weigh(None, 3.0, "token", trainer, sampler, mask)
    assert torch.equal(tokens == 0, steps.abs() >= 2)
    sequences = weigh(None, 3.0, "sequence", trainer, sampler, mask)
    assert torch.equal(sequences == 0, (steps.sum(1, keepdim=True).abs() >= 2).expand(-1, 4))
    assert 0 < int((tokens == 0).sum()) < 200 and 0 < int((sequences == 0).sum()) < 200


def test_an_underflow_or_overflow_of_the_ratio_stays_finite_under_a_cap():
    far = torch.tensor([[200.0, -200.0, 0.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert weigh(2.0, None, "token", far, torch.zeros(1, 3), mask).tolist() == [[2.0, 0.0, 1.0]]
    assert weigh(None, 2.0, "token", far, torch.zeros(1, 3), mask).tolist() == [[0.0, 0.0, 1.0]]


# The gradient that an engine with other numerics leaves: enumerated over all responses, in float64


def expected_gradient(tables, sampler, advantages, cap, level) -> list[torch.Tensor]:
    """Mean over the sampler's responses of the policy loss's gradient. `tables` maps a prefix to logits (V,);
    `sampler` turns logits into those that the sampler draws from; None as `level`: no weights."""
    total = [torch.zeros_like(table) for table in tables.values()]
    names = list(tables)
    for tokens in itertools.product(range(len(tables[()])), repeat=1 + max(map(len, names))):
        prefixes = [tokens[:t] for t in range(len(tokens))]
        pairs = list(zip(prefixes, tokens, strict=True))
        new = torch.stack([tables[prefix].log_softmax(-1)[x] for prefix, x in pairs])[None]
        drawn = torch.stack([sampler(tables[prefix].detach()).log_softmax(-1)[x] for prefix, x in pairs])[None]
        mask = torch.ones_like(new, dtype=torch.bool)
        weights = None if level is None else importance_weights(new, drawn, mask, cap, None, level)
        loss, _ = policy_loss(new, new.detach(), advantages[tokens].expand_as(new), mask, 0.2, weights)
        share = float(drawn.sum().exp())
        gradients = torch.autograd.grad(loss, list(tables.values()), allow_unused=True)
        total = [t if g is None else t + share * g for t, g in zip(total, gradients, strict=True)]
    return total


def true_gradient(tables, advantages) -> list[torch.Tensor]:
    """Of -E[advantage] over the trainer's own policy."""
    value = 0.0
    length = 1 + max(map(len, tables))
    for tokens in itertools.product(range(len(tables[()])), repeat=length):
        share = math.prod(tables[tokens[:t]].softmax(-1)[tokens[t]] for t in range(length))
        value = value - share * advantages[tokens]
    return list(torch.autograd.grad(value, list(tables.values())))


def off(a, b) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def make_tables(vocabulary: int, length: int):
    generator = torch.Generator().manual_seed(3)
    prefixes = [p for n in range(length) for p in itertools.product(range(vocabulary), repeat=n)]
    tables = {p: torch.randn(vocabulary, generator=generator).double().requires_grad_() for p in prefixes}
    return tables, torch.randn([vocabulary] * length, generator=generator).double()


ENGINES = {
    "temperature": (lambda logits: logits / 0.9, 1e-2),
    "bfloat16": (lambda logits: logits.bfloat16().double(), 1e-4),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradient_of_an_engine_that_differs_is_unbiased(engine):
    """One token: its own ratio is all there is to correct."""
    sampler, gap = ENGINES[engine]
    tables, advantages = make_tables(6, 1)
    truth = true_gradient(tables, advantages)
    assert off(expected_gradient(tables, sampler, advantages, None, None), truth) > gap
    assert off(expected_gradient(tables, sampler, advantages, None, "token"), truth) < 1e-12
    assert off(expected_gradient(tables, sampler, advantages, 2.0, "token"), truth) < 1e-12, "no ratio reaches 2"


def test_truncation_takes_what_lies_over_the_cap():
    """A token counts with min(its probability, cap x the sampler's): the bias is what the truncated ones lack."""
    tables, advantages = make_tables(6, 1)
    logits = tables[()]
    drawn = (logits.detach() / 3).softmax(-1)  # a sampler that is far off
    p = logits.detach().softmax(-1)
    assert bool((p > 1.2 * drawn).any())
    kept = torch.minimum(p, 1.2 * drawn) * advantages
    expected = torch.autograd.grad(-(kept * logits.log_softmax(-1)).sum(), logits)
    assert off(expected_gradient(tables, lambda x: x / 3, advantages, 1.2, "token"), expected) < 1e-12


def test_of_several_tokens_the_sequence_weight_is_unbiased_and_token_weights_nearly():
    """Token weights leave the prefixes as the sampler drew them."""
    sampler, _ = ENGINES["temperature"]
    tables, advantages = make_tables(4, 3)
    truth = true_gradient(tables, advantages)
    none, token, sequence = (
        off(expected_gradient(tables, sampler, advantages, None, level), truth) for level in (None, "token", "sequence")
    )
    assert sequence < 1e-12 < 1e-4 < token < none


# The mismatch


def test_mismatch_by_hand():
    # ratios trainer / sampler 2, 1/2, 4, 1/8, 1: |difference| 1, 1, 2, 3, 0 times ln 2; k3 = ratio - 1 - ln ratio
    numbers = logprob_mismatch(TRAINER, SAMPLER, MASK)
    assert numbers["mismatch"].item() == pytest.approx(7 * math.log(2), rel=1e-5)
    assert numbers["max_mismatch"].item() == pytest.approx(3 * math.log(2), rel=1e-5)
    k3 = (2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2)) + (3 - 2 * math.log(2)) + (0.125 - 1 + 3 * math.log(2))
    assert numbers["mismatch_kl"].item() == pytest.approx(k3, rel=1e-5)


def test_mismatch_estimates_the_kl_from_sampler_to_trainer():
    """Weighed by the sampler's probabilities of all tokens, k3 sums to the exact KL(sampler, trainer)."""
    q, p = torch.randn(1, 12).double().softmax(-1), torch.randn(1, 12).double().softmax(-1)
    each = [logprob_mismatch(p[:, [x]].log(), q[:, [x]].log(), torch.ones(1, 1, dtype=torch.bool)) for x in range(12)]
    estimate = sum(float(q[0, x]) * float(each[x]["mismatch_kl"]) for x in range(12))
    assert estimate == pytest.approx(float((q * (q / p).log()).sum()), rel=1e-9)


@pytest.mark.parametrize("junk", JUNK)
def test_mismatch_ignores_padding(junk):
    dirty = logprob_mismatch(TRAINER.masked_fill(~MASK, junk), SAMPLER.masked_fill(~MASK, -junk), MASK)
    assert {k: float(v) for k, v in dirty.items()} == {
        k: float(v) for k, v in logprob_mismatch(TRAINER, SAMPLER, MASK).items()
    }
