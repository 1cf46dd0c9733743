"""How long rows are in tokens, and those over a cap dropped, never cut (C.4: prompts over 1k tokens are filtered out).

Many texts are tokenised in one call: one call a text would take minutes for a large file of rankings.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from align.errors import UserError
from align.rows import DataReport
from align.types import Choice, Demonstration, Prompt, Ranking, Text

T = TypeVar("T")
ROWS = 1024  # whose tokens exist at once


class Tokens(Protocol):
    """What lengths need of `align.text.Codec`."""

    def prompts(self, prompts: list[Text]) -> list[list[int]]: ...

    def responses(self, completions: list[Text]) -> list[list[int]]: ...


def prompt_lengths(rows: Sequence[Prompt | Demonstration | Ranking], codec: Tokens) -> list[int]:
    return [len(ids) for ids in codec.prompts([row.prompt for row in rows])]


def demonstration_lengths(rows: Sequence[Demonstration], codec: Tokens) -> list[int]:
    answers = codec.responses([row.completion for row in rows])
    return [prompt + len(answer) for prompt, answer in zip(prompt_lengths(rows, codec), answers, strict=True)]


def ranking_lengths(rows: Sequence[Ranking], codec: Tokens) -> list[int]:
    """Prompt plus the longest of the K completions."""
    answers = _lengths([completion for row in rows for completion in row.completions], codec)
    prompts = prompt_lengths(rows, codec)
    return [p + max(next(answers) for _ in row.completions) for p, row in zip(prompts, rows, strict=True)]


def choice_lengths(rows: Sequence[Choice], codec: Tokens) -> list[int]:
    """Prompt, or the token that stands for none, plus the longest of the K choices, whose EOS is not read."""
    answers = _lengths([choice for row in rows for choice in row.choices], codec)
    prompts = iter(codec.prompts([row.prompt for row in rows if row.prompt is not None]))
    starts = [1 if row.prompt is None else len(next(prompts)) for row in rows]
    return [p + max(next(answers) for _ in row.choices) - 1 for p, row in zip(starts, rows, strict=True)]


def _lengths(answers: list[Text], codec: Tokens) -> Iterator[int]:
    return map(len, codec.responses(answers))


Lengths = Callable[[Sequence[T], Tokens], list[int]]


def drop_long(
    rows: list[T], codec: Tokens, max_tokens: int, report: DataReport, lengths: Lengths = prompt_lengths
) -> tuple[list[T], DataReport]:
    """The rows of at most `max_tokens`, and the report with the others counted. Raises UserError when none is left, and
    for a row that the chat template refuses, by its number."""
    kept = []
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        try:
            sizes = lengths(some, codec)
        except UserError:
            name_refused(some, codec, lengths, f"{', '.join(report.paths)}: row", start, len(rows))
            raise
        kept += [row for row, size in zip(some, sizes, strict=True) if size <= max_tokens]
    if rows and not kept:
        remedy = "raise max_prompt_length or max_length"
        raise UserError(f"{', '.join(report.paths)}: every row is over {max_tokens} tokens: {remedy}")
    return kept, report.with_dropped("too_long", len(rows) - len(kept))


def name_refused(rows: Sequence[T], codec: Tokens, lengths: Lengths, where: str, before: int, count: int) -> None:
    """Raises the UserError of the first row that cannot be tokenised, with its number."""
    for number, row in enumerate(rows, start=before + 1):
        try:
            lengths([row], codec)
        except UserError as error:
            raise UserError(f"{where} {number} of {count} in use: {error}") from None
