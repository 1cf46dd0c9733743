"""Bradley-Terry for people: how far labelers agree, and so how accurate a reward model can be at best.

Legend: a *judgement* is one labeler's verdict on two completions of a prompt. a is the chance that two labelers order
a pair alike, c the accuracy of a scorer that always says what most labelers would say, against one labeler drawn at
random. With q >= 1/2 the share of labelers on the majority's side of a pair, a = E[q^2 + (1 - q)^2] and c = E[q]: c
depends on how q is spread, which two labelers a pair do not show, but lies between a and (1 + sqrt(2a - 1)) / 2.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq, minimize
from scipy.special import expit, logsumexp

from align.evaluate.win_rate import (
    Interval,
    accuracy_interval,
    agreement,
    judged_pairs,
    numbered,
    preferences,
    text_key,
    two_labelers,
)
from align.types import Ranking

PairKey = tuple[str, str, str]  # prompt, completion, completion, as in `judged_pairs`
NODES = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)  # a standard normal as equally likely points
PRIOR_STD = 3.0  # of a completion's strength, nats: keeps what nobody ever rejected finite
SAME = 1e-3  # strengths nearer than this are one


def labelers_report(scored: Sequence[tuple[Ranking, list[float]]], seed: int) -> dict[str, Any]:
    """Agreement of labelers on the rankings that were scored, and the reward model against what it allows.

    Keys: agreement (pairs untied by both), pairs, prompts, agreement_with_ties (the same of better, tie, worse), ties
    (share of judgements), by_labeler (each against the others), ceiling (accuracy of a perfect predictor of the mean
    labeler, see `ceiling`), ceiling_bounds, accuracy (of the scores on the pairs that two labelers judged and neither
    tied, the pairs that the ceiling is for), consensus (on all pairs that two judged, against the labelers' joint
    order, which noise blurs less). Null where no two labelers judged a pair.
    """
    rankings = [ranking for ranking, _ in scored]
    judged = judged_pairs(rankings)
    verdicts = [verdict for pair in judged.values() for _, verdict in pair]
    several = {key: verdicts for key, verdicts in judged.items() if any(two_labelers({key: verdicts}))}
    ahead = _ahead(scored, list(several))
    both = [(prompt, *one, *other) for prompt, one, other in two_labelers(several)]
    agreed = agreement(rankings, seed)
    report = {
        "agreement": agreed.interval if agreed else None,
        "pairs": agreed.pairs if agreed else 0,
        "prompts": agreed.prompts if agreed else 0,
        "agreement_with_ties": None,
        "ties": float(np.mean(np.array(verdicts) == 0.5)),
        "by_labeler": _by_labeler(both, seed),
        "ceiling": None,
        "ceiling_bounds": None,
        "accuracy": _accuracy(several, ahead, seed),
        "consensus": _consensus(several, ahead, seed),
    }
    if both:
        same = [verdict == other for _, _, verdict, _, other in both]
        report["agreement_with_ties"] = accuracy_interval(same, numbered([row[0] for row in both]), seed)
    if agreed:
        interval = agreed.interval
        report["ceiling"] = Interval(*(ceiling(a) for a in (interval.mean, interval.low, interval.high)))
        report["ceiling_bounds"] = [float(c) for c in ceiling_bounds(interval.mean)]
    return report


def ceiling_bounds(agreement_rate: float) -> tuple[float, float]:
    """Least and greatest accuracy of a perfect predictor of the mean labeler that an agreement allows.

    Least when each pair is either certain or a coin toss, greatest when all pairs are alike. At or under one half no
    predictor is better than chance.
    """
    a = min(max(agreement_rate, 0.5), 1.0)
    return a, (1 + np.sqrt(2 * a - 1)) / 2


def ceiling(agreement_rate: float) -> float:
    """Accuracy of a perfect predictor of the mean labeler if gaps in quality are normal and labelers Bradley-Terry.

    q = sigmoid(s |z|), z standard normal: the spread s that gives the agreement gives the accuracy.
    """
    if agreement_rate <= 0.5:
        return 0.5

    def agrees(log_s: float) -> float:
        q = expit(np.exp(log_s) * NODES)
        return float(np.mean(q**2 + (1 - q) ** 2))

    low, high = -8.0, 12.0  # spreads from nothing to certainty
    target = min(max(agreement_rate, agrees(low)), agrees(high))
    s = np.exp(brentq(lambda x: agrees(x) - target, low, high))
    return float(np.mean(expit(s * np.abs(NODES))))


def bradley_terry(
    first: ArrayLike, second: ArrayLike, verdicts: ArrayLike, size: int, prior_std: float = PRIOR_STD
) -> tuple[NDArray[np.float64], float]:
    """Strengths (size,) and the tie parameter nu of most probable judgements with ties (Davidson 1970), in float64.

        P(i over j), P(tie), P(j over i)  =  e^{s_i}, nu e^{(s_i + s_j) / 2}, e^{s_j}, divided by their sum

    Judgement t compares items first[t] and second[t]: 1 the first won, 0.5 a tie, 0 the second won. Each strength has a
    normal prior of mean 0, which also holds together items that no chain of judgements connects. Convex, by L-BFGS.
    Without any tie nu is 0, and with ties alone, where no finite nu is best, a large number.
    """
    i, j = np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)
    outcome = np.asarray(verdicts, dtype=np.float64)
    chosen = np.select([outcome == 1.0, outcome == 0.5], [0, 1], 2)  # (T,) column of the logits below
    ties = bool((chosen == 1).any())
    rows = np.arange(len(i))

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        s, log_nu = parameters[:size], parameters[size] if ties else -np.inf
        logits = np.stack([s[i], log_nu + (s[i] + s[j]) / 2, s[j]], axis=1)  # (T, 3)
        norm = logsumexp(logits, axis=1)
        excess = np.exp(logits - norm[:, None])
        excess[rows, chosen] -= 1.0  # d loss / d logits
        gradient = np.append(s / prior_std**2, 0.0)
        np.add.at(gradient, i, excess[:, 0] + excess[:, 1] / 2)
        np.add.at(gradient, j, excess[:, 2] + excess[:, 1] / 2)
        gradient[size] = excess[:, 1].sum() if ties else 0.0
        value = (norm - logits[rows, chosen]).sum() + 0.5 * (s**2).sum() / prior_std**2
        return float(value), gradient

    options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-8}
    found = minimize(loss, np.zeros(size + 1), jac=True, method="L-BFGS-B", options=options).x
    return found[:size], float(np.exp(found[size])) if ties else 0.0


def _ahead(scored: Sequence[tuple[Ranking, list[float]]], pairs: list[PairKey]) -> NDArray[np.float64]:
    """(P,) 1 where the scores put the first completion of a pair ahead, 0.5 where they tie, 0 where the second."""
    score = {(text_key(r.prompt), text_key(r.completions[k])): s for r, scores in scored for k, s in enumerate(scores)}
    return preferences([score[p, a] for p, a, _ in pairs], [score[p, b] for p, _, b in pairs])


def _accuracy(several: Mapping[PairKey, list], ahead: NDArray[np.float64], seed: int) -> Interval | None:
    """The scores against both judgements of every two labelers of a pair that neither tied: the pairs, and the weights,
    of `agreement`, from which the ceiling comes."""
    trials = [
        (prompt, first if verdict == 1.0 else 1 - first)
        for (key, verdicts), first in zip(several.items(), ahead, strict=True)
        for prompt, (_, one), (_, other) in two_labelers({key: verdicts})
        if one != 0.5 != other
        for verdict in (one, other)
    ]
    if not trials:
        return None
    prompts, correct = zip(*trials, strict=True)
    return accuracy_interval(correct, numbered(prompts), seed)


def _consensus(several: Mapping[PairKey, list], ahead: NDArray[np.float64], seed: int) -> dict[str, Any] | None:
    """The scores against the order that Bradley-Terry gives the completions from all judgements together."""
    if not several:
        return None
    items: dict[tuple[str, str], int] = {}
    ends = np.array([[items.setdefault((p, c), len(items)) for c in (a, b)] for p, a, b in several])
    counts = [len(verdicts) for verdicts in several.values()]
    outcomes = [verdict for verdicts in several.values() for _, verdict in verdicts]
    first, second = np.repeat(ends, counts, axis=0).T
    strength, nu = bradley_terry(first, second, outcomes, len(items))
    gaps = strength[ends[:, 0]] - strength[ends[:, 1]]
    ordered = np.abs(gaps) > SAME
    if not ordered.any():
        return None
    correct = np.where(gaps > 0, ahead, 1 - ahead)[ordered]
    prompts = numbered([prompt for prompt, _, _ in several])[ordered]
    return {"accuracy": accuracy_interval(correct, prompts, seed), "pairs": int(ordered.sum()), "tie_parameter": nu}


def _by_labeler(both: Sequence[tuple], seed: int) -> dict[str, dict[str, Any]]:
    """How often each named labeler orders a pair as another does, pairs that neither ties."""
    trials: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for prompt, labeler, verdict, other, theirs in both:
        for name in (labeler, other):
            if name is not None and 0.5 not in (verdict, theirs):
                trials[name].append((prompt, verdict == theirs))
    table = {}
    for name, rows in sorted(trials.items()):
        prompts, agreed = zip(*rows, strict=True)
        interval = accuracy_interval(agreed, numbered(prompts), seed)
        table[name] = {"agreement": interval, "pairs": len(rows), "prompts": len(set(prompts))}
    return table
