"""No prompt in two splits (paper section 3.2); splits and filters by prompt and by user (Appendix A.2)."""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

from align.errors import UserError
from align.order import epoch_order
from align.rows import DataReport, Problem
from align.types import Text, contents

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


# By user and by prompt; at most 200 prompts a user, no long shared prefix, no personal data (Appendix A.2)


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
