"""What the paper leaves out (Appendix A.2): prompts with one opening, a customer's 201st prompt, personal data."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from align.errors import UserError
from align.rows import Problem
from align.splits import prompt_key
from align.types import Text, contents

Row = dict[str, Any]


@dataclass(frozen=True)
class Cap:
    """`{column, rows}`: of each value of a column the first so many rows."""

    column: str
    rows: int = 200  # prompts of one user in the paper

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(f"rows: {self.rows}; keep at least 1 row of each {self.column}")


class Repeats:
    """The openings and customers of the rows kept so far. Ask `problem` of a row, and tell `keep` when it is kept."""

    def __init__(self, prefix_characters: int | None, cap: Cap | None):
        self.prefix_characters, self.cap = prefix_characters, cap
        self.first: dict[str, str] = {}  # opening -> place
        self.seen: Counter[str] = Counter()

    def problem(self, place: str, prompt: Text, row: Row) -> Problem | None:
        """Why the row is left out, or None."""
        first = self.first.get(self.opening(prompt)) if self.prefix_characters else None
        if first is not None:
            what = f"begins as {first} does, {self.prefix_characters} characters long"
            return Problem(place, "shared_prefix", what, "raise shared_prefix to keep it")
        if self.cap and self.seen[column(place, row, self.cap.column)] >= self.cap.rows:
            what = f"its {self.cap.column} has {self.cap.rows} rows already"
            return Problem(place, "over_max_rows_per", what, "raise max_rows_per to keep it")
        return None

    def keep(self, place: str, prompt: Text, row: Row) -> None:
        if self.prefix_characters:
            self.first[self.opening(prompt)] = place
        if self.cap:
            self.seen[column(place, row, self.cap.column)] += 1

    def opening(self, prompt: Text) -> str:
        return prompt_key(prompt)[: self.prefix_characters]


def column(place: str, row: Row, name: str) -> str:
    if row.get(name) is None:
        raise UserError(f"{place}: no column {name!r}: name one that every row of the source has")
    return str(row[name])


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


def has_personal_data(text: Text) -> bool:
    """Whether it holds an e-mail address, a telephone, payment card or identity number. A filter, no guarantee."""
    plain = contents(text)
    if EMAIL.search(plain) or PHONE.search(plain) or IDENTITY_NUMBER.search(plain):
        return True
    return any(_luhn([int(c) for c in m.group() if c.isdecimal()]) for m in LONG_NUMBER.finditer(plain))


def _luhn(digits: list[int]) -> bool:
    """The check digit of payment cards: every other number from the right doubled, digit sums, divides by 10."""
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
