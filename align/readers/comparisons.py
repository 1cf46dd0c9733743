"""Comparisons in the shapes of large public sets: SHP, WebGPT, Chatbot Arena, AlpacaFarm, Unified-Feedback, and
HelpSteer2's ratings. A unit is one judgement (of the ratings one answer); those of one prompt are joined.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from align.readers.base import (
    SHAPE_ERRORS,
    WRONG_SHAPE,
    Converted,
    Note,
    Options,
    Output,
    Record,
    as_prompt,
    columns,
    field,
    items,
    message,
    number,
    problem,
    ranking_row,
    with_input,
)
from align.readers.judgements import BETTER, TIE, WORSE
from align.readers.pairwise import SIGNS, VERDICTS, Judged, helpsteer_prompt, labeler_of, of_both, table
from align.rows import BadRow, Problem
from align.splits import prompt_key

ARENA_WINNERS = {"model_a": BETTER, "model_b": WORSE, "tie": TIE, "tie (bothbad)": TIE}
FLAGS = ("winner_model_a", "winner_model_b", "winner_tie")  # one of the three is 1
FLAGGED = {(1, 0, 0): "model_a", (0, 1, 0): "model_b", (0, 0, 1): "tie"}
RATED_BY = "helpfulness"


def shp_pairs(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """SHP: two comments on a post; `labels` is 1 where more people preferred A, else 0."""

    def read(row: Mapping[str, Any]) -> Judged:
        one, other = field(row, "human_ref_A"), field(row, "human_ref_B")
        about = columns({"id": row.get("post_id"), "domain": row.get("domain")})
        return field(row, "history"), one, other, {"": number(row.get("labels"))}, about

    yield from table(records, read, {1: BETTER, 0: WORSE})


def webgpt_pairs(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """WebGPT's comparisons: two answers, each with a score; the higher is better, equal ones tie. No quotes."""

    def read(row: Mapping[str, Any]) -> Judged:
        question, scores = row["question"], [number(row.get(name)) for name in ("score_0", "score_1")]
        sign = None if None in scores else (scores[0] < scores[1]) - (scores[0] > scores[1])
        about = columns({"id": question.get("id"), "dataset": question.get("dataset")})
        return field(question, "full_text"), field(row, "answer_0"), field(row, "answer_1"), {"": sign}, about

    yield from table(records, read, SIGNS)


def arena_pairs(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """Chatbot Arena's and MT-Bench's battles: two conversations, a winner, who judged."""

    def read(row: Mapping[str, Any]) -> Judged:
        prompt, one, other = fork(row, "conversation_a", "conversation_b")
        about = columns({"id": row.get("question_id"), "language": row.get("language")})
        return prompt, one, other, {labeler_of(row): row.get("winner")}, about

    yield from table(records, read, ARENA_WINNERS)


def arena_texts(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """The arena's 55k table: lists of the turns' texts, written as JSON, and three flags for the winner."""

    def read(row: Mapping[str, Any]) -> Judged:
        asked, one, other = (_turns(row, name) for name in ("prompt", "response_a", "response_b"))
        if not len(asked) == len(one) == len(other):
            raise BadRow("wrong_shape", "its lists of turns are of several lengths", "give one answer a question")
        talks = [
            [turn for q, a in zip(asked, said, strict=True) for turn in (message("user", q), message("assistant", a))]
            for said in (one, other)
        ]
        prompt, one, other = fork({"a": talks[0], "b": talks[1]}, "a", "b")
        winner = FLAGGED.get(tuple(number(row.get(name)) for name in FLAGS))
        return prompt, one, other, {"": winner}, columns({"id": row.get("id")})

    yield from table(records, read, ARENA_WINNERS)


def _turns(row: Mapping[str, Any], name: str) -> list[str]:
    turns = row.get(name)
    try:
        turns = json.loads(turns) if isinstance(turns, str) else turns
    except ValueError:
        raise BadRow("wrong_type", f"{name!r} is no JSON list of texts", "give the table as it is published") from None
    if not isinstance(turns, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in turns):
        raise BadRow("empty_field", f"a turn in {name!r} is empty or no text", "take the row out")
    return [text.strip() for text in turns]


def farm_pairs(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """AlpacaFarm's: an instruction, two outputs, and the number of the better one, 1 or 2."""

    def read(row: Mapping[str, Any]) -> Judged:
        prompt = with_input(field(row, "instruction"), field(row, "input", optional=True))
        said = {labeler_of(row): number(row.get("preference"))}
        used = ("instruction", "input", "output_1", "output_2", "preference")
        return prompt, field(row, "output_1"), field(row, "output_2"), said, of_both(row, *used)

    yield from table(records, read, VERDICTS)


def unified_pairs(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """Unified-Feedback: two conversations and a rating of each; the higher is better, equal ones tie."""

    def read(row: Mapping[str, Any]) -> Judged:
        prompt, one, other = fork(row, "conv_A", "conv_B")
        ratings = [number(row.get(name)) for name in ("conv_A_rating", "conv_B_rating")]
        sign = None if None in ratings else (ratings[0] < ratings[1]) - (ratings[0] > ratings[1])
        return prompt, one, other, {"": sign}, columns({"id": row.get("id"), "source": row.get("source")})

    yield from table(records, read, SIGNS)


def fork(row: Mapping[str, Any], first: str, second: str) -> tuple[Any, str, str]:
    """What two conversations share, and the last answer of each. Raises BadRow when they part before that."""
    one, other = (
        [message(field(turn, "role"), field(turn, "content")) for turn in items(row, name)] for name in (first, second)
    )
    if len(one) < 2 or one[:-1] != other[:-1]:
        what = "the two conversations part before their last answers"
        raise BadRow("prompt_mismatch", what, "answers to different questions are not compared: take it out")
    if one[-1]["role"] != "assistant" or other[-1]["role"] != "assistant":
        raise BadRow("bad_messages", "a conversation does not end with the assistant's answer", "end both with one")
    return as_prompt(one[:-1]), one[-1]["content"], other[-1]["content"]


def rated_answers(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """HelpSteer2's ratings, an answer a row: those of a prompt become a ranking by `helpfulness`, equal ones tie."""
    groups: dict[str, list[tuple[str, Any, str, float]]] = {}
    for place, row in records:
        try:
            prompt, rating = helpsteer_prompt(row), number(row.get(RATED_BY))
            if rating is None:
                raise BadRow("bad_score", f"{RATED_BY!r} is missing or no number", "give each answer a number")
            groups.setdefault(prompt_key(prompt), []).append((place, prompt, field(row, "response"), float(rating)))
        except BadRow as bad:
            yield problem(place, bad)
        except SHAPE_ERRORS:
            yield problem(place, WRONG_SHAPE)
    for group in groups.values():
        yield from _by_rating(group)


def _by_rating(group: list[tuple[str, Any, str, float]]) -> Iterator[Output]:
    places, notes = tuple(place for place, *_ in group), []
    levels = sorted({rating for *_, rating in group}, reverse=True)
    if len(group) > 1 and len(levels) == 1:
        yield from (Problem(p, "all_ties", "prefers nothing", "a ranking needs a preference") for p in places)
        return
    try:
        ranked = [(answer, float(levels.index(rating))) for *_, answer, rating in group]
        row = ranking_row(group[0][1], ranked, notes)
    except BadRow as bad:
        yield from (problem(place, bad) for place in places)
        return
    yield from (Note(places[0], kind, what) for kind, what in notes)
    yield Converted(row, places)
