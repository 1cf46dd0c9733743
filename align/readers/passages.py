"""Long texts: prose, SQuAD's passages with questions, SQuALITY's stories with questions."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from align.readers.base import (
    Converted,
    Expand,
    Notes,
    Options,
    Output,
    Reader,
    Record,
    Row,
    columns,
    field,
    items,
    nested,
    with_context,
)
from align.rows import BadRow


def documents(text: str, longest: int) -> list[str]:
    """Prose as documents of at most `longest` characters, cut between paragraphs, else lines, else words.

    Only white space at the cuts is lost.
    """
    found = []
    rest = text.strip()
    while len(rest) > longest:
        head = rest[: longest + 1]
        cuts = (head.rfind("\n\n"), head.rfind("\n"), head.rfind(" "))
        cut = next((cut for cut in cuts if cut > longest // 2), longest)  # no short documents for a tidy cut
        found.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*found, rest] if rest else found


def _as_text(name: str, expand: Expand) -> Reader:
    """A reader of the text in a field of each unit, cut into documents."""

    def read(records: Iterable[Record], options: Options) -> Iterator[Output]:
        whole = nested(expand, lambda row, options, notes: {"text": field(row, name), **_id(row)})
        for output in whole(records, options):
            if not isinstance(output, Converted):
                yield output
                continue
            for document in documents(output.row["text"], options.document_characters):
                yield Converted({**output.row, "text": document}, output.places)

    return read


def _id(row: Mapping[str, Any]) -> Row:
    own = row.get("id") or (row.get("metadata") or {}).get("passage_id")
    return {} if own is None else {"id": own}


def _paragraphs(row: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place inside the row, paragraph): of a whole SQuAD file, or of one of its articles a line."""
    articles = items(row, "data") if "data" in row else [row]
    for number, article in enumerate(articles, start=1):
        for inner, paragraph in enumerate(items(article, "paragraphs"), start=1):
            place = f", article {number}" if "data" in row else ""
            yield f"{place}, paragraph {inner}", paragraph


def _questions(row: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    for inner, paragraph in _paragraphs(row):
        for number, question in enumerate(items(paragraph, "qas"), start=1):
            yield f"{inner}, question {number}", {**question, "context": paragraph.get("context")}


def _squad_answer(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """A question after its passage, answered as most people did.

    Offsets are not used: one that does not fit is noted, and an answer whose text is not in the passage is not taken.
    """
    answers, asked = items(row, "answers"), with_context(field(row, "context"), field(row, "question"), options)
    context = row["context"]  # as it stands, white space and all: offsets count it
    texts = [field(answer, "text") for answer in answers]
    wrong = sum(not _fits(context, answer["text"], answer.get("answer_start")) for answer in answers)
    if wrong:
        notes.append(("bad_offset", f"{wrong} of {len(texts)} offsets do not fit: texts were compared"))
    inside = [text for text in texts if text in context]
    if not inside:
        raise BadRow("answer_not_in_text", "none of its answers is in the passage", "mend the answer")
    best = max(inside, key=inside.count)
    return {"prompt": asked, "completion": best, "answers": sorted(set(texts)), "id": row.get("id")}


def _fits(context: str, text: str, start: Any) -> bool:
    return isinstance(start, int) and start >= 0 and context[start : start + len(text)] == text


def _answers(row: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    for question in items(row, "questions"):
        for number, response in enumerate(items(question, "responses"), start=1):
            inner = f", question {question.get('question_number')}, answer {number}"
            yield inner, {"document": field(row, "document"), "question": question, "response": response}


def _squality_answer(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """A question on a story and what one person answered."""
    prompt = with_context(row["document"], field(row["question"], "question_text"), options)
    completion = field(row["response"], "response_text")
    about = {"labeler": row["response"].get("worker_id"), "id": row["response"].get("uid")}
    return {"prompt": prompt, "completion": completion, **columns(about)}


prose = _as_text("text", lambda row: [("", row)])
squality_texts = _as_text("document", lambda row: [("", row)])  # a unit is a story
squad_texts = _as_text("context", _paragraphs)  # a unit is a passage
squad_demonstrations = nested(_questions, _squad_answer)  # a unit is a question
squality_demonstrations = nested(_answers, _squality_answer)  # a unit is one person's answer
