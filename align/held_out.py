"""Stage 3 on prompts that it does not train on: now and then the policy that would be saved answers them."""

import contextlib
import hashlib
import itertools
import json
from contextlib import AbstractContextManager

import torch

from align.config import PPOConfig
from align.evaluate.win_rate import Interval, paired_gain
from align.judge import GoldJudge
from align.learn import Inputs, Progress
from align.order import evenly
from align.rollout import RolloutModels, collect_rollout
from align.runtime import Runtime
from align.track import Metrics, Transcripts, announce, episode_metrics, part_metrics
from align.types import Rollout
from align.update import Learner

STREAM = -1  # of random numbers: no iteration's, and the same each time, so that answers differ by the policy alone


class HeldOut:
    """`validation_prompts` of `validation_file`, and what answers them. Nothing here changes a weight.

    The numbers depend neither on how many processes there are nor on whether the run was resumed.
    """

    def __init__(
        self, inputs: Inputs, learner: Learner, models: RolloutModels, judge: GoldJudge, config: PPOConfig,
        runtime: Runtime,
    ):  # fmt: skip
        self.queries, self.codec = evenly(inputs.held_out, config.validation_prompts), inputs.codec
        self.learner, self.models, self.judge = learner, models, judge
        self.config, self.runtime = config, runtime
        self.transcripts = Transcripts(config.output_dir, count=len(self.queries), name="validation.jsonl")
        self.last = config.total_episodes // config.rollout_batch_size
        tokens = json.dumps([query.tokens for query in self.queries])
        self.digest = hashlib.sha256(tokens.encode()).hexdigest()

    def start(self, progress: Progress, metrics: Metrics) -> None:
        """Before the first iteration: the row that later ones are compared with. A resumed run has it."""
        if not progress.done and self.due(0):
            metrics.log(0, {"episode": 0, **self.measure(progress, 0), **self.runtime.lap()})

    def due(self, done: int) -> bool:
        """Whether the prompts are answered after `done` iterations: every so many, and after the last."""
        every = self.config.eval_iterations
        return bool(self.queries) and every > 0 and (done % every == 0 or done == self.last)

    def measure(self, progress: Progress, done: int, last: bool = False) -> dict[str, float]:
        """{"validation/...": number} after `done` iterations, with the paired gain over the start; {} if not due.
        `last`: the run ends here, sooner than it was to."""
        if not (self.due(done) or (last and self.due(self.last))):
            return {}
        with self.runtime.timed("validation"), self.averaged():
            rollout = self.answer(progress.kl_coef)
        self.transcripts.write(done, rollout, self.codec)
        scores = {"raw_scores": rollout.raw_scores.tolist()}
        row = episode_metrics(rollout, "validation") | part_metrics(rollout, "validation")
        gold = self.judge.scores([query.prompt for query in self.queries], rollout)
        if gold:
            scores["gold"] = gold
            row["validation/gold"] = sum(gold) / len(gold)
        if not done:
            progress.start_scores = {"prompts": self.digest, **scores}
        gains = self.gains(progress, scores) if done else {}
        announce(said(done, row, gains))
        for name, gain in gains.items():
            key = f"validation/{name}"
            row |= {key: gain.mean, f"{key}_low": gain.low, f"{key}_high": gain.high}
        return row

    def averaged(self) -> AbstractContextManager:
        """The policy that would be saved now."""
        ema = self.learner.ema
        return ema.swapped(self.runtime.unwrap(self.learner.policy)) if ema else contextlib.nullcontext()

    def answer(self, kl_coef: float) -> Rollout:
        """An episode a prompt. Processes take as many each: the first prompts again, and left out again."""
        count, world = len(self.queries), self.runtime.world
        filled = list(itertools.islice(itertools.cycle(self.queries), -(-count // world) * world))
        rollout = collect_rollout(filled, self.models, self.config, self.runtime, kl_coef, STREAM)
        return rollout.index(torch.arange(count, device=self.runtime.device))

    def gains(self, progress: Progress, scores: dict[str, list[float]]) -> dict[str, Interval]:
        """Of each score, over the same prompts' at the start; {} where the start answered others, or none."""
        before = progress.start_scores
        if before.get("prompts") != self.digest:
            return {}
        names = {"raw_scores": "gain", "gold": "gold_gain"}
        return {names[name]: paired_gain(now, before[name]) for name, now in scores.items() if name in before}


def said(done: int, row: dict[str, float], gains: dict[str, Interval]) -> str:
    more = "".join(f", {name.replace('_', ' ')} {gain}" for name, gain in gains.items())
    score, finished = row["validation/raw_scores"], row["validation/finished"]
    return (
        f"held-out prompts after {done} iterations: score {score:.3g}{more}, KL {row['validation/kl']:.3g}, "
        f"finished {finished:.2f}"
    )
