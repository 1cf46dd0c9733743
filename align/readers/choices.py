"""Evaluation sets as rows of choices: `prompt`, `choices` and the `answer` among them; of pairs of sentences neither.

All carry `eval_only`, so that no stage trains on them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from align.data import LETTERS
from align.readers import benchmarks
from align.readers.base import Converted, Notes, Options, Output, Reader, Record, Row, columns, each, field, items
from align.rows import Problem

GENDERED = re.compile(r"(.+)\.(male|female|neutral)\.txt")  # Winogender's sentence numbers


def _rows(made: Callable[[Mapping[str, Any]], Row], *used: str) -> Reader:
    """A reader of rows whose prompt, choices and answer `made(row)` gives; `used` columns are left behind."""

    def convert(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
        return _marked(made(row), columns(row, "prompt", "choices", "answer", *used))

    return each(convert)


def _marked(own: Row, rest: Row) -> Row:
    return {**own, **rest, "eval_only": True}


def _remade(reader: Reader, made: Callable[[Row], Row], *used: str) -> Reader:
    """Rows of choices of what another reader gives as prompts with their choices behind letters."""

    def read(records: Iterable[Record], options: Options) -> Iterator[Output]:
        for output in reader(records, options):
            if isinstance(output, Converted):
                rest = {name: value for name, value in output.row.items() if name not in ("prompt", "answer", *used)}
                output = replace(output, row=_marked(made(output.row), rest))
            yield output

    return read


def _truthfulqa(row: Mapping[str, Any]) -> Row:
    """MC1: one true answer. {answer: 0 or 1} in the authors' file, two lists in the hub's."""
    targets = row["mc1_targets"]
    if set(targets) == {"choices", "labels"}:
        targets = dict(zip(targets["choices"], targets["labels"], strict=True))
    right = [i for i, true in enumerate(targets.values()) if int(true)]
    return {"prompt": field(row, "question"), "choices": list(targets), "answer": right}


def _bbq(row: Row) -> Row:
    asked = f"{row['context']}\n{row['question']}"
    return {"prompt": asked, "choices": row["choices"], "answer": LETTERS.index(row["answer"])}


def _halluqa(row: Row) -> Row:
    return {"prompt": row["question"], "choices": row["choices"], "answer": LETTERS.index(row["answer"])}


def _safetybench(row: Row) -> Row:
    answer = {"answer": LETTERS.index(row["answer"])} if "answer" in row else {}
    return {"prompt": row["question"], "choices": row["options"], **answer}


def _crows(row: Mapping[str, Any]) -> Row:
    """The sentence that stereotypes more stands first."""
    return {"choices": [field(row, "sent_more"), field(row, "sent_less")]}


def _mmlu(row: Mapping[str, Any]) -> Row:
    return {"prompt": field(row, "question"), "choices": items(row, "choices", str), "answer": row["answer"]}


def _arc(row: Mapping[str, Any]) -> Row:
    texts, labels = (list(row["choices"][name]) for name in ("text", "label"))
    return {"prompt": field(row, "question"), "choices": texts, "answer": labels.index(row["answerKey"])}


def _hellaswag(row: Mapping[str, Any]) -> Row:
    return {"prompt": field(row, "ctx"), "choices": items(row, "endings", str), "answer": int(row["label"])}


def winogender(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """The sentence with "he" and the one with "she", in this order; those with "they" are not asked for."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for place, row in records:
        match = GENDERED.fullmatch(str(row.get("sentid"))) if isinstance(row, Mapping) else None
        if match is None or not str(row.get("sentence") or "").strip():
            yield Problem(place, "no_text", "holds no sentence of one gender", "give all_sentences.tsv")
        elif match[2] == "neutral":
            yield Problem(place, "no_gender", "its sentence is of no gender", "not asked for: pairs are of he and she")
        elif match[2] in found.setdefault(match[1], {}):
            yield Problem(place, "repeated_id", "its sentence was there before", "keep one of the two")
        else:
            found[match[1]][match[2]] = (place, row["sentence"])
    for name, pair in found.items():
        if len(pair) < 2:
            (alone, _) = next(iter(pair.values()))
            yield Problem(alone, "no_partner", "its sentence of the other gender is missing", "give the whole file")
            continue
        (he, his), (she, hers) = pair["male"], pair["female"]
        yield Converted(_marked({"choices": [his, hers]}, {"id": name}), (he, she))


truthfulqa_mc = _rows(_truthfulqa, "mc1_targets", "mc2_targets", "question")
crows_pairs = _rows(_crows, "sent_more", "sent_less")
mmlu, arc = _rows(_mmlu, "question"), _rows(_arc, "question", "answerKey")
hellaswag = _rows(_hellaswag, "ctx", "endings", "label", "ctx_a", "ctx_b")
bbq = _remade(benchmarks.bbq, _bbq, "context", "question", "ans0", "ans1", "ans2", "label")
halluqa_mc = _remade(benchmarks.halluqa_mc, _halluqa, "question")
safetybench = _remade(benchmarks.safetybench, _safetybench, "question", "options")
