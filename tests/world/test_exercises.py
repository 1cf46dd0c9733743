"""data/world/exercises.py: every mark is right by the lexicon and the text; about half are "no"."""

import re
from random import Random

import pytest

from data.world import exercises
from data.world import lexicon as lx
from data.world.skills import FACT_TABLES

ENGLISH = re.compile(r"check (.*?) ?: (.*) \.")


def parse(text: str) -> tuple[str, list[tuple[str, bool]]]:
    """An English exercise's title, and its claims with their marks."""
    title, rest = ENGLISH.fullmatch(text).groups()
    claims = re.findall(r"(.*?) (yes|no)(?: , |$)", rest)
    return title, [(claim, mark == "yes") for claim, mark in claims]


def many(writer, language="en", number=300):
    rng = Random(5)
    return [writer(rng, language) for _ in range(number)]


def test_about_half_of_the_marks_are_no():
    rng = Random(0)
    texts = [exercises.exercise(rng) for _ in range(6000)]
    english = [mark for text in texts if text.startswith("check") for _, mark in parse(text)[1]]
    chinese = "".join(text for text in texts if text.startswith("看"))
    assert 0.47 < sum(english) / len(english) < 0.55
    assert 0.45 < chinese.count("对") / (chinese.count("对") + chinese.count("错")) < 0.55
    assert len(english) > 5000 and len(chinese) > 5000


@pytest.mark.parametrize("writer", [exercises.facts, exercises.told])
def test_facts_are_the_lexicons(writer):
    tone = {word: "positive" for word in lx.POSITIVE} | {word: "negative" for word in lx.NEGATIVE}
    tables = {**FACT_TABLES, "kind": lx.CATEGORY_OF, "opposite": lx.OPPOSITE, "tone": tone}
    for text in many(writer):
        for claim, true in parse(text)[1]:
            words = re.findall(r"\w+", claim)
            pairs = [(key, word) for key in words for word in words if key != word]
            assert true == any(table.get(key) == value for table in tables.values() for key, value in pairs), text


def test_members_belong_to_the_kind():
    kinds = {plural: kind for kind, plural in lx.PLURAL.items()}
    for text in many(exercises.members):
        title, claims = parse(text)
        assert all((noun in lx.NOUNS[kinds[title]]) == true for noun, true in claims)


@pytest.mark.parametrize("writer", [exercises.held, exercises.found, exercises.seen])
def test_what_stands_in_the_text(writer):
    for text in many(writer):
        title, claims = parse(text)
        assert all((word in title.split()) == true for word, true in claims), text


def test_claims_about_all_of_several_words():
    kinds = {plural: kind for kind, plural in lx.PLURAL.items()}
    for text in many(exercises.alike):
        title, [(claim, true)] = parse(text)
        assert {lx.CATEGORY_OF[noun] == kinds[title] for noun in claim.split(" , ")} in ({True}, {True, False})
        assert all(noun in lx.NOUNS[kinds[title]] for noun in claim.split(" , ")) == true, text
    for text in many(exercises.both):
        title, [(claim, true)] = parse(text)
        assert (set(claim.split(" and ")) <= set(title.split())) == true, text


def test_things_are_counted():
    numbers = {"two": 2, "three": 3, "four": 4}
    for text in many(exercises.counted):
        title, claims = parse(text)
        assert all((numbers[number] == len(title.split(" , "))) == true for number, true in claims), text
    for text in many(exercises.repeated):
        title, claims = parse(text)
        assert all((title.split(" , ").count(claim.split()[0]) == 2) == true for claim, true in claims), text


@pytest.mark.parametrize("writer", list(exercises.ZH_WRITERS))
def test_chinese_exercises(writer):
    for text in many(writer, "zh"):
        assert re.fullmatch(r"看.*：.*[对错]。", text), text


def test_chinese_words_that_stand_in_the_text():
    for writer in (exercises.held, exercises.found):
        for text in many(writer, "zh"):
            title, claims = re.fullmatch(r"看(.*)：(.*)。", text).groups()
            assert all((claim[:-1] in title) == (claim[-1] == "对") for claim in claims.split("，")), text
