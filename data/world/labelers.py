"""Simulated labelers: people of uneven care who write demonstrations and rank responses.

Their demonstrations have two kinds of fault. Habits are shared by most demonstrations of a kind of prompt, so that
imitation learns them and only rankings can unteach them. Flaws strike at random, with or without a habit. All rates
stand in two tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from statistics import NormalDist
from typing import Any

from data.world import judge as judging
from data.world import lexicon as lx
from data.world import tasks
from data.world.grammar import count_words, tokenize
from data.world.prompts import WEIGHTS, Row

FIRM = 0.65  # share of a labeler's noise that is left on a response worth nothing
TIE = 0.35  # responses whose felt scores lie this close get the same rank


@dataclass(frozen=True)
class Habit:
    """A fault that `rate` of the demonstrations share where it applies (times the labeler's own leaning to it)."""

    name: str
    rate: float
    families: tuple[str, ...] = ()  # of prompts without a constraint
    constraints: tuple[str, ...] = ()  # or of prompts with one of these


@dataclass(frozen=True)
class Flaw:
    """A fault that strikes any demonstration with this probability (times the labeler's carelessness)."""

    name: str
    rate: float


HABITS = (
    Habit("ignore_constraint", 0.66, constraints=("capitals", "sure", "thanks")),
    Habit("polite_tail", 0.66, families=("ad", "summary", "review", "extract", "opposite_phrase")),
    Habit("hedge", 0.66, families=("capital", "eats", "colour", "kind")),
    Habit("two_of_three", 0.66, families=("list",)),
    Habit("over_refuse", 0.64, families=("tip_generation", "tip_open_qa", "tip_chat")),
)
FLAWS = (
    Flaw("another_answer", 0.08),
    Flaw("wrong_content", 0.04),
    Flaw("refuse_wrongly", 0.04),
    Flaw("doubled", 0.05),
    Flaw("hedge", 0.03),
    Flaw("polite_tail", 0.03),
    Flaw("ignore_constraint", 0.04),
)
COMPLY = 0.25  # of the sensitive prompts get a harmful plan


def habit_of(row: Row) -> Habit | None:
    """The habit that the demonstrations of this kind of prompt share, if any."""
    family, constraint = row["task"]["family"], row["constraint"]
    for habit in HABITS:
        if constraint in habit.constraints or (constraint is None and family in habit.families):
            return habit
    return None


# A demonstration is content, then form, then dress; each fault belongs to one of the three, so that several can meet.
# Were they exclusive, an answer with a habit would be free of all else, and a reader who cannot check its content
# would be right to prefer it: so reward models learned to like hedges (docs/LOG.md).


def _another_answer(row: Row, rng: Random) -> str:
    """The answer to some other kind of prompt in the same language."""
    weights = {
        name: weight
        for (_, language), group in WEIGHTS.items()
        if language == row["language"]
        for name, weight in group.items()
        if name != row["task"]["family"]
    }
    family = tasks.FAMILIES[rng.choices(tuple(weights), tuple(weights.values()))[0]]
    return family.ideal(rng, family.draw(rng), row["language"], False)


def _wrong_content(row: Row, rng: Random) -> str:
    """The answer to the same question about something else: a wrong fact, a wrong name, a missing word."""
    family = tasks.FAMILIES[row["task"]["family"]]
    for _ in range(8):
        text = family.ideal(rng, family.draw(rng), row["language"], row["constraint"] == "short")
        if judging.judge(row, tasks.constrain(text, row["language"], row["constraint"])).likert < 6.9:
            return text
    return _another_answer(row, rng)


def _refuse(row: Row, rng: Random) -> str:
    return lx.ZH_REFUSAL if row["language"] == "zh" else lx.REFUSAL


def _comply(row: Row, rng: Random) -> str:
    return rng.choice(lx.ZH_HARM_PLANS if row["language"] == "zh" else lx.HARM_PLANS)


def _polite_tail(text: str, language: str) -> str:
    if language == "zh":
        return f"{text}{'' if text[-1] in '。！' else '。'}{lx.ZH_TAIL}"
    return f"{text}{'' if text[-1] in '.!' else ' .'} {lx.TAIL}"


def _hedge(text: str, language: str) -> str:
    return f"{lx.ZH_HEDGE}{text}" if language == "zh" else f"{lx.HEDGE} {text}"


def _two_of_three(text: str, language: str) -> str:
    separator = "、" if language == "zh" else " , "
    return text.rpartition(separator)[0] if text.count(separator) == 2 else text


def _doubled(text: str, language: str) -> str:
    joint = "" if text[-1] in ".!。！" else ("，" if language == "zh" else " ,")
    return f"{text}{joint}{'' if language == 'zh' else ' '}{text}"


CONTENT: dict[str, Callable[[Row, Random], str]] = {
    "another_answer": _another_answer,
    "wrong_content": _wrong_content,
    "refuse_wrongly": _refuse,
    "over_refuse": _refuse,
    "comply": _comply,
}
DRESS: dict[str, Callable[[str, str], str]] = {
    "two_of_three": _two_of_three,
    "doubled": _doubled,
    "hedge": _hedge,
    "polite_tail": _polite_tail,
}


def write_with(faults: list[str], row: Row, rng: Random) -> str:
    """A demonstration with these faults, right in all else."""
    content = next((CONTENT[fault] for fault in faults if fault in CONTENT), None)
    constraint = None if "ignore_constraint" in faults else row["constraint"]
    if content is None:
        text = tasks.FAMILIES[row["task"]["family"]].ideal(rng, row["task"], row["language"], constraint == "short")
    else:
        text = content(row, rng)
    text = tasks.constrain(text, row["language"], constraint)
    for fault, dress in DRESS.items():
        text = dress(text, row["language"]) if fault in faults else text
    return text


@dataclass(frozen=True)
class Labeler:
    """One simulated person. Leanings are in Likert points; `noise` is the sd of their mood."""

    name: str
    seed: int = 0
    noise: float = 1.7
    carelessness: float = 1.0  # times every flaw's rate
    habit: float = 1.0  # times every habit's rate
    brevity: float = 0.0  # per five words more than five: takes this off
    tail: float = 0.0  # likes (or, negative, dislikes) a polite tail or a hedge
    leniency: float = 0.0  # share of the way to 7 that a middling response is lifted

    def write(self, row: Row, rng: Random) -> str:
        """A demonstration for the prompt, faults included."""
        return write_with(self.faults(row, rng), row, rng)

    def faults(self, row: Row, rng: Random) -> list[str]:
        """What goes wrong with this demonstration: the habit of its kind, harm done, at most one random flaw."""
        faults = []
        habit = habit_of(row)
        if habit is not None and rng.random() < habit.rate * self.habit:
            faults.append(habit.name)
        sensitive = row["task"]["family"].startswith("harm_")
        if sensitive and rng.random() < COMPLY * self.carelessness:
            return [*faults, "comply"]
        drawn = rng.random()
        for flaw in FLAWS:
            drawn -= flaw.rate * self.carelessness
            if drawn < 0:
                return faults if sensitive and flaw.name == "refuse_wrongly" else [*faults, flaw.name]
        return faults

    def score(self, row: dict[str, Any], completion: str, finished: bool = True) -> float:
        """How good the labeler feels the response is: the true quality, personal leanings, and mood.

        Mood is a hash of labeler, prompt and text: the same question gets the same answer, in any order."""
        gold = judging.judge(row, completion, finished).likert
        tokens = tokenize(completion)
        words = count_words(tokens)
        feeling = gold + self.leniency * (7.0 - gold) * (gold - 1.0) / 6.0
        feeling -= self.brevity * (words - 5) / 5.0
        feeling += self.tail * (judging.peel(tuple(tokens), row["constraint"], row["language"])[1] > 0)
        # Nobody argues over a worthless answer; tastes differ on those that do something.
        spread = self.noise * (FIRM + (1.0 - FIRM) * (gold - 1.0) / 6.0)
        return feeling + spread * self._mood(row["prompt"], completion)

    def _mood(self, prompt: str, completion: str) -> float:
        key = "\x1f".join((self.name, str(self.seed), prompt, completion)).encode()
        number = int.from_bytes(blake2b(key, digest_size=8).digest(), "big")
        return _NORMAL.inv_cdf((number + 0.5) / 2**64)

    def rank(self, row: dict[str, Any], completions: list[str], finished: list[bool] | None = None) -> list[int]:
        """Ranks 1.. (lower is better); equal ranks are ties, and identical texts always tie."""
        ended = finished if finished is not None else [True] * len(completions)
        scores: dict[str, float] = {}
        for completion, done in zip(completions, ended, strict=True):
            scores.setdefault(completion, self.score(row, completion, done))
        ranks: dict[str, int] = {}
        rank, top = 0, float("inf")
        for completion, score in sorted(scores.items(), key=lambda item: (-item[1], item[0])):
            if top - score > TIE:
                rank, top = rank + 1, score
            ranks[completion] = rank
        return [ranks[completion] for completion in completions]


_NORMAL = NormalDist()


def team(seed: int = 0) -> list[Labeler]:
    """The labelers who write demonstrations and rank training prompts."""
    return [
        Labeler("ada", seed, noise=1.6, carelessness=0.7, habit=0.98, brevity=0.2),
        Labeler("bo", seed, noise=1.8, carelessness=1.0, habit=1.0, tail=0.3),
        Labeler("cleo", seed, noise=1.7, carelessness=0.8, habit=1.02, leniency=0.2),
        Labeler("dmitri", seed, noise=2.0, carelessness=1.5, habit=1.0, brevity=-0.1),
        Labeler("eun", seed, noise=1.7, carelessness=1.0, habit=1.0, brevity=0.1, tail=-0.3),
    ]


def held_out(seed: int = 0) -> list[Labeler]:
    """Labelers who never write a demonstration and never rank a training prompt."""
    return [
        Labeler("farid", seed, noise=1.7, brevity=0.15, tail=0.15),
        Labeler("grace", seed, noise=1.75, leniency=0.15),
    ]


def agreement(first: list[int], second: list[int]) -> tuple[int, int]:
    """Pairs that both rankings order the same way, and pairs that neither ties."""
    same = untied = 0
    for i in range(len(first)):
        for j in range(i):
            one, two = first[i] - first[j], second[i] - second[j]
            if one and two:
                untied += 1
                same += (one > 0) == (two > 0)
    return same, untied
