"""The value model's head before the first update: what the body tells of the returns, by ridge regression.

A value model that starts as the reward model (paper section 3.5) has a head that was trained at EOS alone. Before EOS
it can be off by more than the returns are spread. GAE then credits the last token of every response with making up for
that: with values too high, the first updates teach the policy never to end (Yuan et al. 2025, who pretrain the value
model). Refitted on the first rollout, whose returns are known, the head starts as good as its features are.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from align.config import VALUE_FOLDS, PPOConfig
from align.maths.returns import gae
from align.models import ScalarModel, pack_responses
from align.packing import token_batches
from align.postmortem import kept_for_inspection
from align.rollout import advantages_and_returns, whitened_rewards
from align.runtime import Runtime, broadcast
from align.track import announce
from align.types import Rollout
from align.update import require_finite_numbers

RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e4)  # of the features' mean variance; the last leaves the mean return


def fit_value_head(
    rollout: Rollout, value_model: nn.Module, config: PPOConfig, runtime: Runtime
) -> tuple[Rollout, dict[str, float]]:
    """Set the head to the ridge regression of the rollout's returns (lambda 1) on the
    states before its tokens; the ridge is the best of RIDGES by cross-validation over episodes.

    Gives the rollout with the new values. Its advantages and returns are taken with values of fits that did not see the
    episode: a baseline that knows the outcome would explain it away. Also 1 - squared error / variance of the returns,
    `value_head/before` and, on episodes left out, `value_head/fitted`. Every process returns the same. With a
    `value_head_init` of "kept" nothing is fitted.
    """
    if config.value_head_init == "kept":
        return rollout, {}
    with kept_for_inspection(config.output_dir, rollout.tensors(), {"iteration": 0, "config": config}):
        require_finite_numbers(rollout)
    rewards = whitened_rewards(rollout.rewards, rollout.response_mask, config)
    targets = gae(rewards, torch.zeros_like(rewards), rollout.response_mask, config.gamma, 1.0)[1]  # (B, R)
    model = runtime.unwrap(value_model)
    with runtime.timed("update value"):
        products = runtime.sum(fold_products(replace(rollout, returns=targets), model, config, runtime))
        weights, biases, error = broadcast(fits(products))  # all folds but one, and all: (FOLDS + 1, d), (FOLDS + 1,)
        with torch.no_grad():
            model.head.weight.copy_(weights[-1:])
            model.head.bias.copy_(biases[-1:])
        unseen, values = read_values(rollout, model, weights, biases, config, runtime)

    known = targets[rollout.response_mask]
    spread = float(known.var(correction=0))
    before = float((known - rollout.values[rollout.response_mask]).square().mean())
    if spread < 1e-8:
        announce("value head: all returns of the first rollout are alike, and it says that one number")
        numbers = {}
    else:
        numbers = {"value_head/before": 1 - before / spread, "value_head/fitted": 1 - error / spread}
        announce("value head: explained variance {:.2f} as it came, {:.2f} fitted".format(*numbers.values()))
    advantages, returns = advantages_and_returns(rollout.rewards, unseen, rollout.response_mask, config)
    return replace(rollout, values=values, advantages=advantages, returns=returns), numbers


def fold_products(rollout: Rollout, model: ScalarModel, config: PPOConfig, runtime: Runtime) -> Tensor:
    """Z'Z of this process's tokens by fold, a row of Z being (state, 1, return). (FOLDS, d + 2, d + 2) in float64"""
    size, device = model.head.in_features + 2, rollout.returns.device
    products = torch.zeros(VALUE_FOLDS, size, size, dtype=torch.float64, device=device)
    for rows, part, states in states_by_batch(rollout, model, config, runtime):
        returns = part.returns[part.response_mask][:, None]
        table = torch.cat([states, torch.ones_like(returns), returns], 1)  # (M, d + 2)
        fold = (rows % VALUE_FOLDS)[:, None].expand_as(part.response_mask)[part.response_mask]  # (M,)
        for i in range(VALUE_FOLDS):
            products[i] += table[fold == i].T @ table[fold == i]
    return products


def read_values(
    rollout: Rollout, model: ScalarModel, weights: Tensor, biases: Tensor, config: PPOConfig, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Values of the fit that left the episode's fold out, and of the fit on all. (B, R) each"""
    found = torch.zeros(2, *rollout.values.shape, device=rollout.values.device)
    for rows, part, states in states_by_batch(rollout, model, config, runtime):
        each = states @ weights.T.to(states) + biases.to(states)  # (M, FOLDS + 1)
        fold = (rows % VALUE_FOLDS)[:, None].expand_as(part.response_mask)[part.response_mask]  # (M,)
        for values, chosen in zip(found, (each.gather(1, fold[:, None])[:, 0], each[:, -1]), strict=True):
            padded = torch.zeros(part.response_mask.shape, device=values.device)
            values[rows, : padded.shape[1]] = padded.masked_scatter(part.response_mask, chosen.float())
    unseen, values = runtime.sum(found)  # every process holds 0 for the others' episodes
    return unseen, values


def states_by_batch(
    rollout: Rollout, model: ScalarModel, config: PPOConfig, runtime: Runtime
) -> Iterator[tuple[Tensor, Rollout, Tensor]]:
    """(rows, their part of the rollout, what the head reads before each of their response tokens (M, d) in float64), of
    this process's episodes."""
    mine = runtime.mine(list(range(len(rollout))))
    ends = rollout.query_lengths + rollout.response_lengths
    lengths = [int(ends[i]) for i in mine]
    with model.cached_casts():
        for batch in token_batches(lengths, config.per_device_rollout_batch_size, config.microbatch_tokens):
            rows = torch.tensor([mine[i] for i in batch], device=ends.device)
            part = rollout.index(rows)
            pack, _, at = pack_responses(part.input_ids, part.query_lengths, part.response_lengths)
            with runtime.autocast(), model.cast_weights() as cast:
                states = model.states(pack, cast)[at].double()
            yield rows, part, states


def fits(products: Tensor) -> tuple[Tensor, Tensor, float]:
    """From Z'Z of each fold: weights and biases without each fold in turn, then on all, under the ridge with the least
    squared error on the folds left out; and that error, a token's mean. (FOLDS + 1, d), (FOLDS + 1,)"""
    total = products.sum(0)
    each = [solve(total - left_out) for left_out in products]
    errors = products.new_zeros(len(RIDGES))
    for (weights, biases), left_out in zip(each, products, strict=True):
        residual = torch.cat([weights, biases[:, None], -torch.ones_like(biases)[:, None]], 1)  # (ridges, d + 2)
        errors += ((residual @ left_out) * residual).sum(1)
    best = int(errors.argmin())
    weights, biases = zip(*[(w[best], b[best]) for w, b in (*each, solve(total))], strict=True)
    return torch.stack(weights).cpu(), torch.stack(biases).cpu(), float(errors[best] / total[-2, -2])


def solve(products: Tensor, ridges: tuple[float, ...] = RIDGES) -> tuple[Tensor, Tensor]:
    """Ridge regressions from Z'Z, the intercept free: weights (ridges, d), biases (ridges,)."""
    features, ones = slice(0, -2), -2
    mean = products[features, ones] / products[ones, ones]
    target = products[ones, -1] / products[ones, ones]
    covariance = products[features, features] / products[ones, ones] - mean.outer(mean)
    slope = products[features, -1] / products[ones, ones] - mean * target
    scales, directions = torch.linalg.eigh(covariance)
    tiny = torch.finfo(scales.dtype).tiny
    ridge = torch.tensor(ridges, dtype=scales.dtype, device=scales.device)[:, None] * scales.mean().clamp_min(tiny)
    weights = (directions.T @ slope) / (scales.clamp_min(0) + ridge) @ directions.T
    return weights, target - weights @ mean
