"""How well a reward model's scores predict rankings: accuracy, calibration, and the baselines it must beat.

Legend: a *pair* is two completions of one prompt. m untied pairs over all rankings. Every interval is clustered by
prompt, since the up to C(9, 2) = 36 pairs of a prompt, from any number of labelers, are not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from align.evaluate.win_rate import Interval, accuracy_interval, text_key
from align.types import Ranking, Text

Scored = tuple[Ranking, list[float]]  # a ranking and the reward model's score of each of its K completions


@dataclass(frozen=True)
class Pair:
    """One untied pair, seen from the completion that should win."""

    ranking: Ranking
    gap: float  # score of the better completion minus score of the worse
    length_gap: int  # the same in characters
    distance: float  # difference in rank, or in gold value


def ranking_accuracy(
    scored: Sequence[Scored], seed: int, columns: Sequence[str] = ("use_case", "language"), bins: int = 10
) -> dict[str, Any]:
    """How the scores order the pairs that labelers did not tie; a tie in score counts half.

    Keys: accuracy, pairs, prompts, margin (mean score gap, signed), by_k, by_labeler, by_rank_distance, by_column,
    calibration (bins), calibration_error, baselines. Accuracies are `Interval`s; `plain` makes it JSON.
    """
    pairs = [pair for ranking, scores in scored for pair in _pairs(ranking, scores, [-r for r in ranking.ranks])]
    if not pairs:
        raise ValueError("no untied pair to measure accuracy on")
    correct = _correct([p.gap for p in pairs])
    longer = _correct([p.length_gap for p in pairs])
    prompts = np.array([text_key(p.ranking.prompt) for p in pairs])
    calibration = _calibration(pairs, prompts, bins, seed)
    error = sum(b["pairs"] * abs(b["observed"].mean - b["predicted"]) for b in calibration) / len(pairs)
    return {
        "accuracy": accuracy_interval(correct, prompts, seed),
        "pairs": len(pairs),
        "prompts": len(set(prompts)),
        "margin": float(np.mean([p.gap for p in pairs])),
        "by_k": _by([str(len(p.ranking.completions)) for p in pairs], correct, prompts, seed),
        "by_labeler": _by([p.ranking.labeler or "unknown" for p in pairs], correct, prompts, seed),
        "by_rank_distance": _by([f"{p.distance:g}" for p in pairs], correct, prompts, seed),
        "by_column": {
            name: _by([str(p.ranking.columns.get(name, "unknown")) for p in pairs], correct, prompts, seed)
            for name in columns
        },
        "calibration": calibration,
        "calibration_error": error,
        "baselines": {
            "longer": accuracy_interval(longer, prompts, seed),
            "shorter": accuracy_interval(1 - longer, prompts, seed),
            "random": Interval(0.5, 0.5, 0.5),  # exact: a coin is right on half of any pairs
        },
    }


def gold_accuracy(scored: Sequence[Scored], gold: Sequence[Sequence[float]], seed: int = 0) -> Interval | None:
    """How the scores order the pairs whose `gold` values (one row of K a ranking; higher is better) differ.

    None when no pair differs, as with a policy whose every answer is worthless.
    """
    pairs = [
        pair for (ranking, scores), values in zip(scored, gold, strict=True) for pair in _pairs(ranking, scores, values)
    ]
    if not pairs:
        return None
    return accuracy_interval(_correct([p.gap for p in pairs]), [text_key(p.ranking.prompt) for p in pairs], seed)


def _pairs(ranking: Ranking, scores: Sequence[float], quality: Sequence[float]) -> list[Pair]:
    """The pairs of a ranking whose `quality` (K; higher is better) differs."""
    size = len(ranking.completions)
    if len(scores) != size or len(quality) != size:
        raise ValueError(f"{size} completions need as many scores and values, got {len(scores)} and {len(quality)}")
    if not np.isfinite([*scores, *quality]).all():
        raise ValueError(f"a score or value is NaN or infinite, for the prompt {text_key(ranking.prompt)[:80]}")
    lengths = [_characters(c) for c in ranking.completions]
    pairs = []
    for i, j in combinations(range(size), 2):
        if quality[i] == quality[j]:
            continue
        win, lose = (i, j) if quality[i] > quality[j] else (j, i)
        gaps = scores[win] - scores[lose], lengths[win] - lengths[lose], quality[win] - quality[lose]
        pairs.append(Pair(ranking, *gaps))
    return pairs


def _correct(gaps: Sequence[float]) -> NDArray[np.float64]:
    """(m,) 1 where the better completion is ahead, 0 where it is behind, 0.5 where they tie."""
    return (np.sign(np.asarray(gaps, dtype=np.float64)) + 1) / 2


def _by(labels: list[str], correct: NDArray[np.float64], prompts: NDArray[Any], seed: int) -> dict[str, dict[str, Any]]:
    """Accuracy, pairs and prompts for each label, in the labels' natural order."""
    named = np.array(labels)
    table = {}
    for label in sorted(set(labels), key=lambda s: (not _is_number(s), float(s) if _is_number(s) else 0.0, s)):
        rows = named == label
        accuracy = accuracy_interval(correct[rows], prompts[rows], seed)
        table[label] = {"accuracy": accuracy, "pairs": int(rows.sum()), "prompts": len(set(prompts[rows]))}
    return table


def _calibration(pairs: list[Pair], prompts: NDArray[Any], bins: int, seed: int) -> list[dict[str, Any]]:
    """Bradley-Terry says P(a over b) = sigmoid(score gap): is the favourite right as often as it says?

    The favourite is the completion with the higher score, so predictions lie in [0.5, 1], in `bins` of equal width;
    empty bins are left out. Each: low, high (edges), predicted (mean), observed (`Interval`), pairs.
    """
    gaps = np.array([p.gap for p in pairs])
    predicted, correct = expit(np.abs(gaps)), _correct(gaps)
    edges = np.linspace(0.5, 1.0, bins + 1)
    index = np.minimum(np.searchsorted(edges, predicted, side="right") - 1, bins - 1)
    table = []
    for b in np.unique(index):
        rows = index == b
        table.append(
            {
                "low": float(edges[b]),
                "high": float(edges[b + 1]),
                "predicted": float(predicted[rows].mean()),
                "observed": accuracy_interval(correct[rows], prompts[rows], seed),
                "pairs": int(rows.sum()),
            }
        )
    return table


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
