"""Means, rates and win rates with 95% intervals (paper section 3.6 and Fig. 1).

Legend: n prompts, K completions of a prompt. Everything is numpy; an interval of fewer than two prompts (or clusters)
is an error, not a guess.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

if TYPE_CHECKING:  # align.types imports torch, which nothing here needs
    from align.types import Ranking, Text

CONFIDENCE = 0.95
Z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))  # 1.96
FEW_CLUSTERS = 10  # fewer show a bootstrap too little of the spread

Verdict = float  # 1.0 the first answer is better, 0.5 a tie, 0.0 the second is better


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% interval, in the unit of what was measured."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Agreement:
    """How often two labelers order a pair alike, and on how many (pair, labeler pair) and prompts that rests."""

    interval: Interval
    pairs: int
    prompts: int


def text_key(text: Text) -> str:
    """One hashable string a text: plain text and conversations (lists of messages) alike."""
    return json.dumps(text, ensure_ascii=False, sort_keys=True)


def numbered(names: Sequence[str]) -> NDArray[np.int64]:
    """(m,) one number a name, in the names' order: an array of prompts would take the longest one's room for each."""
    numbers = {name: i for i, name in enumerate(sorted(set(names)))}
    return np.array([numbers[name] for name in names], dtype=np.int64)


def mean_interval(x: ArrayLike) -> Interval:
    """Mean of n >= 2 independent values, (n,), with Student's t interval: mean +- t(n - 1) * sd / sqrt(n)."""
    values = _finite(x, "x")
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 values, got {len(values)}")
    mean = float(values.mean())
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


def paired_gain(a: ArrayLike, b: ArrayLike) -> Interval:
    """Mean of a - b over the same prompts, (n,) each. Pairing removes the spread between easy and hard prompts."""
    return mean_interval(np.subtract(*_pair(a, b)))


def rate_interval(successes: int, n: int) -> Interval:
    """Share of `n` independent trials that succeeded, with Wilson's score interval."""
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high))


def preferences(a_scores: ArrayLike, b_scores: ArrayLike) -> NDArray[np.float64]:
    """(n,) 1 where a scores higher, 0 where b does, 0.5 where they tie."""
    a, b = _pair(a_scores, b_scores)
    return (np.sign(a - b) + 1) / 2


def higher_score(first: float, second: float) -> Verdict:
    """The judge of two scores: the higher one is better."""
    return float(preferences([first], [second])[0])


def compare(
    judge_pair: Callable[[Any, Any], Verdict], a: Sequence[Any], b: Sequence[Any], seed: int
) -> NDArray[np.float64]:
    """(n,) verdicts for a against b from a judge that sees two answers in an order; a tie is 0.5.

    Which answer comes first is drawn at random, a first on half of the prompts (to within one), so that a judge's
    taste for the first place cannot favour either model. Equal answers tie without asking: nobody can tell them apart.
    """
    if len(a) != len(b):
        raise ValueError(f"a and b must answer the same prompts, got {len(a)} and {len(b)} answers")
    a_first = np.random.default_rng(seed).permutation(len(a)) % 2 == 0
    verdicts = np.empty(len(a))
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        verdicts[i] = _verdict(judge_pair, one, other, bool(a_first[i]))
    return verdicts


def win_rate(
    a: Sequence[Any], b: Sequence[Any], seed: int, judge_pair: Callable[[Any, Any], Verdict] = higher_score
) -> Interval:
    """Share of prompts on which a beats b, ties half. a and b are scores, or whatever `judge_pair` compares."""
    return win_interval(compare(judge_pair, a, b, seed))


def win_interval(verdicts: ArrayLike) -> Interval:
    """Mean of n verdicts in {0, 0.5, 1} with its score interval: Wilson's, with the observed share of ties t.

    Solves n (mean - p)^2 = z^2 (p (1 - p) - t / 4) for p. Without ties this is Wilson's interval; with nothing but
    ties it is 0.5 exactly; it stays in [0, 1] and keeps a width when every verdict is a win, where the normal
    interval would claim certainty.
    """
    values = _finite(verdicts, "verdicts")
    n, mean, ties = len(values), float(values.mean()) if len(values) else 0.0, float(np.mean(values == 0.5))
    if n < 2:
        raise ValueError(f"an interval needs at least 2 verdicts, got {n}")
    if not np.isin(values, (0.0, 0.5, 1.0)).all():
        raise ValueError("verdicts must be 0, 0.5 or 1")
    return _score_interval(mean, n, ties)


def _score_interval(mean: float, n: float, ties: float = 0.0) -> Interval:
    a, b, c = n + Z**2, 2 * n * mean + Z**2, n * mean**2 + Z**2 * ties / 4
    root = max(b**2 - 4 * a * c, 0.0) ** 0.5
    return Interval(mean, min(max((b - root) / (2 * a), 0.0), mean), max(min((b + root) / (2 * a), 1.0), mean))


def cluster_interval(numerators: ArrayLike, denominators: ArrayLike, seed: int, resamples: int = 2000) -> Interval:
    """Ratio of sums over clusters, (n,) each, with a percentile bootstrap that draws whole clusters.

    Several pairs that share a prompt are no independent trials: treating them as such makes intervals too narrow.
    Clusters whose denominator is 0 hold no trial and are left out.
    """
    top, bottom = _pair(numerators, denominators)
    top, bottom = top[bottom != 0], bottom[bottom != 0]
    if len(top) < 2:
        raise ValueError(f"an interval needs at least 2 clusters with a trial, got {len(top)}")
    result = stats.bootstrap(
        (top, bottom),
        lambda x, y, axis=-1: x.sum(axis) / y.sum(axis),
        n_resamples=resamples,
        batch=256,  # bounds the memory: 256 x n numbers at a time
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    mean = float(top.sum() / bottom.sum())
    return Interval(mean, min(float(result.low), mean), max(float(result.high), mean))


def accuracy_interval(correct: ArrayLike, clusters: ArrayLike, seed: int) -> Interval:
    """Mean of trials in [0, 1], (m,), whose cluster ids are `clusters`, (m,): `cluster_interval` made safe for rates.

    Few clusters show the bootstrap too little spread, equal ones none at all (two prompts, half right each), and it
    would claim certainty. There each cluster is one trial of Wilson's interval, unequal ones as many as Kish's
    effective number: trials in [0, 1] spread at most as much as right and wrong. One cluster says nothing: [0, 1].
    """
    values = _finite(correct, "correct")
    if not len(values):
        raise ValueError("no trial to take an accuracy of")
    right, trials, effective = _by_cluster(values, clusters)
    mean = float(values.mean())
    if len(trials) == 1:
        return Interval(mean, 0.0, 1.0)
    if effective < FEW_CLUSTERS or np.ptp(right / trials) == 0:
        return _score_interval(mean, effective)
    return cluster_interval(right, trials, seed)


def accuracy_gain(correct: ArrayLike, other: ArrayLike, clusters: ArrayLike, seed: int) -> Interval:
    """Mean of correct - other over the same trials, (m,) each in [0, 1]: paired, so what both find hard cancels out.

    Few clusters get Student's interval of a ratio, unequal ones as their effective number. Where all n clusters gain
    the same, up to Wilson's bound on what was seen in 0 of n trials may gain otherwise, anything in [-1, 1]. One
    cluster says nothing: its interval is [-1, 1].
    """
    gains = np.subtract(*_pair(correct, other))
    gained, trials, effective = _by_cluster(gains, clusters)
    mean, n = float(gains.mean()), len(trials)
    if n == 1:
        return Interval(mean, -1.0, 1.0)
    if np.ptp(gained / trials) == 0:
        unseen = _score_interval(0.0, effective).high
        return Interval(mean, mean - unseen * (1 + mean), mean + unseen * (1 - mean))
    if effective < FEW_CLUSTERS:
        spread = effective / (effective - 1) * np.sum((gained - mean * trials) ** 2)
        half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, effective - 1) * np.sqrt(spread)) / trials.sum()
        return Interval(mean, max(mean - half, -1.0), min(mean + half, 1.0))
    return cluster_interval(gained, trials, seed)


def _by_cluster(values: NDArray[np.float64], clusters: ArrayLike) -> tuple[NDArray, NDArray, float]:
    """Sum and count of each cluster's values, (n,) each, and how many clusters of equal size tell as much."""
    _, ids = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(ids)
    return np.bincount(ids, weights=values), counts, float(counts.sum() ** 2 / (counts**2).sum())


def judged_pairs(rankings: Iterable[Ranking]) -> dict[tuple[str, str, str], list[tuple[str | None, Verdict]]]:
    """(prompt, completion, completion) -> who judged the pair, and how: 1 the first is better, 0.5 tie, 0 second.

    Completions may come in any order and among any others.
    """
    judged: dict[tuple[str, str, str], list[tuple[str | None, Verdict]]] = defaultdict(list)
    for ranking in rankings:
        prompt = text_key(ranking.prompt)
        keyed = sorted(zip(map(text_key, ranking.completions), ranking.ranks, strict=True))
        for (one, rank), (other, other_rank) in combinations(keyed, 2):
            judged[prompt, one, other].append((ranking.labeler, (rank < other_rank) + 0.5 * (rank == other_rank)))
    return judged


def two_labelers(judged: Mapping[tuple[str, str, str], list[tuple[str | None, Verdict]]]) -> Iterator[tuple]:
    """(prompt, (labeler, verdict), (labeler, verdict)) for every two labelers of a pair.

    Labelers without a name are different ones; a labeler who judged the same pair twice agrees with nobody else.
    """
    for (prompt, _, _), verdicts in judged.items():
        for one, other in combinations(verdicts, 2):
            if one[0] != other[0] or one[0] is None:
                yield prompt, one, other


def agreement(rankings: Iterable[Ranking], seed: int = 0) -> Agreement | None:
    """Pairwise agreement between labelers who judged the same completions of a prompt (paper section 3.4: 72.6%).

    Counts pairs of completions untied for both labelers, for all pairs of labelers; the interval is clustered by
    prompt. None when no two labelers share such a pair.
    """
    both = [(p, a == b) for p, (_, a), (_, b) in two_labelers(judged_pairs(rankings)) if 0.5 not in (a, b)]
    if not both:
        return None
    clusters = numbered([prompt for prompt, _ in both])
    return Agreement(accuracy_interval([same for _, same in both], clusters, seed), len(both), len(set(clusters)))


def _verdict(judge_pair: Callable[[Any, Any], Verdict], a: Any, b: Any, a_first: bool) -> Verdict:
    if a == b:
        return 0.5
    verdict = judge_pair(a, b) if a_first else 1.0 - judge_pair(b, a)
    if verdict not in (0.0, 0.5, 1.0):
        raise ValueError(f"a judge of pairs answers 1 (first), 0.5 (tie) or 0 (second), not {verdict!r}")
    return verdict


def _finite(x: ArrayLike, name: str) -> NDArray[np.float64]:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(values)).sum())} values that are NaN or infinite")
    return values


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _finite(a, "the first"), _finite(b, "the second")
    if len(first) != len(second):
        raise ValueError(f"the two must cover the same prompts, got {len(first)} and {len(second)} values")
    return first, second
