"""A judge: a user's function that says how good an answer is. Logged and reported, never trained on."""

import math
from typing import Any

from align.errors import UserError
from align.runtime import broadcast, is_main_process
from align.text import Codec
from align.types import Prompt, Rollout
from align.user_code import blamed, import_function


class Judge:
    """judge(row, response, finished) by import path. It returns an object with `likert`, a finite number, and
    `as_dict()`, which gives the report yes/no fields beside it."""

    def __init__(self, path: str):
        self.path, self.function = path, import_function(path, "judge")

    def __call__(self, row: dict[str, Any], response: str, finished: bool) -> Any:
        what = f"judge: {self.path}, asked of prompt {row.get('id', 'without id')!r},"
        with blamed(what, self.path):
            judgement = self.function(row, response, finished)
            likert = float(judgement.likert)
        if not math.isfinite(likert):
            raise UserError(f"{what} gave a likert of {likert}; give finite numbers")
        return judgement


class GoldJudge:
    """A judge's scores of episodes, for the log."""

    def __init__(self, path: str | None, codec: Codec):
        self.judge, self.codec = (Judge(path) if path else None), codec

    def score(self, prompts: list[Prompt], rollout: Rollout) -> dict[str, float]:
        """{"eval/gold": mean over an iteration's episodes}, or nothing without a judge."""
        scores = self.scores(prompts, rollout)
        return {"eval/gold": sum(scores) / len(scores)} if scores else {}

    def scores(self, prompts: list[Prompt], rollout: Rollout) -> list[float]:
        """One an episode, or none without a judge. `prompts` in the rollout's order. The main process asks."""
        if self.judge is None:
            return []
        return broadcast(self.ask(prompts, rollout) if is_main_process() else None)

    def ask(self, prompts: list[Prompt], rollout: Rollout) -> list[float]:
        ends = (rollout.query_lengths + rollout.response_lengths).tolist()
        scores = []
        for i, prompt in enumerate(prompts):
            response = rollout.input_ids[i, int(rollout.query_lengths[i]) : ends[i]].tolist()
            row = {"prompt": prompt.prompt, **prompt.columns}
            scores.append(float(self.judge(row, self.codec.decode(response), bool(rollout.finished[i])).likert))
        return scores
