"""Rows as records: demonstrations, rankings, prompts, texts, choices.

Nothing bad is skipped in silence and nothing bad reaches a collator. A row that cannot be used becomes a `Problem`
with its place, and then `on_bad_rows` decides: "stop" raises one `UserError` that names the first and counts the rest,
"drop" goes on and leaves the counts in the `DataReport`, which the manifest keeps. No message repeats a row's text:
real preference data holds text that belongs in no log.

Formats: design section 4, TRL's names, text or conversational, in the files and data sets that `align.rows` reads.

Rule for equal completions in one ranking (compared without surrounding white space): with the same rank they are one
completion, merged and noted as `merged_duplicates`; with different ranks the labeler contradicts himself and the row
is bad, as it is when fewer than two distinct completions remain.

What a row says beside its answers: a text `system` becomes the prompt's first message; a `margin` stays a column, and a
conversation teaches its last answer alone, both counted in the notes. Answers under names that are not ours make no
prompt of a row (`answer_columns`).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.files import sha256_file
from align.rows import BadRow, DataReport, Problem, count_kinds, read_rows, refuse, split_paths
from align.types import Choice, Demonstration, Message, Prompt, Ranking, Text, contents

Columns = Mapping[str, Any]

ASKED = (  # what others call a prompt, or what it may be in
    "question", "instruction", "input", "query", "context", "history", "conversation", "conversations", "dialogue",
    "trajectory", "post", "problem", "messages",
)  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool")
REPLY = "\n\nAssistant:"  # the turn marker of Anthropic's HH dialogues
ANSWERED = ("completion", "completions", "chosen", "rejected", "messages")  # our own names of answers
ORDERS = ("rank", "ranks", "ranking", "labels", "scores")  # beside a list of texts: it holds answers to be compared
ONE_OF_SEVERAL = re.compile(  # response_0, answer-b, Response 1
    r"(answer|completion|output|response)[ _-]?(\d{1,2}|[a-k])|(chosen|rejected)[ _-](answer|completion|response)"
    r"|(answer|completion|response)[ _-](chosen|rejected)|human_ref_[ab]",
    re.IGNORECASE,
)
# A table's way to write messages, and Python's: nobody means this as a prompt or an answer.
TALK_AS_TEXT = re.compile(r"(array\()?\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
SYSTEMS = ("system", "system_prompt")
LETTERS = "ABCDEFGHIJ"  # of choices
LABELS = ("label", "kto_tag")  # TRL's and LLaMA-Factory's: whether an answer is a good one
NO_CALLS = "calls of tools are not learned: take the row out, or write it as text"
SCORES_OF_PAIRS = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
)  # fmt: skip
EARLIER = "earlier_answers_not_learned"
NOTES = {
    "merged_duplicates": "equal completions of one rank were merged",
    "system_used": "has a column `system` or `system_prompt`, which opens the prompt as its system message",
    "scores_disagree": "the chosen answer's score is not above the rejected one's: taken as chosen all the same",
    "margin_not_used": "has a margin, which the loss does not use: it stays a column",
    EARLIER: "the assistant's earlier answers are prompt: the last one alone is learned, unless all_answers is set",
}


# One row -> one record


def _text(row: Columns, name: str, what: str | None = None) -> Text:
    """The text or conversation in field `name`."""
    value, what = row.get(name), what or repr(name)
    if value is None:
        raise BadRow("missing_field", f"{what} is missing", "add it, or give a file of the right kind")
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty_field", f"{what} is empty", "fill it, or take the row out")
        if name != "text" and TALK_AS_TEXT.match(value.lstrip()):
            remedy = "export the data as JSON lines or Parquet, not as a table"
            raise BadRow("talk_as_text", f"{what} is a conversation written out as text", remedy)
        return value
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong_type", f"{what} is neither text nor a list of messages", "write text or messages")
    if not value:
        raise BadRow("empty_field", f"{what} is empty", "fill it, or take the row out")
    return tuple(_message(message, what) for message in value)


def _message(message: Any, what: str) -> Message:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, (list, tuple)):
        content = _joined(content, what)
    if isinstance(message, Mapping) and not content and calls_tools(message):
        raise BadRow("bad_messages", f"{what} holds a tool call without text", NO_CALLS)
    if not isinstance(content, str):
        remedy = 'write {"role": ..., "content": ...}'
        raise BadRow("bad_messages", f"{what} holds something that is no message", remedy)
    if message.get("role") not in ROLES:
        raise BadRow("bad_messages", f"{what} holds a message of an unknown role", f"use one of {', '.join(ROLES)}")
    if not content.strip():
        raise BadRow("empty_field", f"{what} holds an empty message", "fill it, or take the row out")
    return {key: value for key, value in message.items() if value is not None} | {"content": content}


def _joined(parts: Sequence[Any], what: str) -> str:
    """The text of content parts, end to end as chat templates write them."""
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type", "text") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        remedy = 'keep {"type": "text", "text": ...} alone, or take the row out'
        raise BadRow("bad_messages", f"{what} holds a content part that is not text, such as an image", remedy)
    return "".join(texts)


def calls_tools(message: Message) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call"))


def _prompt(row: Columns) -> Text:
    if earlier_turns(row):
        what, remedy = "'history' holds earlier turns beside the prompt", "`align convert` puts them into the prompt"
        raise BadRow("unread_history", what, remedy)
    return system_first(_as_prompt(_text(row, "prompt")), row)


def earlier_turns(row: Columns) -> bool:
    """Whether a column `history` is a list of [question, answer], as ChatGLM's and Alpaca's data have it."""
    turns = row.get("history")
    lists = isinstance(turns, (list, tuple)) and bool(turns) and all(isinstance(turn, (list, tuple)) for turn in turns)
    return lists and all(len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns)


def label_of(row: Columns) -> bool | None:
    """Whether an unpaired answer is labelled good; None where no label says so. Tables write numbers and texts."""
    for value in (row.get(name) for name in LABELS):
        said = str(value).strip().lower()
        if isinstance(value, (bool, int, float, str)) and said in ("true", "1", "1.0", "false", "0", "0.0"):
            return said in ("true", "1", "1.0")
    return None


def system_of(row: Columns) -> str:
    """The text of `system` or `system_prompt`, a system message; "" where there is none, or it is something else."""
    return next((row[name].strip() for name in SYSTEMS if isinstance(row.get(name), str) and row[name].strip()), "")


def system_first(prompt: Text, row: Columns) -> Text:
    """The prompt after the row's `system`, which Alpaca and ShareGPT have in such a column too."""
    system = system_of(row)
    if not system:
        return prompt
    turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if turns[0]["role"] not in ROLES[:2]:
        return ({"role": "system", "content": system}, *turns)
    if turns[0]["content"].strip() != system:
        raise BadRow("bad_messages", "'system' is not the system message that the prompt begins with", "keep one")
    return turns


def _as_prompt(prompt: Text) -> Text:
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise BadRow("bad_messages", "the prompt ends with the assistant's message", "end it with the user's")
    return prompt


def _completion(row: Columns, name: str, what: str | None = None) -> Text:
    """A completion; as messages, the assistant's alone, since all of it is trained on."""
    completion = _text(row, name, what)
    if not isinstance(completion, str) and any(m["role"] != "assistant" for m in completion):
        raise BadRow("bad_messages", f"{what or repr(name)} holds others' messages", "keep the assistant's alone")
    return _spoken(completion)


def _spoken(completion: Text) -> Text:
    """A completion that is text alone: of a tool call beside it nothing would be learned."""
    if not isinstance(completion, str) and any(calls_tools(message) for message in completion):
        raise BadRow("bad_messages", "an answer holds a tool call", NO_CALLS)
    return completion


def _rest(row: Columns, *used: str) -> dict[str, Any]:
    """The columns beside the record's own fields."""
    taken = (*used, *SYSTEMS) if system_of(row) else used
    return {key: value for key, value in row.items() if key not in taken}


def answer_columns(row: Columns) -> list[str]:
    """The columns that hold answers to the prompt under names that are not ours, such as response_0.

    No such column are `answer`, and `answers` as a list of texts: reward functions compare with them.
    """
    return [name for name, value in row.items() if value and _holds_answers(name, value, row)]


def _holds_answers(name: str, value: Any, row: Columns) -> bool:
    if not isinstance(value, (str, list, tuple, Mapping)) or not isinstance(name, str):
        return False
    if name == "answers":
        objects = isinstance(value, (list, tuple)) and any(isinstance(one, Mapping) for one in value)
        objects = objects or (isinstance(value, str) and value.lstrip().startswith("[{"))  # in a table
        return objects or any(isinstance(row.get(order), (list, tuple)) for order in ORDERS)
    if name in ("responses", "ranked_responses", "generations"):
        return not isinstance(value, str)
    return name == "response" or ONE_OF_SEVERAL.fullmatch(name) is not None


def parse_demonstration(row: Columns, notes: Counter[str]) -> Demonstration:
    if label_of(row) is False:
        raise BadRow("labelled_bad", "is labelled as a bad answer", "use it in rankings")
    if _is_talk(row):
        messages = _text(row, "messages")
        if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            what = "'messages' does not end with an answer of the assistant"
            raise BadRow("bad_messages", what, "write at least a user's message and then the assistant's")
        prompt = system_first(_as_prompt(messages[:-1]), row)
        record = Demonstration(prompt, _spoken(messages[-1:]), _rest(row, "messages"))
    else:
        record = Demonstration(_prompt(row), _completion(row, "completion"), _rest(row, "prompt", "completion"))
    if not isinstance(record.prompt, str) and any(m["role"] == "assistant" for m in record.prompt):
        notes[EARLIER] += 1
    return record


def _is_talk(row: Columns) -> bool:
    """Whether a row holds prompt and answer together, as `messages`."""
    others = ("completion", "completions", "chosen", "rejected")
    return row.get("messages") is not None and all(row.get(name) is None for name in others)


def read_prompt(row: Columns) -> Text:
    """The prompt of a row that has passed the check: of a demonstration, a ranking or a prompt."""
    return system_first(_as_prompt(_text(row, "messages")[:-1]), row) if _is_talk(row) else _prompt(row)


def parse_prompt(row: Columns, notes: Counter[str]) -> Prompt:
    prompt, unread = _prompt(row), answer_columns(row)
    if unread and all(row.get(name) is None for name in ANSWERED):  # else a prompt was asked for, not made of the row
        what = f"has answers beside its prompt ({', '.join(map(repr, unread))}) in no shape that is read"
        shapes = "completion (a demonstration), chosen and rejected (a pair) or completions (a ranking)"
        remedy = f"name them {shapes}; a column for a reward function needs another name; see docs/formats.md"
        raise BadRow("unread_answers", what, remedy)
    return Prompt(prompt, _rest(row, "prompt"))


def parse_text(row: Columns, notes: Counter[str]) -> str:
    text = _text(row, "text")
    if not isinstance(text, str):
        raise BadRow("wrong_type", "'text' is not text", "write plain text")
    return text


def parse_choice(row: Columns, notes: Counter[str]) -> Choice:
    """`choices` and the `answer` among them, by number from 0, letter or text, or several; none for a pair."""
    texts = row.get("choices")
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadRow("wrong_type", "'choices' is no list of texts", 'write ["one", "another"]')
    if len(texts) < 2:
        raise BadRow("too_few_choices", f"has {len(texts)} choices", "give two or more, or take the row out")
    if len(set(texts)) < len(texts):
        raise BadRow("repeated_choice", "two of its choices are alike", "take the row out")
    answer = row.get("answer")
    answers = answer if isinstance(answer, (list, tuple)) else [answer] * (answer is not None)
    prompt = None if row.get("prompt") is None else _prompt(row)
    if not answers and (len(texts) > 2 or (prompt is not None and answer is None)):
        remedy = "give the number of the right one, from 0, or [] for a pair of which neither is"
        raise BadRow("missing_field", "has no 'answer'", remedy)
    right = tuple(sorted({_place(answer, texts) for answer in answers}))
    return Choice(prompt, tuple(texts), right, _rest(row, "prompt", "choices", "answer"))


def _place(answer: Any, texts: Sequence[str]) -> int:
    """Where the answer stands: itself, its letter or its number."""
    if isinstance(answer, str):
        if answer in texts:
            return list(texts).index(answer)
        answer = LETTERS.find(answer) if len(answer) == 1 and answer in LETTERS else answer
    number = int(answer) if str(answer).isdecimal() and not isinstance(answer, bool) else -1
    if not 0 <= number < len(texts):
        raise BadRow("bad_label", "'answer' is none of the choices", "give its number from 0, its letter or its text")
    return number


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
    asked = next((name for name in ASKED if row.get(name)), None)
    if row.get("prompt") is None and asked and isinstance(chosen, str):  # else a common start would be made the prompt
        remedy = f"name it 'prompt'; `align convert` reads {', '.join(ASKED[:4])}"
        raise BadRow("missing_field", f"'prompt' is missing, and there is {asked!r}", remedy)
    whole = isinstance(chosen, tuple) and any(message["role"] != "assistant" for message in chosen)
    if row.get("prompt") is None or whole:
        prompt, chosen, rejected = _implicit(chosen, rejected)
        _check_stated(row.get("prompt"), prompt)
        prompt, chosen, rejected = system_first(prompt, row), _spoken(chosen), _spoken(rejected)
    else:
        prompt, chosen, rejected = _prompt(row), _completion(row, "chosen"), _completion(row, "rejected")
    for better, worse in SCORES_OF_PAIRS:
        scores = row.get(better), row.get(worse)
        if all(isinstance(score, (int, float)) for score in scores) and scores[0] <= scores[1]:
            notes["scores_disagree"] += 1
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
    if row.get("margin") is not None:
        notes["margin_not_used"] += 1
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
    if isinstance(stated, (list, tuple)) and _text({"prompt": stated}, "prompt") != prompt:
        raise BadRow("prompt_mismatch", "'prompt' is not the one in 'chosen'", "give all three one prompt")


PARSERS: dict[str, Callable[[Columns, Counter[str]], Any]] = {
    "demonstration": parse_demonstration,
    "ranking": parse_ranking,
    "preference": parse_ranking,
    "prompt": parse_prompt,
    "text": parse_text,
    "choice": parse_choice,
}


def parse_row(kind: str, place: str, row: Any, notes: Counter[str]) -> Any:
    """The record of `kind` in `row`, or a Problem. What was mended on the way is counted in `notes`."""
    if isinstance(row, Problem):
        return row
    if not isinstance(row, Mapping):
        return Problem(place, "not_a_dict", "is not a JSON object", 'write {"field": ...}')
    try:
        record = PARSERS[kind](row, notes)
        if kind != "text" and system_of(row):
            notes["system_used"] += 1
        return record
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


def load_choices(paths: str | list[str], on_bad_rows: str = "stop") -> tuple[list[Choice], DataReport]:
    """Multiple choice and pairs of sentences, in file order."""
    return _load("choice", paths, on_bad_rows)


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
        digests[name] = hub_rows.hexdigest() if from_hub else sha256_file(name)
    if on_bad_rows == "stop":
        refuse(problems)
    if not used:
        counts = f" ({count_kinds(problems)})" if problems else ""
        raise UserError(f"{', '.join(names)}: no {kind} that can be used{counts}: `align validate FILE` says why")
    dropped = dict(Counter(problem.kind for problem in problems))
    return used, DataReport(tuple(names), len(used) + len(problems), len(used), digests, dropped, dict(notes))
