"""Pairs under other names than ours: Orca's `question`, LLaMA-Factory's `instruction` and `input`, Argilla's
`chosen_response`, ms-swift's `rejected_response`."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from align.data import parse_demonstration
from align.readers.base import Notes, Options, Row, as_json, columns, each, field
from align.readers.chat import alpaca_prompt
from align.types import contents

ASKED = ("prompt", "instruction", "question", "query", "input")
CHOSEN = ("chosen", "chosen_response", "response_chosen")
REJECTED = ("rejected", "rejected_response", "response_rejected")
BESIDE = ("input", "context", "history", "system", "system_prompt")  # of the prompt


def is_named_pair(row: Any) -> bool:
    """Two texts under such names beside what they answer; not our own pair."""
    if not isinstance(row, Mapping):
        return False
    given = [[name for name in names if row.get(name) is not None] for names in (ASKED, CHOSEN, REJECTED)]
    asked, better, worse = (names[0] if names else None for names in given)
    if better is None and worse == "rejected_response":
        return isinstance(row.get("messages"), (list, tuple))
    names = (asked, better, worse)
    return names != ("prompt", "chosen", "rejected") and all(n and isinstance(row[n], str) for n in names)


def named_pair(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    if row.get("messages") is not None:  # whose last answer is the better one
        good = parse_demonstration({"messages": row["messages"], "system": row.get("system")}, Counter())
        pair = {"chosen": contents(good.completion), "rejected": field(row, "rejected_response")}
        return {"prompt": as_json(good.prompt), **pair, **columns(row, "rejected_response", "system")}
    name = next((name for name in ASKED if row.get(name) is not None), ASKED[0])
    prompt = alpaca_prompt({key: row.get(key) for key in BESIDE if key != name} | {"instruction": row[name]})
    used = (*ASKED, *CHOSEN, *REJECTED, *BESIDE)
    return {"prompt": prompt, "chosen": field(row, *CHOSEN), "rejected": field(row, *REJECTED), **columns(row, *used)}


named_pairs = each(named_pair)
