"""Rollout -> one PPO(-ptx) update: minibatches, microbatches, clipped losses, one optimiser step each (App. C.4).

    objective = E[min(ratio * A, clip(ratio) * A)] + ptx_coef * E_pretrain[log pi]      value: 0.5 * E[max(...)]

Every loss is a sum divided by the global count of its minibatch, taken before the first backward, so neither the
microbatch size nor the number of processes changes a gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.config import PPOConfig, exact_div
from align.errors import UserError
from align.maths.importance import logprob_mismatch
from align.maths.losses import policy_loss, value_loss
from align.models import EMA, document_nll, response_logprobs, response_values
from align.packing import token_batches
from align.postmortem import kept_for_inspection
from align.runtime import Runtime
from align.types import Rollout, UpdateStats

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
        asked = config.ptx_examples_per_episode * minibatch if config.ptx_coef > 0 else 0
        ptx = round(asked)
        if abs(ptx - asked) > 1e-9 * max(1, ptx):  # 0.07 x 100 is 7.000000000000001
            raise UserError(
                f"ptx_examples_per_episode: {minibatch} episodes times it is {asked}; choose a whole product"
            )
        exact_div(ptx, processes, "pretraining documents a minibatch / processes")
        iterations = exact_div(config.total_episodes, config.rollout_batch_size, "total_episodes / rollout_batch_size")
        micro = min(config.per_device_train_batch_size, share)
        return BatchAlgebra(config.rollout_batch_size, minibatch, micro, ptx, iterations, processes)

    def __str__(self) -> str:
        return (
            f"{self.iterations} iterations x {self.rollout} episodes; {self.rollout // self.minibatch} minibatches of "
            f"{self.minibatch} episodes + {self.ptx} pretraining documents; microbatch {self.microbatch} rows; "
            f"{self.processes} process(es)"
        )


def update(
    rollout: Rollout, learner: Learner, next_documents: PtxSource, config: PPOConfig, runtime: Runtime, iteration: int
) -> UpdateStats:
    """All inner epochs over one rollout; each episode is used once an epoch. Changes the learner's weights.

    In the first `value_warmup_iterations` the value model's alone, and no pretraining document is taken.
    """
    algebra, value_alone = BatchAlgebra.of(config, runtime.world), iteration < config.value_warmup_iterations
    parts = []
    for epoch in range(config.num_ppo_epochs):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration * 101 + epoch)
        order = torch.randperm(len(rollout), generator=generator)
        for rows in order.split(algebra.minibatch):
            documents = [] if value_alone else next_documents(algebra.ptx)
            minibatch = rollout.index(rows.to(runtime.device))
            about = {"iteration": iteration, "epoch": epoch, "rows": rows, "documents": documents, "config": config}
            with kept_for_inspection(config.output_dir, minibatch.tensors(), about):
                parts.append(optimiser_step(minibatch, documents, learner, config, runtime, value_alone))
    return UpdateStats({**UpdateStats.total(parts).sums, **sampling_mismatch(rollout, parts[0], config)})


def sampling_mismatch(rollout: Rollout, first: UpdateStats, config: PPOConfig) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's under the weights that sampled: over the rollout
    where the latter were recomputed, else over the first minibatch, whose forward passes come before any step."""
    if config.old_logprobs == "sampler":
        return {"mismatch_tokens": first.sums["tokens"], **{name: first.sums[name] for name in MISMATCH}}
    if rollout.sampler_logprobs is None:
        return {}
    numbers = logprob_mismatch(rollout.logprobs, rollout.sampler_logprobs, rollout.response_mask)
    return {"mismatch_tokens": float(rollout.response_mask.sum()), **{name: float(numbers[name]) for name in MISMATCH}}


MISMATCH = ("mismatch", "mismatch_kl", "max_mismatch")


def optimiser_step(
    minibatch: Rollout, documents: list[list[int]], learner: Learner, config: PPOConfig, runtime: Runtime,
    value_alone: bool = False,
) -> UpdateStats:  # fmt: skip
    """One minibatch: PPO's gradient, then the pretraining gradient, in the same buffers, then a step (App. C.4); the
    value model follows, so that one model's gradients exist at a time.

    What is not finite raises UserError. In the rollout or the policy's gradient it stops before any weight changes; a
    value gradient that is not finite is found only after the policy has stepped.
    """
    require_finite_numbers(minibatch)
    tokens = int(minibatch.response_mask.sum())
    ptx_tokens = sum(len(document) - 1 for document in documents)
    mine = minibatch.index(runtime.mine(torch.arange(len(minibatch), device=runtime.device)))
    micros = microbatches(mine, config, runtime)
    with runtime.timed("update policy"):
        if value_alone:
            numbers = read_policy(micros, learner.policy, config, runtime)
        else:
            numbers = policy_step(micros, documents, tokens, ptx_tokens, learner, config, runtime)
    with runtime.timed("update value"):
        value_numbers = summed(backward(micros, value_terms, learner.value_model, tokens, config, runtime), runtime)
        norm = step("value", learner.value_model, learner.value_optimizer, value_numbers, config, runtime)
        numbers |= value_numbers | {"value_grad_norm": norm}
    return UpdateStats(numbers | {"tokens": float(tokens), "ptx_tokens": float(ptx_tokens), "steps": 1.0})


def policy_step(
    micros: list[Rollout], documents: list[list[int]], tokens: int, ptx_tokens: int, learner: Learner,
    config: PPOConfig, runtime: Runtime,
) -> dict[str, float]:  # fmt: skip
    """Both gradients, a step, and the average of weights."""
    stats = backward(micros, policy_terms, learner.policy, tokens, config, runtime, more=bool(documents))
    if documents:
        stats += pretraining_backward(runtime.mine(documents), ptx_tokens, learner, config, runtime)
    numbers = summed(stats, runtime)
    norm = step("policy", learner.policy, learner.policy_optimizer, numbers, config, runtime)
    if learner.ema is not None and not getattr(learner.policy_optimizer, "step_was_skipped", False):  # float16
        learner.ema.update(runtime.unwrap(learner.policy))
    return numbers | {"policy_grad_norm": norm}


@torch.no_grad()
def read_policy(micros: list[Rollout], policy: nn.Module, config: PPOConfig, runtime: Runtime) -> dict[str, float]:
    """What the log says of a policy that does not learn yet."""
    with runtime.autocast():
        stats = [policy_terms(micro, policy, config)[1] for micro in micros]
    return summed(stats, runtime) | {"policy_grad_norm": 0.0}


def require_finite_numbers(minibatch: Rollout) -> None:
    """Stops before either model has changed."""
    for name in ("logprobs", "values", "advantages", "returns", "importance_weights"):
        if getattr(minibatch, name) is None:
            continue
        numbers = getattr(minibatch, name)[minibatch.response_mask]
        wrong = numbers[~numbers.isfinite()].tolist()
        if wrong:
            raise UserError(f"{name} is {wrong[0]}; lower learning_rate or check the reward; no weight was changed")


def backward(
    micros: list[Rollout], terms: Callable, model: nn.Module, tokens: int, config: PPOConfig, runtime: Runtime,
    more: bool = False,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Gradients of the mean loss of a response token, `tokens` over all processes; `more` of the step's will follow."""
    stats = []
    for i, micro in enumerate(micros):
        with runtime.accumulate(model, last=i == len(micros) - 1 and not more):
            with runtime.autocast():
                loss, numbers = terms(micro, model, config)
            runtime.backward(loss / tokens)
        stats.append(numbers)
    return stats


def microbatches(rollout: Rollout, config: PPOConfig, runtime: Runtime) -> list[Rollout]:
    """Rows of like length together; how they are cut changes no gradient. Every process gets as many as the others."""
    lengths = (rollout.query_lengths + rollout.response_lengths).tolist()
    batches = token_batches(lengths, config.per_device_train_batch_size, config.microbatch_tokens)
    return [rollout.index(torch.tensor(rows, device=rollout.input_ids.device)) for rows in runtime.as_many(batches)]


def policy_terms(micro: Rollout, policy: nn.Module, config: PPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    rows = micro.input_ids, micro.query_lengths, micro.response_lengths
    logprobs, entropies = response_logprobs(policy, *rows, config.temperature, with_entropies=True)
    old, mask = micro.logprobs, micro.response_mask
    weights = micro.importance_weights
    loss, stats = policy_loss(logprobs, old, micro.advantages, mask, config.cliprange, weights, config.dual_clip)
    if config.old_logprobs == "sampler":
        stats |= logprob_mismatch(logprobs, old, mask)
    return loss, stats | {"entropy": entropies.sum()}


def value_terms(micro: Rollout, value_model: nn.Module, config: PPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    values = response_values(value_model, micro.input_ids, micro.query_lengths, micro.response_lengths)
    return value_loss(values, micro.values, micro.returns, micro.response_mask, config.cliprange_value)


def pretraining_backward(
    documents: list[list[int]], total: int, learner: Learner, config: PPOConfig, runtime: Runtime
) -> list[dict[str, Tensor]]:
    """Gradient of ptx_coef times the mean loss of a pretraining token, `total` tokens over all processes."""
    batches = token_batches([len(d) for d in documents], config.per_device_train_batch_size, config.microbatch_tokens)
    batches = runtime.as_many(batches)
    stats = []
    for i, picked in enumerate(batches):
        with runtime.accumulate(learner.policy, last=i == len(batches) - 1):
            with runtime.autocast():
                loss = document_nll(learner.policy, [documents[row] for row in picked], runtime.device)
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
    if not maxima:
        return totals
    return totals | dict(zip(maxima, runtime.max(torch.stack(list(maxima.values()))).tolist(), strict=True))


def step(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, numbers: dict[str, float], config: PPOConfig,
    runtime: Runtime,
) -> float:  # fmt: skip
    """Clip, check, step; returns the gradient's norm. What is not finite stops the run before it changes this model.

    Under float16 infinite gradients are the loss scaler's business, which skips their step.
    """
    norm = runtime.clip_grad_norm(model.parameters(), config.max_grad_norm)
    for key, value in (numbers if runtime.scales_loss else numbers | {f"{name}_grad_norm": norm}).items():
        if not math.isfinite(value):
            raise UserError(f"{key} is {value}; {REMEDY[name]}")
    optimizer.step()
    optimizer.zero_grad()
    return norm


REMEDY = {
    "policy": "lower learning_rate or check the reward; the policy and the value model are as before this minibatch",
    "value": "lower value_learning_rate or check the reward; the value model is as before this minibatch, the policy "
    "has taken its step, and no checkpoint holds it",
}
