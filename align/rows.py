"""Files and hub data sets as rows, each with its place; what cannot be used is named and counted, never lost.

Local JSONL, JSON (also gzipped) or Parquet, or a hub id `org/name` or `org/name/subset`, behind it `@revision` and
`:split` (default train). What lies on the disk by that path wins.
"""

import dataclasses
import datetime
import decimal
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import UserError, first_line

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
WHOLE = (".json", ".json.gz")
HUB_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<subset>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.%\[\]:+-]+))?"
)


@dataclass(frozen=True)
class Problem:
    """One row that cannot be used: where it is, its kind (a slug to count by), what is wrong, how to mend it."""

    place: str
    kind: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}: {self.remedy}"


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of one data set. `rows_used + sum(dropped.values()) == rows_read`."""

    paths: tuple[str, ...]
    rows_read: int
    rows_used: int
    sha256: Mapping[str, str]  # path -> digest of the file's bytes, or of a hub data set's rows as JSON
    dropped: Mapping[str, int] = field(default_factory=dict)  # kind -> rows
    notes: Mapping[str, int] = field(default_factory=dict)  # what was mended, not dropped

    def with_dropped(self, kind: str, count: int) -> "DataReport":
        """A copy in which `count` more rows were dropped for `kind`."""
        if count == 0:
            return self
        dropped = {**self.dropped, kind: self.dropped.get(kind, 0) + count}
        return dataclasses.replace(self, dropped=dropped, rows_used=self.rows_used - count)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {**vars(self), "paths": list(self.paths), "sha256": dict(self.sha256), "dropped": dict(self.dropped)}


class BadRow(Exception):
    """A row's fault before its place is known. It never leaves `align.data` and `align.readers`."""

    def __init__(self, kind: str, what: str, remedy: str):
        super().__init__(what)
        self.kind, self.what, self.remedy = kind, what, remedy


def split_paths(paths: str | list[str]) -> list[str]:
    """A path, a list of them, or several with commas between."""
    if isinstance(paths, str):
        paths = [paths] if Path(paths).is_file() else paths.split(",")
    found = [path.strip() for path in paths if path.strip()]
    if not found:
        raise UserError("no data file given: name a .jsonl, .json or .parquet file, or a hub id org/name")
    return found


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) for each row of a file or hub data set; a row that cannot be read is a `Problem`.

    The place is `file:line` for JSONL and `file:row N`, from 1, otherwise. Raises UserError when there is no such
    file, when its type is unknown, and when it is so torn that what is missing cannot be counted.
    """
    local = Path(path)
    if not local.is_file():
        yield from _hub_rows(path)
        return
    name = local.name.lower()
    try:
        if name.endswith(LINES):
            with _open(local) as file:
                yield from _line_rows(path, file)
        elif name.endswith(WHOLE):
            with _open(local) as file:
                yield from _json_rows(path, file.read())
        elif name.endswith(".parquet"):
            yield from _parquet_rows(path)
        else:
            raise UserError(f"{path}: unknown type of file: give .jsonl, .json or .parquet")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path}: the gzip file is torn: fetch or write it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): check the file") from None


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _line_rows(path: str, lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():  # an empty line is no row
            place = f"{path}:{number}"
            yield place, _decode(place, line)


def _json_rows(path: str, content: bytes) -> Iterator[tuple[str, Any]]:
    """A JSON list of rows. Many a .json file is JSON lines by another name, and is read as that."""
    row = _decode(path, content)
    if isinstance(row, Problem) and content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        yield from _line_rows(path, content.splitlines())
        return
    rows = row if isinstance(row, list) else [row]
    for number, row in enumerate(rows, start=1):
        yield (row.place if isinstance(row, Problem) else f"{path}:row {number}"), row


def _decode(place: str, content: bytes) -> Any:
    """JSON bytes -> value, or a Problem. A byte order mark is let pass; half a surrogate pair is no text."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        return Problem(place, "encoding", "is not UTF-8 text", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return Problem(place, "broken_json", f"is not JSON ({where})", "write one JSON object a row")
    except (ValueError, RecursionError):  # a number of thousands of digits, a thousand nested lists
        return Problem(place, "broken_json", "is not JSON that can be read", "write one JSON object a row")
    return value


def _parquet_rows(path: str) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = itertools.count(1)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from ((f"{path}:row {next(numbers)}", jsonable(row)) for row in batch.to_pylist())
    except (pa.ArrowException, UnicodeError):
        raise UserError(f"{path}: is not a Parquet file that can be read: fetch or write it again") from None


def _hub_rows(path: str) -> Iterator[tuple[str, Any]]:
    hub = HUB_ID.fullmatch(path)
    suffixes = (*LINES, *WHOLE, ".parquet", ".gz", ".csv", ".txt")
    folder = Path(path.split("/")[0])
    if hub is None or path.startswith(".") or path.lower().endswith(suffixes) or Path(path).exists() or folder.is_dir():
        raise UserError(f"{path}: no such file: give a .jsonl, .json or .parquet file, or a hub id org/name")
    import datasets

    subset = [hub["subset"]] if hub["subset"] else []
    try:
        rows = datasets.load_dataset(hub["name"], *subset, split=hub["split"] or "train", revision=hub["revision"])
    except Exception as error:  # whatever the network, the hub and other people's files raise
        raise UserError(
            f"{path}: no local file, and no data set from the hub ({first_line(error)}): check the name, "
            "org/name/subset@revision:split"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}:row {number}", jsonable(row)


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it: dates as ISO text, decimals as numbers, an image and the like as null."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(one) for one in value]
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    return float(value) if isinstance(value, decimal.Decimal) else None


def refuse(problems: list[Problem]) -> None:
    """Raise a one-line UserError when there are problems: the first, and how many more of what kind."""
    if not problems:
        return
    text = str(problems[0])
    if len(problems) > 1:
        rest = problems[1:]
        text += f" (and {len(rest)} more bad row{'s' if len(rest) > 1 else ''}: {count_kinds(rest)}"
        text += "; `align validate FILE` lists them, on_bad_rows: drop skips them)"
    raise UserError(" ".join(text.split()))


def count_kinds(problems: Iterable[Problem]) -> str:
    """Such as `2 empty_field, 1 all_ties`, most frequent first."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(p.kind for p in problems).most_common())
