"""`align prepare --config FILE --data_dir FOLDER`: the files of a run from public data, as one YAML file says.

    data_dir/*  --read, limit, exclude-->  rows  --by a hash of the first question-->  NAME.jsonl, NAME_validation.jsonl

A prompt's split is the same in every file of the run, so nothing that any stage holds out is trained on by any other.
A source may be held out whole (`split: validation`); a training row that asks one of its questions is dropped and named
(`held_out_elsewhere`). Beside the files lie `card.json` (counts, digests, prompts that sources share) and
`dropped.jsonl` (place and reason of every unit that was dropped, mended or not drawn). No message repeats a row's text.
"""

import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config import choose
from align.convert import counted, decorated, prompt_of
from align.data import parse_row
from align.errors import UserError
from align.files import atomic_folder, write_json, write_jsonl
from align.filters import Cap, Repeats, column, has_personal_data
from align.parse import parse
from align.readers.base import DOCUMENT_CHARACTERS, Options, Row
from align.readers.files import read_records
from align.readers.formats import FORMATS
from align.readers.reading import KINDS, Conversion, read
from align.rows import Problem
from align.splits import check_splits, opening_key, prompt_key, split_of
from align.types import Demonstration, Ranking, contents

SPLITS = ("train", "validation")
PAIR = ("chosen", "rejected")
USAGE = "usage: align prepare --config FILE --data_dir FOLDER [--run DIR] [--seed N]"


@dataclass(frozen=True)
class Exclusion:
    """`{file, field, column}`: leaves out rows whose `column` is a value of `field` in `file`."""

    file: str
    field: str
    column: str


@dataclass(frozen=True)
class Source:
    """Files of one format that are read together."""

    files: tuple[str, ...]  # under data_dir
    format: str | None = None  # null: found from the fields
    source: str | None = None  # of the rows that name none; null: the file's name
    language: str | None = None
    split: str | None = None  # all rows there; null: by the hash
    split_column: str | None = None  # hash this column (a customer's id), not the first question
    context_characters: int | None = None  # cut passages and stories before a question; 0: none
    document_characters: int = DOCUMENT_CHARACTERS
    max_characters: int | None = None  # of prompt and longest completion; longer rows are dropped and counted
    max_rows: int | None = None  # drawn by a hash of the prompt, from both sides of the split
    max_validation_rows: int | None = None  # given: so many held-out rows, and max_rows counts training rows alone
    max_rows_per: Cap | None = None  # {column, rows}: the first so many rows of each customer
    shared_prefix: int | None = None  # characters: of prompts that begin with the same ones the first is kept
    drop_personal_data: bool = False  # training rows with an e-mail address, a telephone, card or identity number
    exclude: Exclusion | None = None

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError("files: empty; name at least one file under data_dir")
        if self.shared_prefix is not None and self.shared_prefix < 1:
            raise UserError(f"shared_prefix: {self.shared_prefix}; give a number of characters, or null")
        choose("format", self.format or "trl", tuple(FORMATS))
        choose("split", self.split or "train", SPLITS)


@dataclass(frozen=True)
class Output:
    """NAME.jsonl and NAME_validation.jsonl: rows of one kind from several sources."""

    kind: str
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        choose("kind", self.kind, tuple(kind for kind in KINDS if kind != "choice"))  # which nothing is trained on


@dataclass(frozen=True)
class PrepareConfig:
    output_dir: str
    outputs: dict[str, Output]
    data_dir: str | None = None
    seed: int = 0  # of the split and of what max_rows draws
    validation_share: float = 0.1  # of the prompts

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise UserError(f"validation_share: {self.validation_share}; give a share between 0 and 1")
        self._check_contexts()

    def _check_contexts(self) -> None:
        """A prompt is hashed with its context, so a question cut in two ways could lie on both sides of the split."""
        asked = [
            (file, name, source.context_characters)
            for name, output in self.outputs.items()
            for source in output.sources
            for file in source.files
            if output.kind != "text"
        ]
        seen: dict[str, tuple[str, int | None]] = {}
        for file, name, characters in asked:
            other, before = seen.setdefault(file, (name, characters))
            if before != characters:
                raise UserError(
                    f"outputs.{name}: {file}: context_characters is {characters} here and {before} in outputs.{other}; "
                    "give one, or a question may be trained on and held out"
                )


@dataclass
class Part:
    """What became of one source: rows by split and everything that was dropped."""

    name: str  # of the output
    source: Source
    conversion: Conversion
    rows: dict[str, list[tuple[str, Row]]] = field(default_factory=lambda: {split: [] for split in SPLITS})  # place
    problems: list[Problem] = field(default_factory=list)
    undrawn: list[Problem] = field(default_factory=list)  # over max_rows

    def label(self) -> str:
        return f"{self.name} from {', '.join(self.source.files)}"

    def prompts(self) -> set[str]:
        return {prompt_key(prompt_of(row)) for rows in self.rows.values() for _, row in rows}


def main(argv: list[str]) -> int:
    """0 when the files were written. Raises UserError when they cannot be."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    config = parse(PrepareConfig, argv)
    if not config.data_dir or not Path(config.data_dir).is_dir():
        raise UserError(
            f"data_dir: {config.data_dir or 'missing'}: no such folder; give the data's (make: DATA=FOLDER)"
        )
    parts = [part for name, output in config.outputs.items() for part in read_output(name, output, config)]
    drop_held_out(parts)
    drop_repeated_prompts([part for part in parts if config.outputs[part.name].kind == "prompt"])
    for part in parts:
        draw(part, config.seed)
    files = gather(parts, config)
    save(config, files, parts)
    for part in parts:
        counts = ", ".join(f"{len(rows)} {split}" for split, rows in part.rows.items())
        reasons = Counter(problem.kind for problem in part.problems)
        dropped = "".join(f"; {count} {kind}" for kind, count in reasons.most_common())
        print(f"{part.conversion.summary()}\n  {part.label()}: {counts}{dropped}; {len(part.undrawn)} over max_rows")
    for line in shared_prompts(parts):
        print(line)
    print(f"every row that was dropped, mended or not drawn by its place in {config.output_dir}/dropped.jsonl")
    print(f"{config.output_dir}: " + ", ".join(f"{name} {len(rows)}" for name, rows in files.items()))
    return 0


def read_output(name: str, output: Output, config: PrepareConfig) -> Iterator[Part]:
    """The converted sources of one output, long and excluded rows dropped, the others split."""
    for source in output.sources:
        paths = [str(Path(config.data_dir) / file) for file in source.files]
        options = Options(source.context_characters, source.document_characters)
        for conversion in read(paths, source.format, output.kind, options):
            part = Part(name, source, conversion)
            fill(part, config)
            yield part


def fill(part: Part, config: PrepareConfig) -> None:
    """Sort a source's rows into the splits. Raises UserError when one marked `eval_only` would be trained on."""
    source, shares = part.source, {"train": 1 - config.validation_share, "validation": config.validation_share}
    excluded = excluded_values(source.exclude, config.data_dir) if source.exclude else set()
    repeats = Repeats(source.shared_prefix, source.max_rows_per)
    rows = decorated(part.conversion, source.source, source.language)
    for converted, row in zip(part.conversion.rows, rows, strict=True):
        place = converted.places[0]
        if source.exclude and str(row.get(source.exclude.column)) in excluded:
            part.problems.append(Problem(place, "excluded", f"is named in {source.exclude.file}", "as configured"))
            continue
        prompt, answers = texts(part.conversion.kind, place, row)
        if source.max_characters and len(prompt) + max(map(len, answers), default=0) > source.max_characters:
            what = f"is over {source.max_characters} characters"
            part.problems.append(Problem(place, "too_long", what, "raise max_characters to keep it"))
            continue
        problem = repeats.problem(place, prompt_of(row), row)
        if problem:
            part.problems.append(problem)
            continue
        split = source.split or split_of(split_key(part, place, row), shares, config.seed)
        if split == "train" and row.get("eval_only"):
            raise UserError(f"{place}: is for evaluation only and would be trained on; set split: validation")
        if split == "train" and source.drop_personal_data and any(map(has_personal_data, (prompt, *answers))):
            what = "holds an e-mail address, a telephone, card or identity number"
            part.problems.append(Problem(place, "personal_data", what, "set drop_personal_data: false to keep it"))
            continue
        repeats.keep(place, prompt_of(row), row)
        part.rows[split].append((place, row))


def excluded_values(exclusion: Exclusion, data_dir: str) -> set[str]:
    records = read_records(str(Path(data_dir) / exclusion.file))
    found = {str(row[exclusion.field]) for _, row in records if isinstance(row, dict) and exclusion.field in row}
    if not found:
        raise UserError(
            f"exclude: no row of {exclusion.file} has the field {exclusion.field!r}; name one that they have"
        )
    return found


def split_key(part: Part, place: str, row: Row) -> Any:
    """What a row is split by: its prompt, or its customer; of prose the whole work that a document was cut from, where
    it has an id."""
    if part.source.split_column:
        return column(place, row, part.source.split_column)
    return str(row["id"]) if part.conversion.kind == "text" and row.get("id") is not None else prompt_of(row)


def texts(kind: str, place: str, row: Row) -> tuple[str, list[str]]:
    """The prompt (or the document) and the completions."""
    record = parse_row(kind, place, row, Counter())
    if isinstance(record, str):
        return record, []
    answers = [record.completion] if isinstance(record, Demonstration) else []
    answers = record.completions if isinstance(record, Ranking) else answers
    return contents(record.prompt), [contents(answer) for answer in answers]


def opening(row: Row) -> str:
    """The first question, by which rows are split: all prompts of one conversation tree share it."""
    return opening_key(prompt_of(row))


def drop_held_out(parts: list[Part]) -> None:
    """Take training rows out that ask what some source holds out, and name that source."""
    asking = [part for part in parts if part.conversion.kind != "text"]
    held: dict[str, str] = {}
    for part in asking:
        for _, row in part.rows["validation"]:
            held.setdefault(opening(row), part.label())
    for part in asking:
        kept = []
        for place, row in part.rows["train"]:
            other = held.get(opening(row))
            if other is None:
                kept.append((place, row))
            else:
                what = f"its first question is held out in {other}"
                part.problems.append(Problem(place, "held_out_elsewhere", what, "it is evaluated on, not trained on"))
        part.rows["train"] = kept


def drop_repeated_prompts(parts: list[Part]) -> None:
    """Each prompt once, over all sources of prompts."""
    seen: dict[str, str] = {}
    for part, split in itertools.product(parts, SPLITS):
        kept = []
        for place, row in part.rows[split]:
            first = seen.setdefault(prompt_key(prompt_of(row)), place)
            if first == place:
                kept.append((place, row))
            else:
                part.problems.append(Problem(place, "repeated_prompt", f"is also at {first}", "it is taken once"))
        part.rows[split] = kept


def draw(part: Part, seed: int) -> None:
    """Keep `max_rows` rows, drawn by a hash of the first question, so that rows of one tree stay together."""
    both = [(split, place, row) for split, rows in part.rows.items() for place, row in rows]
    part.rows = {split: [] for split in SPLITS}
    if part.source.max_validation_rows is None:
        return draw_rows(part, both, "max_rows", seed)
    for split, key in zip(SPLITS, ("max_rows", "max_validation_rows"), strict=True):
        draw_rows(part, [row for row in both if row[0] == split], key, seed)


def draw_rows(part: Part, rows: list[tuple[str, str, Row]], key: str, seed: int) -> None:
    """Of `rows` (split, place, row) keep as many as the source's `key` says."""
    limit = getattr(part.source, key)
    ranks = [hashlib.sha256(f"draw {seed} {part.name}\n{opening(row)}".encode()).digest() for _, _, row in rows]
    drawn = set(sorted(range(len(rows)), key=lambda i: ranks[i])[:limit])
    for i, (split, place, row) in enumerate(rows):
        if i in drawn:
            part.rows[split].append((place, row))
        else:
            what = f"was not among the {limit} rows that were drawn"
            part.undrawn.append(Problem(place, f"over_{key}", what, f"raise {key} to keep it"))


def gather(parts: list[Part], config: PrepareConfig) -> dict[str, list[Row]]:
    """File name -> rows. Raises UserError when an output would have no rows, or a prompt lay on both sides."""
    files = {}
    for name in config.outputs:
        for split, suffix in zip(SPLITS, ("", "_validation"), strict=True):
            rows = [row for part in parts if part.name == name for _, row in part.rows[split]]
            if rows:
                files[f"{name}{suffix}"] = rows
        if not any(file in files for file in (name, f"{name}_validation")):
            raise UserError(f"outputs.{name}: none of its sources gives a row; raise its limits")
    asking = [part for part in parts if part.conversion.kind != "text"]
    by_split = {split: [opening(row) for part in asking for _, row in part.rows[split]] for split in SPLITS}
    for problem in check_splits(by_split):
        raise UserError(f"{problem}")
    return files


def shared_prompts(parts: list[Part]) -> list[str]:
    """A line for each two sources with prompts in common; what they share lies on one side of the split."""
    found = []
    asking = [(part.label(), part.prompts()) for part in parts if part.conversion.kind != "text"]
    for (first, mine), (second, theirs) in itertools.combinations(asking, 2):
        common = len(mine & theirs)
        if common:
            found.append(f"{second}: {common} of its {len(theirs)} prompts are also in {first}, in the same split")
    return found


def save(config: PrepareConfig, files: dict[str, list[Row]], parts: list[Part]) -> None:
    """Write all files and the card, or none."""
    output = Path(config.output_dir)
    if output.exists() and any(output.iterdir()) and not (output / "card.json").is_file():
        raise UserError(f"output_dir: {output} holds something else than prepared data; choose another")
    reasons = [
        {"output": part.name, **vars(one)}
        for part in parts
        for one in (*part.conversion.problems, *part.problems, *part.undrawn, *part.conversion.notes)
    ]
    card = {
        "config": config,
        "rows": {name: len(rows) for name, rows in files.items()},
        "sources": [describe(part) for part in parts],
        "shared_prompts": shared_prompts(parts),
    }
    with atomic_folder(output) as folder:
        for name, rows in files.items():
            write_jsonl(folder / f"{name}.jsonl", rows)
        write_jsonl(folder / "dropped.jsonl", reasons)
        write_json(folder / "card.json", card)


def completions(part: Part) -> dict[str, dict[int, int]]:
    """Split -> K -> rankings with K completions; chosen and rejected are two."""
    return {
        split: dict(sorted(Counter(len(row.get("completions", PAIR)) for _, row in rows).items()))
        for split, rows in part.rows.items()
    }


def describe(part: Part) -> dict[str, Any]:
    conversion = part.conversion
    return {
        "output": part.name,
        **counted(conversion),  # dropped: units, by the reader
        "rows_read": len(conversion.rows),
        "rows": {split: len(rows) for split, rows in part.rows.items()},
        **({"completions": completions(part)} if conversion.kind == "ranking" else {}),
        "over_max_rows": len(part.undrawn),
        "left_out": dict(Counter(problem.kind for problem in part.problems)),  # rows, by this config
    }
