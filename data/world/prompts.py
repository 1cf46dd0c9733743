"""Customers and the prompts they write: Table 1's shares, constraints, wordings, no duplicates, splits by customer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random
from typing import Any

from align.errors import UserError
from data.world import tasks

Row = dict[str, Any]

# InstructGPT, Table 1, in per cent.
USE_CASES = {
    "generation": 45.6,
    "open_qa": 12.4,
    "brainstorming": 11.2,
    "chat": 8.4,
    "rewrite": 6.6,
    "summarization": 4.2,
    "classification": 3.5,
    "other": 3.5,
    "closed_qa": 2.6,
    "extract": 1.9,
}
# The share of a use case that is Chinese: 15% of all prompts.
CHINESE = {"generation": 0.18, "open_qa": 0.14, "brainstorming": 0.21, "chat": 0.20, "classification": 0.34}
# Weights of the families within a use case and language. harm_ is sensitive (7% of all), tip_ only looks so (4%).
WEIGHTS: dict[tuple[str, str], dict[str, float]] = {
    ("generation", "en"): {
        "story": 34,
        "story_two": 16,
        "note": 24,
        "ad": 14,
        "harm_generation": 6.2,
        "tip_generation": 3.6,
    },
    ("generation", "zh"): {"story": 60, "note": 33, "harm_generation": 7},
    ("open_qa", "en"): {"capital": 26, "eats": 18, "colour": 24, "harm_open_qa": 12, "tip_open_qa": 20},
    ("open_qa", "zh"): {"capital": 50, "colour": 50},
    ("brainstorming", "en"): {"list": 87, "harm_brainstorming": 13},
    ("brainstorming", "zh"): {"list": 100},
    ("chat", "en"): {"greet": 38, "thanks": 18, "bye": 15, "harm_chat": 14, "tip_chat": 15},
    ("chat", "zh"): {"greet": 88, "harm_chat": 12},
    ("rewrite", "en"): {"opposite": 45, "opposite_phrase": 55},
    ("summarization", "en"): {"summary": 1},
    ("classification", "en"): {"review": 55, "kind": 45},
    ("classification", "zh"): {"review": 1},
    ("other", "en"): {"repeat": 1},
    ("closed_qa", "en"): {"closed": 1},
    ("extract", "en"): {"extract": 1},
}
CONSTRAINED = 0.29  # of the prompts whose family can carry a constraint: about a quarter of all
MAX_PER_CUSTOMER = 200
MAX_FAILURES = 50  # draws of a use case in a row that find nothing new
OPENERS = {
    "en": ("", "", "please ", "hey , ", "now ", "ok , ", "quick : "),
    "zh": ("", "", "请帮忙：", "问题："),
}
CLOSERS = {"en": ("", "", " please", " be quick ."), "zh": ("", "", "快一点。")}
CONSTRAINT_WORDINGS = {
    "en": {
        "capitals": ("write in capitals .", "all in capitals ."),
        "sure": ("begin with sure .", "start with sure ."),
        "thanks": ("end with thanks .", "close with thanks ."),
        "short": ("at most five words .", "no more than five words ."),
    },
    "zh": {"sure": ("用“好的”开头。",), "thanks": ("用“谢谢”结尾。",), "short": ("不超过十个字。",)},
}


def stream(seed: int, *names: object) -> Random:
    """A random stream of its own for every purpose: drawing more from one never changes another."""
    key = "/".join(map(str, (seed, *names))).encode()
    return Random(int.from_bytes(blake2b(key, digest_size=8).digest(), "big"))


@dataclass
class Customer:
    """Someone who writes prompts in a style of their own."""

    name: str
    budget: int
    openers: dict[str, list[str]] = field(default_factory=dict)
    closers: dict[str, list[str]] = field(default_factory=dict)


def draw_customer(rng: Random, name: str) -> Customer:
    """Sizes are uneven, as in life, and capped at `MAX_PER_CUSTOMER`."""
    budget = min(MAX_PER_CUSTOMER, max(8, round(rng.lognormvariate(4.0, 0.9))))
    return Customer(
        name,
        budget,
        {language: rng.sample(options, 3) for language, options in OPENERS.items()},
        {language: rng.sample(options, 2) for language, options in CLOSERS.items()},
    )


def customers(rng: Random, split: str) -> Iterator[Customer]:
    """An endless line of customers of one split."""
    number = 0
    while True:
        yield draw_customer(rng, f"{split}-{number:04d}")
        number += 1


def _choose(rng: Random, weights: dict[str, float]) -> str:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def draw_prompt(rng: Random, use_case: str, language: str, customer: Customer) -> Row:
    """One prompt of a use case in the customer's style; it may be one that was written before."""
    family = tasks.FAMILIES[_choose(rng, WEIGHTS[use_case, language])]
    slots = family.draw(rng)
    allowed = tuple(name for name in family.constraints if name in CONSTRAINT_WORDINGS[language])
    constraint = rng.choice(allowed) if allowed and rng.random() < CONSTRAINED else None
    wordings = family.wordings[language]
    text = rng.choice(wordings).format_map(family.fields(slots, language))
    ask = rng.choice(CONSTRAINT_WORDINGS[language][constraint]) if constraint else ""
    parts = [rng.choice(customer.openers[language]), text, ask, rng.choice(customer.closers[language])]
    if language == "en" and ask:
        parts[2] = f" {ask}"
    prompt = "".join(parts)
    return {
        "prompt": prompt,
        "customer": customer.name,
        "use_case": use_case,
        "language": language,
        "constraint": constraint,
        "task": {"family": family.name, **slots},
    }


def write_prompts(seed: int, split: str, number: int, taken: set[str]) -> list[Row]:
    """`number` distinct prompts of new customers; none is in `taken`, to which they are added.

    Duplicates go by the whole text: these prompts are too short for a long common prefix to mean anything less.
    """
    rng = stream(seed, "prompts", split)
    rows: list[Row] = []
    for customer in _authors(seed, split, number):
        row = _new_row(rng, customer, taken)
        if row is None:
            raise UserError(f"the world holds no {number} new prompts for {split}: ask for fewer")
        taken.add(row["prompt"])
        rows.append({"id": f"{split}-{len(rows):06d}", **row})
    return rows


def _authors(seed: int, split: str, number: int) -> list[Customer]:
    """Who writes each of `number` prompts: at random, each up to their budget. In turn, the first would write most of
    the prompts of families that run out."""
    line, authors = customers(stream(seed, "customers", split), split), []
    while len(authors) < number:
        customer = next(line)
        authors += [customer] * customer.budget
    stream(seed, "authors", split).shuffle(authors)
    return authors[:number]


def _new_row(rng: Random, customer: Customer, taken: set[str]) -> Row | None:
    for _ in range(MAX_FAILURES):
        use_case = _choose(rng, USE_CASES)
        language = "zh" if rng.random() < CHINESE.get(use_case, 0.0) else "en"
        row = _new_prompt(rng, use_case, language, customer, taken)
        if row is not None:
            return row
    return None


def _new_prompt(rng: Random, use_case: str, language: str, customer: Customer, taken: set[str]) -> Row | None:
    for _ in range(60):
        row = draw_prompt(rng, use_case, language, customer)
        if row["prompt"] not in taken:
            return row
    return None


def is_sensitive(row: Row) -> bool:
    return row["task"]["family"].startswith("harm_")


def only_looks_sensitive(row: Row) -> bool:
    return row["task"]["family"].startswith("tip_")
