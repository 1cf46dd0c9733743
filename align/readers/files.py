"""Files -> (place, row): what `align.rows` reads, and tables (.csv, .tsv) and prose (.txt), plain or gzipped.

Shards of one data set are files given one after the other.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from align.errors import UserError
from align.readers.base import Record
from align.rows import Problem, read_rows

TABLES = {".csv": ",", ".tsv": "\t"}
LONGEST_FIELD = 1 << 24  # characters; the csv module's own limit of 128 k is less than a story


def suffix(path: str) -> str:
    """The suffix that says what is inside, under any .gz."""
    name = path.lower().removesuffix(".gz")
    return Path(name).suffix


def read_records(path: str) -> Iterator[Record]:
    """Yield (place, row). A table's row is a dict of texts, a prose file is one row {"text"}.

    Raises UserError as `align.rows.read_rows` does.
    """
    if suffix(path) not in (*TABLES, ".txt"):
        yield from read_rows(path)
        return
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file: give .jsonl, .json, .parquet, .csv, .tsv or .txt")
    try:
        content = Path(path).read_bytes()
        text = (gzip.decompress(content) if path.lower().endswith(".gz") else content).decode("utf-8-sig")
    except UnicodeError:
        raise UserError(f"{path}: is not UTF-8 text: save the file as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: the gzip file is torn: fetch or write it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): check the file") from None
    if suffix(path) == ".txt":
        yield f"{path}", {"text": text.replace("\r\n", "\n")}
        return
    yield from table_rows(path, text)


def table_rows(path: str, text: str) -> Iterator[Record]:
    """The rows of a table under its header; a row with too few or too many fields is a Problem."""
    csv.field_size_limit(LONGEST_FIELD)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=TABLES[suffix(path)], strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for row in lines:
            place, start = f"{path}:{start}", lines.line_num + 1
            if not row:  # an empty line is no row
                continue
            if header is None:
                header = row
            elif len(row) != len(header):
                what = f"has {len(row)} fields under a header of {len(header)}"
                yield place, Problem(place, "wrong_columns", what, "check its quotes and separators")
            else:
                yield place, dict(zip(header, row, strict=True))
    except csv.Error:
        raise UserError(f"{path}:{start}: is not a table that can be read: check its quotes") from None
