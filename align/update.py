"""Rollout -> one PPO(-ptx) update: minibatches, microbatches, clipped losses, one optimiser step each (App. C.4).

    objective = E[min(ratio * A, clip(ratio) * A)] + ptx_coef * E_pretrain[log pi]      value: 0.5 * E[max(...)]

Every loss is a sum divided by the global count of its minibatch, taken before the first backward, so neither the
microbatch size nor the number of processes changes a gradient.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.config import PPOConfig, exact_div
from align.errors import UserError
from align.maths.losses import lm_loss, policy_loss, value_loss
from align.maths.masks import length_mask
from align.maths.reduce import masked_sum
from align.models import EMA, response_logprobs, response_values
from align.runtime import Runtime
from align.types import Rollout, UpdateStats, pad_rows

PtxSource = Callable[[int], list[list[int]]]  # n -> the next n documents as tokens, the same in every process


@dataclass(frozen=True)
class Learner:
    """What an update changes: the trained modules, their optimisers, the weight average."""

    policy: nn.Module
    value_model: nn.Module
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer
    ema: EMA | None


@dataclass(frozen=True)
class BatchAlgebra:
    """How an iteration divides, all whole numbers."""

    rollout: int  # episodes an iteration
    minibatch: int  # episodes an optimiser step, all processes
    microbatch: int  # rows of one forward and backward, one process
    ptx: int  # pretraining documents an optimiser step, all processes
    iterations: int
    processes: int

    @staticmethod
    def of(config: PPOConfig, processes: int) -> "BatchAlgebra":
        minibatch = exact_div(
            config.rollout_batch_size, config.num_mini_batches, "rollout_batch_size / num_mini_batches"
        )
        share = exact_div(minibatch, processes, "minibatch episodes / processes")
        ptx = config.ptx_examples_per_episode * minibatch if config.ptx_coef > 0 else 0
        if ptx != int(ptx):
            raise UserError(f"ptx_examples_per_episode: {minibatch} episodes times it is {ptx}; choose a whole product")
        exact_div(int(ptx), processes, "pretraining documents a minibatch / processes")
        iterations = exact_div(config.total_episodes, config.rollout_batch_size, "total_episodes / rollout_batch_size")
        micro = min(config.per_device_train_batch_size, share)
        return BatchAlgebra(config.rollout_batch_size, minibatch, micro, int(ptx), iterations, processes)

    def __str__(self) -> str:
        return (
            f"{self.iterations} iterations x {self.rollout} episodes; {self.rollout // self.minibatch} minibatches of "
            f"{self.minibatch} episodes + {self.ptx} pretraining documents; microbatch {self.microbatch} rows; "
            f"{self.processes} process(es)"
        )


def update(
    rollout: Rollout, learner: Learner, next_documents: PtxSource, config: PPOConfig, runtime: Runtime, iteration: int
) -> UpdateStats:
    """All inner epochs over one rollout; each episode is used once an epoch. Changes the learner's weights."""
    algebra = BatchAlgebra.of(config, runtime.world)
    parts = []
    for epoch in range(config.num_ppo_epochs):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration * 101 + epoch)
        order = torch.randperm(len(rollout), generator=generator)
        for rows in order.split(algebra.minibatch):
            documents = next_documents(algebra.ptx)
            parts.append(optimiser_step(rollout.index(rows.to(runtime.device)), documents, learner, config, runtime))
    return UpdateStats.total(parts)


def optimiser_step(
    minibatch: Rollout, documents: list[list[int]], learner: Learner, config: PPOConfig, runtime: Runtime
) -> UpdateStats:
    """One minibatch: PPO gradient, then the pretraining gradient, in the same buffers, then one step (App. C.4)."""
    tokens = int(minibatch.response_mask.sum())
    ptx_tokens = sum(len(document) - 1 for document in documents)
    mine = minibatch.index(torch.arange(runtime.rank, len(minibatch), runtime.world, device=runtime.device))
    micros = list(microbatches(mine, config.per_device_train_batch_size))
    stats = []
    for i, micro in enumerate(micros):
        last = i == len(micros) - 1
        with runtime.accumulate(learner.policy, last=last and not documents):
            with runtime.autocast():
                loss, numbers = policy_terms(micro, learner.policy, config)
            runtime.backward(loss / tokens)
        with runtime.accumulate(learner.value_model, last=last):
            with runtime.autocast():
                value, value_numbers = value_terms(micro, learner.value_model, config)
            runtime.backward(value / tokens)
        stats.append(numbers | value_numbers)
    if documents:
        stats += pretraining_backward(runtime.mine(documents), ptx_tokens, learner, config, runtime)
    numbers = summed(stats, runtime)
    numbers |= step_optimisers(learner, config, runtime, numbers)
    return UpdateStats(numbers | {"tokens": float(tokens), "ptx_tokens": float(ptx_tokens), "steps": 1.0})


def microbatches(rollout: Rollout, size: int) -> Iterator[Rollout]:
    """Rows of like length together, so that little is padding; how they are cut changes no gradient."""
    order = (rollout.query_lengths + rollout.response_lengths).argsort(stable=True)
    for rows in order.split(size):
        yield rollout.index(rows)


def policy_terms(micro: Rollout, policy: nn.Module, config: PPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    mask = micro.response_mask
    logprobs, entropies = response_logprobs(
        policy, micro.input_ids, micro.query_lengths, mask.shape[1], config.temperature
    )
    loss, stats = policy_loss(logprobs, micro.logprobs, micro.advantages, mask, config.cliprange)
    return loss, stats | {"entropy": masked_sum(entropies, mask)}


def value_terms(micro: Rollout, value_model: nn.Module, config: PPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    values = response_values(value_model, micro.input_ids, micro.query_lengths, micro.response_mask.shape[1])
    return value_loss(values, micro.values, micro.returns, micro.response_mask, config.cliprange_value)


def pretraining_backward(
    documents: list[list[int]], total: int, learner: Learner, config: PPOConfig, runtime: Runtime
) -> list[dict[str, Tensor]]:
    """Gradient of ptx_coef times the mean loss of a pretraining token, `total` tokens over all processes."""
    size = config.per_device_train_batch_size
    documents = sorted(documents, key=len)
    starts = list(range(0, len(documents), size))
    stats = []
    for start in starts:
        rows = documents[start : start + size]
        ids = pad_rows(rows, 0).to(runtime.device)
        mask = length_mask(torch.tensor([len(row) for row in rows], device=runtime.device), ids.shape[1])
        with runtime.accumulate(learner.policy, last=start == starts[-1]):
            with runtime.autocast():
                loss = lm_loss(learner.policy(input_ids=ids, use_cache=False).logits, ids, mask)
            runtime.backward(config.ptx_coef * loss / total)
        stats.append({"ptx_loss": loss.detach()})
    return stats


def summed(stats: list[dict[str, Tensor]], runtime: Runtime) -> dict[str, float]:
    """Totals over microbatches and processes; maxima for names that start with max_."""
    names = sorted({name for part in stats for name in part})
    columns = {name: torch.stack([part[name].double() for part in stats if name in part]) for name in names}
    sums = {name: column.sum() for name, column in columns.items() if not name.startswith("max_")}
    maxima = {name: column.max() for name, column in columns.items() if name.startswith("max_")}
    totals = dict(zip(sums, runtime.sum(torch.stack(list(sums.values()))).tolist(), strict=True))
    return totals | dict(zip(maxima, runtime.max(torch.stack(list(maxima.values()))).tolist(), strict=True))


def step_optimisers(
    learner: Learner, config: PPOConfig, runtime: Runtime, numbers: dict[str, float]
) -> dict[str, float]:
    """Clip, check, step, average. A loss or gradient that is not finite stops the run before it touches a weight."""
    norms = {
        "policy_grad_norm": runtime.clip_grad_norm(learner.policy.parameters(), config.max_grad_norm),
        "value_grad_norm": runtime.clip_grad_norm(learner.value_model.parameters(), config.max_grad_norm),
    }
    for name, value in (numbers | norms).items():
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}; lower learning_rate or check the reward; no weight was changed")
    learner.policy_optimizer.step()
    learner.value_optimizer.step()
    learner.policy_optimizer.zero_grad()
    learner.value_optimizer.zero_grad()
    if learner.ema is not None:
        learner.ema.update(runtime.unwrap(learner.policy))
    return norms
