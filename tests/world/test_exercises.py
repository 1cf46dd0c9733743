"""data/world/exercises.py: every mark is right, by the lexicon and by the judge; half of them are "no"."""

import re
from random import Random

import pytest

from data.world import exercises
from data.world import lexicon as lx
from data.world.judge import judge
from data.world.skills import FACT_TABLES

ENGLISH = re.compile(r"check (.*?) ?: (.*) \.")
ZH_PLAIN = {zh: noun for noun, zh in lx.ZH_NOUN.items()}


def parse(text: str) -> tuple[str, list[tuple[str, bool]]]:
    """An English exercise's title, and its claims with their marks."""
    title, rest = ENGLISH.fullmatch(text).groups()
    claims = re.findall(r"(.*?) (yes|no)(?: , |$)", rest)
    return title, [(claim, mark == "yes") for claim, mark in claims]


def many(writer, language="en", number=300):
    rng = Random(5)
    return [writer(rng, language) for _ in range(number)]


def perfect(text: str, task: dict[str, str], answer: str, language: str = "en") -> bool:
    row = {"prompt": text, "task": task, "language": language, "constraint": None}
    return judge(row, answer).likert > 6.99


def test_half_of_the_marks_are_no():
    rng = Random(0)
    texts = [exercises.exercise(rng) for _ in range(6000)]
    english = [mark for text in texts if text.startswith("check") for _, mark in parse(text)[1]]
    chinese = "".join(text for text in texts if text.startswith("看"))
    assert 0.47 < sum(english) / len(english) < 0.55
    assert 0.45 < chinese.count("对") / (chinese.count("对") + chinese.count("错")) < 0.55
    assert len(english) > 5000 and len(chinese) > 5000


@pytest.mark.parametrize("writer", [exercises.facts, exercises.told])
def test_facts_are_the_lexicons(writer):
    tables = {**FACT_TABLES, "kind": lx.CATEGORY_OF, "opposite": lx.OPPOSITE}
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


def test_answers_are_marked_as_the_judge_would(subtests):
    kinds = {plural: kind for kind, plural in lx.PLURAL.items()}

    def listed(title):
        plural, _, without = title.removeprefix("three ").partition(" , no ")
        return {"family": "list", "category": kinds[plural], "noun": without}

    def story(title):
        words = title.removeprefix("about ").split(" and ")
        return {"family": "story" if len(words) == 1 else "story_two", "words": " ".join(words)}

    def letter(title):
        name, noun = title.split(" , ")
        return {"family": "note", "name": name, "noun": noun}

    def phrase(title):
        _, _, adjective, noun = title.split()
        return {"family": "opposite_phrase", "adjective": adjective, "noun": noun}

    def review(title):
        word = title.split()[-1]
        return {"family": "review", "tone": "positive" if word in lx.POSITIVE else "negative", "noun": title.split()[1]}

    for writer, task_of in (
        (exercises.listed, listed), (exercises.story, story), (exercises.letter, letter),
        (exercises.phrase, phrase), (exercises.review, review),
    ):  # fmt: skip
        with subtests.test(writer.__name__):
            for text in many(writer):
                title, [(answer, true)] = parse(text)
                assert perfect(title, task_of(title), answer) == true, text


def test_scenes_are_marked_as_the_judge_would():
    summary = re.compile(r"(\w+) went to the (\w+) \. s?he (\w+) an? (\w+)")
    seen = set()
    for text in many(exercises.scene):
        title, [(answer, true)] = parse(text)
        seen.add(true)
        if match := summary.fullmatch(title):
            task = dict(zip(("name", "place", "verb", "noun"), match.groups(), strict=True))
            assert perfect(title, {"family": "summary", **task}, answer) == true, text
        else:
            words = re.fullmatch(r"(?P<name>\w+) \w+ an? (?P<noun>\w+) at the (?P<place>\w+) \. (?P<asked>\w+)", title)
            assert (answer == words[words["asked"]]) == true, text
    assert seen == {True, False}


@pytest.mark.parametrize("writer", list(exercises.ZH_WRITERS))
def test_chinese_exercises(writer):
    for text in many(writer, "zh"):
        assert re.fullmatch(r"看.*：.*[对错]。", text), text


def test_chinese_lists_are_marked_as_the_judge_would():
    kinds = {zh: kind for kind, zh in lx.ZH_CATEGORY.items()}
    for text in many(exercises.listed, "zh"):
        kind, without, answer, mark = re.fullmatch(r"看三种(.*?)(?:，没有(.*?))?：(.*)([对错])。", text).groups()
        task = {"family": "list", "category": kinds[kind], "noun": ZH_PLAIN.get(without, "")}
        assert perfect(text, task, answer, "zh") == (mark == "对"), text
