"""Losses as sums with their statistics; the caller divides by the global count of prompts or tokens."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from align.maths.reduce import masked_sum


def ranking_loss(scores: Tensor, ranks: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over prompts of the mean over C(K, 2) pairs of -log sigmoid(better - worse) (paper Eq. 1).

    scores, ranks, mask: (B, K), K padded to the largest; lower rank is better. A tied pair adds nothing to the
    numerator and stays in C(K, 2), so a prompt full of ties weighs less and one of only ties gives 0.
    Stats: untied pairs, pairs the scores order rightly (equal scores count half), sum of margins.
    """
    assert scores.shape == ranks.shape == mask.shape
    scores = torch.where(mask, scores, torch.zeros_like(scores))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    gap = scores[:, :, None] - scores[:, None, :]  # (B, K, K) row minus column
    better = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    size = mask.sum(1)
    pairs = (size * (size - 1) / 2).clamp(min=1)  # (B,) all C(K, 2)
    per_prompt = torch.where(better, softplus(-gap), torch.zeros_like(gap)).sum((1, 2)) / pairs
    with torch.no_grad():
        stats = {
            "pairs": better.sum(),
            "correct": ((gap > 0) & better).sum() + 0.5 * ((gap == 0) & better).sum(),
            "margin": masked_sum(gap, better),
        }
    return per_prompt.sum(), stats


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float,
    weights: Tensor | None = None, dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Sum over tokens of -min(ratio * A, clip(ratio, 1 - c, 1 + c) * A) (Schulman et al. 2017, Eq. 7), each times its
    weight where `weights` are given. All (B, R).

    `dual_clip`: where A < 0 a token costs at most dual_clip * |A|, whatever its ratio (Ye et al. 2020, Eq. 4).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    loss = masked_sum(losses if weights is None else losses * weights, mask)
    with torch.no_grad():
        stats = {
            "policy_loss": loss.detach(),
            "policy_clipped": masked_sum((clipped > unclipped).float(), mask),
            "approxkl": masked_sum(log_ratio**2 / 2, mask),
            "ratio": masked_sum(ratio, mask),
            "max_ratio_deviation": torch.where(mask, (ratio - 1).abs(), torch.zeros_like(ratio)).max(),
        }
    return loss, stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of 0.5 * max((V - R)^2, (clip(V, V_old +- c) - R)^2); plain squares if c is None. All (B, R)."""
    values, old_values, returns = (torch.where(mask, x, torch.zeros_like(x)) for x in (values, old_values, returns))
    unclipped = (values - returns) ** 2
    worst = unclipped
    if cliprange_value is not None:
        near = torch.minimum(torch.maximum(values, old_values - cliprange_value), old_values + cliprange_value)
        worst = torch.maximum(unclipped, (near - returns) ** 2)
    loss = 0.5 * masked_sum(worst, mask)
    with torch.no_grad():
        clipped = masked_sum((worst > unclipped).float(), mask)
    return loss, {"value_loss": loss.detach(), "value_clipped": clipped}
