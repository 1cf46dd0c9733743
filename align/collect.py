"""Samples of a policy, shown to labelers, as rankings."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

from align.errors import UserError
from align.text import Codec
from align.types import Episode, Prompt
from align.user_code import blamed, import_function


class Labeler(Protocol):
    """Somebody who ranks: a simulation, a program, or a queue of people behind a web page."""

    name: str

    def rank(self, row: dict[str, Any], completions: list[str], finished: list[bool]) -> list[float]:
        """A rank a completion; lower is better, equal is a tie."""


@dataclass(frozen=True)
class Candidates:
    """The distinct completions of one prompt."""

    prompt: Prompt
    completions: tuple[str, ...]
    finished: tuple[bool, ...]


NEW = ("completions", "completion", "chosen", "rejected", "messages", "labeler", "finished")
TOO_FEW = "fewer than two distinct completions"  # of a prompt: nothing to rank


def draw_k(num_prompts: int, min_k: int, max_k: int, seed: int) -> list[int]:
    """How many samples each prompt gets, uniform over min_k..max_k (paper App. C.2: 4 to 9)."""
    rng = random.Random(seed)
    return [rng.randint(min_k, max_k) for _ in range(num_prompts)]


def group(prompts: list[Prompt], sizes: list[int], episodes: list[Episode], codec: Codec) -> list[Candidates]:
    """Episodes, sizes[i] a prompt in order, to distinct texts; white space alone makes no difference."""
    grouped, position = [], 0
    for prompt, size in zip(prompts, sizes, strict=True):
        texts: dict[str, tuple[str, bool]] = {}
        for episode in episodes[position : position + size]:
            text = codec.decode(episode.response)
            texts.setdefault(" ".join(text.split()), (text, episode.finished))
        position += size
        shown = [pair for key, pair in texts.items() if key]
        grouped.append(Candidates(prompt, tuple(text for text, _ in shown), tuple(done for _, done in shown)))
    return grouped


def load_labelers(path: str, key: str, seed: int) -> list[Labeler]:
    made = import_function(path, key)
    with blamed(f"{key}: {path}", path):
        labelers = made(seed)
    if not labelers or not all(hasattr(labeler, "rank") and hasattr(labeler, "name") for labeler in labelers):
        raise UserError(f"{key}: {path} must return a list of objects with a name and a rank method")
    return labelers


def rank_all(
    candidates: list[Candidates], labelers: list[Labeler], per_prompt: int, seed: int
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Ranking rows by `per_prompt` labelers a prompt, drawn at random; what gave no ranking is counted by reason."""
    rows, skipped = [], Counter()
    rng = random.Random(f"labelers {seed}")  # a stream of its own: from `draw_k`'s, K would tell who ranked
    for candidate in candidates:
        chosen = rng.sample(labelers, min(per_prompt, len(labelers)))
        if len(candidate.completions) < 2:
            skipped[TOO_FEW] += 1
            continue
        for labeler in chosen:
            row = ranking_row(candidate, labeler)
            if len({item["rank"] for item in row["completions"]}) < 2:
                skipped["all tied"] += 1
                continue
            rows.append(row)
    return rows, skipped


def own_columns(prompt: Prompt) -> dict[str, Any]:
    """What a prompt brings along, without the answers and judgements that its file may hold: these here are new."""
    return {name: value for name, value in prompt.columns.items() if name not in NEW}


def ranking_row(candidate: Candidates, labeler: Labeler) -> dict[str, Any]:
    columns = own_columns(candidate.prompt)
    shown = {"prompt": candidate.prompt.prompt, **columns}
    with blamed(f"labelers: {labeler.name}", type(labeler).__module__):
        ranks = labeler.rank(shown, list(candidate.completions), list(candidate.finished))
    if len(ranks) != len(candidate.completions):
        raise UserError(
            f"labelers: {labeler.name} gave {len(ranks)} ranks for {len(candidate.completions)} completions"
        )
    completions = [{"completion": c, "rank": r} for c, r in zip(candidate.completions, ranks, strict=True)]
    finished = list(candidate.finished)
    return (
        {"prompt": candidate.prompt.prompt, "completions": completions, "labeler": labeler.name}
        | columns
        | {"finished": finished}
    )
