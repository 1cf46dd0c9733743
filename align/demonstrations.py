"""Demonstrations and pretraining text as the rows a causal-LM trainer reads."""

import random
from dataclasses import replace

from align.data import EARLIER, calls_tools
from align.errors import UserError
from align.rows import DataReport
from align.text import Codec
from align.track import announce
from align.types import Demonstration, Text, contents

Row = dict[str, list[int]]  # input_ids; completion_mask is 1 on tokens that are learned


def demonstration_rows(
    demonstrations: list[Demonstration], codec: Codec, max_length: int, report: DataReport
) -> tuple[list[Row], DataReport]:
    """Query + response + EOS, with the response marked. Rows over `max_length` are dropped and counted, never cut."""
    warn_of_no_gap(demonstrations, codec)
    queries = codec.prompts([d.prompt for d in demonstrations])
    responses = codec.responses([d.completion for d in demonstrations])
    rows = [
        {"input_ids": query + response, "completion_mask": [0] * len(query) + [1] * len(response)}
        for query, response in zip(queries, responses, strict=True)
    ]
    kept = [row for row in rows if len(row["input_ids"]) <= max_length]
    if not kept:
        raise UserError(f"{', '.join(report.paths)}: every row is over max_length {max_length} tokens: raise it")
    return kept, report.with_dropped("too_long", len(rows) - len(kept))


def warn_of_no_gap(demonstrations: list[Demonstration], codec: Codec) -> None:
    """Without a chat template a prompt and its answer are one text, and most data sets leave what parts them to one."""
    if codec.tokenizer.chat_template is not None:
        return
    glued = sum(not (contents(d.prompt)[-1:].isspace() or contents(d.completion)[:1].isspace()) for d in demonstrations)
    if glued > len(demonstrations) / 2:
        remedy = "end prompts with a line break, or give sft a chat_template_path"
        announce(f"warning: no white space stands between prompt and answer in {glued} rows: {remedy}")


def every_answer(demonstrations: list[Demonstration], report: DataReport) -> tuple[list[Demonstration], DataReport]:
    """Also the assistant's earlier answers, each a row of its own behind what was said before it, once, and none that
    is a row's own answer too. What is said beside a call of a tool is no answer. The report counts them as read."""
    rows, seen = [], {(*spoken(row.prompt, "user"), *spoken(row.completion, "assistant")) for row in demonstrations}
    for row in demonstrations:
        turns = () if isinstance(row.prompt, str) else row.prompt
        for i, (before, message) in enumerate(zip(turns, turns[1:], strict=False), start=1):
            asked = before["role"] in ("user", "tool")
            answers = asked and message["role"] == "assistant" and not calls_tools(message)
            place = spoken(turns[: i + 1])
            if answers and place not in seen:
                seen.add(place)
                rows.append(Demonstration(turns[:i], (message,), row.columns))
        rows.append(row)
    extra = len(rows) - len(demonstrations)
    notes = {kind: count for kind, count in report.notes.items() if kind != EARLIER} | {"earlier_answers": extra}
    counts = {"rows_read": report.rows_read + extra, "rows_used": report.rows_used + extra}
    return rows, replace(report, notes=notes, **counts)


def spoken(text: Text, role: str = "user") -> tuple[tuple[str, str], ...]:
    """Who says what; a plain text is said by `role`."""
    return ((role, text),) if isinstance(text, str) else tuple((turn["role"], turn["content"]) for turn in text)


def mix_pretraining(
    rows: list[Row], texts: list[str], fraction: float, codec: Codec, max_length: int, seed: int
) -> list[Row]:
    """`rows` plus so many pretraining documents that they are `fraction` of all rows (App. C.3; the paper does not say
    of what its 10% is a share, rows are assumed). Drawn at random; documents are cut to `max_length` tokens."""
    if fraction == 0:
        return rows
    count = round(len(rows) * fraction / (1 - fraction))
    rng = random.Random(seed)
    drawn = [texts[i] for i in rng.sample(range(len(texts)), min(count, len(texts)))]
    drawn += rng.choices(texts, k=count - len(drawn))
    documents = [ids[:max_length] for ids in codec.documents(drawn)]
    return rows + [{"input_ids": ids, "completion_mask": [1] * len(ids)} for ids in documents]
