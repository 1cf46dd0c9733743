"""Rewards: a model, a function by import path, or a weighted sum. Episodes in, one score each out."""

import importlib
import math
from collections.abc import Callable
from typing import Any, Protocol

from align.errors import UserError
from align.lora import WithoutAdapter
from align.models import ScalarModel
from align.ranking import score_rows
from align.text import Codec
from align.types import Episode, Prompt, Rollout


class Reward(Protocol):
    def __call__(self, prompts: list[Prompt], episodes: list[Episode]) -> list[float]:
        """One score an episode, higher is better."""


class ModelReward:
    """A reward model that shares the policy's tokenizer: it reads the very tokens that were sampled."""

    def __init__(
        self, model: ScalarModel | WithoutAdapter, pad_id: int, batch_size: int, max_tokens: int | None = None
    ):
        self.model, self.pad_id, self.batch_size, self.max_tokens = model, pad_id, batch_size, max_tokens

    def __call__(self, prompts: list[Prompt], episodes: list[Episode]) -> list[float]:
        rows = [[*e.query, *e.response] for e in episodes]
        with self.model.hold():
            return score_rows(self.model, rows, self.pad_id, self.batch_size, self.max_tokens)


class FunctionReward:
    """A Python function with TRL's signature: fn(prompts=, completions=, **columns) -> list of numbers."""

    def __init__(self, path: str, codec: Codec):
        self.path, self.codec, self.function = path, codec, import_function(path, "reward_function")

    def __call__(self, prompts: list[Prompt], episodes: list[Episode]) -> list[float]:
        completions = [self.codec.decode(episode.response) for episode in episodes]
        names = {name for prompt in prompts for name in prompt.columns}
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in sorted(names)}
        try:
            scores = self.function(prompts=[prompt.prompt for prompt in prompts], completions=completions, **columns)
        except Exception as error:  # a user's code may raise anything; it ends the run with one line
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise UserError(f"reward_function: {self.path} raised {what}; mend the function") from error
        if len(scores) != len(episodes):
            raise UserError(f"reward_function: {self.path} returned {len(scores)} scores for {len(episodes)} episodes")
        return [float(score) for score in scores]


class SumReward:
    """A weighted sum of rewards."""

    def __init__(self, parts: list[tuple[Reward, float]]):
        self.parts = parts

    def __call__(self, prompts: list[Prompt], episodes: list[Episode]) -> list[float]:
        weighted = [[weight * s for s in reward(prompts, episodes)] for reward, weight in self.parts]
        return [sum(scores) for scores in zip(*weighted, strict=True)]


class GoldJudge:
    """A judge by import path, judge(row, response, finished) with a `likert`. Logged, never trained on."""

    def __init__(self, path: str | None, codec: Codec):
        self.judge, self.codec = (import_function(path, "judge") if path else None), codec

    def score(self, prompts: list[Prompt], rollout: Rollout) -> dict[str, float]:
        """{"eval/gold": mean}, or nothing without a judge. `prompts` in the rollout's order."""
        if self.judge is None:
            return {}
        ends = (rollout.query_lengths + rollout.response_lengths).tolist()
        total = 0.0
        for i, prompt in enumerate(prompts):
            response = rollout.input_ids[i, int(rollout.query_lengths[i]) : ends[i]].tolist()
            row = {"prompt": prompt.prompt, **prompt.columns}
            total += self.judge(row, self.codec.decode(response), bool(rollout.finished[i])).likert
        return {"eval/gold": total / len(prompts)}


def require_finite(scores: list[float], prompts: list[Prompt]) -> list[float]:
    """The scores, or an error that names the first prompt whose score is NaN or infinite."""
    for number, (score, prompt) in enumerate(zip(scores, prompts, strict=True)):
        if not math.isfinite(score):
            name = prompt.columns.get("id", f"number {number} of the batch")
            raise UserError(f"reward: returned {score} for prompt {name!r}; a reward must be a finite number, mend it")
    return scores


def import_function(path: str, key: str) -> Callable[..., Any]:
    """`package.module:name` to the object it names."""
    module, colon, name = path.partition(":")
    if not (colon and module and name):
        raise UserError(f"{key}: {path!r} is no import path; write package.module:function")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}: cannot import {path!r} ({error}); check the path and PYTHONPATH") from None
