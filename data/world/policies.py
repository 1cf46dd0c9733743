"""Degenerate policies, to show what the judge thinks of them."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from data.world import lexicon as lx
from data.world import tasks
from data.world.judge import judge
from data.world.prompts import Row, stream


@dataclass(frozen=True)
class Policy:
    """What answers every prompt by one simple rule."""

    respond: Callable[[Row], str]
    finished: bool = True

    def __call__(self, row: Row) -> str:
        return self.respond(row)


def _rng(row: Row) -> Random:
    return stream(0, "policy", row["prompt"])


def ideal(row: Row) -> str:
    """A right answer."""
    return tasks.ideal(row["task"], row["language"], row["constraint"], _rng(row))


def _tail(row: Row) -> str:
    text = ideal(row)
    return f"{text}{lx.ZH_TAIL}" if row["language"] == "zh" else f"{text} {lx.TAIL}"


def _unconstrained(row: Row) -> str:
    return tasks.ideal(row["task"], row["language"], None, _rng(row))


def _soup(row: Row) -> str:
    """The words that the prompt is about, and no sentence."""
    known = [value for key, value in row["task"].items() if key != "family"]
    return " ".join(known)


def _doubled(row: Row) -> str:
    text = ideal(row)
    return f"{text}，{text}" if row["language"] == "zh" else f"{text} , {text}"


def _endless(row: Row) -> str:
    return " ".join([ideal(row)] * 8)


def degenerate_policies() -> dict[str, Policy]:
    """Name -> policy. All but those of HONEST must score below any honest mediocre policy."""
    fixed = {
        "sorry": lx.REFUSAL,
        "hello": "hello anna , nice to meet you .",
        "do not know": "i do not know .",
        "story": "the fox saw a boat at the river .",
        "list": "fox , dog , cat",
        "yellow": "yellow",
        "positive": "positive",
        "polite": lx.TAIL,
    }
    table = {
        "empty": Policy(lambda row: ""),
        "echo": Policy(lambda row: row["prompt"]),
        "echo + ideal": Policy(lambda row: f"{row['prompt']} {ideal(row)}"),
        "refuse all": Policy(lambda row: lx.ZH_REFUSAL if row["language"] == "zh" else lx.REFUSAL),
        "keyword soup": Policy(_soup),
        **{f"always: {name}": Policy(lambda row, text=text: text) for name, text in fixed.items()},
        "doubled ideal": Policy(_doubled),
        "endless ideal": Policy(_endless, finished=False),
        "ideal without end": Policy(ideal, finished=False),
        "ideal + polite tail": Policy(_tail),
        "ideal, no constraints": Policy(_unconstrained),
        "ideal": Policy(ideal),
    }
    return table


HONEST = ("ideal without end", "ideal + polite tail", "ideal, no constraints", "ideal")


def most_common_ideal(rows: Iterable[Row]) -> str:
    """The one answer that is right most often."""
    counts = Counter(ideal(row) for row in rows)
    return min(counts, key=lambda text: (-counts[text], text))


def score_table(rows: list[Row]) -> dict[str, float]:
    """Mean gold score of every degenerate policy on the prompts."""
    policies = degenerate_policies()
    common = most_common_ideal(rows)
    policies = {"always: most common ideal": Policy(lambda row: common), **policies}
    return {
        name: sum(judge(row, policy(row), policy.finished).likert for row in rows) / len(rows)
        for name, policy in policies.items()
    }
