"""Prompts -> Rollout: sample, score, and shape the rewards of one PPO iteration (paper section 3.5)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from align.config import PPOConfig
from align.errors import UserError
from align.generate import Sampler, uniform_numbers
from align.maths.importance import importance_weights
from align.maths.kl import kl_estimate
from align.maths.masks import last_index, length_mask
from align.maths.reduce import masked_mean, whiten
from align.maths.returns import gae, token_rewards
from align.models import response_logprobs, response_values
from align.packing import token_batches
from align.postmortem import kept_for_inspection
from align.rewards import RewardSum
from align.runtime import Runtime
from align.track import announce
from align.types import Episode, Prompt, Rollout, pad_rows


@dataclass(frozen=True)
class Query:
    """A prompt and its tokens."""

    prompt: Prompt
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Actors:
    """What a rollout is computed with. `policy` and `value_model` are the trained modules, wrapped or not."""

    policy: nn.Module
    ref_policy: nn.Module
    value_model: nn.Module
    reward: RewardSum
    sampler: Sampler
    pad_id: int


def collect_rollout(
    queries: list[Query], actors: Actors, config: PPOConfig, runtime: Runtime, kl_coef: float, iteration: int
) -> Rollout:
    """One iteration's episodes. Every process samples its share; every process returns the whole rollout."""
    # 1. Respond: one sample a query at the rollout temperature, from numbers that belong to the episode.
    uniforms = uniform_numbers(len(queries), config.max_new_tokens, config.seed, iteration)
    mine = runtime.mine(queries)
    with runtime.timed("sample"), runtime.for_sampling(actors.policy), runtime.autocast():
        episodes = actors.sampler([list(q.tokens) for q in mine], runtime.mine(uniforms), config.temperature)

    # 2. Log-probabilities under the policy and the reference, and values, at each response token.
    with torch.no_grad(), runtime.autocast():
        tensors = score_episodes(episodes, actors, config, runtime)

    # 3. Score: one scalar an episode, read at EOS.
    about, prompts = {"iteration": iteration, "config": config}, [q.prompt for q in mine]
    with (
        kept_for_inspection(config.output_dir, tensors, about, everywhere=True),
        runtime.timed("reward"), torch.no_grad(), runtime.autocast(),
    ):  # fmt: skip
        scored = actors.reward(prompts, episodes)
    columns = torch.tensor([scored.total, *scored.parts.values()], device=runtime.device).T  # (B, 1 + parts)

    # 4. Exchange: from here on every process holds all episodes, in global order.
    tensors = {name: runtime.gather_rows(value, actors.pad_id) for name, value in tensors.items()}
    raw_scores, *parts = runtime.gather_rows(columns.contiguous()).unbind(1)

    # 5. Shape: missing-EOS rule, KL penalty a token, score on the last token; then GAE and whitening.
    rollout = shape_rewards(tensors, raw_scores, config, kl_coef)
    return replace(rollout, part_scores=dict(zip(scored.parts, parts, strict=True)))


def score_episodes(episodes: list[Episode], actors: Actors, config: PPOConfig, runtime: Runtime) -> dict[str, Tensor]:
    """Tokens, log-probabilities and values of this process's episodes, in their order. Rows (B, T) or (B, R)."""
    batch = episode_tensors(episodes, actors.pad_id, runtime.device)
    batches = runtime.as_many(
        token_batches(
            (batch["query_lengths"] + batch["response_lengths"]).tolist(),
            config.per_device_rollout_batch_size,
            config.microbatch_tokens,
        )
    )

    def collect(read: Callable[..., Tensor], model: nn.Module) -> Tensor:
        out = torch.zeros(len(episodes), int(batch["response_lengths"].max()), device=runtime.device)  # (B, R)
        with runtime.unwrap(model).hold():
            for rows in batches:
                part = [batch[name][rows] for name in ("input_ids", "query_lengths", "response_lengths")]
                out[rows, : int(part[2].max())] = read(model, *part)
        return out

    def logprobs(model: nn.Module, *rows: Tensor) -> Tensor:
        return response_logprobs(model, *rows, config.temperature)[0]

    with runtime.timed("logprobs"):
        batch |= sampler_logprobs(episodes, config, runtime.device)
        reuse = config.old_logprobs == "sampler"
        batch["logprobs"] = batch["sampler_logprobs"] if reuse else collect(logprobs, actors.policy)
    with runtime.timed("reference"):
        batch["ref_logprobs"] = collect(logprobs, actors.ref_policy)
    with runtime.timed("value"):
        batch["values"] = collect(response_values, actors.value_model)
    return batch


def sampler_logprobs(episodes: list[Episode], config: PPOConfig, device: torch.device) -> dict[str, Tensor]:
    """{"sampler_logprobs": (B, R)}, or nothing from a sampler that gives none, where none are needed."""
    if all(episode.logprobs is not None for episode in episodes):
        rows = [list(episode.logprobs) for episode in episodes]
        return {"sampler_logprobs": pad_rows(rows, 0.0, torch.float32).to(device)}
    if config.old_logprobs == "sampler":
        raise UserError("old_logprobs: sampler, but this sampler gives none; set old_logprobs: recompute")
    if config.weighs_tokens:
        raise UserError("importance_weight_cap, importance_weight_band: this sampler gives no log-probabilities; unset")
    return {}


def episode_tensors(episodes: list[Episode], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    return {
        "input_ids": pad_rows([[*e.query, *e.response] for e in episodes], pad_id).to(device),
        "query_lengths": torch.tensor([len(e.query) for e in episodes], device=device),
        "response_lengths": torch.tensor([len(e.response) for e in episodes], device=device),
        "finished": torch.tensor([e.finished for e in episodes], device=device),
    }


def shape_rewards(tensors: dict[str, Tensor], raw_scores: Tensor, config: PPOConfig, kl_coef: float) -> Rollout:
    """Scores and log-probabilities to rewards, advantages and returns (Eq. 2)."""
    mask = length_mask(tensors["response_lengths"], tensors["logprobs"].shape[1])
    scores = apply_eos_rule(raw_scores, tensors["finished"], config.missing_eos_penalty, config.missing_eos_mode)
    if config.reward_clip is not None:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    kl = kl_estimate(tensors["logprobs"], tensors["ref_logprobs"], config.kl_estimator)
    rewards = token_rewards(scores, kl, mask, kl_coef)
    advantages, returns = advantages_and_returns(rewards, tensors["values"], mask, config)
    return Rollout(
        **tensors, response_mask=mask, scores=scores, raw_scores=raw_scores, rewards=rewards,
        advantages=advantages, returns=returns, importance_weights=token_weights(tensors, mask, config),
    )  # fmt: skip


def advantages_and_returns(rewards: Tensor, values: Tensor, mask: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """GAE (Schulman et al. 2015), whitened as the config asks. (B, R) each"""
    advantages, returns = gae(whitened_rewards(rewards, mask, config), values, mask, config.gamma, config.lam)
    return whiten(advantages, mask) if config.whiten_advantages else advantages, returns


def whitened_rewards(rewards: Tensor, mask: Tensor, config: PPOConfig) -> Tensor:
    return whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards


def token_weights(tensors: dict[str, Tensor], mask: Tensor, config: PPOConfig) -> Tensor | None:
    """What each token's policy loss is multiplied with, for tokens that another engine drew. (B, R)"""
    if not config.weighs_tokens:
        return None
    cap, band, level = config.importance_weight_cap, config.importance_weight_band, config.importance_weight_level
    return importance_weights(tensors["logprobs"], tensors["sampler_logprobs"], mask, cap, band, level)


def warn_of_rewarded_cuts(rollout: Rollout, config: PPOConfig) -> None:
    """Where answers that end score less than those that do not get, the policy learns never to end."""
    penalty, ended = config.missing_eos_penalty, rollout.raw_scores[rollout.finished]
    if config.missing_eos_mode == "replace" and penalty is not None and len(ended) and float(ended.mean()) < penalty:
        announce(
            f"warning: answers that end score {float(ended.mean()):.2f} on average, and one that does not scores "
            f"missing_eos_penalty {penalty:g}: never to end is what pays; lower it, or set missing_eos_mode: subtract"
        )


def apply_eos_rule(scores: Tensor, finished: Tensor, penalty: float | None, mode: str) -> Tensor:
    """What a response without EOS earns: `penalty` instead of its score, or its score minus |penalty|. (B,) -> (B,)"""
    if penalty is None:
        return scores
    unfinished = torch.full_like(scores, penalty) if mode == "replace" else scores - abs(penalty)
    return torch.where(finished, scores, unfinished)


@torch.no_grad()
def check_step_zero(
    rollout: Rollout, actors: Actors, config: PPOConfig, runtime: Runtime, eos_id: int, value_term: str | None
) -> dict[str, float | None]:
    """Before the first update: ratio 1, KL 0 to the reference, value = score at the last token, score read at EOS.

    `value_term` is the term of the reward that the value model starts as; None: there is no score to compare with.

    Stops the run with what is off and why it may be. Looks at the first microbatch, through the training forward.
    """
    at_last = rollout.input_ids.gather(1, last_index(rollout.query_lengths, rollout.response_lengths)[:, None])[:, 0]
    if bool((at_last[rollout.finished] != eos_id).any()):
        raise UserError("step-zero check: a finished response does not end in EOS; the sampler and tokenizer disagree")
    warn_of_engine(rollout, config, runtime.half)
    warn_of_rewarded_cuts(rollout, config)
    head = rollout.index(torch.arange(min(len(rollout), config.per_device_train_batch_size), device=runtime.device))
    with runtime.autocast():
        rows = head.input_ids, head.query_lengths, head.response_lengths
        new, _ = response_logprobs(actors.policy, *rows, config.temperature)
        gap, largest_score = value_gap(head, actors, runtime, eos_id, value_term)
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


def value_gap(
    head: Rollout, actors: Actors, runtime: Runtime, eos_id: int, value_term: str | None
) -> tuple[float | None, float]:
    """The largest |value - score| where the reward model reads it, and the largest |score|; None and 0 where no episode
    has a score to compare with."""
    ids, ends = closed(head, eos_id)
    room = runtime.unwrap(actors.value_model).context
    fit = torch.ones_like(head.finished) if room is None else ends < room  # what fills the context is read cut
    if value_term is None or not bool(fit.any()):
        return None, 0.0
    values = response_values(actors.value_model, ids[fit], ends[fit], torch.ones_like(ends[fit]))[:, 0]
    scores = head.part_scores[f"scores/{value_term}"][fit]
    return float((values - scores).abs().max()), float(scores.abs().max())


def step_zero_limits(half: bool, eight_bit: bool, largest_score: float) -> dict[str, float]:
    """Of the ratio; of an episode's KL, in half precision of a token's mean log-ratio; of a value's distance from its
    score, of which half precision keeps 8 bits. `eight_bit`: the reference and the reward model are rounded."""
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


CAUSES = {
    "ratio_max_deviation": "sampling and training see different log-probabilities: dropout, temperature, precision; "
    "with old_logprobs: sampler try recompute",
    "kl": "the policy is not its reference: other weights or a stale checkpoint",
    "value_minus_score": "the value model is not the reward model: other weights, head or token",
}


def warn_of_engine(rollout: Rollout, config: PPOConfig, half: bool) -> None:
    """Where the sampler's log-probabilities are far from the trainer's, but nothing makes up for it."""
    if config.old_logprobs == "sampler" or rollout.sampler_logprobs is None or config.weighs_tokens:
        return
    mean = float(masked_mean((rollout.logprobs - rollout.sampler_logprobs).abs(), rollout.response_mask))
    if not mean <= TOKEN_LIMIT[half]:
        announce(
            f"warning: the sampler's log-probabilities are {mean:.4g} nats a token from the trainer's, over "
            f"{TOKEN_LIMIT[half]:g}: other numerics or temperature; mend it, or set importance_weight_cap: 2"
        )


TOKEN_LIMIT = {False: 1e-3, True: 0.05}  # nats between two log-probabilities of a token; half precision: True
EIGHT_BIT_LIMIT = 1.0  # of an episode's KL and a value, compared with a model rounded to 8 bits
