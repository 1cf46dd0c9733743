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
from align.maths.masks import length_mask
from align.maths.reduce import whiten
from align.maths.returns import gae, token_rewards
from align.models import response_logprobs, response_values
from align.packing import token_batches
from align.postmortem import kept_for_inspection
from align.rewards import RewardSum
from align.runtime import Runtime
from align.types import Episode, Prompt, Rollout, pad_rows


@dataclass(frozen=True)
class Query:
    """A prompt and its tokens."""

    prompt: Prompt
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class RolloutModels:
    """What a rollout is computed with. `policy` and `value_model` are the trained modules, wrapped or not."""

    policy: nn.Module
    ref_policy: nn.Module
    value_model: nn.Module
    reward: RewardSum
    sampler: Sampler
    pad_id: int


def collect_rollout(
    queries: list[Query], models: RolloutModels, config: PPOConfig, runtime: Runtime, kl_coef: float, iteration: int
) -> Rollout:
    """One iteration's episodes. Every process samples its share; every process returns the whole rollout."""
    # 1. Respond: one sample a query at the rollout temperature, from numbers that belong to the episode.
    uniforms = uniform_numbers(len(queries), config.max_new_tokens, config.seed, iteration)
    mine = runtime.mine(queries)
    with runtime.timed("sample"), runtime.for_sampling(models.policy), runtime.autocast():
        episodes = models.sampler([list(q.tokens) for q in mine], runtime.mine(uniforms), config.temperature)

    # 2. Log-probabilities under the policy and the reference, and values, at each response token.
    with torch.no_grad(), runtime.autocast():
        tensors = score_episodes(episodes, models, config, runtime)

    # 3. Score: one scalar an episode, read at EOS.
    about, prompts = {"iteration": iteration, "config": config}, [q.prompt for q in mine]
    with (
        kept_for_inspection(config.output_dir, tensors, about, everywhere=True),
        runtime.timed("reward"), torch.no_grad(), runtime.autocast(),
    ):  # fmt: skip
        scored = models.reward(prompts, episodes)
    columns = torch.tensor([scored.total, *scored.parts.values()], device=runtime.device).T  # (B, 1 + parts)

    # 4. Exchange: from here on every process holds all episodes, in global order.
    tensors = {name: runtime.gather_rows(value, models.pad_id) for name, value in tensors.items()}
    raw_scores, *parts = runtime.gather_rows(columns.contiguous()).unbind(1)

    # 5. Shape: missing-EOS rule, KL penalty a token, score on the last token; then GAE and whitening.
    rollout = shape_rewards(tensors, raw_scores, config, kl_coef)
    return replace(rollout, part_scores=dict(zip(scored.parts, parts, strict=True)))


def score_episodes(
    episodes: list[Episode], models: RolloutModels, config: PPOConfig, runtime: Runtime
) -> dict[str, Tensor]:
    """Tokens, log-probabilities and values of this process's episodes, in their order. Rows (B, T) or (B, R)."""
    batch = episode_tensors(episodes, models.pad_id, runtime.device)
    batches = runtime.as_many(
        token_batches(
            (batch["query_lengths"] + batch["response_lengths"]).tolist(),
            config.per_device_rollout_batch_size,
            config.microbatch_tokens,
        )
    )

    def collect(read: Callable[..., Tensor], model: nn.Module) -> Tensor:
        out = torch.zeros(len(episodes), int(batch["response_lengths"].max()), device=runtime.device)  # (B, R)
        with runtime.unwrap(model).cached_casts():
            for rows in batches:
                part = [batch[name][rows] for name in ("input_ids", "query_lengths", "response_lengths")]
                out[rows, : int(part[2].max())] = read(model, *part)
        return out

    def logprobs(model: nn.Module, *rows: Tensor) -> Tensor:
        return response_logprobs(model, *rows, config.temperature)[0]

    with runtime.timed("logprobs"):
        batch |= sampler_logprobs(episodes, config, runtime.device)
        reuse = config.old_logprobs == "sampler"
        batch["logprobs"] = batch["sampler_logprobs"] if reuse else collect(logprobs, models.policy)
    with runtime.timed("reference"):
        batch["ref_logprobs"] = collect(logprobs, models.ref_policy)
    with runtime.timed("value"):
        batch["values"] = collect(response_values, models.value_model)
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


def apply_eos_rule(scores: Tensor, finished: Tensor, penalty: float | None, mode: str) -> Tensor:
    """What a response without EOS earns: `penalty` instead of its score, or its score minus |penalty|. (B,) -> (B,)"""
    if penalty is None:
        return scores
    unfinished = torch.full_like(scores, penalty) if mode == "replace" else scores - abs(penalty)
    return torch.where(finished, scores, unfinished)
