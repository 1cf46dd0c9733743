"""Evaluation sets as prompt rows: the prompt as a model is asked, every other column kept for whoever scores.

Those whose authors ask it, or that would be spoilt by it, carry `eval_only`: the training stages refuse such rows.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from align.data import LETTERS
from align.readers.base import (
    Converted,
    Notes,
    Options,
    Output,
    Reader,
    Record,
    Row,
    attempt,
    columns,
    each,
    field,
    items,
)
from align.rows import BadRow, Problem

MC = re.compile(r"\s*([A-J]) ?[:：]")  # the choices inside HalluQA's questions


def _rows(prompt: Any, *, eval_only: bool = True) -> Reader:
    """A reader of rows whose prompt, and columns to replace, `prompt(row)` gives."""

    def convert(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
        own = prompt(row)
        rest = columns(row, "prompt", "", *own)
        return {**own, **rest, **({"eval_only": True} if eval_only else {})}

    return each(convert)


def choices(question: str, options: list[str]) -> str:
    """A question with its options, one a line behind letters."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))])


def _bbq(row: Mapping[str, Any]) -> Row:
    asked = f"{field(row, 'context')}\n{field(row, 'question')}"
    answers = [field(row, name) for name in ("ans0", "ans1", "ans2")]
    return {"prompt": choices(asked, answers), "answer": LETTERS[_index(row, "label", 3)], "choices": answers}


def _index(row: Mapping[str, Any], name: str, count: int) -> int:
    value = str(row.get(name))
    if not value.isdecimal() or int(value) >= count:
        raise BadRow("bad_label", f"{name!r} is no number of a choice", "see docs/formats.md")
    return int(value)


def _gsm8k(row: Mapping[str, Any]) -> Row:
    answer = field(row, "answer")
    if "####" not in answer:
        raise BadRow("missing_field", "'answer' holds no #### result", "see docs/formats.md")
    return {"prompt": field(row, "question"), "result": answer.split("####")[-1].strip().replace(",", "")}


def _truthfulqa(row: Mapping[str, Any]) -> Row:
    lists = {name: field(row, name).split("; ") for name in ("Correct Answers", "Incorrect Answers")}
    return {"prompt": field(row, "Question"), **{n: [a.strip() for a in v if a.strip()] for n, v in lists.items()}}


def _halluqa(row: Mapping[str, Any]) -> Row:
    best = [row[n] for n in (f"Best Answer{i}" for i in range(1, 5)) if row.get(n)]
    wrong = [row[n] for n in (f"Wrong_Answer{i}" for i in range(1, 5)) if row.get(n)]
    return {"prompt": field(row, "Question"), "best_answers": best, "wrong_answers": wrong}


def _halluqa_mc(row: Mapping[str, Any]) -> Row:
    """The choices are parsed out of the question's text."""
    asked, *parts = MC.split(field(row, "question"))
    letters, texts = parts[::2], [text.strip() for text in parts[1::2]]
    answer = field(row, "answer").removeprefix("Answer:").strip()
    if letters != list(LETTERS[: len(letters)]) or answer not in letters:
        raise BadRow("bad_choices", "the choices A, B, ... cannot be told apart in its text", "see docs/formats.md")
    question = asked.strip().removeprefix("Question:").strip()
    return {"prompt": choices(question, texts), "question": question, "choices": texts, "answer": answer}


def _turns(row: Mapping[str, Any]) -> Row:
    turns = items(row, "turns", str)
    if not turns or not turns[0].strip():
        raise BadRow("empty_field", "'turns' is empty", "fill it, or take the row out")
    return {"prompt": turns[0].strip(), "turns": turns}


def _named(name: str) -> Any:
    return lambda row: {"prompt": field(row, name)}


def safetybench(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """SafetyBench's questions; its answers are a file of their own, one object by id: give both to join them."""
    questions: list[Record] = []
    answers: dict[str, tuple[str, Any]] = {}
    for place, row in records:
        if not isinstance(row, Mapping) or not row or "question" in row:
            questions.append((place, row))
            continue
        for key, value in row.items():
            own = f"{place}, id {key}"
            if answers.setdefault(str(key), (own, value))[0] != own:
                yield Problem(own, "repeated_id", "this id was answered before", "keep one of the answers")

    def convert(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
        texts = items(row, "options", str)
        known = answers.get(str(row.get("id")), ("", {}))[1]
        answer = {"answer": LETTERS[_index(known, "answer", len(texts))]} if known else {}
        asked = choices(field(row, "question"), texts)
        return {"prompt": asked, **answer, **columns(row, "prompt"), "eval_only": True}

    joined = set()
    for place, row in questions:
        key = str(row.get("id")) if isinstance(row, Mapping) else ""
        for output in attempt(place, row, convert, options):
            if isinstance(output, Converted) and key in answers:
                joined.add(key)
                output = replace(output, partners=(answers[key][0],))
            yield output
    for key, (place, _) in answers.items():
        if key not in joined:
            yield Problem(place, "no_partner", "answers no question of the files given", "give the questions' file too")


def no_text(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """A table of numbers that belongs to another file: nothing to train or ask."""
    for place, _ in records:
        yield Problem(place, "no_text", "holds no text to ask", "use it beside the sentences it belongs to")


bbq, gsm8k, truthfulqa = _rows(_bbq), _rows(_gsm8k), _rows(_truthfulqa)
truthfulqa_mc, halluqa, halluqa_mc = _rows(_named("question")), _rows(_halluqa), _rows(_halluqa_mc)
sentence, crows_pairs, cold = _rows(_named("sentence")), _rows(_named("sent_more")), _rows(_named("TEXT"))
asked = _rows(_named("prompt"))
turns = _rows(_turns, eval_only=False)
