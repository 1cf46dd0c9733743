"""When the engine that samples is not the one that trains: how far apart they are, and weights that make up for it.

Both are log-probabilities of the drawn tokens at the rollout temperature, under the same weights; numerics differ.
A policy gradient over tokens drawn by the sampler is that of the trainer's policy once each is weighed by
probability under the trainer / probability under the sampler; truncated, so that a rare token cannot rule the step.
"""

import torch
from torch import Tensor

from align.maths.kl import kl_estimate
from align.maths.reduce import masked_sum

LEVELS = ("token", "sequence")


def importance_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float | None, band: float | None, level: str
) -> Tensor:
    """Trainer's probability / sampler's, at most `cap`, and 0 outside [1 / band, band]. All (B, R); 0 off the mask.

    Level "token" takes each token's own ratio: little variance, but what led up to the token stays the sampler's.
    "sequence" gives every token the ratio of its whole response, the product: unbiased up to cap and band, of more
    variance. Exactly 1 where the two agree. Carries no gradient.
    """
    assert logprobs.shape == sampler_logprobs.shape == mask.shape and level in LEVELS
    log_weights = torch.where(mask, (logprobs - sampler_logprobs).detach(), torch.zeros_like(logprobs))
    if level == "sequence":
        log_weights = log_weights.sum(1, keepdim=True).expand_as(mask)
    weights = log_weights.exp()
    if band is not None:
        outside = (weights < 1 / band) | (weights > band)
        weights = torch.where(outside, torch.zeros_like(weights), weights)
    if cap is not None:
        weights = weights.clamp(max=cap)
    return torch.where(mask, weights, torch.zeros_like(weights))


def logprob_mismatch(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sums over tokens of the absolute difference and of KL(sampler, trainer) as k3 estimates it, and the largest
    difference, in nats. All (B, R)."""
    with torch.no_grad():
        difference = torch.where(mask, (logprobs - sampler_logprobs).abs(), torch.zeros_like(logprobs))
        kl = kl_estimate(sampler_logprobs, logprobs, "k3")
        return {
            "mismatch": difference.sum(), "mismatch_kl": masked_sum(kl, mask), "max_mismatch": difference.max()
        }  # fmt: skip
