"""`align validate [--all] FILE...`: what every stage checks when it starts, for all rows at once, without starting one.

Finds each file's kind from its columns, prints a line a bad row (`file:line: what is wrong: how to mend it`; without
`--all` the first 50 of each file), then a summary a file. Never prints a row's text. The same prompt in two files of
one kind is bad (`in_two_splits`: they are taken for splits); in files of different kinds it is only reported, since
demonstrations, rankings and prompts may share prompts. A file in another public format is named as such: `align
convert` reads it.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data import parse_row
from align.errors import UserError
from align.manifest import Manifest, read_manifest
from align.readers.files import TABLES, suffix
from align.readers.formats import FORMATS, detect_format
from align.rows import Problem, count_kinds, read_rows, split_paths
from align.splits import prompt_key
from align.track import announce
from align.types import Choice, Ranking, Text

ALL = "--all"
USAGE = f"usage: align validate [{ALL}] FILE...   ({ALL}: every bad row, not the first 50 of each file)"
SHOWN = 50  # bad rows printed a file, without --all
SAMPLE = 100  # rows that decide a file's kind
MARKS = {"completions": "ranking", "chosen": "preference", "rejected": "preference", "messages": "demonstration"}
MARKS |= {"completion": "demonstration", "prompt": "prompt", "text": "text", "choices": "choice"}  # the first decides
FAMILY = {"preference": "ranking"}  # read as the same records


@dataclass
class FileCheck:
    """What was found in one file."""

    path: str
    kind: str
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    sizes: Counter[int] = field(default_factory=Counter)  # K -> rankings
    notes: Counter[str] = field(default_factory=Counter)
    prompts: dict[str, str] = field(default_factory=dict)  # key -> place of its first row

    def lines(self, limit: int | None = SHOWN) -> list[str]:
        shown = [str(problem) for problem in self.problems[:limit]]
        if len(shown) < len(self.problems):
            more = len(self.problems) - len(shown)
            shown.append(f"{self.path}: {more} more bad rows not shown: `align validate {ALL}` shows them")
        return shown

    def summary(self) -> str:
        bad = f", {len(self.problems)} bad ({count_kinds(self.problems)})" if self.problems else ", none bad"
        text = f"{self.path}: {self.kind}: {self.rows} row{'' if self.rows == 1 else 's'}{bad}"
        if self.prompts:
            text += f"; {len(self.prompts)} distinct prompts"
        if self.sizes:
            text += "; K: " + ", ".join(f"{k} x {self.sizes[k]}" for k in sorted(self.sizes))
        return text + "".join(f"; {count} {name}" for name, count in sorted(self.notes.items()))


def detect_kind(rows: Iterable[Any]) -> str | None:
    """The kind that most of `rows` have by their fields; None when none has any."""
    found: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, dict):
            found.update([kind for mark, kind in MARKS.items() if row.get(mark) is not None][:1])
    return max(found, key=lambda kind: found[kind]) if found else None


def check_file(path: str) -> FileCheck:
    """Read and parse every row. Raises UserError when the file cannot be read or is of no known kind."""
    if suffix(path) in (*TABLES, ".txt"):
        raise UserError(f"{path}: is a table or prose: `align convert {path} --output FILE` makes rows of it")
    rows = read_rows(path)
    head = list(itertools.islice(rows, SAMPLE))
    kind = detect_kind(row for _, row in head)
    unreadable = [row for _, row in head if isinstance(row, Problem)]
    if kind is None and unreadable:
        kind = "unknown"
    if kind == "prompt" and head and all(isinstance(_choice(row), Choice) for _, row in head):
        kind = "choice"  # else choices are a column of prompts, for a reward function
    foreign = detect_format(row for _, row in head)
    foreign = foreign if foreign is not None and FORMATS[foreign].foreign else None
    if foreign and kind in (None, "text"):  # whose `text` is a part of its row
        raise UserError(f"{path}: {_foreign(path, foreign)}")
    if kind is None:
        wanted = "name its fields prompt, completion, messages, completions, chosen and rejected, or text"
        raise UserError(f"{path}: {'no row is of a known kind' if head else 'has no rows'}: {wanted}")
    check = FileCheck(path, kind)
    for place, row in itertools.chain(head, rows):
        check.rows += 1
        _check_row(check, place, row)
    if (
        foreign and len(check.problems) == check.rows
    ):  # named by its fields, such as a tree's `prompt`, and yet not ours
        raise UserError(f"{path}: {_foreign(path, foreign)}")
    return check


def _choice(row: Any) -> Any:
    return parse_row("choice", "", row, Counter())


def _foreign(path: str, name: str) -> str:
    return f"is in the format {name}: `align convert {path} --output FILE` makes rows of it"


def _check_row(check: FileCheck, place: str, row: Any) -> None:
    if check.kind == "unknown" and not isinstance(row, Problem):
        row = Problem(place, "unknown_kind", "has no field of a known kind", "add prompt, text or messages")
    record = parse_row(check.kind, place, row, check.notes)
    if isinstance(record, Problem):
        check.problems.append(record)
        return
    if isinstance(record, Ranking):
        check.sizes[len(record.completions)] += 1
    if check.kind != "text" and record.prompt is not None:
        check.prompts.setdefault(prompt_key(record.prompt), place)


def _compare(first: FileCheck, second: FileCheck) -> list[str]:
    """Find prompts of `second` that are in `first`: bad rows of `second`, or a line when their kinds differ."""
    shared = [(place, first.prompts[key]) for key, place in second.prompts.items() if key in first.prompts]
    if FAMILY.get(first.kind, first.kind) != FAMILY.get(second.kind, second.kind):
        count = f"{len(shared)} of its {len(second.prompts)} prompts are also in {first.path}"
        return [f"{second.path}: {count}, such as {shared[0][0]} and {shared[0][1]}"] if shared else []
    for place, other in shared:
        what, remedy = f"its prompt is also at {other}", "split by prompt, each in one file"
        second.problems.append(Problem(place, "in_two_splits", what, remedy))
    return []


def say_training_leaks(folders: Iterable[str | None], records: Iterable[Any]) -> None:
    """A line for each of `training_leaks`, of the prompts of these records."""
    for leak in training_leaks(folders, [record.prompt for record in records]):
        announce(leak)


def training_leaks(folders: Iterable[str | None], prompts: Iterable[Text]) -> list[str]:
    """A line for each file that these checkpoints or their parents were trained on and that holds some of `prompts`,
    with a place.

    Training files are those that the manifests name; one that is no longer there cannot be looked at and is left out.
    """
    keys = {prompt_key(prompt) for prompt in prompts}
    if not keys:  # PPO without held-out prompts: no file need be read
        return []
    reports = [manifest.data.get("train_file") or {} for manifest in ancestry(folders)]
    lines = []
    for path in dict.fromkeys(path for report in reports for path in report.get("paths", [])):
        if not Path(path).is_file():
            continue
        try:
            trained_on = check_file(path).prompts
        except UserError:  # a file whose `text` alone a stage has read: there are no prompts in it
            continue
        places = [place for key, place in trained_on.items() if key in keys]
        if places:
            what = f"{len(places)} of the {len(keys)} prompts given for evaluation were trained on"
            lines.append(f"{path}: {what}, such as at {places[0]}: split by prompt")
    return lines


def ancestry(folders: Iterable[str | None]) -> list[Manifest]:
    """The manifests of these checkpoints, and of those that they started from as far as they still lie there."""
    found: dict[str, Manifest] = {}
    left = [folder for folder in folders if folder]
    while left:
        folder = left.pop(0)
        manifest = None if folder in found else read_manifest(folder)
        if manifest is not None:
            found[folder] = manifest
            left += [parent["path"] for parent in manifest.parents]
    return list(found.values())


def validate(paths: list[str], limit: int | None = SHOWN) -> tuple[int, str]:
    """The exit code (1 when anything is bad) and the text to print, with at most `limit` bad rows a file."""
    checks: list[FileCheck] = []
    errors: list[str] = []
    for path in split_paths(paths):
        try:
            checks.append(check_file(path))
        except UserError as error:
            errors.append(str(error))
    remarks = [line for a, b in itertools.combinations(checks, 2) for line in _compare(a, b)]
    lines = [line for check in checks for line in check.lines(limit)]
    lines += errors + [check.summary() for check in checks] + remarks
    bad = bool(errors) or any(check.problems for check in checks)
    return int(bad), "\n".join(lines)


def main(argv: list[str]) -> int:
    paths = [word for word in argv if word != ALL]
    if not paths or any(word.startswith("-") for word in paths):
        help_wanted = "-h" in argv or "--help" in argv
        print(USAGE, file=sys.stdout if help_wanted else sys.stderr)
        return 0 if help_wanted else 2
    code, text = validate(paths, None if len(paths) < len(argv) else SHOWN)
    print(text)
    return code
