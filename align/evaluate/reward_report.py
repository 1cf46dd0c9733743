"""How well a reward model's scores predict rankings: accuracy, calibration, and the baselines it must beat.

Legend: a *pair* is two completions of one prompt. m untied pairs over all rankings. Every interval is clustered by
prompt, since the up to C(9, 2) = 36 pairs of a prompt, from any number of labelers, are not independent.

Ties: a pair that the labeler tied is counted in `ties` and is in no accuracy and no calibration bin. If people follow
Bradley-Terry with ties (Davidson 1970), P(a over b | no tie) is sigmoid(gap) whatever their share of ties, so leaving
them out is what calibration asks for. A pair that the *model* ties counts half.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from align.errors import UserError
from align.evaluate.win_rate import Interval, accuracy_gain, accuracy_interval, numbered, text_key
from align.types import Ranking, contents

Scored = tuple[Ranking, list[float]]  # a ranking and the reward model's score of each of its K completions
RATIOS = {"up to 1/2": 0.5, "1/2 to 4/5": 0.8, "4/5 to 5/4": 1.25, "5/4 to 2": 2.0, "over 2": 1e12}  # upper ends
LENGTH_FOLDS = 5  # prompts that the fitted length baseline is tested on were not fitted on
RANDOM_SCORERS = 1000


@dataclass(frozen=True)
class Pair:
    """One untied pair, seen from the completion that should win."""

    ranking: Ranking
    win: int  # which of the K completions
    lose: int
    gap: float  # score of the better completion minus score of the worse
    distance: float  # difference in rank, or in gold value

    @property
    def lengths(self) -> tuple[int, int]:
        """Characters of the better and of the worse completion."""
        return tuple(len(contents(self.ranking.completions[i])) for i in (self.win, self.lose))


def ranking_accuracy(
    scored: Sequence[Scored], seed: int, columns: Sequence[str] = ("use_case",), bins: int = 10
) -> dict[str, Any]:
    """How the scores order the pairs that labelers did not tie; a tie in score counts half.

    Keys: accuracy, pairs, ties, prompts, margin (mean score gap, signed), log_loss (of sigmoid(gap), nats; 0.693 knows
    nothing), by_k, by_labeler, by_rank_distance, by_source, by_language, by_length (of the better completion, as a
    multiple of the worse), by_column (those that any ranking has), calibration (bins), calibration_error, baselines
    (see `baselines`), gain (accuracy minus that of either length baseline, paired). Accuracies are `Interval`s; `plain`
    makes it JSON.
    """
    pairs = untied_pairs(scored)
    if not pairs:
        raise ValueError("no untied pair to measure accuracy on")
    correct, prompts = right(pairs), prompts_of(pairs)
    calibration = _calibration(pairs, prompts, bins, seed)
    error = sum(b["pairs"] * abs(b["observed"].mean - b["predicted"]) for b in calibration) / len(pairs)
    groups = groups_of(pairs, [name for name in columns if any(name in p.ranking.columns for p in pairs)])
    tables = {name: _by(labels, correct, prompts, seed) for name, labels in groups.items()}
    return {
        "accuracy": accuracy_interval(correct, prompts, seed),
        "pairs": len(pairs),
        "ties": sum(len(s) * (len(s) - 1) // 2 for _, s in scored) - len(pairs),
        "prompts": len(set(prompts)),
        "margin": float(np.mean([p.gap for p in pairs])),
        "log_loss": float(-np.mean(log_expit([p.gap for p in pairs]))),
        **{name: table for name, table in tables.items() if name.startswith("by_")},
        "by_column": {name: table for name, table in tables.items() if not name.startswith("by_")},
        "calibration": calibration,
        "calibration_error": error,
        **baselines(pairs, correct, prompts, seed),
    }


def untied_pairs(scored: Sequence[Scored]) -> list[Pair]:
    return [pair for ranking, scores in scored for pair in _pairs(ranking, scores, [-r for r in ranking.ranks])]


def prompts_of(pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """(m,) number of each pair's prompt: what intervals are clustered by."""
    return numbered([text_key(p.ranking.prompt) for p in pairs])


def right(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """(m,) 1 where the better completion is ahead, 0 where it is behind, 0.5 where they tie."""
    return _correct([p.gap for p in pairs])


def groups_of(pairs: Sequence[Pair], columns: Sequence[str] = ()) -> dict[str, list[str]]:
    """Name of a breakdown -> the group of each of its m pairs."""
    groups = {
        "by_k": [str(len(p.ranking.completions)) for p in pairs],
        "by_labeler": [p.ranking.labeler or "unknown" for p in pairs],
        "by_rank_distance": [f"{p.distance:g}" for p in pairs],
        "by_source": [str(p.ranking.columns.get("source") or "unknown") for p in pairs],
        "by_language": [str(p.ranking.columns.get("language") or "unknown") for p in pairs],
        "by_length": [_ratio(*p.lengths) for p in pairs],
    }
    return groups | {name: [str(p.ranking.columns.get(name) or "unknown") for p in pairs] for name in columns}


def baselines(
    pairs: Sequence[Pair], correct: NDArray[np.float64], prompts: NDArray[np.int64], seed: int
) -> dict[str, dict[str, Interval]]:
    """What a scorer that reads nothing reaches on the same pairs.

    length_only: the longer is better (characters). length_fitted: a Bradley-Terry score quadratic in the logarithm of
    the length, fitted on other prompts of the same set (`LENGTH_FOLDS`). random: 0.5, with the range in which 95% of
    scorers that draw each completion's score at random fall on these very pairs.
    """
    longer = _correct([a - b for a, b in (p.lengths for p in pairs)])
    fitted = _correct(_fitted_length_gaps(pairs, prompts, seed))
    return {
        "baselines": {
            "length_only": accuracy_interval(longer, prompts, seed),
            "length_fitted": accuracy_interval(fitted, prompts, seed),
            "random": _random_scorers(pairs, seed),
        },
        "gain": {
            "length_only": accuracy_gain(correct, longer, prompts, seed),
            "length_fitted": accuracy_gain(correct, fitted, prompts, seed),
        },
    }


def _fitted_length_gaps(pairs: Sequence[Pair], prompts: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """(m,) score gaps of the fitted length baseline, each by a fit without the prompts of its fold."""
    logs = np.log1p(np.array([p.lengths for p in pairs], dtype=np.float64))  # (m, 2) better, worse
    logs = (logs - logs.mean()) / max(float(logs.std()), 1e-9)
    features = np.stack([logs[:, 0] - logs[:, 1], logs[:, 0] ** 2 - logs[:, 1] ** 2], axis=1)  # (m, 2)
    folds = np.random.default_rng(seed).permutation(prompts.max() + 1)[prompts] % LENGTH_FOLDS  # (m,)
    gaps = np.zeros(len(pairs))
    for fold in np.unique(folds):
        gaps[folds == fold] = features[folds == fold] @ _logistic(features[folds != fold])
    return gaps


def _logistic(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """w (d,) that maximises the likelihood that sigmoid(features @ w) gives to wins alone, with a slight pull to 0."""

    def loss(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margins = features @ w
        return -log_expit(margins).sum() + 0.5 * w @ w, w - expit(-margins) @ features

    return minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B").x


def _random_scorers(pairs: Sequence[Pair], seed: int) -> Interval:
    """Mean and central 95% of the accuracy of scorers that give each completion of a prompt one random score."""
    keys = [(text_key(p.ranking.prompt), text_key(p.ranking.completions[i])) for p in pairs for i in (p.win, p.lose)]
    numbers: dict[tuple[str, str], int] = {}
    win, lose = np.array([numbers.setdefault(key, len(numbers)) for key in keys]).reshape(-1, 2).T
    rng = np.random.default_rng(seed)
    draws = (rng.random(len(numbers)) for _ in range(RANDOM_SCORERS))
    accuracies = [np.mean(scores[win] > scores[lose]) for scores in draws]
    low, high = np.quantile(accuracies, (0.025, 0.975))
    return Interval(0.5, min(float(low), 0.5), max(float(high), 0.5))


def pooled_accuracy(scored: Sequence[Scored], seed: int) -> dict[str, Any] | None:
    """Accuracy with its interval on all untied pairs, how many, and of how many prompts; None when there are none."""
    pairs = untied_pairs(scored)
    if not pairs:
        return None
    prompts = prompts_of(pairs)
    accuracy = accuracy_interval(right(pairs), prompts, seed)
    return {"accuracy": accuracy, "pairs": len(pairs), "prompts": len(np.unique(prompts))}


def gold_accuracy(scored: Sequence[Scored], gold: Sequence[Sequence[float]], seed: int = 0) -> Interval | None:
    """How the scores order the pairs whose `gold` values (one row of K a ranking; higher is better) differ.

    None when no pair differs, as with a policy whose every answer is worthless.
    """
    pairs = [
        pair for (ranking, scores), values in zip(scored, gold, strict=True) for pair in _pairs(ranking, scores, values)
    ]
    if not pairs:
        return None
    return accuracy_interval(right(pairs), prompts_of(pairs), seed)


def _pairs(ranking: Ranking, scores: Sequence[float], quality: Sequence[float]) -> list[Pair]:
    """The pairs of a ranking whose `quality` (K; higher is better) differs."""
    size = len(ranking.completions)
    if len(scores) != size or len(quality) != size:
        raise ValueError(f"{size} completions need as many scores and values, got {len(scores)} and {len(quality)}")
    if not np.isfinite([*scores, *quality]).all():
        raise ValueError("a score or value is NaN or infinite")
    pairs = []
    for i, j in combinations(range(size), 2):
        if quality[i] == quality[j]:
            continue
        win, lose = (i, j) if quality[i] > quality[j] else (j, i)
        pairs.append(Pair(ranking, win, lose, scores[win] - scores[lose], quality[win] - quality[lose]))
    return pairs


def _correct(gaps: Sequence[float]) -> NDArray[np.float64]:
    return (np.sign(np.asarray(gaps, dtype=np.float64)) + 1) / 2


def _by(
    labels: list[str], correct: NDArray[np.float64], prompts: NDArray[np.int64], seed: int
) -> dict[str, dict[str, Any]]:
    """Accuracy, pairs and prompts for each label, in the labels' natural order."""
    named = np.array(labels)
    table = {}
    for label in sorted(set(labels), key=_natural):
        rows = named == label
        accuracy = accuracy_interval(correct[rows], prompts[rows], seed)
        table[label] = {"accuracy": accuracy, "pairs": int(rows.sum()), "prompts": len(set(prompts[rows]))}
    return table


def _calibration(pairs: list[Pair], prompts: NDArray[np.int64], bins: int, seed: int) -> list[dict[str, Any]]:
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


def _ratio(better: int, worse: int) -> str:
    return next(name for name, top in RATIOS.items() if better <= top * max(worse, 1))


def _natural(label: str) -> tuple[float, str]:
    """Numbers by size, then names; ratios of lengths from short to long."""
    if label in RATIOS:
        return float(list(RATIOS).index(label)), label
    return float(label) if label.replace(".", "", 1).isdecimal() else np.inf, label


def require_scores(scores: Sequence[Sequence[float]], role: str) -> None:
    """Raises UserError, naming the config key, when a score is no number: such a model was trained to nothing."""
    if not all(np.isfinite(row).all() for row in scores):
        raise UserError(f"{role}: gives scores that are NaN or infinite; train it anew, or try bf16: false")
