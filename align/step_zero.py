"""Before the first update: is what PPO takes for granted so? (ratio 1, KL 0, value = score, EOS at the end)"""

import torch
from torch import Tensor

from align.config import PPOConfig
from align.errors import UserError
from align.maths.masks import last_index
from align.maths.reduce import masked_mean
from align.models import response_logprobs, response_values
from align.rollout import RolloutModels
from align.runtime import Runtime
from align.track import announce
from align.types import Rollout

TOKEN_LIMIT = {False: 1e-3, True: 0.05}  # nats between two log-probabilities of a token; half precision: True
OTHER_WEIGHTS = 1.0  # nats a token, on average: rounding never is so much
EIGHT_BIT_LIMIT = 1.0  # of an episode's KL and a value, compared with a model rounded to 8 bits

CAUSES = {
    "ratio_max_deviation": "sampling and training see different log-probabilities: dropout, temperature, precision; "
    "with old_logprobs: sampler try recompute",
    "kl": "the policy is not its reference: other weights or a stale checkpoint",
    "value_minus_score": "the value model is not the reward model: other weights, head or token",
}


@torch.no_grad()
def check_step_zero(
    rollout: Rollout, models: RolloutModels, config: PPOConfig, runtime: Runtime, eos_id: int, value_term: str | None
) -> dict[str, float | None]:
    """Before the first update: ratio 1, KL 0 to the reference, value = score at the last token, score read at EOS.

    `value_term` is the term of the reward that the value model starts as; None: there is no score to compare with.

    Stops the run with what is off and why it may be. Looks at the first episodes, as many as a microbatch
    holds, through the training forward.
    """
    at_last = rollout.input_ids.gather(1, last_index(rollout.query_lengths, rollout.response_lengths)[:, None])[:, 0]
    if bool((at_last[rollout.finished] != eos_id).any()):
        raise UserError("step-zero check: a finished response does not end in EOS; the sampler and tokenizer disagree")
    warn_of_engine(rollout, config, runtime.half)
    warn_of_rewarded_cuts(rollout, config)
    head = rollout.index(torch.arange(microbatch_rows(rollout, config), device=runtime.device))
    with runtime.autocast():
        rows = head.input_ids, head.query_lengths, head.response_lengths
        new, _ = response_logprobs(models.policy, *rows, config.temperature)
        gap, largest_score = value_gap(head, models, runtime, eos_id, value_term)
    log_ratio = torch.where(head.response_mask, new - head.logprobs, torch.zeros_like(new))
    u = torch.where(rollout.response_mask, rollout.logprobs - rollout.ref_logprobs, torch.zeros_like(rollout.logprobs))
    numbers = {
        "ratio_max_deviation": float((log_ratio.exp() - 1).abs().max()),
        "kl": float(u.sum(1).abs().max()),
        "value_minus_score": gap,
    }
    measured = {name: (name, value) for name, value in numbers.items()}
    if runtime.half:  # rounds some token off by a third of a nat, so that only the mean of many says anything
        mean = float(masked_mean(log_ratio.abs(), head.response_mask))
        measured["ratio_max_deviation"] = "mean |log ratio|", mean
        mean = float(masked_mean(u.abs(), rollout.response_mask))
        measured["kl"] = "mean |log policy - log ref_policy|", mean
    limits = step_zero_limits(runtime.half, config.frozen_quantization is not None, largest_score)
    for key, (name, value) in measured.items():
        if value is not None and not value <= limits[key]:
            raise UserError(f"step-zero check: {name} is {value:.4g}, over {limits[key]:g}: {CAUSES[key]}")
    return numbers


def microbatch_rows(rollout: Rollout, config: PPOConfig) -> int:
    """How many of the first rows one forward pass may hold, by the config; one in any case."""
    rows = rollout.query_lengths + rollout.response_lengths
    if config.microbatch_tokens is not None:
        rows = rows[rows.cumsum(0) <= config.microbatch_tokens]
    return max(1, min(len(rows), config.per_device_train_batch_size))


def value_gap(
    head: Rollout, models: RolloutModels, runtime: Runtime, eos_id: int, value_term: str | None
) -> tuple[float | None, float]:
    """The largest |value - score| where the reward model reads it, and the largest |score|; None and 0 where no episode
    has a score to compare with."""
    ids, ends = closed(head, eos_id)
    room = runtime.unwrap(models.value_model).context
    fit = torch.ones_like(head.finished) if room is None else ends < room  # what fills the context is read cut
    if value_term is None or not bool(fit.any()):
        return None, 0.0
    values = response_values(models.value_model, ids[fit], ends[fit], torch.ones_like(ends[fit]))[:, 0]
    scores = head.part_scores[f"scores/{value_term}"][fit]
    return float((values - scores).abs().max()), float(scores.abs().max())


def step_zero_limits(half: bool, eight_bit: bool, largest_score: float) -> dict[str, float]:
    """How far from exact the three numbers may be: |ratio - 1|, an episode's KL (in half precision a token's mean
    |log-ratio|), |value - score|. `eight_bit`: the reference and the reward model are rounded to 8 bits."""
    token, value = TOKEN_LIMIT[half], (max(0.1, largest_score / 80) if half else TOKEN_LIMIT[False])
    if not eight_bit:
        return {"ratio_max_deviation": token, "kl": token, "value_minus_score": value}
    kl = 2 * TOKEN_LIMIT[True] if half else EIGHT_BIT_LIMIT
    return {"ratio_max_deviation": token, "kl": kl, "value_minus_score": max(value, EIGHT_BIT_LIMIT)}


def closed(rollout: Rollout, eos_id: int) -> tuple[Tensor, Tensor]:
    """The rows as a reward model reads them: EOS behind those that were cut off. ids (B, T + 1), lengths (B,)"""
    ends = rollout.query_lengths + rollout.response_lengths
    ids = torch.nn.functional.pad(rollout.input_ids, (0, 1))
    cut = (~rollout.finished).nonzero().squeeze(1)
    ids[cut, ends[cut]] = eos_id
    return ids, ends + ~rollout.finished


def warn_of_engine(rollout: Rollout, config: PPOConfig, half: bool) -> None:
    """Where the sampler's log-probabilities are far from the trainer's, but nothing makes up for it. Raises UserError
    where they are so far that vLLM cannot hold the policy's weights."""
    if config.old_logprobs == "sampler" or rollout.sampler_logprobs is None:
        return
    mean = float(masked_mean((rollout.logprobs - rollout.sampler_logprobs).abs(), rollout.response_mask))
    if config.use_vllm and not mean <= OTHER_WEIGHTS:
        raise UserError(
            f"step-zero check: vLLM's log-probabilities are {mean:.4g} nats a token from the trainer's: it does not "
            "hold this policy's weights; set use_vllm: false"
        )
    if not mean <= TOKEN_LIMIT[half] and not config.weighs_tokens:
        announce(
            f"warning: the sampler's log-probabilities are {mean:.4g} nats a token from the trainer's, over "
            f"{TOKEN_LIMIT[half]:g}: other numerics or temperature; mend it, or set importance_weight_cap: 2"
        )


def warn_of_rewarded_cuts(rollout: Rollout, config: PPOConfig) -> None:
    """Warns if answers that end score below `missing_eos_penalty` on average: not to end would then pay."""
    penalty, ended = config.missing_eos_penalty, rollout.raw_scores[rollout.finished]
    if config.missing_eos_mode == "replace" and penalty is not None and len(ended) and float(ended.mean()) < penalty:
        announce(
            f"warning: answers that end score {float(ended.mean()):.2f} on average, and one that does not scores "
            f"missing_eos_penalty {penalty:g}: never to end is what pays; lower it, or set missing_eos_mode: subtract"
        )
