"""`align convert FILE... --output FILE`: public formats (`align.readers`, docs/formats.md) as our JSONL.

Prints the rows that were dropped, each by its place, never by its text, and a line a data set. Beside the output lies
`FILE.report.json` with every dropped and every mended row. Both are written whole or not at all.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from align.data import read_prompt
from align.errors import UserError
from align.files import sha256_file, write_json, write_jsonl
from align.readers.base import DOCUMENT_CHARACTERS, Options, Row
from align.readers.formats import FORMATS
from align.readers.reading import KINDS, Conversion, read, stem
from align.splits import split_of

RENAME = "call a column by a name that a format has, such as question=prompt; may be given again"
SHOWN = 20  # dropped rows printed a data set; the report has all


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="align convert", description="Public data formats -> our JSONL.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="jsonl, json, parquet, csv, tsv, txt (.gz), or hub id")
    parser.add_argument("--output", required=True, help="the JSONL to write")
    parser.add_argument("--to", choices=KINDS, help="kind of row to write; default: the format's usual one")
    parser.add_argument("--format", choices=FORMATS, metavar="NAME", help=f"default: found; {', '.join(FORMATS)}")
    parser.add_argument("--rename", type=new_name, action="append", default=[], metavar="OLD=NEW", help=RENAME)
    parser.add_argument("--source", help="`source` of the rows that name none; default: the file's name")
    parser.add_argument("--language", help="`language` of the rows that name none, such as en or zh")
    parser.add_argument("--context_characters", type=int, help="cut passages and stories before a question; 0: none")
    parser.add_argument(
        "--document_characters", type=int, default=DOCUMENT_CHARACTERS, help="longest document of prose"
    )
    parser.add_argument("--validation_output", help="a second JSONL for the held-out prompts")
    parser.add_argument("--validation_share", type=float, default=0.1, help="of the prompts, by a hash of each")
    parser.add_argument("--seed", type=int, default=0, help="of the hash; the same in all files of a run")
    args = parser.parse_args(argv)
    if min(args.document_characters, (args.context_characters or 0) + 1) < 1:
        parser.error("lengths in characters are positive")
    inputs = {Path(file).resolve() for file in args.files}
    outputs = [Path(path).resolve() for path in (args.output, args.validation_output) if path]
    if len({*outputs}) < len(outputs) or not inputs.isdisjoint(outputs):
        parser.error("each output is a file of its own, and none of the inputs")
    if len(dict(args.rename)) < len(args.rename) or len({new for _, new in args.rename}) < len(args.rename):
        parser.error("--rename: each column is named once, and no two get one name")
    if not 0 < args.validation_share < 1:
        parser.error("--validation_share lies between 0 and 1")
    return args


def new_name(given: str) -> tuple[str, str]:
    """OLD=NEW as the two. For argparse, which says what is wrong."""
    old, _, new = given.rpartition("=")
    if not old or not new:
        raise argparse.ArgumentTypeError(f"{given!r} is not OLD=NEW")
    return old, new


def main(argv: list[str]) -> int:
    """0 when something was written, dropped rows or none. Raises UserError when nothing can be."""
    args = arguments(argv)
    options = Options(args.context_characters, args.document_characters)
    conversions = read(args.files, args.format, args.to, options, dict(args.rename))
    for conversion in conversions:
        for line in lines(conversion):
            print(line)
    kinds = sorted({conversion.kind for conversion in conversions})
    if len(kinds) > 1:
        raise UserError(f"the files give {' and '.join(kinds)} rows: choose one kind with --to")
    rows = [row for conversion in conversions for row in decorated(conversion, args.source, args.language)]
    if not rows:
        raise UserError(f"{', '.join(args.files)}: no row can be used: the lines above say why")
    outputs = {args.output: rows}
    if args.validation_output:
        outputs = split(rows, args)
    for path, part in outputs.items():
        write_jsonl(path, part)
        print(f"{len(part)} {kinds[0]} rows in {path}")
    write_json(f"{args.output}.report.json", {"renamed": dict(args.rename), **report(conversions, outputs)})
    print(f"every dropped and mended row in {args.output}.report.json")
    return 0


def lines(conversion: Conversion) -> list[str]:
    """What to print of one data set: dropped rows by place, then its summary."""
    problems = [str(problem) for problem in conversion.problems[:SHOWN]]
    more = len(conversion.problems) - SHOWN
    return problems + [f"... and {more} more, see the report"] * (more > 0) + [conversion.summary()]


def decorated(conversion: Conversion, source: str | None, language: str | None) -> list[Row]:
    """The rows with `source` and `language` where they had none."""
    stems = {path: stem(path) for path in sorted(conversion.paths, key=len, reverse=True)}
    rows = []
    for converted in conversion.rows:
        own = next((name for path, name in stems.items() if converted.places[0].startswith(path)), None)
        extra = {"source": source or own, "language": language}
        rows.append(converted.row | {k: v for k, v in extra.items() if v and converted.row.get(k) is None})
    return rows


def split(rows: list[Row], args: argparse.Namespace) -> dict[str, list[Row]]:
    """Output file -> its rows, by prompt."""
    shares = {args.output: 1 - args.validation_share, args.validation_output: args.validation_share}
    parts: dict[str, list[Row]] = {path: [] for path in shares}
    for row in rows:
        parts[split_of(prompt_of(row), shares, args.seed)].append(row)
    empty = [path for path, part in parts.items() if not part]
    if empty:
        raise UserError(f"{empty[0]}: would get none of the {len(rows)} rows: change --validation_share or --seed")
    return parts


def prompt_of(row: Row) -> Any:
    """What a row of any kind is split by."""
    if row.get("prompt") is None and row.get("messages") is None:
        return row["choices"][0] if "choices" in row else row["text"]
    return read_prompt(row)


def counted(conversion: Conversion) -> dict[str, Any]:
    """What was read of a data set, and what of it was dropped and mended, by kind."""
    return {
        "paths": conversion.paths,
        "sha256": {path: sha256_file(path) for path in conversion.paths if Path(path).is_file()},
        "format": conversion.format,
        "kind": conversion.kind,
        "units_read": conversion.units,
        "units_used": conversion.used,
        "dropped": dict(Counter(problem.kind for problem in conversion.problems)),
        "notes": dict(Counter(note.kind for note in conversion.notes)),
    }


def report(conversions: list[Conversion], outputs: dict[str, list[Row]]) -> dict[str, Any]:
    """Counts by data set, and the place, kind and reason of everything dropped or mended."""
    return {
        "outputs": {path: len(rows) for path, rows in outputs.items()},
        "data": [counted(conversion) | {"rows": len(conversion.rows)} for conversion in conversions],
        "dropped": [vars(problem) for conversion in conversions for problem in conversion.problems],
        "notes": [vars(note) for conversion in conversions for note in conversion.notes],
    }
