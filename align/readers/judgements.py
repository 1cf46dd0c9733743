"""Pairwise judgements of one annotator on one prompt, joined into K-wise rankings with ties.

The rule: every ranking that is written repeats each judgement it holds; no judgement is bent to fit, and no order is
invented except by transitivity (a over b and b over c is a over c). So, of the judgements on one prompt:

 1. those on a pair that was judged twice and differently are taken out (`contradiction`);
 2. strict ones that lie on a circle (a over b over c over a) are taken out (`intransitive`);
 3. the others are dealt into rankings, largest first, each a weak order: all of its pairs judged or implied, ties
    transitive. Where ties break the order (a ties b, b ties c, a over c) or pairs were never judged, a prompt gives
    several rankings, and no pair is in two of them.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BETTER, TIE, WORSE = 1, 0, -1


@dataclass(frozen=True)
class Judgement:
    """What one annotator said of two texts."""

    place: str
    first: str
    second: str
    verdict: int  # BETTER: the first is better

    def signed(self) -> tuple[tuple[str, str], int]:
        """The pair in a fixed order, and the verdict on that order."""
        if self.first <= self.second:
            return (self.first, self.second), self.verdict
        return (self.second, self.first), -self.verdict


@dataclass(frozen=True)
class Joined:
    """One ranking: texts with ranks (0 is best, equal is a tie), and the judgements that it repeats."""

    ranked: tuple[tuple[str, float], ...]
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True)
class Refused:
    judgement: Judgement
    kind: str  # contradiction or intransitive


Order = dict[str, dict[str, int]]  # order[a][b]: BETTER when a is better than b; absent when not known


def join(judgements: Sequence[Judgement]) -> tuple[list[Joined], list[Refused], bool]:
    """The rankings, what was refused, and whether ties break weak transitivity. Each judgement is in one of the two."""
    pairs: dict[tuple[str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        pairs[judgement.signed()[0]].append(judgement)
    refused: list[Refused] = []
    verdicts: dict[tuple[str, str], int] = {}
    for pair, own in pairs.items():
        said = {judgement.signed()[1] for judgement in own}
        if len(said) > 1:
            refused += [Refused(judgement, "contradiction") for judgement in own]
        else:
            verdicts[pair] = said.pop()
    for pair in circular(verdicts):
        refused += [Refused(judgement, "intransitive") for judgement in pairs[pair]]
        del verdicts[pair]
    order = closure(verdicts)
    joined = []
    for texts in partition(order, set(verdicts)):
        inside = [pair for pair in itertools.combinations(sorted(texts), 2) if pair in verdicts]
        joined.append(Joined(ranks(texts, order), tuple(j for pair in inside for j in pairs[pair])))
    return joined, refused, broken(verdicts)


def circular(verdicts: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The strictly judged pairs that lie on a circle."""
    reach = reachable(verdicts)
    strict = [pair for pair, verdict in verdicts.items() if verdict != TIE]
    return [(a, b) for a, b in strict if b in reach[a] and a in reach[b]]


def reachable(verdicts: dict[tuple[str, str], int]) -> dict[str, set[str]]:
    """For each text all that are below it, directly or by way of others."""
    below: dict[str, set[str]] = defaultdict(set)
    for (a, b), verdict in verdicts.items():
        if verdict != TIE:
            better, worse = (a, b) if verdict == BETTER else (b, a)
            below[better].add(worse)
    reach: dict[str, set[str]] = {}
    for text in {t for pair in verdicts for t in pair}:
        seen, edge = set(), [text]
        while edge:
            fresh = below[edge.pop()] - seen
            seen |= fresh
            edge += fresh
        reach[text] = seen
    return reach


def closure(verdicts: dict[tuple[str, str], int]) -> Order:
    """Judged pairs, and the strict ones they imply; a judged tie stays one."""
    order: Order = defaultdict(dict)
    for better, worse in reachable(verdicts).items():
        for text in worse:
            order[better][text], order[text][better] = BETTER, WORSE
    for (a, b), verdict in verdicts.items():
        order[a][b], order[b][a] = verdict, -verdict
    return order


def partition(order: Order, left: set[tuple[str, str]]) -> Iterator[tuple[str, ...]]:
    """Sets of texts that are weak orders, largest first, until every judged pair is in one; no pair is in two."""
    free = {a: dict(below) for a, below in order.items()}
    while left:
        best = max((grow(pair, free) for pair in sorted(left)), key=lambda texts: (len(texts), _strict(texts, order)))
        yield best
        for a, b in itertools.combinations(sorted(best), 2):
            left.discard((a, b))
            del free[a][b], free[b][a]


def _strict(texts: tuple[str, ...], order: Order) -> int:
    return sum(order[a][b] != TIE for a, b in itertools.combinations(texts, 2))


def grow(pair: tuple[str, str], free: Order) -> tuple[str, ...]:
    """`pair` and each further text that keeps the set a weak order, in turn."""
    texts = pair
    for text in sorted(free[pair[0]]):
        if text not in texts and all(text in free[other] for other in texts) and weak_order((*texts, text), free):
            texts = (*texts, text)
    return texts


def weak_order(texts: tuple[str, ...], order: Order) -> bool:
    """Whether the verdicts on all pairs are those of a ranking: the count of better texts tells every one of them."""
    above = {a: sum(order[b][a] == BETTER for b in texts if b != a) for a in texts}
    pairs = itertools.combinations(texts, 2)
    return all(order[a][b] == (above[a] < above[b]) - (above[a] > above[b]) for a, b in pairs)


def ranks(texts: tuple[str, ...], order: Order) -> tuple[tuple[str, float], ...]:
    """Texts from the best to the worst with dense ranks from 0."""
    above = {a: sum(order[b][a] == BETTER for b in texts if b != a) for a in texts}
    levels = sorted(set(above.values()))
    return tuple((a, float(levels.index(above[a]))) for a in sorted(texts, key=lambda a: (above[a], a)))


def broken(verdicts: dict[tuple[str, str], int]) -> bool:
    """Whether three texts, all pairs of them judged, are in no weak order (without a circle: ties break it)."""
    order: Order = defaultdict(dict)
    for (a, b), verdict in verdicts.items():
        order[a][b], order[b][a] = verdict, -verdict
    triples = itertools.combinations(sorted(order), 3)
    judged = (t for t in triples if all(b in order[a] for a, b in itertools.combinations(t, 2)))
    return any(not weak_order(triple, order) for triple in judged)
