"""Exports of labelling tools: Argilla's ranking questions, Label Studio's Ranker and Pairwise.

A unit is one annotator's answer to one task, or the task where nobody answered. Answers that were discarded, skipped
or left as drafts are named, not used. Suggestions and predictions of models are no answers.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from align.readers.base import (
    Expand,
    Notes,
    Options,
    Row,
    as_prompt,
    field,
    items,
    message,
    nested,
    ranking_row,
    with_context,
)
from align.rows import BadRow

PROMPTS = ("prompt", "instruction", "question", "query", "request", "input", "context")
NO_FIELDS = ("id", "external_id", "metadata", "status", "_server_id", "vectors", "inserted_at", "updated_at")
Answer = tuple[str, Any, str]  # labeler, ranking as the tool stores it, status


def _answers(read: Callable[[Mapping[str, Any]], list[Answer]]) -> Expand:
    """Each answer that `read` finds, with its task."""

    def expand(task: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
        found = read(task)
        if not found:
            raise BadRow("no_answer", "nobody ranked it", "take it out, or have it ranked")
        for number, answer in enumerate(found, start=1):
            yield "" if len(found) == 1 else f", answer {number}", {"task": task, "answer": answer}

    return expand


def _check_status(status: str) -> None:
    if status not in ("submitted", ""):
        raise BadRow("not_submitted", f"the answer was left {status}", "nothing to mend; or submit it in the tool")


def _plain(name: str) -> str:
    """response-1, response_1 and Response 1 are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


# Argilla


def _argilla_answers(row: Mapping[str, Any]) -> list[Answer]:
    responses = row.get("responses")
    if isinstance(responses, list):  # Argilla 1: one object a user, all questions inside
        answers = [(r.get("user_id"), _first_ranking(r.get("values")), r.get("status")) for r in responses]
    elif isinstance(responses, Mapping):  # Argilla 2: one list a question
        lists = [one for one in responses.values() if isinstance(one, list) and any(_pairs(r["value"]) for r in one)]
        answers = [(r.get("user_id"), r["value"], r.get("status")) for r in (lists[0] if lists else [])]
    else:
        answers = _hub_answers(row)
    return [(str(user or ""), value, str(status or "")) for user, value, status in answers]


def _first_ranking(values: Any) -> Any:
    """The first question's value that is a ranking; None when none is (a discarded answer has no values)."""
    found = ((v or {}).get("value") for v in (values or {}).values())
    return next((value for value in found if _pairs(value)), None)


def _hub_answers(row: Mapping[str, Any]) -> list[tuple]:
    for name, value in row.items():
        if name.endswith(".responses") and isinstance(value, list) and any(_pairs(one) for one in value):
            users, states = row.get(f"{name}.users") or [], row.get(f"{name}.status") or []
            pad = [None] * len(value)
            return list(zip([*users, *pad], value, [*states, *pad], strict=False))[: len(value)]
        own = [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
        if any("user_id" in one and _pairs(one.get("value")) for one in own):
            return [(one.get("user_id"), one.get("value"), one.get("status")) for one in own]
    return []


def _pairs(value: Any) -> list[tuple[str, float]]:
    """(option, rank) of a ranking: [{"value", "rank"}], {"value": [...], "rank": [...]}, or options best first."""
    if isinstance(value, Mapping) and isinstance(value.get("value"), list) and isinstance(value.get("rank"), list):
        value = [{"value": v, "rank": r} for v, r in zip(value["value"], value["rank"], strict=True)]
    if not isinstance(value, list) or len(value) < 2:
        return []
    if all(isinstance(one, str) for one in value):
        return [(one, float(i)) for i, one in enumerate(value)]
    if all(isinstance(one, Mapping) and isinstance(one.get("rank"), (int, float)) for one in value):
        return [(str(one.get("value")), float(one["rank"])) for one in value]
    return []


def _argilla_row(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    task, (labeler, value, status) = row["task"], row["answer"]
    _check_status(status)
    pairs = _pairs(value)
    if not pairs:
        raise BadRow("no_answer", "the answer holds no ranking", "take it out, or have it ranked")
    texts = task["fields"] if isinstance(task.get("fields"), Mapping) else task
    names = {_plain(name): name for name in texts}
    if not all(_plain(option) in names for option, _ in pairs):
        raise BadRow("missing_field", "a ranked option names no field", "name options after fields")
    ranked = [(field(texts, names[_plain(option)]), rank) for option, rank in pairs]
    options_named = {_plain(option) for option, _ in pairs}
    asked, context = _asked(texts, options_named), texts.get("context")
    if isinstance(context, str) and context.strip() and context != asked and "context" not in options_named:
        if not isinstance(asked, str):
            raise BadRow("wrong_type", "has a context beside a conversation", "write it into the first message")
        asked = with_context(context, asked, options)
    return ranking_row(asked, ranked, notes, labeler=labeler, id=task.get("id"))


def _asked(texts: Mapping[str, Any], ranked: set[str]) -> Any:
    """The prompt: the field of a usual name, text or messages, or the only text left that is not ranked."""
    for name in (*PROMPTS, "messages"):
        if isinstance(texts.get(name), str):
            return field(texts, name)
        if texts.get(name):  # never another field in its place
            turns = [message(field(turn, "role"), field(turn, "content")) for turn in items(texts, name)]
            return as_prompt(turns)
    left = [n for n, v in texts.items() if isinstance(v, str) and n not in NO_FIELDS and _plain(n) not in ranked]
    if len(left) != 1:
        raise BadRow("missing_field", "which field is the prompt cannot be told", f"name it {PROMPTS[0]!r}")
    return field(texts, left[0])


# Label Studio


def _studio_answers(row: Mapping[str, Any]) -> list[Answer]:
    if "data" not in row:  # JSON-MIN: the task's fields and results side by side
        return [(_user(row.get("annotator")), row, "")] if "annotation_id" in row or "annotator" in row else []
    annotations = row.get("annotations", row.get("completions")) or []
    states = ["cancelled" if one.get("was_cancelled") else "" for one in annotations]
    found = [one.get("result") or [] for one in annotations]
    users = [_user(one.get("completed_by")) for one in annotations]
    return list(zip(users, found, states, strict=True))


def _user(value: Any) -> str:
    """completed_by is a number, or an object with one: an annotator's address does not go into training data."""
    if isinstance(value, Mapping):
        value = value.get("id")
    return "" if value is None else str(value)


def _studio_row(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    task, (labeler, results, status) = row["task"], row["answer"]
    _check_status(status)
    data = task.get("data", task)
    values = _flat(results.values()) if isinstance(results, Mapping) else [one.get("value") for one in results]
    selected = next((v["selected"] for v in values if isinstance(v, Mapping) and "selected" in v), None)
    ranked = _selected(data, selected, _sides(results)) if selected is not None else _ordered(data, values)
    used = {name for name, value in data.items() if value in [text for text, _ in ranked]}
    asked = _asked(data, {_plain(name) for name in used})
    own = task.get("id") if data.get("id") is None else data["id"]  # ours, before the tool's number
    return ranking_row(asked, ranked, notes, labeler=labeler, id=own)


def _flat(values: Iterable[Any]) -> list[Any]:
    """JSON-MIN's fields: a task's, and results, which lie in lists of one."""
    lists = (v if isinstance(v, list) and all(isinstance(one, Mapping) for one in v) else [v] for v in values)
    return [one for found in lists for one in found]


def _sides(results: Any) -> list[str]:
    """What a Pairwise result says it compares, left and right; nothing in JSON-MIN."""
    names = [] if isinstance(results, Mapping) else [one.get("to_name") for one in results if one.get("to_name")]
    return names[0].split(",") if names and isinstance(names[0], str) else list(names[0]) if names else []


def _selected(data: Mapping[str, Any], selected: Any, sides: list[str]) -> list[tuple[str, float]]:
    """The two texts of a Pairwise task: left and right as the result names them, else in the data's order."""
    texts = [n for n, v in data.items() if isinstance(v, str) and n not in (*PROMPTS, *NO_FIELDS)]
    if len(texts) == 2 and set(sides) == set(texts):
        texts = sides
    if len(texts) != 2 or selected not in ("left", "right"):
        raise BadRow("wrong_type", "is no choice between two texts", "give the two texts and a prompt as data")
    left = 0.0 if selected == "left" else 1.0
    return [(field(data, texts[0]), left), (field(data, texts[1]), 1.0 - left)]


def _ordered(data: Mapping[str, Any], values: list[Any]) -> list[tuple[str, float]]:
    """The texts of a Ranker's list in the order of their ids, the best first."""
    lists = [v for v in data.values() if isinstance(v, list) and v and all(isinstance(i, Mapping) for i in v)]
    texts = {str(one.get("id")): one for found in lists for one in found}
    orders = [order for value in values for order in _id_lists(value) if order and set(order) <= texts.keys()]
    if len(orders) > 1:
        raise BadRow("buckets", "its items lie in several buckets, whose order is not in the export", "rank one list")
    if not orders:
        raise BadRow("no_answer", "the answer holds no ranking", "take it out, or have it ranked")
    return [(field(texts[i], "body", "text", "html", "title"), float(n)) for n, i in enumerate(orders[0])]


def _id_lists(value: Any) -> list[list[str]]:
    """Every list of ids in a result: {"ranker": {"rank": [...]}}, {"rank": [...]} or the list itself."""
    if isinstance(value, Mapping):
        return [ids for name, inner in value.items() if name != "_" for ids in _id_lists(inner)]
    if isinstance(value, list) and all(isinstance(one, (str, int)) for one in value):
        return [[str(one) for one in value]]
    return []


argilla = nested(_answers(_argilla_answers), _argilla_row)  # versions 1 and 2: records as JSON, or the hub export
label_studio = nested(_answers(_studio_answers), _studio_row)  # JSON and JSON-MIN
