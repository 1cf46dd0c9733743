"""Prompts -> Rollout: sample, score, and shape the rewards of one PPO iteration (paper section 3.5)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from align.config import PPOConfig
from align.errors import UserError
from align.generate import Sampler, uniform_numbers
from align.maths.kl import kl_estimate
from align.maths.masks import last_index, length_mask
from align.maths.reduce import whiten
from align.maths.returns import gae, token_rewards
from align.models import response_logprobs, response_values
from align.packing import token_batches
from align.rewards import RewardSum
from align.runtime import Runtime
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
    shares = uniforms[runtime.rank :: runtime.world]
    with runtime.timed("sample"), runtime.autocast():
        episodes = actors.sampler([list(q.tokens) for q in mine], shares, config.temperature)

    # 2. Log-probabilities under the policy and the reference, and values, at each response token.
    with torch.no_grad(), runtime.autocast():
        tensors = score_episodes(episodes, actors, config, runtime)

    # 3. Score: one scalar an episode, read at EOS.
    with runtime.timed("reward"), torch.no_grad(), runtime.autocast():
        scored = actors.reward([q.prompt for q in mine], episodes)
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
        if config.old_logprobs == "sampler":
            drawn = [list(require_logprobs(episode)) for episode in episodes]
            batch["logprobs"] = pad_rows(drawn, 0.0, torch.float32).to(runtime.device)
        else:
            batch["logprobs"] = collect(logprobs, actors.policy)
    with runtime.timed("reference"):
        batch["ref_logprobs"] = collect(logprobs, actors.ref_policy)
    with runtime.timed("value"):
        batch["values"] = collect(response_values, actors.value_model)
    return batch


def require_logprobs(episode: Episode) -> tuple[float, ...]:
    if episode.logprobs is None:
        raise UserError("old_logprobs: sampler, but this sampler gives none; set old_logprobs: recompute")
    return episode.logprobs


def episode_tensors(episodes: list[Episode], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    return {
        "input_ids": pad_rows([[*e.query, *e.response] for e in episodes], pad_id).to(device),
        "query_lengths": torch.tensor([len(e.query) for e in episodes], device=device),
        "response_lengths": torch.tensor([len(e.response) for e in episodes], device=device),
        "finished": torch.tensor([e.finished for e in episodes], device=device),
    }


def shape_rewards(tensors: dict[str, Tensor], raw_scores: Tensor, config: PPOConfig, kl_coef: float) -> Rollout:
    """Scores and log-probabilities to rewards, advantages and returns (Eq. 2; GAE of Schulman et al. 2015)."""
    mask = length_mask(tensors["response_lengths"], tensors["logprobs"].shape[1])
    scores = apply_eos_rule(raw_scores, tensors["finished"], config.missing_eos_penalty, config.missing_eos_mode)
    if config.reward_clip is not None:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    kl = kl_estimate(tensors["logprobs"], tensors["ref_logprobs"], config.kl_estimator)
    rewards = token_rewards(scores, kl, mask, kl_coef)
    shaped = whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards
    advantages, returns = gae(shaped, tensors["values"], mask, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Rollout(
        **tensors, response_mask=mask, scores=scores, raw_scores=raw_scores, rewards=rewards,
        advantages=advantages, returns=returns,
    )  # fmt: skip


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
    head = rollout.index(torch.arange(min(len(rollout), config.per_device_train_batch_size), device=runtime.device))
    with runtime.autocast():
        rows = head.input_ids, head.query_lengths, head.response_lengths
        new, _ = response_logprobs(actors.policy, *rows, config.temperature)
        values = response_values(actors.value_model, head.input_ids, rows[1] + rows[2], torch.ones_like(rows[2]))[:, 0]
    ratio = torch.where(head.response_mask, (new - head.logprobs).exp() - 1, torch.zeros_like(new)).abs().max()
    u = torch.where(rollout.response_mask, rollout.logprobs - rollout.ref_logprobs, torch.zeros_like(rollout.logprobs))
    numbers: dict[str, float | None] = {"ratio_max_deviation": float(ratio), "kl": float(u.sum(1).abs().max())}
    score = head.part_scores[f"scores/{value_term}"] if value_term else None
    numbers["value_minus_score"] = None if score is None else float((values - score).abs().max())
    at_last = rollout.input_ids.gather(1, last_index(rollout.query_lengths, rollout.response_lengths)[:, None])[:, 0]
    tolerance = 0.1 if runtime.half else 1e-3
    if bool((at_last[rollout.finished] != eos_id).any()):
        raise UserError("step-zero check: a finished response does not end in EOS; the sampler and tokenizer disagree")
    for name, cause in (
        (
            "ratio_max_deviation",
            "sampling and training see different log-probabilities: dropout, temperature, precision",
        ),
        ("kl", "the policy is not its reference: other weights or a stale checkpoint"),
        ("value_minus_score", "the value model is not the reward model: other weights, head or token"),
    ):
        if numbers[name] is not None and not numbers[name] <= tolerance:
            raise UserError(f"step-zero check: {name} is {numbers[name]:.4g}, over {tolerance:g}: {cause}")
    return numbers
