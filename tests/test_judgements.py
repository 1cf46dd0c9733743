"""align/readers/judgements.py against brute force: no judgement bent, no order invented, none lost."""

import itertools
import operator
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.readers.judgements import BETTER, TIE, WORSE, Judgement, join


def judged(*said: str) -> list[Judgement]:
    """ "a>b", "a=b" and "a<b" as judgements."""
    verdicts = {">": BETTER, "=": TIE, "<": WORSE}
    return [Judgement(str(i), text[0], text[2], verdicts[text[1]]) for i, text in enumerate(said)]


def orders(*said: str) -> list[dict[str, float]]:
    return [dict(one.ranked) for one in join(judged(*said))[0]]


def test_a_whole_ranking():
    assert orders("a>b", "a>c", "b=c") == [{"a": 0, "b": 1, "c": 1}]
    assert orders("b<a", "c>b", "a=c") == [{"a": 0, "c": 0, "b": 1}]


def test_what_was_never_judged_is_implied_by_strict_order_alone():
    assert orders("a>b", "b>c") == [{"a": 0, "b": 1, "c": 2}]
    assert orders("a=b", "b=c") == [{"a": 0, "b": 0}, {"b": 0, "c": 0}]
    assert orders("a>b", "c>d") == [{"a": 0, "b": 1}, {"c": 0, "d": 1}]  # a and d were never compared


def test_ties_that_break_the_order_split_it():
    joined, refused, broken = join(judged("a>b", "a=c", "b=c"))
    assert broken and not refused
    assert [dict(one.ranked) for one in joined] == [{"a": 0, "b": 1}, {"a": 0, "c": 0}, {"b": 0, "c": 0}]


def test_a_circle_is_taken_out_and_the_rest_kept():
    joined, refused, broken = join(judged("a>b", "b>c", "c>a", "a>d", "b>d", "c>d"))
    assert not broken and {r.judgement.place for r in refused} == {"0", "1", "2"}
    assert [dict(one.ranked) for one in joined] == [{"a": 0, "d": 1}, {"b": 0, "d": 1}, {"c": 0, "d": 1}]


def test_one_pair_judged_twice():
    joined, refused, _ = join(judged("a>b", "b<a", "b>c", "c=b"))
    assert [(dict(one.ranked), [j.place for j in one.judgements]) for one in joined] == [({"a": 0, "b": 1}, ["0", "1"])]
    assert [(r.judgement.place, r.kind) for r in refused] == [("2", "contradiction"), ("3", "contradiction")]


SAID = st.tuples(st.sampled_from(list(itertools.combinations("abcde", 2))), st.sampled_from("><=")).map(
    lambda said: said[0][0] + said[1] + said[0][1]
)


@given(st.lists(SAID, max_size=12))
def test_every_judgement_is_repeated_or_refused_and_no_pair_is_in_two_rankings(said):
    judgements = judged(*said)
    joined, refused, _ = join(judgements)
    places = Counter(j.place for one in joined for j in one.judgements) + Counter(r.judgement.place for r in refused)
    assert places == Counter(j.place for j in judgements)
    pairs = [frozenset(pair) for one in joined for pair in itertools.combinations(dict(one.ranked), 2)]
    assert len(pairs) == len(set(pairs))
    for one in joined:
        ranks = dict(one.ranked)
        for judgement in one.judgements:
            gap = ranks[judgement.second] - ranks[judgement.first]
            assert (gap > 0) - (gap < 0) == judgement.verdict


@given(st.permutations("abcde"), st.lists(st.booleans(), min_size=4, max_size=4))
def test_any_weak_order_comes_back_whole(texts, steps):
    """All ten judgements of a ranking with ties give that ranking."""
    level = dict(zip(texts, itertools.accumulate([0, *steps]), strict=True))
    said = [
        f"{a}{'>' if level[a] < level[b] else '<' if level[a] > level[b] else '='}{b}"
        for a, b in itertools.combinations("abcde", 2)
    ]
    assert orders(*said) == [level]


def some_ranking_repeats(said: list[str]) -> bool:
    """By brute force: does any ranking of three texts repeat every judgement?"""
    holds = {">": operator.lt, "=": operator.eq, "<": operator.gt}  # the better has the lower rank
    levels = (dict(zip("abc", ranks, strict=True)) for ranks in itertools.product(range(3), repeat=3))
    return any(all(holds[s[1]](level[s[0]], level[s[2]]) for s in said) for level in levels)


@pytest.mark.parametrize("said", list(itertools.product("><=", repeat=3)), ids="".join)
def test_three_texts_make_one_ranking_exactly_when_some_ranking_repeats_them(said):
    """All 27 ways to judge three pairs."""
    judgements = [f"{pair[0]}{verdict}{pair[1]}" for pair, verdict in zip(("ab", "ac", "bc"), said, strict=True)]
    joined, refused, broken = join(judged(*judgements))
    whole = len(joined) == 1 and len(joined[0].ranked) == 3
    assert whole == some_ranking_repeats(judgements)
    assert broken == (not whole and not refused)
