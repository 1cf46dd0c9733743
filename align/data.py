"""Reads, checks, filters and orders rows (paper section 3.2 and Appendix A).

Nothing bad is skipped in silence and nothing bad reaches a collator. A row that cannot be used becomes a `Problem`
with its place, and then `on_bad_rows` decides: "stop" raises one `UserError` that names the first and counts the rest,
"drop" goes on and leaves the counts in the `DataReport`, which the manifest keeps. No message repeats a row's text:
real preference data holds text that belongs in no log.

Formats: design section 4, TRL's names, text or conversational. Local JSONL, JSON (also gzipped) or Parquet, or a hub
id `org/name`, `org/name:split`, `org/name@revision:split`.

Rule for equal completions in one ranking (compared without surrounding white space): with the same rank they are one
completion, merged and noted as `merged_duplicates`; with different ranks the labeler contradicts himself and the row
is bad, as it is when fewer than two distinct completions remain.
"""

import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from align.errors import UserError, first_line
from align.files import sha256_file
from align.types import Demonstration, Message, Prompt, Ranking, Text

T = TypeVar("T")
Columns = Mapping[str, Any]

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
WHOLE = (".json", ".json.gz")
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.%\[\]:+-]+))?")
ROLES = ("system", "developer", "user", "assistant", "tool")
REPLY = "\n\nAssistant:"  # the turn marker of Anthropic's HH dialogues


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
    """A row's fault before its place is known. It never leaves this module and `align.readers`."""

    def __init__(self, kind: str, what: str, remedy: str):
        super().__init__(what)
        self.kind, self.what, self.remedy = kind, what, remedy


# Reading files


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
                yield from ((f"{path}:row {next(numbers)}", row) for row in batch.to_pylist())
    except (pa.ArrowException, UnicodeError):
        raise UserError(f"{path}: is not a Parquet file that can be read: fetch or write it again") from None


def _hub_rows(path: str) -> Iterator[tuple[str, Any]]:
    hub = HUB_ID.fullmatch(path)
    suffixes = (*LINES, *WHOLE, ".parquet", ".gz", ".csv", ".txt")
    folder = Path(path.split("/")[0])
    if hub is None or path.startswith(".") or path.lower().endswith(suffixes) or Path(path).exists() or folder.is_dir():
        raise UserError(f"{path}: no such file: give a .jsonl, .json or .parquet file, or a hub id org/name")
    import datasets

    try:
        rows = datasets.load_dataset(hub["name"], split=hub["split"] or "train", revision=hub["revision"])
    except Exception as error:  # whatever the network, the hub and other people's files raise
        raise UserError(
            f"{path}: no local file, and no data set from the hub ({first_line(error)}): check the name"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}:row {number}", row


def _digest(path: str, rows: "hashlib._Hash") -> str:
    return sha256_file(path) if Path(path).is_file() else rows.hexdigest()


# One row -> one record


def _text(row: Columns, name: str, what: str | None = None) -> Text:
    """The text or conversation in field `name`."""
    value, what = row.get(name), what or repr(name)
    if value is None:
        raise BadRow("missing_field", f"{what} is missing", "add it, or give a file of the right kind")
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty_field", f"{what} is empty", "fill it, or take the row out")
        return value
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong_type", f"{what} is neither text nor a list of messages", "write text or messages")
    if not value:
        raise BadRow("empty_field", f"{what} is empty", "fill it, or take the row out")
    return tuple(_message(message, what) for message in value)


def _message(message: Any, what: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        remedy = 'write {"role": ..., "content": ...}'
        raise BadRow("bad_messages", f"{what} holds something that is no message", remedy)
    if message.get("role") not in ROLES:
        raise BadRow("bad_messages", f"{what} holds a message of an unknown role", f"use one of {', '.join(ROLES)}")
    if not message["content"].strip():
        raise BadRow("empty_field", f"{what} holds an empty message", "fill it, or take the row out")
    return {key: value for key, value in message.items() if value is not None}


def _prompt(row: Columns) -> Text:
    return _as_prompt(_text(row, "prompt"))


def _as_prompt(prompt: Text) -> Text:
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise BadRow("bad_messages", "the prompt ends with the assistant's message", "end it with the user's")
    return prompt


def _completion(row: Columns, name: str, what: str | None = None) -> Text:
    """A completion; as messages, the assistant's alone, since all of it is trained on."""
    completion = _text(row, name, what)
    if not isinstance(completion, str) and any(m["role"] != "assistant" for m in completion):
        raise BadRow("bad_messages", f"{what or repr(name)} holds others' messages", "keep the assistant's alone")
    return completion


def _rest(row: Columns, *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in used}


def parse_demonstration(row: Columns, notes: Counter[str]) -> Demonstration:
    if row.get("messages") is not None and row.get("completion") is None:
        messages = _text(row, "messages")
        if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            what = "'messages' does not end with an answer of the assistant"
            raise BadRow("bad_messages", what, "write at least a user's message and then the assistant's")
        return Demonstration(_as_prompt(messages[:-1]), messages[-1:], _rest(row, "messages"))
    return Demonstration(_prompt(row), _completion(row, "completion"), _rest(row, "prompt", "completion"))


def parse_prompt(row: Columns, notes: Counter[str]) -> Prompt:
    return Prompt(_prompt(row), _rest(row, "prompt"))


def parse_text(row: Columns, notes: Counter[str]) -> str:
    text = _text(row, "text")
    if not isinstance(text, str):
        raise BadRow("wrong_type", "'text' is not text", "write plain text")
    return text


def parse_ranking(row: Columns, notes: Counter[str]) -> Ranking:
    """A ranking of K >= 2, or a preference as a ranking of K = 2 with ranks 0 and 1."""
    if row.get("completions") is None and ("chosen" in row or "rejected" in row):
        return parse_preference(row, notes)
    prompt, items = _prompt(row), row.get("completions")
    if items is None:
        raise BadRow("missing_field", "'completions' is missing", "add it, or give a file of the right kind")
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, Mapping) for item in items):
        raise BadRow("wrong_type", "'completions' is no list of objects", 'write [{"completion": ..., "rank": ...}]')
    if len(items) < 2:
        what = f"has {len(items)} completion{'' if len(items) == 1 else 's'}"
        raise BadRow("too_few_completions", what, "a ranking needs 2 or more")
    pairs = [
        (_completion(item, "completion", f"completion {i}"), _rank(item, i)) for i, item in enumerate(items, start=1)
    ]
    return _ranking(prompt, pairs, row, notes, "prompt", "completions")


def parse_preference(row: Columns, notes: Counter[str]) -> Ranking:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    whole = isinstance(chosen, tuple) and any(message["role"] != "assistant" for message in chosen)
    if row.get("prompt") is None or whole:
        prompt, chosen, rejected = _implicit(chosen, rejected)
        _check_stated(row.get("prompt"), prompt)
    else:
        prompt, chosen, rejected = _prompt(row), _completion(row, "chosen"), _completion(row, "rejected")
    return _ranking(prompt, [(chosen, 0.0), (rejected, 1.0)], row, notes, "prompt", "chosen", "rejected")


def _rank(item: Columns, number: int) -> float:
    rank, what = item.get("rank"), f"completion {number}"
    if rank is None:
        raise BadRow("missing_field", f"{what} has no rank", "write a number, lower is better")
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not abs(rank) < 1e300:
        raise BadRow("bad_rank", f"the rank of {what} is no number", "write a number, lower is better")
    return float(rank)


def _ranking(prompt: Text, pairs: list[tuple[Text, float]], row: Columns, notes: Counter[str], *used: str) -> Ranking:
    """Merge equal completions, then check what is left."""
    kept: dict[str, tuple[Text, float]] = {}
    for completion, rank in pairs:
        key = contents(completion).strip()
        if key in kept and kept[key][1] != rank:
            what = "the same completion has two ranks"
            raise BadRow("duplicate_completions", what, "keep one of the two")
        kept.setdefault(key, (completion, rank))
    if len(kept) < 2:
        raise BadRow("duplicate_completions", "all completions are the same", "a ranking needs 2 different ones")
    ranks = tuple(rank for _, rank in kept.values())
    if len(set(ranks)) == 1:
        raise BadRow("all_ties", "all completions have the same rank", "take the row out, it prefers nothing")
    if len(kept) < len(pairs):
        notes["merged_duplicates"] += len(pairs) - len(kept)
    labeler = row.get("labeler")
    completions = tuple(completion for completion, _ in kept.values())
    columns = _rest(row, *used, "labeler")
    return Ranking(prompt, completions, ranks, None if labeler is None else str(labeler), columns)


def _implicit(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected completion of two texts (or conversations) that both contain the prompt.

    HH dialogues split after the last "Assistant:". Other text splits where it first differs, moved back to the start
    of the word: TRL's rule, which is all that can be known. Conversations share all but their last message.
    """
    mismatch = BadRow("prompt_mismatch", "'chosen' and 'rejected' do not share their prompt", "give both one prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise mismatch
    if isinstance(chosen, tuple):
        if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
            raise mismatch
        if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
            raise BadRow("bad_messages", "'chosen' or 'rejected' ends with no answer", "end with the assistant's")
        return _as_prompt(chosen[:-1]), chosen[-1:], rejected[-1:]
    cut, other = _reply_start(chosen), _reply_start(rejected)
    if cut is None and other is None:
        cut = other = _shared_words(chosen, rejected)
    if not cut or chosen[:cut] != rejected[:other]:
        raise mismatch
    for name, rest in (("chosen", chosen[cut:]), ("rejected", rejected[other:])):
        if not rest.strip():
            raise BadRow("empty_field", f"the answer in {name!r} is empty", "fill it, or take the row out")
    return chosen[:cut], chosen[cut:], rejected[other:]


def _reply_start(text: str) -> int | None:
    start = text.rfind(REPLY)
    return None if start < 0 else start + len(REPLY)


def _shared_words(a: str, b: str) -> int:
    """Length of the common start, back to the white space before the first word that differs."""
    if a == b:
        raise BadRow("duplicate_completions", "'chosen' and 'rejected' are the same", "take the row out")
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    spaces = [i for i in range(same) if a[i].isspace()]
    return spaces[-1] if spaces and spaces[-1] > 0 else same


def _check_stated(stated: Any, prompt: Text) -> None:
    """A prompt given beside conversations that contain it must be theirs."""
    if isinstance(stated, str) and stated.strip() not in contents(prompt):
        raise BadRow("prompt_mismatch", "'prompt' is not the one in 'chosen'", "give all three one prompt")
    if isinstance(stated, (list, tuple)) and [dict(m) for m in prompt] != list(stated):
        raise BadRow("prompt_mismatch", "'prompt' is not the one in 'chosen'", "give all three one prompt")


PARSERS: dict[str, Callable[[Columns, Counter[str]], Any]] = {
    "demonstration": parse_demonstration,
    "ranking": parse_ranking,
    "preference": parse_ranking,
    "prompt": parse_prompt,
    "text": parse_text,
}


def parse_row(kind: str, place: str, row: Any, notes: Counter[str]) -> Any:
    """The record of `kind` in `row`, or a Problem. What was mended on the way is counted in `notes`."""
    if isinstance(row, Problem):
        return row
    if not isinstance(row, Mapping):
        return Problem(place, "not_a_dict", "is not a JSON object", 'write {"field": ...}')
    try:
        return PARSERS[kind](row, notes)
    except BadRow as bad:
        return Problem(place, bad.kind, bad.what, bad.remedy)


# Loading


def load_demonstrations(paths: str | list[str], on_bad_rows: str = "stop") -> tuple[list[Demonstration], DataReport]:
    """Demonstrations, in file order. Raises UserError for bad rows ("stop"), and when none is left."""
    return _load("demonstration", paths, on_bad_rows)


def load_rankings(paths: str | list[str], on_bad_rows: str = "stop") -> tuple[list[Ranking], DataReport]:
    """Rankings of K >= 2 and preferences (K = 2), in file order."""
    return _load("ranking", paths, on_bad_rows)


def load_prompts(paths: str | list[str], on_bad_rows: str = "stop") -> tuple[list[Prompt], DataReport]:
    """Prompts with all their other columns, in file order."""
    return _load("prompt", paths, on_bad_rows)


def load_texts(paths: str | list[str], on_bad_rows: str = "stop") -> tuple[list[str], DataReport]:
    """Pretraining documents, in file order."""
    return _load("text", paths, on_bad_rows)


def _load(kind: str, paths: str | list[str], on_bad_rows: str) -> tuple[list[Any], DataReport]:
    names = split_paths(paths)
    used: list[Any] = []
    problems: list[Problem] = []
    notes: Counter[str] = Counter()
    digests = {}
    for name in names:
        hub_rows = hashlib.sha256()
        from_hub = not Path(name).is_file()
        for place, row in read_rows(name):
            if from_hub:
                hub_rows.update(json.dumps(row, default=str, sort_keys=True).encode())
            record = parse_row(kind, place, row, notes)
            (problems if isinstance(record, Problem) else used).append(record)
        digests[name] = _digest(name, hub_rows)
    if on_bad_rows == "stop":
        refuse(problems)
    if not used:
        counts = f" ({count_kinds(problems)})" if problems else ""
        raise UserError(f"{', '.join(names)}: no {kind} that can be used{counts}: `align validate FILE` says why")
    dropped = dict(Counter(problem.kind for problem in problems))
    return used, DataReport(tuple(names), len(used) + len(problems), len(used), digests, dropped, dict(notes))


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


# Lengths and splits


class Tokens(Protocol):
    """What lengths need of `align.text.Codec`."""

    def prompt(self, prompt: Text) -> list[int]: ...

    def response(self, completion: Text) -> list[int]: ...


def prompt_length(row: Prompt, codec: Tokens) -> int:
    return len(codec.prompt(row.prompt))


def demonstration_length(row: Demonstration, codec: Tokens) -> int:
    return len(codec.prompt(row.prompt)) + len(codec.response(row.completion))


def ranking_length(row: Ranking, codec: Tokens) -> int:
    """Prompt plus the longest of the K completions."""
    return len(codec.prompt(row.prompt)) + max(len(codec.response(c)) for c in row.completions)


def drop_long(
    rows: list[T],
    codec: Tokens,
    max_tokens: int,
    report: DataReport,
    length: Callable[[T, Any], int] = prompt_length,
) -> tuple[list[T], DataReport]:
    """Drop and count rows over the cap; never cut one (C.4: prompts over 1k tokens are filtered out).

    Raises UserError when none is left.
    """
    kept = [row for row in rows if length(row, codec) <= max_tokens]
    if rows and not kept:
        remedy = "raise max_prompt_length or max_length"
        raise UserError(f"{', '.join(report.paths)}: every row is over {max_tokens} tokens: {remedy}")
    return kept, report.with_dropped("too_long", len(rows) - len(kept))


def contents(text: Text) -> str:
    """The text alone; of a conversation, its messages' contents a line each."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def prompt_key(prompt: Text) -> str:
    """Equal for prompts that differ in white space alone; text is one user message, as in `align.text`."""
    if isinstance(prompt, str):
        return " ".join(prompt.split())
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return " ".join(prompt[0]["content"].split())
    return "\n".join(f"{m['role']}: {' '.join(m['content'].split())}" for m in prompt)


def check_splits(named: Mapping[str, Iterable[Text]]) -> list[Problem]:
    """One Problem for each two splits (name -> prompts, or their keys) that have a prompt in common."""
    keys = {name: {prompt_key(prompt) for prompt in prompts} for name, prompts in named.items()}
    problems = []
    for first, second in itertools.combinations(keys, 2):
        shared = len(keys[first] & keys[second])
        if shared:
            what = f"{shared} of its {len(keys[second])} prompts are also in {first}"
            problems.append(Problem(second, "in_two_splits", what, "split by prompt, each in one file"))
    return problems


def keep_apart(
    rows: list[T], report: DataReport, others: Iterable[Any], on_bad_rows: str = "stop"
) -> tuple[list[T], DataReport]:
    """`rows` without those whose prompt `others` has too: "stop" raises UserError, "drop" counts `in_two_splits`.

    Give the validation rows first and the training rows as `others`.
    """
    taken = {prompt_key(row.prompt) for row in others}
    kept = [row for row in rows if prompt_key(row.prompt) not in taken]
    name, shared = ", ".join(report.paths), len(rows) - len(kept)
    if shared and on_bad_rows == "stop":
        what = f"{name}: the prompts of {shared} of its {len(rows)} rows are also in another split"
        raise UserError(f"{what} (`align validate FILE FILE` names them): split by prompt, or set on_bad_rows: drop")
    if rows and not kept:
        raise UserError(f"{name}: every prompt is also in another split: split by prompt")
    return kept, report.with_dropped("in_two_splits", shared)


def refuse_eval_only(rows: Iterable[Any], report: DataReport) -> None:
    """Raise UserError when training would read rows that `align convert` marked `eval_only`."""
    marked = sum(bool(row.columns.get("eval_only")) for row in rows)
    if marked:
        what = f"{', '.join(report.paths)}: {marked} rows are marked eval_only"
        raise UserError(f"{what}: they must not be trained on; give other rows")


# Filters of Appendix A.2: by user, at most 200 prompts a user, no long shared prefix, no personal data


def split_by(
    rows: Iterable[T], key: Callable[[T], Hashable], shares: Mapping[str, float], seed: int
) -> dict[str, list[T]]:
    """Split so that all rows of one key (a customer's id) are in one split; sizes follow `shares`, near enough.

    Keys are shuffled by `seed` and dealt by the share of rows that came before them. Row order is kept.
    """
    _check_shares(shares)
    rows = list(rows)
    counts = Counter(key(row) for row in rows)
    names, ends = list(shares), list(itertools.accumulate(shares.values()))
    order = list(counts)
    home: dict[Hashable, str] = {}
    before = 0
    for index in epoch_order(len(order), seed, 0):
        place = before / len(rows)
        home[order[index]] = next((n for n, end in zip(names, ends, strict=True) if place < end - 1e-9), names[-1])
        before += counts[order[index]]
    return {name: [row for row in rows if home[key(row)] == name] for name in names}


def _check_shares(shares: Mapping[str, float]) -> None:
    if not shares or min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise UserError(f"shares: {dict(shares)} do not sum to 1: give each split a share of the rows")


def opening_key(prompt: Text) -> str:
    """`prompt_key` of the first question, which all prompts of one conversation tree share."""
    if isinstance(prompt, str):
        return prompt_key(prompt)
    return prompt_key(next((message["content"] for message in prompt if message["role"] == "user"), prompt))


def split_of(prompt: Text, shares: Mapping[str, float], seed: int = 0) -> str:
    """The split of a prompt by a hash of it: the same in every file, in every run, whatever else the files hold.

    Only the first message of the user counts, so all prompts of one conversation tree share a split.
    """
    _check_shares(shares)
    digest = hashlib.sha256(f"{seed}\n{opening_key(prompt)}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64  # uniform on [0, 1)
    ends = zip(shares, itertools.accumulate(shares.values()), strict=True)
    return next((name for name, end in ends if place < end), list(shares)[-1])


def cap_per(rows: Iterable[T], key: Callable[[T], Hashable], limit: int = 200) -> list[T]:
    """The first `limit` rows of each key (A.2: at most 200 prompts of one user)."""
    seen: Counter[Hashable] = Counter()
    kept = []
    for row in rows:
        seen[key(row)] += 1
        if seen[key(row)] <= limit:
            kept.append(row)
    return kept


def _own_prompt(row: Any) -> Text:
    return row if isinstance(row, str) else row.prompt


def dedupe_prefix(rows: Iterable[T], characters: int = 100, text: Callable[[T], Text] = _own_prompt) -> list[T]:
    """The first of the rows that share their first `characters` characters (A.2: a long common prefix)."""
    first: dict[str, T] = {}
    for row in rows:
        first.setdefault(prompt_key(text(row))[:characters], row)
    return list(first.values())


# No pattern looks twice at one stretch of text: a filter must not take minutes on a file of dots.
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}", re.ASCII)
PHONE = re.compile(
    r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,4}\d{2,4}"  # +44 20 7946 0958
    r"|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}"  # (555) 010-9999
    r"|1[3-9]\d-?\d{4}-?\d{4})(?!\w)",  # 138-0013-8000
    re.ASCII,  # Chinese characters, which are \w otherwise, may stand right beside a number
)
LONG_NUMBER = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?!\w)", re.ASCII)
IDENTITY_NUMBER = re.compile(r"(?<!\w)[1-9]\d{5}(?:19|20)\d{2}[01]\d[0-3]\d\d{3}[\dXx](?!\w)", re.ASCII)


def has_pii(text: Text) -> bool:
    """Whether it holds an e-mail address, a telephone, payment card or identity number. A filter, no guarantee."""
    plain = contents(text)
    if EMAIL.search(plain) or PHONE.search(plain) or IDENTITY_NUMBER.search(plain):
        return True
    return any(_luhn([int(c) for c in m.group() if c.isdecimal()]) for m in LONG_NUMBER.finditer(plain))


def _luhn(digits: list[int]) -> bool:
    """The check digit of payment cards: every other number from the right doubled, digit sums, divides by 10."""
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def drop_pii(rows: Iterable[T], text: Callable[[T], Text] = _own_prompt) -> list[T]:
    """The rows without personal data (A.2: filtered from the training split)."""
    return [row for row in rows if not has_pii(text(row))]


# Order


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch: a permutation of the global row numbers, the same for any number of processes."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_rows, generator=generator).tolist()


class Cursor:
    """An endless walk over rows, reshuffled each epoch, that continues from its `state` exactly where it stood."""

    def __init__(self, num_rows: int, seed: int, position: int = 0):
        if num_rows < 1:
            raise UserError("the data set has no rows: give a file that has some")
        self.num_rows, self.seed, self.position = num_rows, seed, position  # position counts over all epochs
        self._order: tuple[int, list[int]] | None = None

    @property
    def epoch(self) -> int:
        return self.position // self.num_rows

    def take(self, count: int) -> list[int]:
        """The next `count` row numbers; they may span epochs."""
        taken: list[int] = []
        while len(taken) < count:
            if self._order is None or self._order[0] != self.epoch:
                self._order = (self.epoch, epoch_order(self.num_rows, self.seed, self.epoch))
            start = self.position % self.num_rows
            part = self._order[1][start : start + count - len(taken)]
            taken += part
            self.position += len(part)
        return taken

    def state(self) -> dict[str, int]:
        return {"num_rows": self.num_rows, "seed": self.seed, "position": self.position}

    @staticmethod
    def from_state(state: Mapping[str, int], num_rows: int | None = None) -> "Cursor":
        """Raises UserError when the data set no longer has the rows that the state was saved with."""
        if num_rows is not None and num_rows != state["num_rows"]:
            what = f"the data set has {num_rows} rows, the checkpoint was written with {state['num_rows']}"
            raise UserError(f"{what}: resume with the same data and filters")
        return Cursor(state["num_rows"], state["seed"], state["position"])
