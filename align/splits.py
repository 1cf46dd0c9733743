"""No prompt in two splits (paper section 3.2): which split a prompt is in, and rows that are kept apart by it."""

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from align.errors import UserError
from align.rows import DataReport, Problem
from align.types import Text

T = TypeVar("T")


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

    The first argument's rows are the ones left out: training stages give their training rows, evaluation its own.
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


# By a hash, the same in every file


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
