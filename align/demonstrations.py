"""Demonstrations and pretraining text as the rows a causal-LM trainer reads."""

import random

from align.errors import UserError
from align.rows import DataReport
from align.text import Codec
from align.types import Demonstration

Row = dict[str, list[int]]  # input_ids; completion_mask is 1 on tokens that are learned


def demonstration_rows(
    demonstrations: list[Demonstration], codec: Codec, max_length: int, report: DataReport
) -> tuple[list[Row], DataReport]:
    """Query + response + EOS, with the response marked. Rows over `max_length` are dropped and counted, never cut."""
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
