"""Rankings that a row or a tree holds whole: ranked lists, scored answers, Nectar, OpenAssistant trees, SQuALITY's
reviews.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from align.data import SYSTEMS, system_of
from align.readers.base import (
    SHAPE_ERRORS,
    WRONG_SHAPE,
    Converted,
    Notes,
    Options,
    Output,
    Reader,
    Record,
    Row,
    as_prompt,
    attempt,
    columns,
    each,
    field,
    items,
    message,
    nested,
    problem,
    ranking_row,
    with_context,
)
from align.readers.chat import alpaca_prompt, waiting_prompt
from align.rows import BadRow, Problem

LISTS = ("output", "ranked_responses", "responses", "completions")
BEST_FIRST = LISTS[:2]  # the others may be in any order, unless --format ranked_list says so
SCORE_LISTS = ("scores", "rewards", "ratings", "reward_scores", "overall_scores")  # beside a list of texts
SCORES = ("score", "overall_score", "rating", "fine-grained_score", "pm_score")
SCORED = ("completions", "responses", "answers", "generations")
SCORED_PROMPTS = ("prompt", "instruction", "question", "input")
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def ranked_list(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """An instruction (with input, history) and its answers as a list of texts, the best first."""
    name = next((n for n in LISTS if isinstance(row.get(n), (list, tuple))), LISTS[0])
    other = next(
        (n for n in ("rank", "ranks", "ranking", "labels", "best", *SCORE_LISTS) if row.get(n) is not None), None
    )
    if other:
        raise BadRow(
            "wrong_type", f"{name!r} is read as best first, and {other!r} says otherwise", "write our rankings"
        )
    answers = items(row, name, str)
    prompt = alpaca_prompt({**row, "instruction": field(row, "instruction", "prompt", "question")})
    rest = columns(row, name, "question", "instruction", "input", "context", "history", *SYSTEMS)
    return ranking_row(prompt, [(text, float(i)) for i, text in enumerate(answers)], notes, **rest)


def scored(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """Answers with scores, higher is better, as ranks: equal scores are a tie.

    `completions` holds objects with a text and a score (UltraFeedback's names too), or `responses` texts beside a list
    of numbers, `scores` or `rewards`.
    """
    asked = next((n for n in SCORED_PROMPTS if row.get(n) is not None), SCORED_PROMPTS[0])
    prompt = waiting_prompt(row, asked, notes)
    beside = next((n for n in SCORE_LISTS if isinstance(row.get(n), (list, tuple))), None)
    if beside:
        name = next((n for n in ("responses", "generations") if row.get(n)), "completions")
        texts, scores = items(row, name, str), list(row[beside])
    else:
        name = next((n for n in SCORED if row.get(n)), "completions")
        found = items(row, name)
        texts = [field(one, "completion", "response", "text") for one in found]
        scores = [next((one[n] for n in SCORES if one.get(n) is not None), None) for one in found]
    if len(scores) != len(texts) or not all(_is_number(score) for score in scores):
        raise BadRow("bad_score", "a score is missing or no number", "give each answer a number")
    if isinstance(prompt, str) and asked != "input":
        prompt = alpaca_prompt({"instruction": prompt, "input": row.get("input"), "system": system_of(row)})
    levels = sorted(set(scores), reverse=True)
    ranked = [(text, float(levels.index(score))) for text, score in zip(texts, scores, strict=True)]
    rest = columns(row, *SCORED_PROMPTS, *SCORE_LISTS, *SCORED, *SYSTEMS)
    return ranking_row(prompt, ranked, notes, **rest)


def nectar(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """Nectar: a dialogue that waits for an answer, and K answers with their ranks; equal ranks are a tie."""
    found = items(row, "answers")
    if not all(_is_number(one.get("rank")) for one in found):
        raise BadRow("bad_rank", "the rank of an answer is missing or no number", "write a number, lower is better")
    ranked = [(field(one, "answer"), float(one["rank"])) for one in found]
    rest = columns(row, "prompt", "answers", "turns", "num_responses")
    if isinstance(rest.get("source"), (list, tuple)):  # a text, by which rows may be held out
        rest["source"] = ", ".join(map(str, rest["source"]))
    return ranking_row(waiting_prompt(row, "prompt", notes), ranked, notes, **rest)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


# OpenAssistant trees


def _groups(tree: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """One unit a message of the prompter that has replies, with the messages that lead to it."""
    if not isinstance(tree.get("prompt"), Mapping):
        raise BadRow("missing_field", "'prompt' is no message", "give trees as OpenAssistant exports them")
    if not tree["prompt"].get("replies"):
        raise BadRow("no_replies", "the tree has no replies", "take it out")
    for thread in _threads(tree["prompt"]):
        yield f", message {thread[-1].get('message_id')}", {"thread": thread}


def _oasst_root(tree: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    """The first message of a tree."""
    return {"prompt": _oasst_prompt([tree["prompt"]]), **_about(tree["prompt"])}


def _threads(root: Mapping[str, Any]) -> Iterator[list[Mapping[str, Any]]]:
    """The messages down to each message of the prompter that has replies."""
    left = [[root]]
    while left:
        thread = left.pop(0)
        replies = thread[-1].get("replies") or []
        if replies and thread[-1].get("role") == "prompter":
            yield thread
        left += [[*thread, reply] for reply in replies]


def _oasst_prompt(thread: list[Mapping[str, Any]]) -> Any:
    if any(one.get("deleted") for one in thread):
        raise BadRow("deleted", "a message before it was deleted", "take it out")
    return as_prompt([message(OASST_ROLES.get(str(one.get("role")), "user"), field(one, "text")) for one in thread])


def _about(post: Mapping[str, Any]) -> Row:
    return {"id": post.get("message_id"), **({"language": post["lang"]} if post.get("lang") else {})}


def _oasst_ranking(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    thread = row["thread"]
    ranked = _ranked_replies(thread[-1])
    left_out = len(thread[-1]["replies"]) - len(ranked)
    if left_out:
        notes.append(("unranked_reply", f"{left_out} unranked or deleted replies were left out"))
    written = sum(bool(reply.get("synthetic")) for reply in ranked)
    if written:
        notes.append(("model_written", f"a model wrote {written} of its replies: kept, since people ranked them"))
    pairs = [(field(reply, "text"), float(reply["rank"])) for reply in ranked]
    return ranking_row(_oasst_prompt(thread), pairs, notes, **_about(thread[-1]))


def _ranked_replies(post: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The replies with a rank, best first. Raises BadRow when fewer than two have one."""
    replies = post["replies"]
    if len(replies) == 1:
        raise BadRow("one_reply", "has one reply", "nothing is compared")
    ranked = [one for one in replies if _is_number(one.get("rank")) and not one.get("deleted")]
    if len(ranked) < 2:
        raise BadRow("no_rank", "its replies are not ranked", "nothing is compared")
    return sorted(ranked, key=lambda one: one["rank"])


def _oasst_best(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
    thread = row["thread"]
    replies = _ranked_replies(thread[-1])
    people = [reply for reply in replies if not reply.get("synthetic")]
    if not people:
        raise BadRow("model_written", "all of its replies were written by a model", "use it in rankings")
    if replies[0].get("synthetic"):
        notes.append(("model_written", "the best reply was written by a model: the best that a person wrote is taken"))
    return {"prompt": _oasst_prompt(thread), "completion": field(people[0], "text"), **_about(thread[-1])}


# SQuALITY's human evaluation


def squality_reviews(records: Iterable[Record], options: Options) -> Iterator[Output]:
    """One ranking a question and reviewer; the stories' file gives the questions' text (join on the passage).

    A unit is one reviewer's order of the three answers; a story that nobody judged is a unit too.
    """
    stories: dict[str, list[Record]] = {}
    judged: list[Record] = []
    for place, row in records:
        if isinstance(row, Mapping) and "document" in row:
            about = row.get("metadata")
            passage = about.get("passage_id") if isinstance(about, Mapping) else None
            stories.setdefault(str(passage), []).append((place, row))
        else:
            judged.append((place, row))
    used = set()
    for place, row in judged:
        for output in _judged(place, row, stories, options):
            used |= set(output.partners) if isinstance(output, Converted) else set()
            yield output
    for place, _ in itertools.chain.from_iterable(stories.values()):
        if place not in used:
            yield Problem(place, "no_partner", "nobody judged its questions", "use it for SFT and as text")


def _judged(place: str, row: Any, stories: Mapping[str, list[Record]], options: Options) -> Iterator[Output]:
    """The rankings of one story's questions."""
    if not isinstance(row, Mapping) or not isinstance(row.get("questions"), Mapping) or not row["questions"]:
        yield Problem(place, "missing_field", "holds no questions", "give SQuALITY's human evaluation")
        return
    story_place, story = stories.get(str(row.get("passage-id")), [("", {})])[0]
    for key, answers in row["questions"].items():
        try:
            outputs = list(_reviews(f"{place}, question {key}", key, answers, story, options))
        except SHAPE_ERRORS:
            outputs = [problem(f"{place}, question {key}", WRONG_SHAPE)]
        for output in outputs:
            yield replace(output, partners=(story_place,)) if isinstance(output, Converted) else output


def _reviews(place: str, key: str, answers: Any, story: Mapping[str, Any], options: Options) -> Iterator[Output]:
    """The rankings of one question, one a reviewer."""
    asked = [q for q in story.get("questions", []) if str(q.get("question_number")) == str(int(key) + 1)]
    if not asked or not isinstance(answers, Mapping):
        yield Problem(place, "no_partner", "its question is in no file given", "give the stories' file too")
        return
    prompt = with_context(story["document"], field(asked[0], "question_text"), options)

    def order(row: Mapping[str, Any], options: Options, notes: Notes) -> Row:
        reviews = {name: answer["reviews"][row["number"]] for name, answer in answers.items()}
        if len({review["worker_id"] for review in reviews.values()}) != 1:
            raise BadRow("mixed_reviewers", "its ranks are of several reviewers", "see docs/formats.md")
        ranked = [(field(answers[name], "response"), float(review["overall-rank"])) for name, review in reviews.items()]
        return ranking_row(prompt, ranked, notes, labeler=str(next(iter(reviews.values()))["worker_id"]))

    counts = [len(answer["reviews"]) for answer in answers.values()]
    if not max(counts):
        yield Problem(place, "no_answer", "nobody ranked it", "take it out, or have it ranked")
    for number in range(max(counts)):
        if number < min(counts):
            yield from attempt(f"{place}, review {number + 1}", {"number": number}, order, options)
        else:
            missing = sum(count <= number for count in counts)
            what = f"{missing} of the {len(counts)} answers have no such review"
            yield Problem(
                f"{place}, review {number + 1}", "missing_review", what, "have each answer ranked, or take it out"
            )


def _messages_too(read: Reader) -> Reader:
    """A reader of trees that also takes them as the hub has them, a message a row: `parent_id` says what it answers."""

    def flat_or_whole(records: Iterable[Record], options: Options) -> Iterator[Output]:
        messages: list[Record] = []
        for place, row in records:
            if isinstance(row, Mapping) and "prompt" not in row and "parent_id" in row:
                messages.append((place, row))
            else:
                yield from read([(place, row)], options)
        trees, orphans = _assembled(messages)
        for place in orphans:
            yield Problem(place, "no_partner", "what it answers is in no file given", "give all files of the data set")
        for place, tree, others in trees:
            outputs = list(read([(place, tree)], options))
            used = next((i for i, one in enumerate(outputs) if isinstance(one, Converted)), None)
            if used is None:
                why = "no_rank", "its tree holds no ranking", "nothing is compared"
                outputs += [Problem(other, *why) for other in others]
            else:
                outputs[used] = replace(outputs[used], partners=tuple(others))
            yield from outputs

    return flat_or_whole


def _assembled(messages: list[Record]) -> tuple[list[tuple[str, Row, list[str]]], list[str]]:
    """Of each tree its root's place, the tree, and the places of its other messages; the places of messages whose tree
    is not there."""
    nodes = {str(row.get("message_id")): {**row, "replies": [], "place": place} for place, row in messages}
    roots, trees, orphans = [], [], []
    for node in nodes.values():
        parent = nodes.get(str(node["parent_id"])) if node["parent_id"] is not None else None
        (roots if parent is None else parent["replies"]).append(node)
    for root in roots:
        others, left = [], list(root["replies"])
        while left:
            node = left.pop()
            others.append(node["place"])
            left += node["replies"]
        if root["parent_id"] is None:
            trees.append((root["place"], {"prompt": root}, others))
        else:
            orphans += [root["place"], *others]
    return trees, orphans


ranked_lists, scored_rows, nectar_rankings = each(ranked_list), each(scored), each(nectar)
oasst_groups, oasst_demonstrations = (
    _messages_too(nested(_groups, convert)) for convert in (_oasst_ranking, _oasst_best)
)
oasst_prompts = _messages_too(each(_oasst_root))
