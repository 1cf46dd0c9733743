"""Pairwise judgements: QA-Feedback (six pairs of four answers), PandaLM (three annotators), PKU-SafeRLHF, HelpSteer,
OpenAI's comparisons of summaries, and any a/b table.

A unit is one judgement of one annotator. `align.readers.judgements` joins those of one annotator on one prompt.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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
    as_prompt,
    columns,
    each,
    field,
    items,
    message,
    number,
    problem,
    ranking_row,
    with_context,
    with_input,
)
from align.readers.chat import waiting_prompt
from align.readers.judgements import BETTER, TIE, WORSE, Joined, Judgement, Refused, join
from align.rows import BadRow, Problem
from align.splits import prompt_key

VERDICTS = {1: BETTER, 2: WORSE, 0: TIE, "1": BETTER, "2": WORSE, "0": TIE}  # tables write texts
FIRST = ("a", "model_a", "response_a", "1", "response1", "first", "left")
SECOND = ("b", "model_b", "response_b", "2", "response2", "second", "right")
ASKED = ("prompt", "question", "instruction")
ANSWERS = ("response_a", "answer_a", "response1")
OTHERS = ("response_b", "answer_b", "response2")
LABELERS = ("labeler", "judge", "annotator")
Judged = tuple[Any, str, str, dict[str, Any], Row]  # prompt, two answers, labeler -> verdict, other columns
CHOICES = {0: BETTER, 1: WORSE, "0": BETTER, "1": WORSE}  # the number of the better one
SIGNS = {-1: BETTER, 0: TIE, 1: WORSE}  # below 0 the first is better
STRENGTHS = ("preference_strength", "overall_preference")
STRONGEST = 3  # of a strength, either way
STEER_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")  # HelpSteer2's dialogues, which begin with the user
WINNERS = dict.fromkeys(FIRST, BETTER) | dict.fromkeys(SECOND, WORSE)
WINNERS |= dict.fromkeys(("tie", "tie_(bothbad)", "both", "0", "equal"), TIE)
SAME_ANSWERS = ("duplicate_completions", "both answers are the same", "nothing is compared")
REASONS = {
    "contradiction": ("the annotator judged this pair twice and differently", "keep one of the judgements"),
    "intransitive": ("lies on a circle of preferences (a over b over c over a)", "no ranking holds it"),
}


def qa_pairs(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """QA-Feedback: four predictions, judgements in the order 1v2, 1v3, 1v4, 2v3, 2v4, 3v4."""
    for place, row in records:
        try:
            texts = [field(row, f"prediction {i}") for i in range(1, 5)]
            said = row.get("preference")
            if not isinstance(said, list) or len(said) != 6 or any(_verdict(v, VERDICTS) is None for v in said):
                raise BadRow("wrong_type", "'preference' is no list of six values 0, 1 or 2", "see docs/formats.md")
            prompt = qa_prompt(row, options)
        except BadRow as bad:
            yield problem(place, bad)
            continue
        except SHAPE_ERRORS:
            yield problem(place, WRONG_SHAPE)
            continue
        judgements = []
        for (a, b), value in zip(itertools.combinations(range(4), 2), said, strict=True):
            own = f"{place}, judgement {a + 1}v{b + 1}"
            if texts[a] == texts[b]:
                yield Problem(own, *SAME_ANSWERS)
            else:
                judgements.append(Judgement(own, texts[a], texts[b], VERDICTS[value]))
        yield from rankings(place, prompt, judgements)


def qa_prompt(row: Mapping[str, Any], options: Options) -> str:
    """The passages, then the question."""
    passages = [": ".join([p[0], " ".join(p[1:])]) for p in row.get("passages") or [] if isinstance(p, list) and p]
    return with_context("\n\n".join(passages), field(row, "question"), options)


def qa_gold(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """The answer that a person wrote."""
    return {"prompt": qa_prompt(row, options), "completion": field(row, "gold")}


def pandalm_pairs(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """PandaLM: two answers to an instruction, judged by `annotator1`, `annotator2`..., each joined on his own."""

    def read(row: Mapping[str, Any]) -> Judged:
        prompt = with_input(field(row, "instruction"), field(row, "input", optional=True))
        said = {name: value for name, value in row.items() if name.startswith("annotator")}
        return prompt, field(row, "response1"), field(row, "response2"), said, {}

    yield from table(records, read, VERDICTS)


def ab_pairs(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """{"prompt", "response_a", "response_b", "winner"[, "labeler"]}: winner a, b or tie, in any of the usual words.

    1 and 2 are the first and the second, 0 a tie; where all are 0 or 1, which answer is 0 cannot be told.
    """
    records = list(records)
    said = {_winner(row) for _, row in records if isinstance(row, Mapping)}
    winners = WINNERS if said - {"0", "1"} else {}

    def read(row: Mapping[str, Any]) -> Judged:
        name = next((name for name in ASKED if row.get(name) is not None), ASKED[0])
        prompt = with_input(field(row, name), field(row, "input", optional=True))
        if prompt.startswith("Human:"):
            prompt = waiting_prompt(row, name, [])
        one, other = field(row, *ANSWERS), field(row, *OTHERS)
        about = columns(row, *ASKED, *ANSWERS, *OTHERS, *LABELERS, "winner", "input")
        return prompt, one, other, {labeler_of(row): _winner(row)}, about

    yield from table(records, read, winners)


def _winner(row: Mapping[str, Any]) -> str:
    return str(row.get("winner")).strip().lower().replace(" ", "_")


def safe_rlhf_pairs(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """PKU-SafeRLHF: two answers and the number of the better (more helpful) one; which is safer is not used."""

    def read(row: Mapping[str, Any]) -> Judged:
        said = {labeler_of(row): row.get("better_response_id")}
        return field(row, "prompt"), field(row, "response_0"), field(row, "response_1"), said, of_both(row, "prompt")

    yield from table(records, read, CHOICES)


def helpsteer_pairs(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """HelpSteer2's and HelpSteer3's preferences: -3 (the first is much better) to 3; 0 is a tie."""

    def read(row: Mapping[str, Any]) -> Judged:
        strength = number(next((row[name] for name in STRENGTHS if row.get(name) is not None), None))
        known = strength is not None and abs(strength) <= STRONGEST
        said = {labeler_of(row): (strength > 0) - (strength < 0) if known else None}
        one, other = field(row, "response_1", "response1"), field(row, "response_2", "response2")
        return helpsteer_prompt(row), one, other, said, of_both(row, "prompt", "context")

    yield from table(records, read, SIGNS)


def helpsteer_prompt(row: Mapping[str, Any]) -> Any:
    """HelpSteer3's messages; HelpSteer2's text, whose later turns stand behind marks."""
    if row.get("context") is not None:
        return as_prompt([message(field(turn, "role"), field(turn, "content")) for turn in items(row, "context")])
    first, *parts = STEER_TURN.split(field(row, "prompt"))
    turns = [message("user", first)]
    turns += [message(role.lower(), text) for role, text in zip(parts[::2], parts[1::2], strict=True)]
    return as_prompt(turns)


def of_both(row: Mapping[str, Any], *used: str) -> Row:
    """The columns that are not about one of the two answers: these mean nothing once the answers are ranked."""
    rest = columns(row, *used, *LABELERS)
    return {name: value for name, value in rest.items() if "response" not in name and "preference" not in name}


def labeler_of(row: Mapping[str, Any]) -> str:
    return next((str(row[name]) for name in LABELERS if row.get(name) is not None), "")


def summary_pairs(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """OpenAI's comparisons (Stiennon et al. 2020): a worker's choice between two summaries of a post."""

    def read(row: Mapping[str, Any]) -> Judged:
        texts = [field(one, "text") for one in items(row, "summaries")]
        if len(texts) != 2:
            raise BadRow("wrong_type", "'summaries' does not hold two", "give the comparisons, not the axis ratings")
        said = {str(row.get("worker") or ""): row.get("choice")}
        about = columns({"id": row["info"].get("id"), "split": row.get("split")})
        return _summary_prompt(row["info"]), *texts, said, about

    yield from table(records, read, CHOICES)


def _summary_prompt(info: Mapping[str, Any]) -> str:
    """The query of Stiennon et al., App. B.1: of a post (or of a news article) what is known."""
    fields = (("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"))
    if not field(info, "post", optional=True):
        fields = (("Article: ", "article"),)
        field(info, "article")
    texts = [(lead, field(info, name, optional=True)) for lead, name in fields]
    return "\n\n".join([*(lead + text for lead, text in texts if text), "TL;DR:"])


def table(records: Iterable[Record], read: Any, verdicts: Mapping[Any, int]) -> Iterator[Output]:
    """One row a pair -> the judgements of each (prompt, labeler), joined, and the columns that all of them share."""
    groups: dict[tuple[str, str], list[Judgement]] = defaultdict(list)
    shared: dict[tuple[str, str], Row] = {}
    prompts: dict[str, Any] = {}
    for place, row in records:
        try:
            prompt, one, other, said, about = read(row)
        except BadRow as bad:
            yield problem(place, bad)
            continue
        except SHAPE_ERRORS:
            yield problem(place, WRONG_SHAPE)
            continue
        prompts.setdefault(prompt_key(prompt), prompt)
        for labeler, value in said.items():
            own = f"{place}, {labeler}" if len(said) > 1 else place
            if _verdict(value, verdicts) is None:
                yield Problem(own, "bad_judgement", "the judgement is of no known value", "see docs/formats.md")
            elif one == other:
                yield Problem(own, *SAME_ANSWERS)
            else:
                group = prompt_key(prompt), labeler
                groups[group].append(Judgement(own, one, other, verdicts[value]))
                before = shared.setdefault(group, about)
                shared[group] = {name: kept for name, kept in before.items() if about.get(name) == kept}
    for (key, labeler), judgements in groups.items():
        yield from rankings(judgements[0].place, prompts[key], judgements, labeler=labeler, **shared[key, labeler])


def _verdict(value: Any, verdicts: Mapping[Any, int]) -> int | None:
    known = isinstance(value, (int, str)) and not isinstance(value, bool)
    return verdicts.get(value) if known else None


def rankings(place: str, prompt: Any, judgements: list[Judgement], /, **extra: Any) -> Iterator[Output]:
    """The rankings that the judgements of one labeler on one prompt make, and those that make none."""
    joined, refused, broken = join(judgements)
    if broken:
        what = f"ties break weak transitivity: its judgements make {len(joined)} rankings"
        yield Note(place, "weak_transitivity", what)
    yield from (_refusal(one) for one in refused)
    for one in joined:
        yield from _ranking(one, prompt, extra)


def _refusal(refused: Refused) -> Problem:
    return Problem(refused.judgement.place, refused.kind, *REASONS[refused.kind])


def _ranking(joined: Joined, prompt: Any, extra: Mapping[str, Any]) -> Iterator[Output]:
    places = tuple(judgement.place for judgement in joined.judgements)
    if len({rank for _, rank in joined.ranked}) == 1:
        yield from (Problem(p, "all_ties", "prefers nothing", "a ranking needs a preference") for p in places)
    else:
        yield Converted(ranking_row(prompt, joined.ranked, [], **columns(extra)), places)


qa_demonstrations = each(qa_gold)
