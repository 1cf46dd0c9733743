"""What every reader of a public format shares.

A reader is a function `(records, options) -> outputs`: it takes (place, row) of one data set and yields our rows, each
with the places it was made from, a `Problem` for what cannot be used, and a `Note` for what was mended. A *unit* is
what the format counts: a row, a ranked group of a tree, one judgement of one annotator. Every unit ends in a row or in
a Problem, never in both and never in neither; `align.readers.reading` checks it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.rows import BadRow, Problem
from align.types import Text

Record = tuple[str, Any]  # place, row
Notes = list[tuple[str, str]]  # kind, what
Row = dict[str, Any]

DOCUMENT_CHARACTERS = 2000
OWN = ("prompt", "completion", "completions", "chosen", "rejected", "messages")


@dataclass(frozen=True)
class Options:
    """What a reader may be told. Lengths are in characters."""

    context_characters: int | None = None  # of a question's passages, story or article; None is all of it, 0 none
    document_characters: int = DOCUMENT_CHARACTERS  # the longest document that prose is cut into


@dataclass(frozen=True)
class Converted:
    """One of our rows and the places of the units it was made from."""

    row: Row
    places: tuple[str, ...]
    partners: tuple[str, ...] = ()  # rows of another file that were joined in, maybe into other rows too


@dataclass(frozen=True)
class Note:
    """Something in a kept row that was mended, or that its user should know."""

    place: str
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


Output = Converted | Note | Problem
Reader = Callable[[Iterable[Record], Options], Iterator[Output]]
Convert = Callable[[Mapping[str, Any], Options, Notes], Row]
Expand = Callable[[Mapping[str, Any]], Iterable[tuple[str, Any]]]

# Other people's nesting may break in any way; what it raises is the row's fault and becomes its Problem.
SHAPE_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError)
WRONG_SHAPE = BadRow("wrong_shape", "is not built as this format builds its rows", "name another --format")


def attempt(place: str, row: Any, convert: Convert, options: Options) -> Iterator[Output]:
    """What `convert` makes of one unit: its notes and the row, or the Problem."""
    if not isinstance(row, Mapping):
        yield Problem(place, "not_a_dict", "is not a JSON object", 'write {"field": ...}')
        return
    notes: Notes = []
    try:
        converted = convert(row, options, notes)
    except BadRow as bad:
        yield problem(place, bad)
    except SHAPE_ERRORS:
        yield problem(place, WRONG_SHAPE)
    else:
        yield from (Note(place, kind, what) for kind, what in notes)
        yield Converted(converted, (place,))


def each(convert: Convert) -> Reader:
    """The reader of a format whose rows stand alone."""

    def read(records: Iterable[Record], options: Options) -> Iterator[Output]:
        for place, row in records:
            yield from attempt(place, row, convert, options)

    return read


def nested(expand: Expand, convert: Convert) -> Reader:
    """The reader of a format whose rows hold several units: `expand` gives (place inside the row, unit)."""

    def read(records: Iterable[Record], options: Options) -> Iterator[Output]:
        for place, row in records:
            try:
                units = list(expand(row)) if isinstance(row, Mapping) else [("", row)]
                if not units:
                    yield Problem(place, "empty_field", "holds nothing that this format counts", "take it out")
            except BadRow as bad:
                units = []
                yield problem(place, bad)
            except SHAPE_ERRORS:
                units = []
                yield problem(place, WRONG_SHAPE)
            for inner, unit in units:
                yield from attempt(place + inner, unit, convert, options)

    return read


def problem(place: str, bad: BadRow) -> Problem:
    return Problem(place, bad.kind, bad.what, bad.remedy)


# Fields


def field(row: Mapping[str, Any], *names: str, optional: bool = False) -> str:
    """The text in the first of these fields that the row has; "" when it is optional and empty or absent."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if value is None and not optional:
        raise BadRow("missing_field", f"{names[0]!r} is missing", "add it, or name another --format")
    if value is not None and not isinstance(value, str):
        raise BadRow("wrong_type", f"{names[0]!r} is not text", "write it as text")
    if not (value or "").strip():
        if optional:
            return ""
        raise BadRow("empty_field", f"{names[0]!r} is empty", "fill it, or take the row out")
    return value.strip()


def items(row: Mapping[str, Any], name: str, what: type = Mapping) -> list[Any]:
    """The list in a field, whose members are all of one type."""
    value = row.get(name)
    if value is None:
        raise BadRow("missing_field", f"{name!r} is missing", "add it, or name another --format")
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, what) for item in value):
        raise BadRow("wrong_type", f"{name!r} is no list of {what.__name__.lower()}s", "see docs/formats.md")
    return list(value)


def columns(row: Mapping[str, Any], *used: str) -> Row:
    """The other columns: none without a value, and none under a name of ours, which would stand for what was read."""
    taken = (*OWN, *used)
    return {key: value for key, value in row.items() if key not in taken and value is not None and value != ""}


def number(value: Any) -> int | float | None:
    """A number, also one that a table wrote as text; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        return None
    return int(value) if value == int(value) else value


def with_input(instruction: str, given: str) -> str:
    """One prompt from an instruction and what it is about, parted by a blank line."""
    return f"{instruction}\n\n{given}" if given else instruction


def with_context(context: str, question: str, options: Options) -> str:
    """A question after its context, which `options` may cut or leave out."""
    shown = context.strip()[: options.context_characters].rstrip()
    return f"{shown}\n\n{question}" if shown else question


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def as_prompt(messages: list[dict[str, str]]) -> Any:
    """A conversation of one user message is plain text: they mean the same (`align.text`)."""
    single = len(messages) == 1 and messages[0]["role"] == "user"
    return messages[0]["content"] if single else messages


def as_json(text: Text) -> Any:
    """A record's prompt or completion as a row has it."""
    return text if isinstance(text, str) else [dict(turn) for turn in text]


def merge_turns(messages: list[dict[str, str]], notes: Notes) -> list[dict[str, str]]:
    """Neighbours of one role become one message: chat templates want turns that alternate."""
    merged: list[dict[str, str]] = []
    for turn in messages:
        if merged and merged[-1]["role"] == turn["role"]:
            merged[-1] = message(turn["role"], f"{merged[-1]['content']}\n\n{turn['content']}")
        else:
            merged.append(turn)
    if len(merged) < len(messages):
        notes.append(("merged_turns", "two turns of one role in a row were joined"))
    return merged


# Rankings


def ranking_row(prompt: Any, ranked: Sequence[tuple[str, float]], notes: Notes, /, **extra: Any) -> Row:
    """A ranking of ours from (completion, rank) pairs, lower is better.

    A text that occurs twice: with nothing ranked between its copies, or beside one of them, it is one completion at
    its best rank; otherwise the labeler contradicts himself about it, and it alone is taken out.
    """
    for completion, _ in ranked:
        if not isinstance(completion, str):
            raise BadRow("wrong_type", "a completion is not text", "write it as text")
        if not completion.strip():
            raise BadRow("empty_field", "a completion is empty", "fill it, or take the row out")
    ranks: dict[str, list[float]] = {}
    for completion, rank in ranked:
        ranks.setdefault(completion.strip(), []).append(rank)
    kept: dict[str, float] = {}
    for text, own in ranks.items():
        low, high = min(own), max(own)
        others = [rank for other, theirs in ranks.items() if other != text for rank in theirs]
        if low < high and any(low <= rank <= high for rank in others):
            notes.append(("contradicted_completion", "a completion has two ranks with others between: taken out"))
            continue
        if len(own) > 1:
            notes.append(("repeated_completion", "a completion occurs twice: kept once, at its best rank"))
        kept[text] = low
    if len(kept) < 2:
        what = "fewer than 2 different completions" if len(ranked) > 1 else f"has {len(ranked)} completion"
        kind = "duplicate_completions" if len(ranked) > 1 else "too_few_completions"
        raise BadRow(kind, what, "a ranking needs 2 or more")
    completions = [{"completion": text, "rank": rank} for text, rank in kept.items()]
    return {"prompt": prompt, "completions": completions, **columns(extra, "prompt", "completions")}
