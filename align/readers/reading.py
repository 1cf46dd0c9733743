"""Public formats -> our rows: which reader takes which file, and the count of what it read, used and dropped.

    conversion = read(["hh.jsonl.gz", "en_100_tree.jsonl"], to="ranking")

A format is found from the fields of a file's rows, or named. Files of one format are read as one data set, so that
judgements join across shards; some formats need a second file beside them (`partner`). Every row that comes out has
passed `align.data.parse_row`; a unit that nothing names would be reported as `unnamed`, so none is lost in silence.
"""

import dataclasses
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data import NOTES, answer_columns, parse_row
from align.errors import UserError
from align.readers import chat
from align.readers.base import Converted, Note, Options, Output, Reader, Record, as_json, columns
from align.readers.files import read_records, suffix
from align.readers.formats import FORMATS, detect_format, our_kind
from align.rows import Problem, count_kinds
from align.splits import prompt_key
from align.types import Demonstration, Ranking, contents

SAMPLE = 100  # rows that decide a file's format
SHOWN_FIELDS, LONGEST_NAME = 12, 40
RENAMED_TWICE = "renamed_twice"  # a row with two columns of one name
KINDS = ("demonstration", "ranking", "prompt", "text", "choice")
NAMES_A_MODEL = re.compile(r"language model|OpenAI|ChatGPT|语言模型", re.IGNORECASE)


@dataclass
class Conversion:
    """What became of one data set: rows with the places they came from, and everything that was dropped or mended.

    `units == used + len(problems)`.
    """

    paths: tuple[str, ...]
    format: str
    kind: str
    rows: list[Converted] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def used(self) -> int:
        return len({place for row in self.rows for place in (*row.places, *row.partners)})

    @property
    def units(self) -> int:
        return self.used + len(self.problems)

    def summary(self) -> str:
        text = f"{', '.join(self.paths)}: {self.format} -> {self.kind}: {self.units} read, {self.used} used"
        text += f", {len(self.problems)} dropped" + (f" ({count_kinds(self.problems)})" if self.problems else "")
        text += f"; {len(self.rows)} rows"
        notes = Counter(note.kind for note in self.notes)
        return text + "".join(f"; {count} {kind}" for kind, count in notes.most_common())


def read(
    paths: list[str],
    format: str | None = None,
    to: str | None = None,
    options: Options | None = None,
    names: Mapping[str, str] | None = None,
) -> list[Conversion]:
    """A Conversion for each format that the files have, in the order of the files. `names`: what columns are to be
    called (old -> new) before a format is found.

    Raises UserError for a file that cannot be read or is of no known format, and when it has no rows of kind `to` or
    no column of `names`.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"--format {format}: unknown: choose one of {', '.join(FORMATS)}")
    sources: dict[str, Source] = defaultdict(list)
    heads: dict[str, list[Any]] = defaultdict(list)
    for path in paths:
        records = renamed(path, read_records(path), names) if names else read_records(path)
        head = list(itertools.islice(records, SAMPLE))
        name = format or ("prose" if suffix(path) == ".txt" else detect_format(row for _, row in head))
        if name is None:
            broken = [row for _, row in head if isinstance(row, Problem) and row.kind == RENAMED_TWICE]
            if broken:
                raise UserError(str(broken[0]))
            what = f"no row is of a known format{_fields(head)}" if head else "has no rows"
            raise UserError(f"{path}: {what}: name one with --format, or columns with --rename, see docs/formats.md")
        sources[name].append((path, itertools.chain(head, records)))
        heads[name] += [row for _, row in head]
    for name in list(sources):
        partner = FORMATS[name].partner
        if partner in sources and (to is None or to in FORMATS[name].readers):
            sources[name] += sources.pop(partner)
    return [_convert(name, source, heads[name], to, options or Options()) for name, source in sources.items()]


def renamed(path: str, records: Iterator[Record], names: Mapping[str, str]) -> Iterator[Record]:
    """The rows under the new names of their columns, all at once, so that two may change places. A row that has
    another column of a new name is a Problem. Raises UserError where no row at the file's start has an old name."""
    head = list(itertools.islice(records, SAMPLE))
    for old in names:
        if not any(isinstance(row, Mapping) and old in row for _, row in head):
            what = f"none of the first {SAMPLE} rows has a column {old!r}{_fields(head)}"
            raise UserError(f"{path}: --rename {old}={names[old]}: {what}")
    for place, row in itertools.chain(head, records):
        if isinstance(row, Mapping):
            row = _renamed_row(place, row, names)
        yield place, row


def _renamed_row(place: str, row: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any] | Problem:
    taken = [new for old, new in names.items() if old in row and row.get(new) is not None and new not in names]
    if taken:
        what = f"has a column {taken[0]!r} beside the one that takes its name"
        return Problem(place, RENAMED_TWICE, what, f"rename it too: --rename {taken[0]}={taken[0]}_before")
    moved = {old: new for old, new in names.items() if old in row}
    rest = {name: value for name, value in row.items() if name not in moved and name not in moved.values()}
    return rest | {new: row[old] for old, new in moved.items()}


def _fields(head: list[tuple[str, Any]]) -> str:
    row = next((row for _, row in head if isinstance(row, Mapping)), {})
    names = [name for name in map(str, row) if len(name) <= LONGEST_NAME]
    return f" (fields: {', '.join(names[:SHOWN_FIELDS])})" if names else ""


Source = list[tuple[str, Iterator[tuple[str, Any]]]]  # of each file its path and rows; a row may be a Problem


def _convert(name: str, source: Source, head: list[Any], to: str | None, options: Options) -> Conversion:
    paths = tuple(path for path, _ in source)
    readers = dict(FORMATS[name].readers) or {our_kind(head) or "prompt": chat.trl_rows}
    if name == "trl" and any(isinstance(row, Mapping) and row.get("choices") is not None for row in head):
        readers.setdefault("choice", chat.trl_rows)
    kind = to or next(iter(readers))
    asking = next((own for own in readers if own != "text"), None)
    if asking is not None:
        readers.setdefault("prompt", prompts_of(asking, readers[asking]))
    if kind not in readers:
        raise UserError(f"{paths[0]}: {name} gives no {kind}: choose --to from {', '.join(sorted(readers))}")
    conversion = Conversion(paths, name, kind)
    read_places: list[str] = []

    def records() -> Iterator[Record]:
        for place, row in itertools.chain.from_iterable(rows for _, rows in source):
            if isinstance(row, Problem):  # what could not be read at all is no reader's matter
                conversion.problems.append(row)
            else:
                read_places.append(place)
                yield place, row

    for output in readers[kind](records(), options):
        _sort(output, conversion)
    _name_the_rest(read_places, conversion)
    return conversion


def _sort(output: Output, conversion: Conversion) -> None:
    """Put a reader's output where it belongs; a row that our own check refuses is dropped with all of its units."""
    if isinstance(output, Problem):
        conversion.problems.append(output)
        return
    if isinstance(output, Note):
        conversion.notes.append(output)
        return
    place, mended = output.places[0], Counter()
    record = parse_row(conversion.kind, place, output.row, mended)
    if isinstance(record, Problem):
        conversion.problems += _all_places(output, record)
        return
    conversion.notes += [Note(place, kind, NOTES[kind]) for kind in mended]
    answers = [record.completion] if isinstance(record, Demonstration) else []
    answers = record.completions if isinstance(record, Ranking) else answers
    if any(NAMES_A_MODEL.search(contents(answer)) for answer in answers):
        conversion.notes.append(Note(place, "names_a_model", "an answer names a language model or its maker: kept"))
    conversion.rows.append(output)


def _name_the_rest(read_places: list[str], conversion: Conversion) -> None:
    """A row that no output names is a reader's fault; it is reported, not lost."""
    named = {problem.place for problem in conversion.problems}
    named |= {place for row in conversion.rows for place in (*row.places, *row.partners)}
    named |= {place[: comma.start()] for place in named for comma in re.finditer(", ", place)}
    for place in read_places:
        if place not in named:
            conversion.problems.append(Problem(place, "unnamed", "was lost by its reader", "report it as a bug"))


def prompts_of(kind: str, reader: Reader) -> Reader:
    """The prompts alone of the rows of `kind` that a reader gives, each once."""

    def prompts(records: Iterable[Record], options: Options) -> Iterator[Output]:
        seen: dict[str, str] = {}
        for output in reader(records, options):
            if not isinstance(output, Converted):
                yield output
                continue
            record = parse_row(kind, output.places[0], output.row, Counter())
            if not isinstance(record, Problem) and record.prompt is None:
                record = Problem(output.places[0], "no_text", "asks nothing", "give --to choice")
            if isinstance(record, Problem):
                yield from _all_places(output, record)
                continue
            place = seen.setdefault(prompt_key(record.prompt), output.places[0])
            if place == output.places[0]:
                unread = answer_columns(record.columns)  # prompts were asked for: answers stay behind
                rest = columns(record.columns, *unread)  # beside `messages` a prompt is their first question alone
                yield Converted({"prompt": as_json(record.prompt), **rest}, output.places, output.partners)
            else:
                again = Problem(place, "repeated_prompt", f"its prompt is also at {place}", "it is taken once")
                yield from _all_places(output, again)

    return prompts


def _all_places(converted: Converted, problem: Problem) -> list[Problem]:
    """The same Problem for each unit of a row."""
    return [dataclasses.replace(problem, place=place) for place in converted.places]


def stem(path: str) -> str:
    """A file's name without its suffixes: the source of its rows."""
    return Path(path).name.removesuffix(".gz").rsplit(".", 1)[0]
