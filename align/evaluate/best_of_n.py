"""Best-of-n: the KL that it costs, what it is expected to score, and Gao et al.'s two laws of over-optimisation.

Legend: P prompts, N answers of a prompt, drawn alike. Best-of-n draws n and keeps the one with the highest proxy (the
reward model's score); gold is what a judge says of that answer. d = sqrt(KL to the start), in nats^(1/2).
Laws: Gao, Schulman and Hilton 2022 (arXiv 2210.10760).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evaluate.win_rate import mean_interval, paired_gain

FIELDS = {"proxy": "proxy", "gold": "likert"}  # score -> its name in a policy's records
BENDS = {"best_of_n": lambda d: d, "rl": np.log}  # what beta multiplies in each law


def kl_best_of(n: int) -> float:
    """KL(best-of-n, policy) in nats: ln n - (n - 1) / n.

    Exact where no two answers are equal or tie, else an upper bound (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def sizes(count: int) -> list[int]:
    """1, 2, 4, ... up to `count`, and `count` itself."""
    return sorted({2**i for i in range(count.bit_length())} | {count})


def expected_best(proxy: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """Expected score of the answer that best-of-n keeps, for n = 1 to N: (P, N), (P, N) -> (N, P), n = 1 first.

    The mean over all subsets of size n of a prompt's N answers, which is unbiased. The answer of rank i by proxy is the
    best of C(i - 1, n - 1) of the C(N, n) subsets; answers that tie share theirs evenly, whatever their order.
    """
    proxy, scores = np.asarray(proxy, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    prompts, count = proxy.shape
    ordered = np.sort(proxy, 1)
    lower, upto = (  # how many answers have a lower proxy, and how many one that is no higher
        np.array([np.searchsorted(row, own, side) for row, own in zip(ordered, proxy, strict=True)])
        for side in ("left", "right")
    )
    found = np.empty((count, prompts))
    rank, within = np.arange(count + 1), np.ones(count + 1)  # within: C(rank, n) / C(N, n), all n in the lowest `rank`
    for n in range(1, count + 1):
        within = within * np.maximum(rank - n + 1, 0) / (count - n + 1)
        weights = (within[upto] - within[lower]) / (upto - lower)
        found[n - 1] = (weights * scores).sum(1)
    return found


@dataclass(frozen=True)
class Law:
    """R = d (alpha - beta d) of best-of-n, R = d (alpha - beta ln d) of RL: the gain over the start, where R(0) = 0."""

    form: str  # "best_of_n" or "rl"
    alpha: float
    beta: float

    def gain(self, kl: ArrayLike) -> NDArray[np.float64]:
        """R at KLs in nats, of any shape; a KL under 0, as an estimate may be, counts as 0."""
        distance = _distance(kl)
        bend = BENDS[self.form](np.where(distance > 0, distance, 1.0))
        return distance * (self.alpha - self.beta * bend)

    @property
    def peak(self) -> float | None:
        """d where R is highest; None where beta <= 0: R then rises for ever."""
        if self.beta <= 0:
            return None
        if self.form == "best_of_n":
            return max(self.alpha, 0.0) / (2 * self.beta)
        with np.errstate(over="ignore"):
            return float(np.exp(self.alpha / self.beta - 1))


def fit_law(form: str, kl: ArrayLike, gains: ArrayLike) -> Law | None:
    """The law of that form nearest to the gains, (n,) at KLs (n,) in nats, by least squares.

    None where fewer than two distances over 0 leave alpha and beta open.
    """
    distance, gains = _distance(kl), np.asarray(gains, dtype=np.float64)
    distance, gains = distance[distance > 0], gains[distance > 0]
    if len(np.unique(distance)) < 2:
        return None
    columns = np.stack([distance, -distance * BENDS[form](distance)], 1)
    alpha, beta = np.linalg.lstsq(columns, gains)[0]
    return Law(form, float(alpha), float(beta))


def best_of_report(answers: Sequence[Mapping[str, Sequence[float]]], policies: Mapping[str, Any]) -> dict[str, Any]:
    """`best_of_n` of evaluation.json: the curve, its laws, and each PPO policy beside the n that is as far from SFT.

    answers: a prompt's N scores by "proxy" and, where judged, "gold"; policies: those of an evaluation, whose records
    are of the same prompts in the same order.
    """
    scores = {key: np.array([row[key] for row in answers]) for key in answers[0]}
    best = {key: expected_best(scores["proxy"], values) for key, values in scores.items()}
    ns = sizes(scores["proxy"].shape[1])
    curve = [
        {"n": n, "kl": kl_best_of(n)}
        | {key: mean_interval(best[key][n - 1]) if key in best else None for key in FIELDS}
        for n in ns
    ]
    trained = [name for name in ("ppo", "ppo_ptx") if policies.get(name)]
    return {
        "samples": ns[-1],
        "prompts": len(answers),
        "curve": curve,
        "laws": {key: _law(curve, key) if key in best else None for key in FIELDS},
        "policies": {name: _beside(policies[name]["sampled"], best) for name in trained},
        "scores": {key: values.tolist() for key, values in scores.items()},
    }


def _law(curve: Sequence[Mapping[str, Any]], key: str) -> dict[str, float | None] | None:
    gains = [row[key].mean - curve[0][key].mean for row in curve]
    law = fit_law("best_of_n", [row["kl"] for row in curve], gains)
    if law is None:
        return None
    return {"alpha": law.alpha, "beta": law.beta, "peak_kl": None if law.peak is None else law.peak**2}


def _beside(records: Sequence[Mapping[str, Any]], best: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """A policy's numbers, and those of the n >= 2 whose KL is nearest to its own, paired by prompt."""
    kl = mean_interval([record["kl"] for record in records])
    n = min(range(2, len(best["proxy"]) + 1), key=lambda n: abs(kl_best_of(n) - kl.mean))
    compared: dict[str, Any] = dict.fromkeys(FIELDS)
    for key, expected in best.items():
        own = [float(record[FIELDS[key]]) for record in records]
        reach = np.flatnonzero(expected.mean(1) >= np.mean(own))
        compared[key] = {
            "score": mean_interval(own),
            "best_of": mean_interval(expected[n - 1]),
            "gain": paired_gain(own, expected[n - 1]),
            "matched_by": int(reach[0]) + 1 if len(reach) else None,  # the smallest n that scores as much
        }
    return {"kl": kl, "n": n, "kl_of_n": kl_best_of(n), **compared}


def _distance(kl: ArrayLike) -> NDArray[np.float64]:
    return np.sqrt(np.maximum(np.asarray(kl, dtype=np.float64), 0.0))
