"""Demonstrations, prompts and pairs: TRL, Alpaca, Self-Instruct, ShareGPT, HH dialogues, lists of prompts."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from align.data import (
    LABELS,
    SYSTEMS,
    earlier_turns,
    label_of,
    parse_demonstration,
    parse_preference,
    system_of,
)
from align.readers.base import (
    SHAPE_ERRORS,
    WRONG_SHAPE,
    Converted,
    Note,
    Notes,
    Options,
    Output,
    Record,
    Row,
    as_json,
    as_prompt,
    columns,
    each,
    field,
    items,
    merge_turns,
    message,
    nested,
    problem,
    ranking_row,
    with_input,
)
from align.rows import BadRow, Problem
from align.splits import prompt_key
from align.types import Demonstration, contents

TURN = re.compile(r"\n\n(Human|Assistant):")  # Anthropic's HH dialogues
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
SHAREGPT_ROLES = {"human": "user", "user": "user", "system": "system", "tool": "tool", "observation": "tool"}
TALKS = ("conversations", "conversation", "data")
ANSWERED = (  # names of a question and its answer: Orca, MetaMath, Aya and xP3, Firefly
    ("prompt", "response"), ("question", "response"), ("query", "response"), ("inputs", "targets"), ("input", "target"),
    ("INSTRUCTION", "RESPONSE"),
)  # fmt: skip
SHAREGPT_ROLES |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant")


def trl(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """TRL's formats, standard and conversational. They are ours: only a pair's prompt, and earlier turns in a column
    `history`, are made explicit."""
    if earlier_turns(row) and isinstance(row.get("prompt"), str):
        prompt = [*earlier(row), message("user", field(row, "prompt"))]
        row = {name: value for name, value in row.items() if name != "history"} | {"prompt": prompt}
    if row.get("completions") is not None or (row.get("chosen") is None and row.get("rejected") is None):
        return dict(row)
    pair = parse_preference(row, Counter())
    chosen, rejected = map(as_json, pair.completions)
    used = SYSTEMS if system_of(row) else ()
    return {"prompt": as_json(pair.prompt), "chosen": chosen, "rejected": rejected, **columns(row, *used)}


def unpaired_rankings(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """TRL's unpaired preferences: of each prompt the completions labelled true share rank 0, the others rank 1."""
    groups: dict[str, list[tuple[str, bool, Demonstration]]] = {}
    for place, row in records:
        try:
            record = parse_demonstration({**row, **dict.fromkeys(LABELS)}, Counter())
            label = label_of(row)
            if label is None:
                raise BadRow("wrong_type", "'label' is neither true nor false", "write true or false")
            groups.setdefault(prompt_key(record.prompt), []).append((place, label, record))
        except BadRow as bad:
            yield problem(place, bad)
        except SHAPE_ERRORS:
            yield problem(place, WRONG_SHAPE)
    for group in groups.values():
        places = tuple(place for place, _, _ in group)
        if len({label for _, label, _ in group}) < 2:
            what, remedy = "its prompt has completions of one label only", "nothing is compared; use it for SFT"
            yield from (Problem(place, "one_label", what, remedy) for place in places)
            continue
        first, notes = group[0][2], []
        ranked = [(contents(record.completion), float(not label)) for _, label, record in group]
        try:
            converted = Converted(
                ranking_row(as_json(first.prompt), ranked, notes, **columns(first.columns, *LABELS)), places
            )
        except BadRow as bad:
            yield from (problem(place, bad) for place in places)
            continue
        yield from (Note(places[0], kind, what) for kind, what in notes)
        yield converted


def unpaired_demonstration(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    if not label_of(row):
        raise BadRow("labelled_bad", "is labelled as a bad answer", "use it in rankings")
    return {"prompt": row["prompt"], "completion": row["completion"], **columns(row, *LABELS)}


def alpaca(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """Alpaca's instruction, input and output (Dolly: context, response); LLaMA-Factory's system and history."""
    used = ("instruction", "input", "context", "output", "response", "history", *SYSTEMS)
    completion = field(row, "output", "response")
    return {"prompt": alpaca_prompt(row), "completion": completion, **columns(row, *used)}


def answered(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """A question and its one answer under one of the pairs of names in ANSWERED."""
    asked, answer = answered_by(row)
    prompt = waiting_prompt(row, asked, notes)
    system = [message("system", system_of(row))] if system_of(row) else []
    if system or earlier_turns(row):
        turns = [message("user", prompt)] if isinstance(prompt, str) else prompt
        prompt = [*system, *earlier(row), *turns]
    used = (asked, answer, "history", *(SYSTEMS if system else ()))
    return {"prompt": prompt, "completion": field(row, answer), **columns(row, *used)}


def answered_by(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names under which a row holds a question and its answer, both texts."""
    return next((pair for pair in ANSWERED if all(isinstance(row.get(name), str) for name in pair)), None)


def alpaca_prompt(row: Mapping[str, Any]) -> Any:
    asked = with_input(field(row, "instruction"), field(row, "input", "context", optional=True))
    system = [message("system", system_of(row))] if system_of(row) else []
    return as_prompt([*system, *earlier(row), message("user", asked)])


def earlier(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a column `history`, a list of [question, answer]."""
    messages = []
    for turn in row.get("history") or []:
        texts = isinstance(turn, (list, tuple)) and [t.strip() for t in turn if isinstance(t, str) and t.strip()]
        if not texts or len(texts) != 2:
            raise BadRow("bad_messages", "'history' is no list of [question, answer]", "write two texts a turn")
        messages += [message("user", texts[0]), message("assistant", texts[1])]
    return messages


def _instances(row: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """Self-Instruct's tasks: one demonstration an instance."""
    instances = items(row, "instances")
    if not instances:
        raise BadRow("missing_field", "'instances' is empty", "add an example")
    for number, instance in enumerate(instances, start=1):
        yield "" if len(instances) == 1 else f", instance {number}", {**row, "instance": instance}


def _instance(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    prompt = with_input(field(row, "instruction"), field(row["instance"], "input", optional=True))
    rest = columns(row, "instruction", "instances", "instance")
    return {"prompt": prompt, "completion": field(row["instance"], "output"), **rest}


def _sharegpt_turn(turn: Mapping[str, Any]) -> dict[str, str]:
    role = SHAREGPT_ROLES.get(str(turn.get("from", turn.get("role"))).lower())
    if role is None:
        raise BadRow("bad_messages", "a turn is of an unknown role", f"use one of {', '.join(SHAREGPT_ROLES)}")
    return message(role, field(turn, "value", "content"))


def _sharegpt_turns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    name = next((name for name in TALKS if row.get(name) is not None), TALKS[0])
    said = row[name]
    if isinstance(said, (list, tuple)) and said and all(isinstance(text, str) for text in said):
        # LIMA's and UltraChat's texts, the user's first.
        turns = [message(("user", "assistant")[i % 2], text.strip()) for i, text in enumerate(said)]
    elif all("input" in turn and "output" in turn for turn in items(row, name)):  # Capybara's
        texts = [field(one, name) for one in said for name in ("input", "output")]
        turns = [message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    else:
        turns = [_sharegpt_turn(turn) for turn in said if not _says_nothing(turn)]
    stated = system_of(row)
    return turns if not stated or turns[:1] == [message("system", stated)] else [message("system", stated), *turns]


def _says_nothing(turn: Mapping[str, Any]) -> bool:
    """An empty system message, as ShareGPT's exports have them."""
    said = turn.get("value") or turn.get("content")
    return not said and str(turn.get("from", turn.get("role"))).lower() == "system"


def sharegpt_pair(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """LLaMA-Factory's preferences: a conversation that waits for an answer, and two answers as turns or texts."""
    pair = {}
    for name in ("chosen", "rejected"):
        answer = row[name]
        turn = _sharegpt_turn(answer) if isinstance(answer, Mapping) else message("assistant", field(row, name))
        if turn["role"] != "assistant":
            raise BadRow("bad_messages", f"{name!r} is not the assistant's", "give two answers")
        pair[name] = turn["content"]
    prompt = as_prompt(merge_turns(_sharegpt_turns(row), notes))
    return {"prompt": prompt, **pair, **columns(row, *TALKS, *SYSTEMS)}


def sharegpt(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """A ShareGPT conversation as messages that end with the assistant's last answer."""
    turns = _sharegpt_turns(row)
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
    if any(turn["role"] != "system" for turn in turns[:first]):
        notes.append(("cut_turns", "what the assistant says before the first question was cut"))
    turns = [turn for turn in turns[:first] if turn["role"] == "system"] + turns[first:]
    last = next((i for i in range(len(turns) - 1, -1, -1) if turns[i]["role"] == "assistant"), -1)
    if last < 1:
        raise BadRow("bad_messages", "holds no question with an answer", "take the row out")
    if last < len(turns) - 1:
        notes.append(("cut_turns", "what follows the assistant's last answer was cut"))
    return {"messages": merge_turns(turns[: last + 1], notes), **columns(row, *TALKS, *SYSTEMS)}


def hh(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """Two HH dialogues that differ in the last reply, as a prompt of messages and two completions."""
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():  # the answers stand alone
        pair = {name: field(row, name) for name in ("chosen", "rejected")}
        return {"prompt": waiting_prompt(row, "prompt", notes), **pair, **columns(row, "prompt", "chosen", "rejected")}
    dialogues = {name: _dialogue(row, name) for name in ("chosen", "rejected")}
    for name, turns in dialogues.items():
        if turns[-1]["role"] != "assistant":
            raise BadRow("bad_messages", f"{name!r} does not end with the assistant's reply", "end it with a reply")
    chosen, rejected = dialogues.values()
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise BadRow("prompt_mismatch", "'chosen' and 'rejected' do not share their prompt", "give both one prompt")
    for name, turns in dialogues.items():
        if not all(turn["content"] for turn in turns):
            raise BadRow("empty_field", f"a turn in {name!r} is empty", "fill it, or take the row out")
    pair = {name: turns[-1]["content"] for name, turns in dialogues.items()}
    prompt = merge_turns(chosen[:-1], notes)
    if prompt[-1]["role"] == "assistant":  # the assistant spoke twice: what it said first begins both replies
        said = prompt.pop()["content"]
        pair = {name: f"{said}\n\n{reply}" for name, reply in pair.items()}
    return {"prompt": as_prompt(prompt), **pair, **columns(row, "chosen", "rejected")}


def waiting_prompt(row: Mapping[str, Any], name: str, notes: Notes) -> Any:
    """The prompt in an HH dialogue that ends where the assistant is to answer; other text as it stands."""
    text = field(row, name).lstrip()
    if not text.startswith("Human:"):
        return text
    turns = _dialogue(row, name)
    if turns[-1] == message("assistant", ""):
        turns.pop()
    if turns[-1]["role"] != "user":
        raise BadRow("bad_messages", f"{name!r} ends with an answer", "end it with a question and 'Assistant:'")
    if not all(turn["content"] for turn in turns):
        raise BadRow("empty_field", f"a turn in {name!r} is empty", "fill it, or take the row out")
    return as_prompt(merge_turns(turns, notes))


def _dialogue(row: Mapping[str, Any], name: str) -> list[dict[str, str]]:
    lead, *parts = TURN.split("\n\n" + field(row, name))
    if lead.strip() or not parts:
        raise BadRow("bad_messages", f"{name!r} does not begin with a turn", "begin it with Human:")
    return [message(HH_ROLES[role], text.strip()) for role, text in zip(parts[::2], parts[1::2], strict=True)]


def strings(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """A list of prompts, each one JSON string."""
    for place, row in records:
        if not isinstance(row, str):
            yield Problem(place, "wrong_type", "is not a JSON string", "write one string a prompt")
        elif not row.strip():
            yield Problem(place, "empty_field", "is empty", "fill it, or take it out")
        else:
            yield Converted({"prompt": row.strip()}, (place,))


trl_rows, alpaca_rows, sharegpt_rows, hh_rows = each(trl), each(alpaca), each(sharegpt), each(hh)
sharegpt_pairs, answered_rows = each(sharegpt_pair), each(answered)
unpaired_demonstrations = each(unpaired_demonstration)
self_instruct = nested(_instances, _instance)
