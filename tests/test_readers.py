"""align/readers: each public format as a hand-written miniature with the rows it must give."""

import csv
import datetime
import decimal
import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data import parse_row
from align.errors import UserError
from align.readers.base import Options
from align.readers.files import read_records
from align.readers.formats import FORMATS, detect_format
from align.readers.passages import documents
from align.readers.reading import Conversion, read
from align.rows import Problem
from align.validate import validate

USER, YES, NO = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("assistant", "no")))


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def one(tmp_path: Path, rows: list[Any], to: str | None = None, **options: Any) -> Conversion:
    """The rows of a JSONL file, its format found and not named."""
    (conversion,) = read([lines(tmp_path / "a.jsonl", rows)], to=to, options=Options(**options))
    return conversion


def rows_of(conversion: Conversion) -> list[dict[str, Any]]:
    return [row.row for row in conversion.rows]


def faults(conversion: Conversion) -> list[tuple[str, str]]:
    """(place inside the file, kind) of what was dropped."""
    return [(problem.place.split("a.jsonl:")[1], problem.kind) for problem in conversion.problems]


def notes(conversion: Conversion) -> list[tuple[str, str]]:
    return [(note.place.split("a.jsonl:")[1], note.kind) for note in conversion.notes]


def ranking(prompt: Any, *texts: tuple[str, float], **extra: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completions": [{"completion": t, "rank": float(r)} for t, r in texts], **extra}


HH = "\n\nHuman: hi\n\nAssistant: well\n\nHuman: so?\n\nAssistant:"
CAT_POST = "SUBREDDIT: r/cats\n\nTITLE: my cat\n\nPOST: it sat.\n\nTL;DR:"
TALK = [USER, {"role": "assistant", "content": "well"}, {"role": "user", "content": "so?"}]
SQUAD = {"context": "the cat sat", "id": "p1", "qas": [{"id": "q1", "question": "who?", "answers": []}]}
SQUAD["qas"][0]["answers"] = [{"text": t, "answer_start": s} for t, s in (("cat", -1), ("cat", 4), ("the cat", 0))]
PKU = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}


def summaries(first: str, second: str, choice: int, **info: Any) -> dict[str, Any]:
    post = {"id": "t3", "post": "it sat.", "title": "my cat", "subreddit": "cats", "site": None, "article": None}
    texts = [{"text": text, "policy": "sup2", "note": None} for text in (first, second)]
    return {"info": post | info, "summaries": texts, "choice": choice, "worker": "w", "extra": {"confidence": 3}}


BBQ = {"context": "a and b met.", "question": "who ran?", "ans0": "a", "ans1": "b", "ans2": "unknown", "label": 2}
EVAL = {"eval_only": True}

# name, format, the rows of a file, the kind asked for, the rows that must come out
MINIATURES: list[tuple[str, list[Any], str | None, list[dict[str, Any]]]] = [
    ("trl", [{"prompt": "p", "completion": "c", "id": 1}], None, [{"prompt": "p", "completion": "c", "id": 1}]),
    ("trl", [{"messages": [USER, YES]}], None, [{"messages": [USER, YES]}]),
    ("trl", [{"prompt": [USER]}], None, [{"prompt": [USER]}]),
    ("trl", [{"text": "once"}], None, [{"text": "once"}]),
    ("trl", [ranking("p", ("a", 1), ("b", 1), ("c", 2))], None, [ranking("p", ("a", 1), ("b", 1), ("c", 2))]),
    ("trl", [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}], None,
     [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}]),
    ("trl", [{"chosen": [USER, YES], "rejected": [USER, NO]}], None,
     [{"prompt": [USER], "chosen": [YES], "rejected": [NO]}]),
    ("trl", [{"chosen": "the sky is blue", "rejected": "the sky is red"}], None,
     [{"prompt": "the sky is", "chosen": " blue", "rejected": " red"}]),
    ("trl", [{"messages": [USER, YES]}], "prompt", [{"prompt": [USER]}]),
    ("unpaired", [{"prompt": "p", "completion": "a", "label": True},
                  {"prompt": "p ", "completion": "b", "label": False},
                  {"prompt": "p", "completion": "c", "label": True}], None,
     [ranking("p", ("a", 0), ("b", 1), ("c", 0))]),
    ("unpaired", [{"prompt": "p", "completion": "a", "label": True, "id": 3}], "demonstration",
     [{"prompt": "p", "completion": "a", "id": 3}]),
    ("unpaired", [{"prompt": [USER], "completion": [YES], "label": True},
                  {"prompt": [USER], "completion": [NO], "label": False}], None,
     [ranking([USER], ("yes", 0), ("no", 1))]),
    ("alpaca", [{"instruction": "add", "input": "1 2", "output": "3"}], None,
     [{"prompt": "add\n\n1 2", "completion": "3"}]),
    ("alpaca", [{"instruction": "add", "context": "", "response": "3", "category": "maths"}], None,
     [{"prompt": "add", "completion": "3", "category": "maths"}]),
    ("alpaca", [{"instruction": "so?", "input": "", "output": "yes", "history": [["hi", "well"]], "system": "be kind"}],
     None, [{"prompt": [{"role": "system", "content": "be kind"}, *TALK], "completion": "yes"}]),
    ("self_instruct", [{"id": "s", "instruction": "add", "is_classification": False,
                        "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "4"}]}], None,
     [{"prompt": "add\n\n1 2", "completion": "3", "id": "s", "is_classification": False},
      {"prompt": "add", "completion": "4", "id": "s", "is_classification": False}]),
    ("sharegpt", [{"id": "x", "conversations": [
        {"from": "human", "value": "hi"}, {"from": "gpt", "value": "well"}, {"from": "human", "value": "so?"},
        {"from": "gpt", "value": "yes"}]}], None, [{"messages": [*TALK, YES], "id": "x"}]),
    ("hh", [{"chosen": HH + " yes", "rejected": HH + " no"}], None,
     [{"prompt": TALK, "chosen": "yes", "rejected": "no"}]),
    ("hh", [{"chosen": HH + " yes", "rejected": HH + " no"}], "prompt", [{"prompt": TALK}]),
    ("ranked_list", [{"instruction": "so?", "input": "", "output": ["a", "b", "c"], "history": [["hi", "well"]]}], None,
     [ranking(TALK, ("a", 0), ("b", 1), ("c", 2))]),
    ("ranked_list", [{"prompt": "p", "ranked_responses": ["a", "b"], "id": 7}], None,
     [ranking("p", ("a", 0), ("b", 1), id=7)]),
    ("scores", [{"instruction": "p", "completions": [
        {"response": "a", "overall_score": 3}, {"response": "b", "overall_score": 8.5},
        {"response": "c", "overall_score": 3}]}], None, [ranking("p", ("a", 1), ("b", 0), ("c", 1))]),
    ("scores", [{"prompt": "p", "responses": ["a", "b"], "scores": [-1, 2]}], None, [ranking("p", ("a", 1), ("b", 0))]),
    ("pairwise", [{"prompt": "p", "response_a": "a", "response_b": "b", "winner": "model_a", "judge": "j"},
                  {"prompt": "p", "response_a": "c", "response_b": "b", "winner": "model_b", "judge": "j"},
                  {"prompt": "p", "response_a": "c", "response_b": "a", "winner": "model_b", "judge": "j"}], None,
     [ranking("p", ("a", 0), ("b", 1), ("c", 2), labeler="j")]),
    ("safe_rlhf", [PKU | {"prompt_source": "x", "safer_response_id": 0, "is_response_0_safe": True}], None,
     [ranking("p", ("b", 0), ("a", 1), prompt_source="x")]),
    ("helpsteer", [{"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -2, "split": "train",
                    "preference_statement": "a is better"}], None, [ranking("p", ("a", 0), ("b", 1), split="train")]),
    ("helpsteer", [{"context": [USER], "response1": "a", "response2": "b", "overall_preference": 1, "domain": "code",
                    "individual_preference": [{"score": 1}]}], None,
     [ranking("hi", ("b", 0), ("a", 1), domain="code")]),
    ("helpsteer", [{"context": TALK, "response1": "a", "response2": "b", "overall_preference": -1}], "prompt",
     [{"prompt": TALK}]),
    ("helpsteer", [{"prompt": "hi\n<extra_id_1>Assistant\nwell\n<extra_id_1>User\nso?", "response_1": "a",
                    "response_2": "b", "preference_strength": 3}], None, [ranking(TALK, ("b", 0), ("a", 1))]),
    ("summarize_from_feedback", [summaries("a", "b", 1), summaries("b", "c", 0)], None,
     [ranking(CAT_POST, ("b", 0), ("a", 1), labeler="w", id="t3"),
      ranking(CAT_POST, ("b", 0), ("c", 1), labeler="w", id="t3")]),
    ("summarize_from_feedback", [summaries("a", "b", 0, title=None, subreddit="", id=None)], None,
     [ranking("POST: it sat.\n\nTL;DR:", ("a", 0), ("b", 1), labeler="w")]),
    ("summarize_from_feedback", [summaries("a", "b", 0, post=None, article="it rained.", id=None)], None,
     [ranking("Article: it rained.\n\nTL;DR:", ("a", 0), ("b", 1), labeler="w")]),
    ("nectar", [{"prompt": HH + " ", "turns": 2, "num_responses": 3, "source": ["one", "two"], "good_natured": True,
                 "answers": [{"answer": "a", "model": "m", "rank": 2.0}, {"answer": "b", "model": "n", "rank": 1.0},
                             {"answer": "c", "model": "o", "rank": 2.0}]}], None,
     [ranking(TALK, ("a", 2), ("b", 1), ("c", 2), source="one, two", good_natured=True)]),
    ("nectar", [{"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}], None,
     [ranking("p", ("a", 1), ("b", 2))]),
    ("shp", [{"post_id": "x", "domain": "askx", "history": "why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1,
              "score_A": 9, "score_B": 2},
             {"post_id": "x", "domain": "a", "history": "why?", "human_ref_A": "c", "human_ref_B": "b", "labels": 0}],
     None, [ranking("why?", ("a", 0), ("b", 1), ("c", 2), id="x")]),
    ("webgpt", [{"question": {"dataset": "eli5", "id": "q1", "full_text": "why?"}, "quotes_0": {"title": ["t"]},
                 "answer_0": "a", "score_0": -0.5, "quotes_1": {"title": []}, "answer_1": "b", "score_1": 0.5}], None,
     [ranking("why?", ("b", 0), ("a", 1), id="q1", dataset="eli5")]),
    ("arena", [{"question_id": "q", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "arena_user_1",
                "conversation_a": [USER, YES], "conversation_b": [USER, NO], "turn": 1, "language": "English"}], None,
     [ranking("hi", ("no", 0), ("yes", 1), labeler="arena_user_1", id="q", language="English")]),
    ("arena_texts", [{"id": 5, "model_a": "m", "model_b": "n", "prompt": '["hi"]', "response_a": '["a"]',
                      "response_b": '["b"]', "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}], None,
     [ranking("hi", ("a", 0), ("b", 1), id=5)]),
    ("alpaca_farm", [{"instruction": "add", "input": "1 2", "output_1": "a", "output_2": "b", "preference": 2,
                      "annotator": "w"}], None, [ranking("add\n\n1 2", ("b", 0), ("a", 1), labeler="w")]),
    ("unified_feedback", [{"conv_A": [*TALK, YES], "conv_B": [*TALK, NO], "conv_A_rating": 1.0, "conv_B_rating": 3,
                           "source": "s"}], None, [ranking(TALK, ("no", 0), ("yes", 1), source="s")]),
    ("ratings", [{"prompt": "p", "response": "a", "helpfulness": 3, "verbosity": 1},
                 {"prompt": "p", "response": "b", "helpfulness": 4, "verbosity": 1}], None,
     [ranking("p", ("a", 1), ("b", 0))]),
    ("scores", [{"qid": 1, "question": "why?", "answers": [{"text": "a", "pm_score": 1, "author": "x"},
                                                           {"text": "b", "pm_score": 4, "author": "y"}]}], None,
     [ranking("why?", ("a", 1), ("b", 0), qid=1)]),
    ("scores", [{"input": "p", "generations": ["a", "b"], "ratings": [5, 3]}], None,
     [ranking("p", ("a", 0), ("b", 1))]),
    ("scores", [{"prompt": HH, "responses": ["a", "b"], "scores": [1, 2]}], None, [ranking(TALK, ("a", 1), ("b", 0))]),
    ("named_pairs", [{"system": "be kind", "question": "so?", "chosen": "yes", "rejected": "no", "id": 4}], None,
     [{"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "so?"}], "chosen": "yes",
       "rejected": "no", "id": 4}]),
    ("named_pairs", [{"instruction": "add", "input": "1 2", "chosen": "3", "rejected": "4"}], None,
     [{"prompt": "add\n\n1 2", "chosen": "3", "rejected": "4"}]),
    ("named_pairs", [{"instruction": "add", "chosen_response": "3", "rejected_response": "4"}], None,
     [{"prompt": "add", "chosen": "3", "rejected": "4"}]),
    ("named_pairs", [{"messages": [*TALK, YES], "rejected_response": "no"}], None,
     [{"prompt": TALK, "chosen": "yes", "rejected": "no"}]),
    ("pairwise", [{"question": HH, "response_a": "a", "response_b": "b", "winner": "Model A"}], None,
     [ranking(TALK, ("a", 0), ("b", 1))]),
    ("response", [{"id": "n", "system_prompt": "be kind", "question": "so?", "response": "4"}], None,
     [{"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "so?"}], "completion": "4",
       "id": "n"}]),
    ("response", [{"query": "so?", "response": "yes", "type": "t"}], None,
     [{"prompt": "so?", "completion": "yes", "type": "t"}]),
    ("response", [{"inputs": "so?", "targets": "yes"}], None, [{"prompt": "so?", "completion": "yes"}]),
    ("response", [{"prompt": "so?", "response": "yes", "history": [["hi", "well"]]}], None,
     [{"prompt": TALK, "completion": "yes"}]),
    ("sharegpt", [{"conversation_id": "x", "conversation": [*TALK, YES]}], None,
     [{"messages": [*TALK, YES], "conversation_id": "x"}]),
    ("sharegpt", [{"conversation": [{"input": "hi", "output": "well"}, {"input": "so?", "output": "yes"}]}], None,
     [{"messages": [*TALK, YES]}]),
    ("sharegpt", [{"id": "0", "data": ["hi", "well", "so?", "yes"]}], None, [{"messages": [*TALK, YES], "id": "0"}]),
    ("sharegpt", [{"system_prompt": "be kind", "conversations": [
        {"from": "system", "value": ""}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}], None,
     [{"messages": [{"role": "system", "content": "be kind"}, USER, YES]}]),
    ("unpaired", [{"prompt": "p", "completion": "a", "label": 1}, {"prompt": "p", "completion": "b", "label": "False"}],
     None, [ranking("p", ("a", 0), ("b", 1))]),
    ("trl", [{"prompt": "so?", "history": [["hi", "well"]], "chosen": "yes", "rejected": "no"}], None,
     [{"prompt": TALK, "chosen": "yes", "rejected": "no"}]),
    ("mt_bench", [{"question_id": 1, "category": "x", "turns": ["one", "two"]}], None,
     [{"prompt": "one", "turns": ["one", "two"], "question_id": 1, "category": "x"}]),
    ("truthfulqa_mc", [{"question": "q", "mc1_targets": {"a": 1, "b": 0}}], None,
     [{"prompt": "q", "question": "q", "mc1_targets": {"a": 1, "b": 0}, **EVAL}]),
    ("halluqa", [{"Question": "q", "Best Answer1": "a", "Wrong_Answer1": "b", "Wrong_Answer2": "c"}], None,
     [{"prompt": "q", "best_answers": ["a"], "wrong_answers": ["b", "c"], "Question": "q", "Best Answer1": "a",
       "Wrong_Answer1": "b", "Wrong_Answer2": "c", **EVAL}]),
    ("halluqa_mc", [{"question_id": 1, "question": "Question: q? A:one B:two ", "answer": "Answer: B"}], None,
     [{"prompt": "q?\nA. one\nB. two", "question": "q?", "choices": ["one", "two"], "answer": "B", "question_id": 1,
       **EVAL}]),
    ("gsm8k", [{"question": "q", "answer": "600*2=<<600*2=1200>>1200\n#### 1,200"}], None,
     [{"prompt": "q", "result": "1200", "question": "q", "answer": "600*2=<<600*2=1200>>1200\n#### 1,200", **EVAL}]),
    ("bbq", [BBQ], None, [BBQ | {"prompt": "a and b met.\nwho ran?\nA. a\nB. b\nC. unknown", "answer": "C",
                                 "choices": ["a", "b", "unknown"], **EVAL}]),
    ("crows_pairs", [{"sent_more": "a", "sent_less": "b"}], None,
     [{"prompt": "a", "sent_more": "a", "sent_less": "b", **EVAL}]),
    ("winogender", [{"sentid": "i", "sentence": "s"}], None, [{"prompt": "s", "sentence": "s", "sentid": "i", **EVAL}]),
    ("cold", [{"TEXT": "t", "fine-grained-label": "0"}], None,
     [{"prompt": "t", "TEXT": "t", "fine-grained-label": "0", **EVAL}]),
    ("safetybench", [{"id": 3, "options": ["x", "y"], "question": "q"}], None,
     [{"prompt": "q\nA. x\nB. y", "id": 3, "options": ["x", "y"], "question": "q", **EVAL}]),
    ("xstest", [{"prompt": "p", "focus": "f", "type": "t"}], None,
     [{"prompt": "p", "focus": "f", "type": "t", **EVAL}]),
    ("humaneval", [{"prompt": "def f():", "canonical_solution": " pass"}], None,
     [{"prompt": "def f():", "canonical_solution": " pass", **EVAL}]),
    ("ifeval", [{"prompt": "p", "instruction_id_list": ["x"]}], None,
     [{"prompt": "p", "instruction_id_list": ["x"], **EVAL}]),
    ("strings", ["one", "two "], None, [{"prompt": "one"}, {"prompt": "two"}]),
    ("squad", [{"version": "1", "data": [{"paragraphs": [SQUAD]}]}], None, [{"text": "the cat sat", "id": "p1"}]),
    ("squad", [{"paragraphs": [SQUAD]}], "demonstration",
     [{"prompt": "the cat sat\n\nwho?", "completion": "cat", "answers": ["cat", "the cat"], "id": "q1"}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "to", "wanted"), MINIATURES, ids=lambda x: x if isinstance(x, str) else "")
def test_miniature(tmp_path, name, rows, to, wanted):
    conversion = one(tmp_path, rows, to)
    assert conversion.format == name
    assert rows_of(conversion) == wanted and conversion.problems == []


@pytest.mark.parametrize(("name", "rows", "to", "wanted"), MINIATURES, ids=lambda x: x if isinstance(x, str) else "")
def test_converted_rows_are_read_as_ours_and_unchanged(tmp_path, name, rows, to, wanted):
    conversion = one(tmp_path, wanted)
    assert rows_of(conversion) == wanted and conversion.problems == []
    code, text = validate([str(tmp_path / "a.jsonl")])
    assert code == 0 and "none bad" in text


def test_our_rows_with_other_formats_columns_stay_ours(tmp_path):
    scored = ranking("p", ("a", 1), ("b", 0))
    scored["completions"][0]["score"] = 2
    for row in (scored, {"prompt": "p", "winner": "x"}, {"prompt": "p", "scores": {"x": 1}}):
        assert one(tmp_path, [row]).format == "trl"


QA = {"question": "q", "gold": "g", "passages": [["title", "fact one.", "fact two."]]}
QA |= {f"prediction {i}": text for i, text in enumerate("abcd", start=1)}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ([1, 1, 1, 1, 1, 1], [ranking("q", ("a", 0), ("b", 1), ("c", 2), ("d", 3))]),
        ([0, 2, 1, 2, 1, 1], [ranking("q", ("c", 0), ("a", 1), ("b", 1), ("d", 2))]),  # c, then a and b, then d
        # a over b, a ties c, b ties c: no ranking holds all three. d is worse than all.
        ([1, 0, 1, 0, 1, 1], [ranking("q", ("a", 0), ("b", 1), ("d", 2)), ranking("q", ("c", 0), ("d", 1))]),
    ],
)  # fmt: skip
def test_qa_feedback(tmp_path, said, wanted):
    conversion = one(tmp_path, [QA | {"preference": said}], context_characters=0)
    assert conversion.format == "qa_feedback" and rows_of(conversion) == wanted and conversion.units == 6


def test_qa_feedback_names_ties_that_hold_no_preference(tmp_path):
    every = one(tmp_path, [QA | {"preference": [0] * 6}])
    assert faults(every) == [
        (f"1, judgement {pair}", "all_ties") for pair in ("1v2", "1v3", "1v4", "2v3", "2v4", "3v4")
    ]
    broken = one(tmp_path, [QA | {"preference": [1, 0, 1, 0, 1, 1]}])
    assert faults(broken) == [("1, judgement 1v3", "all_ties"), ("1, judgement 2v3", "all_ties")]
    assert notes(broken) == [("1", "weak_transitivity")] and broken.used == 4


def test_qa_feedback_context_and_gold(tmp_path):
    rows = [QA | {"preference": [1] * 6}]
    whole = {"prompt": "title: fact one. fact two.\n\nq", "completion": "g"}
    assert rows_of(one(tmp_path, rows, "demonstration")) == [whole]
    assert rows_of(one(tmp_path, rows, "demonstration", context_characters=6))[0]["prompt"] == "title:\n\nq"
    assert rows_of(one(tmp_path, rows, "demonstration", context_characters=0))[0]["prompt"] == "q"


def panda(first: str, second: str, *said: object) -> dict[str, Any]:
    judged = {f"annotator{i}": value for i, value in enumerate(said, start=1)}
    return {"instruction": "i", "input": "", "response1": first, "response2": second, **judged}


def test_safe_rlhf_pairs_of_one_prompt_are_joined(tmp_path):
    rows = [PKU, PKU | {"response_0": "b", "response_1": "c", "better_response_id": 0, "response_0_source": "m"}]
    assert rows_of(one(tmp_path, rows)) == [ranking("p", ("b", 0), ("a", 1)), ranking("p", ("b", 0), ("c", 1))]
    rows[1] |= {"response_0": "c", "response_1": "b", "better_response_id": 0}
    assert rows_of(one(tmp_path, rows)) == [ranking("p", ("c", 0), ("b", 1), ("a", 2))]


def test_preferences_without_a_known_value_are_named(tmp_path):
    steer = {"prompt": "p", "response_1": "a", "response_2": "b"}
    rows = [steer | {"preference_strength": strength} for strength in (2, 0, -100, True, "x", float("nan"))]
    conversion = one(tmp_path, [{**row, "prompt": f"p{i}"} for i, row in enumerate(rows)])
    assert faults(conversion) == [*((str(n), "bad_judgement") for n in (3, 4, 5, 6)), ("2", "all_ties")]
    pairs = [PKU, PKU | {"better_response_id": 2}, PKU | {"better_response_id": True}, PKU | {"response_0": " b"}]
    assert faults(one(tmp_path, pairs)) == [
        ("2", "bad_judgement"), ("3", "bad_judgement"), ("4", "duplicate_completions"),
    ]  # fmt: skip
    posts = [summaries("a", "b", 0), summaries("a", "b", 2), summaries("a", "b", 0, post=""), summaries("a", "", 0)]
    posts += [summaries("a", "b", 0) | {"summaries": [{"text": "a"}]}, summaries("a", "b", 0) | {"info": "x"}]
    assert faults(one(tmp_path, posts)) == [
        ("2", "bad_judgement"), ("3", "missing_field"), ("4", "empty_field"), ("5", "wrong_type"), ("6", "wrong_shape"),
    ]  # fmt: skip


def test_each_worker_of_a_post_gets_a_ranking(tmp_path):
    rows = [summaries("a", "b", 0), summaries("b", "c", 0), summaries("a", "b", 1) | {"worker": "v"}]
    prompt = CAT_POST
    assert rows_of(one(tmp_path, rows)) == [
        ranking(prompt, ("a", 0), ("b", 1), ("c", 2), labeler="w", id="t3"),
        ranking(prompt, ("b", 0), ("a", 1), labeler="v", id="t3"),
    ]


def test_nectar_dialogues_that_wait_for_no_answer(tmp_path):
    answers = [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]
    good = {"prompt": "\n\nHuman: hi\n\nHuman: so?\n\nAssistant: ", "answers": answers}
    rows = [good, good | {"prompt": "\n\nHuman: hi\n\nAssistant: well"}, good | {"prompt": "\n\nHuman:\n\nAssistant:"}]
    rows += [good | {"answers": [answers[0], {"answer": "b", "rank": "x"}]}, good | {"answers": answers[:1]}]
    conversion = one(tmp_path, rows)
    assert rows_of(conversion) == [ranking("hi\n\nso?", ("a", 1), ("b", 2))]
    assert notes(conversion) == [("1", "merged_turns")]
    assert faults(conversion) == [
        ("2", "bad_messages"), ("3", "empty_field"), ("4", "bad_rank"), ("5", "too_few_completions"),
    ]  # fmt: skip


@pytest.mark.parametrize("row", [row[1][0] for row in MINIATURES if row[0] in ("safe_rlhf", "helpsteer", "nectar")])
def test_rankings_in_other_shapes_are_never_validated_as_prompts(tmp_path, row):
    code, text = validate([lines(tmp_path / "a.jsonl", [row, row])])
    assert code == 1 and "`align convert" in text and "none bad" not in text


def test_answers_that_no_reader_takes_make_no_prompt(tmp_path):
    unread = [
        {"response": "a", "helpfulness": 3}, {"response_a": "a", "response_b": "b"}, {"Response 1": "a"},
        {"answer-1": "a", "answer-2": [NO]}, {"answers": [{"text": "a"}]}, {"responses": [{"text": "a"}]},
        {"answers": ["a", "b"], "scores": [1, 2]}, {"completion_a": "a"}, {"chosen_response": "a"},
    ]  # fmt: skip
    conversion = one(tmp_path, [{"prompt": "p", **answers} for answers in unread])
    assert conversion.format == "trl" and conversion.rows == []
    assert faults(conversion) == [(str(n), "unread_answers") for n in range(1, len(unread) + 1)]
    message = str(conversion.problems[1])
    assert (
        "('response_a', 'response_b')" in message and "completions (a ranking)" in message and "formats.md" in message
    )


def test_columns_that_reward_functions_read_stay_with_their_prompt(tmp_path):
    kept = [
        {"answer": "4"}, {"answer": ["4", "four"]}, {"answers": ["4", "four"]}, {"answer_info": {"a": 1}},
        {"answer_start": 3}, {"response_format": "json"}, {"response": ""}, {"response_a": None}, {"solution": "x"},
        {"responses": []}, {"output": "x"},
    ]  # fmt: skip
    rows = [{"prompt": f"p{i}", **columns} for i, columns in enumerate(kept)]
    conversion = one(tmp_path, rows)
    assert rows_of(conversion) == rows and conversion.problems == []


def test_prompts_of_our_own_rows_leave_other_answers_behind(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "response": "x", "answer": "4"}]
    assert rows_of(one(tmp_path, rows, "prompt")) == [{"prompt": "p", "answer": "4"}]


def test_a_system_column_stands_before_the_prompt(tmp_path):
    system = {"role": "system", "content": "be kind"}
    pair = {"prompt": "hi", "chosen": "a", "rejected": "b", "system": " be kind"}
    assert rows_of(one(tmp_path, [pair])) == [{"prompt": [system, USER], "chosen": "a", "rejected": "b"}]
    whole = {"chosen": [USER, YES], "rejected": [USER, NO], "system": "be kind"}
    assert rows_of(one(tmp_path, [whole])) == [{"prompt": [system, USER], "chosen": [YES], "rejected": [NO]}]
    said = [{"prompt": "hi", "completion": c, "label": c == "a", "system": s} for c in "ab" for s in ("be kind", "")]
    assert rows_of(one(tmp_path, said)) == [
        ranking([system, USER], ("a", 0), ("b", 1)), ranking("hi", ("a", 0), ("b", 1)),
    ]  # fmt: skip
    assert rows_of(one(tmp_path, [{"messages": [USER, YES], "system": "be kind"}], "prompt")) == [
        {"prompt": [system, USER]}
    ]


def test_what_is_not_learned_is_noted(tmp_path):
    conversion = one(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": m} for m in (2, None, 0.5)])
    assert notes(conversion) == [("1", "margin_not_used"), ("3", "margin_not_used")]
    assert "2 margin_not_used" in conversion.summary() and "margin" in conversion.notes[0].what
    turns = [{"from": role, "value": text} for role, text in zip(("human", "gpt") * 2, "abcd", strict=True)]
    assert notes(one(tmp_path, [{"conversations": turns}])) == [("1", "earlier_answers_not_learned")]


def test_content_parts_in_unpaired_rows(tmp_path):
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    rows = [{"prompt": [USER], "completion": c, "label": c == parts} for c in (parts, [NO])]
    assert rows_of(one(tmp_path, rows)) == [ranking([USER], ("yes", 0), ("no", 1))]


def test_pandalm_joins_each_annotator_over_rows(tmp_path):
    conversion = one(tmp_path, [panda("a", "b", 1, 1, 1), panda("b", "c", 1, 0, 2), panda("c", "a", 2, 2, 2)])
    assert conversion.format == "pandalm" and conversion.problems == [] and conversion.used == 9
    assert rows_of(conversion) == [
        ranking("i", ("a", 0), ("b", 1), ("c", 2), labeler="annotator1"),
        ranking("i", ("a", 0), ("b", 1), ("c", 1), labeler="annotator2"),
        ranking("i", ("a", 0), ("c", 1), ("b", 2), labeler="annotator3"),
    ]


def test_pandalm_circles_contradictions_and_broken_answers_are_named(tmp_path):
    circle = [panda("a", "b", 1), panda("b", "c", 1), panda("c", "a", 1), panda("a", "d", 1)]
    conversion = one(
        tmp_path, [*circle, panda("d", "a", 1), panda("a", "x", 0), panda("a", "", 1), panda("a", True, 1)]
    )
    assert faults(conversion) == [
        ("7", "empty_field"), ("8", "wrong_type"), ("4", "contradiction"), ("5", "contradiction"),
        ("1", "intransitive"), ("2", "intransitive"), ("3", "intransitive"), ("6", "all_ties"),
    ]  # fmt: skip
    assert conversion.rows == []
    assert faults(one(tmp_path, [panda("a", "b", 3), panda("a", "a ", 1), panda("a", "b", [1])])) == [
        ("1", "bad_judgement"), ("2", "duplicate_completions"), ("3", "bad_judgement"),
    ]  # fmt: skip


def test_judgements_join_across_shards(tmp_path):
    shards = [
        lines(tmp_path / f"{n}.jsonl", [panda(*pair, 1)]) for n, pair in enumerate((("a", "b"), ("b", "c"), ("a", "c")))
    ]
    (conversion,) = read(shards)
    assert rows_of(conversion) == [ranking("i", ("a", 0), ("b", 1), ("c", 2), labeler="annotator1")]


# Trees


def post(name: str, text: str, role: str, *replies: dict, **extra: Any) -> dict[str, Any]:
    return {"message_id": name, "text": text, "role": role, "lang": "en", "replies": list(replies), **extra}


def bot(name: str, rank: int | None, *replies: dict, **extra: Any) -> dict[str, Any]:
    return post(name, f"text {name}", "assistant", *replies, rank=rank, **extra)


def tree(*replies: dict) -> dict[str, Any]:
    return {"message_tree_id": "t", "prompt": post("root", "hi", "prompter", *replies)}


def test_oasst_rankings_of_every_depth(tmp_path):
    deeper = post("ask", "so?", "prompter", bot("x", 1), bot("y", 0))
    conversion = one(tmp_path, [tree(bot("a", 1, deeper), bot("b", 0), bot("c", 2))])
    first = {"role": "assistant", "content": "text a"}
    assert conversion.format == "oasst" and rows_of(conversion) == [
        ranking("hi", ("text b", 0), ("text a", 1), ("text c", 2), id="root", language="en"),
        ranking(
            [USER, first, {"role": "user", "content": "so?"}], ("text y", 0), ("text x", 1), id="ask", language="en"
        ),
    ]


def test_oasst_a_message_a_row_as_on_the_hub(tmp_path):
    """In any order; a reply that nobody ranked and a tree without a ranking are named or counted, none is lost."""

    def said(number: str, parent: str | None, role: str, rank: int | None = None, tree: str = "t") -> dict[str, Any]:
        return {
            "message_id": number, "parent_id": parent, "message_tree_id": tree, "role": role, "rank": rank,
            "text": f"text {number}", "synthetic": False, "deleted": False, "lang": "en",
        }  # fmt: skip

    rows = [
        said("b", "a", "assistant", 1), said("a", None, "prompter"), said("c", "a", "assistant", 0),
        said("d", "c", "prompter"), said("e", "d", "assistant", 1), said("f", "d", "assistant", 0),
        said("g", "d", "assistant"), said("h", None, "prompter", tree="u"), said("i", "h", "assistant", tree="u"),
    ]  # fmt: skip
    conversion = one(tmp_path, rows)
    first, second = rows_of(conversion)
    assert first == ranking("text a", ("text c", 0), ("text b", 1), id="a", language="en")
    assert [turn["content"] for turn in second["prompt"]] == ["text a", "text c", "text d"]
    assert [item["completion"] for item in second["completions"]] == ["text f", "text e"]
    assert faults(conversion) == [("8, message h", "one_reply"), ("9", "no_rank")]
    best = one(tmp_path, rows, to="demonstration")
    assert [row["completion"] for row in rows_of(best)] == ["text c", "text f"]
    assert [row["prompt"] for row in rows_of(one(tmp_path, rows, to="prompt"))] == ["text a", "text h"]


def test_oasst_groups_without_a_ranking_are_named(tmp_path):
    rows = [
        tree(bot("a", None)), tree(bot("a", None), bot("b", None)), tree(),
        tree(bot("a", 0), bot("b", 1, deleted=True)),
        tree(bot("a", 0), bot("b", None), bot("c", 1)), {"message_tree_id": "t", "prompt": "hi"},
    ]  # fmt: skip
    conversion = one(tmp_path, rows)
    assert faults(conversion) == [
        ("1, message root", "one_reply"), ("2, message root", "no_rank"), ("3", "no_replies"),
        ("4, message root", "no_rank"), ("6", "missing_field"),
    ]  # fmt: skip
    assert notes(conversion) == [("5, message root", "unranked_reply")] and conversion.used == 1


def test_oasst_model_written_replies_may_be_ranked_but_never_imitated(tmp_path):
    rows = [
        tree(bot("a", 0, synthetic=True), bot("b", 1)),
        tree(*(bot(n, i, synthetic=True) for i, n in enumerate("cd"))),
    ]
    ranked = one(tmp_path, rows)
    assert ranked.used == 2 and [kind for _, kind in notes(ranked)] == ["model_written"] * 2
    shown = one(tmp_path, rows, "demonstration")
    assert [row["completion"] for row in rows_of(shown)] == ["text b"]
    assert faults(shown) == [("2, message root", "model_written")]
    assert notes(shown) == [("1, message root", "model_written")]
    assert rows_of(one(tmp_path, rows, "prompt"))[0] == {"prompt": "hi", "id": "root", "language": "en"}


# Files that belong together


def review(rank: int, worker: str) -> dict[str, Any]:
    return {"overall-rank": rank, "overall-rating": 50, "worker_id": worker}


def test_squality_reviews_take_the_question_from_the_stories(tmp_path):
    answers = {
        name: {"response": f"by {name}", "reviews": [review(first, "7"), review(second, "9")]}
        for name, first, second in (("bart", 2, 1), ("human", 1, 2))
    }
    judged = lines(tmp_path / "judged.jsonl", [{"passage-id": "p", "questions": {"0": answers, "1": answers}}])
    question = {"question_text": "why?", "question_number": 1, "responses": [{"response_text": "so", "worker_id": "3"}]}
    story = {"metadata": {"passage_id": "p"}, "document": "once upon a time", "questions": [question]}
    stories = lines(tmp_path / "stories.jsonl", [story, story | {"metadata": {"passage_id": "z"}}])
    (conversion,) = read([stories, judged], to="ranking", options=Options(context_characters=4))
    assert rows_of(conversion) == [
        ranking("once\n\nwhy?", ("by bart", 1 + 1), ("by human", 1), labeler="7"),
        ranking("once\n\nwhy?", ("by bart", 1), ("by human", 2), labeler="9"),
    ]
    assert [(p.place, p.kind) for p in conversion.problems] == [
        (f"{judged}:1, question 1", "no_partner"), (f"{stories}:2", "no_partner"),
    ]  # fmt: skip
    assert [p.kind for p in read([judged])[0].problems] == ["no_partner"] * 2
    (told,) = read([stories], to="demonstration")
    assert rows_of(told)[0] == {"prompt": "once upon a time\n\nwhy?", "completion": "so", "labeler": "3"}
    (text,) = read([stories], to="text")
    assert rows_of(text)[0] == {"text": "once upon a time", "id": "p"}


def test_a_review_that_not_every_answer_has_is_named(tmp_path):
    answers = {
        name: {"response": f"by {name}", "reviews": [review(i, "7")]} for i, name in enumerate(("bart", "human"))
    }
    answers["bart"]["reviews"].append(review(1, "9"))
    none = {name: {"response": name, "reviews": []} for name in answers}
    judged = lines(tmp_path / "judged.jsonl", [{"passage-id": "p", "questions": {"0": answers, "1": none}}])
    questions = [{"question_text": "why?", "question_number": i, "responses": []} for i in (1, 2)]
    stories = lines(
        tmp_path / "stories.jsonl", [{"metadata": {"passage_id": "p"}, "document": "x", "questions": questions}]
    )
    (conversion,) = read([stories, judged], to="ranking")
    assert len(conversion.rows) == 1
    assert [(p.place, p.kind) for p in conversion.problems] == [
        (f"{judged}:1, question 0, review 2", "missing_review"), (f"{judged}:1, question 1", "no_answer"),
    ]  # fmt: skip


def test_safetybench_takes_its_answers_from_the_other_file(tmp_path):
    asked = lines(tmp_path / "q.jsonl", [{"id": i, "options": ["x", "y"], "question": "q"} for i in (3, 4)])
    answers = tmp_path / "a.json"
    answers.write_text(json.dumps({"3": {"answer": 1, "category": "c"}, "9": {"answer": 0, "category": "c"}}))
    (conversion,) = read([asked, str(answers)])
    assert [row.get("answer") for row in rows_of(conversion)] == ["B", None]
    assert [(p.place, p.kind) for p in conversion.problems] == [(f"{answers}:row 1, id 9", "no_partner")]
    assert conversion.used == 3
    assert [p.kind for p in read([str(answers)])[0].problems] == ["no_partner"] * 2
    again = tmp_path / "again.json"
    again.write_text(answers.read_text())
    (twice,) = read([asked, str(answers), str(again)])
    assert [(p.place, p.kind) for p in twice.problems[:1]] == [(f"{again}:row 1, id 3", "repeated_id")]


# Exports of labelling tools


ARGILLA_1 = {"fields": {"prompt": "p", "response-1": "a", "response-2": "b", "response-3": "c"}}
RANKS = [{"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}, {"value": "response-3", "rank": 2}]


@pytest.mark.parametrize(
    "row",
    [
        ARGILLA_1 | {"responses": [{"user_id": "u", "status": "submitted", "values": {"q": {"value": RANKS}}}]},
        ARGILLA_1 | {"responses": {"q": [{"user_id": "u", "value": RANKS}]}},
        ARGILLA_1["fields"] | {"q": [{"user_id": "u", "value": RANKS, "status": "submitted"}], "metadata": "{}"},
        ARGILLA_1["fields"] | {"q": [{"user_id": "u", "status": "submitted", "value": {
            "rank": [2, 1, 2], "value": ["response_1", "response_2", "response_3"]}}]},
        ARGILLA_1["fields"] | {"q.responses": [RANKS], "q.responses.users": ["u"], "q.responses.status": ["submitted"]},
    ],
)  # fmt: skip
def test_argilla_in_each_of_its_exports(tmp_path, row):
    conversion = one(tmp_path, [row])
    assert conversion.format == "argilla" and conversion.problems == []
    assert rows_of(conversion) == [ranking("p", ("a", 2), ("b", 1), ("c", 2), labeler="u")]


def test_argilla_with_a_context_beside_the_prompt(tmp_path):
    fields = {"prompt": "Sum it up.", "context": "A long story.", "response_1": "a", "response_2": "b"}
    answers = [{"user_id": "u", "value": ["response_2", "response_1"]}]
    conversion = one(tmp_path, [{"id": "r", "fields": fields, "responses": {"q": answers}}])
    assert rows_of(conversion) == [ranking("A long story.\n\nSum it up.", ("b", 0), ("a", 1), labeler="u", id="r")]


def test_a_list_beside_its_own_ranks_or_labels_is_not_read_as_best_first(tmp_path):
    rows = [{"prompt": "p", "output": ["a", "b"]}, {"prompt": "p", "output": ["a", "b"], "ranks": [2, 1]}]
    rows += [{"prompt": "p", "output": ["a", "b"], "labels": [True, False]}]
    rows += [{"prompt": "p", "ranked_responses": ["a", "b"], "best": 1}]
    conversion = one(tmp_path, rows)
    assert rows_of(conversion) == [ranking("p", ("a", 0), ("b", 1))]
    assert faults(conversion) == [("2", "wrong_type"), ("3", "wrong_type"), ("4", "wrong_type")]


@pytest.mark.parametrize("name", ["scores", "rewards", "ratings", "reward_scores"])
def test_numbers_beside_a_list_of_answers_are_their_scores(tmp_path, name):
    row = {"prompt": "p", "responses": ["bad", "good", "bad too"], name: [-3, 2.5, -3]}
    assert rows_of(one(tmp_path, [row])) == [ranking("p", ("bad", 1), ("good", 0), ("bad too", 1))]


def test_samples_in_no_order_are_no_ranking(tmp_path):
    rows = [{"prompt": "p", "responses": ["a", "b"]}]
    assert faults(one(tmp_path, rows)) == [("1", "unread_answers")]
    (said,) = read([str(tmp_path / "a.jsonl")], "ranked_list")
    assert rows_of(said) == [ranking("p", ("a", 0), ("b", 1))], "unless one says so"


def test_a_stage_gives_a_pair_whose_question_has_another_name_no_made_up_prompt():
    """A common start of the two answers would be taken for it."""
    row = {"system": "", "question": "Name a colour.", "chosen": "The best is blue.", "rejected": "The best is red."}
    problem = parse_row("ranking", "a:1", row, Counter())
    assert problem.kind == "missing_field" and "'question'" in problem.what and "align convert" in problem.remedy
    row = {"chosen": "Say a colour: blue", "rejected": "Say a colour: red"}
    assert parse_row("ranking", "a:1", row, Counter()).prompt == "Say a colour:"


TALK_IN_A_CELL = "[{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yes'}]"


@pytest.mark.parametrize("text", [TALK_IN_A_CELL, json.dumps([USER, YES]), f"[{json.dumps(USER)}\n {json.dumps(YES)}]",
                                  "array([" + TALK_IN_A_CELL[1:] + ", dtype=object)"])  # fmt: skip
def test_messages_that_a_table_wrote_out_as_text_are_refused(tmp_path, text):
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["chosen", "rejected"], [text, text.replace("yes", "no")]])
    (conversion,) = read([str(path)])
    assert [problem.kind for problem in conversion.problems] == ["talk_as_text"] and not conversion.rows
    for row in ({"prompt": text}, {"prompt": "p", "completion": text}):
        assert [problem.kind for problem in one(tmp_path, [row]).problems] == ["talk_as_text"]
    assert rows_of(one(tmp_path, [{"text": text}, {"text": "[1]"}]))[0]["text"] == text, "a text may be anything"


@pytest.mark.parametrize("label", [False, 0, 0.0, "False", "0"])
def test_an_answer_labelled_bad_is_no_demonstration(tmp_path, label):
    rows = [{"prompt": "p", "completion": "c", "label": label}, {"prompt": "q", "completion": "c", "label": 1}]
    conversion = one(tmp_path, rows, "demonstration")
    assert faults(conversion) == [("1", "labelled_bad")] and rows_of(conversion) == [{"prompt": "q", "completion": "c"}]
    for row in ({"messages": [USER, YES], "label": label}, {"instruction": "i", "output": "o", "kto_tag": label}):
        assert faults(one(tmp_path, [row])) == [("1", "labelled_bad")]
    assert not one(tmp_path, [{"prompt": "p", "completion": "c", "label": "entailment"}]).problems


def test_prompts_of_conversations_keep_what_was_said_before(tmp_path):
    """no_robots and UltraChat repeat the first question as `prompt`."""
    row = {"prompt": "hi", "prompt_id": "x", "messages": [*TALK, YES]}
    assert rows_of(one(tmp_path, [row], "prompt")) == [{"prompt": TALK, "prompt_id": "x"}]


@pytest.mark.parametrize("row", [
    {"instruction": "i", "output": "SECRET", "prompt": "Below is ... SECRET"},
    {"instruction": "i", "output": "SECRET", "completion": "other"},
    {"conversations": [{"from": "human", "value": "i"}, {"from": "gpt", "value": "SECRET"}], "messages": "other"},
])  # fmt: skip
def test_a_column_never_stands_for_what_was_read(tmp_path, row):
    (made,) = rows_of(one(tmp_path, [row]))
    if "messages" in made:
        assert made["messages"] == [{"role": "user", "content": "i"}, {"role": "assistant", "content": "SECRET"}]
    else:
        assert made == {"prompt": "i", "completion": "SECRET"}


def test_a_stage_does_not_lose_earlier_turns_in_a_column(tmp_path):
    problem = parse_row("demonstration", "a:1", {"prompt": "p", "completion": "c", "history": [["q", "a"]]}, Counter())
    assert problem.kind == "unread_history" and "align convert" in problem.remedy
    for other in ("once upon a time", [], [1, 2], [["q"]]):
        assert parse_row("prompt", "a:1", {"prompt": "p", "history": other}, Counter()).columns["history"] == other


def test_conversations_that_part_early_are_not_compared(tmp_path):
    other = [USER, {"role": "assistant", "content": "bah"}, TALK[2], NO]
    battle = {"conversation_a": [*TALK, YES], "conversation_b": other, "winner": "tie"}
    assert faults(one(tmp_path, [battle])) == [("1", "prompt_mismatch")]
    turns = {"prompt": '["hi", "so?"]', "response_a": '["well", "yes"]', "response_b": '["bah", "no"]'}
    flags = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    broken = turns | {"response_b": '["one"]'}
    rows = [
        turns | flags,
        broken | flags,
        turns | flags | {"prompt": "hi"},
        turns | flags | {"response_a": '[null, ""]'},
    ]
    kinds = ["prompt_mismatch", "wrong_shape", "wrong_type", "empty_field"]
    assert [kind for _, kind in faults(one(tmp_path, rows))] == kinds
    same = turns | {"prompt": '["hi"]', "response_a": '["a"]', "response_b": '["b"]'}
    none = dict.fromkeys(flags, 0)
    assert faults(one(tmp_path, [same | none])) == [("1", "bad_judgement")]


def test_ratings_that_compare_nothing_are_named(tmp_path):
    rate = {"prompt": "p", "response": "a", "helpfulness": 2}
    rows = [rate, rate | {"response": "b"}, rate | {"prompt": "q"}, rate | {"prompt": "r", "helpfulness": "many"},
            *(rate | {"prompt": "r", "response": c, "helpfulness": n} for c, n in (("c", "1"), ("d", 2)))]  # fmt: skip
    conversion = one(tmp_path, rows)
    assert rows_of(conversion) == [ranking("r", ("c", 1), ("d", 0))]
    kinds = [("1", "all_ties"), ("2", "all_ties"), ("3", "too_few_completions"), ("4", "bad_score")]
    assert sorted(faults(conversion)) == kinds
    twice = one(tmp_path, [rate, rate | {"helpfulness": 1}, rate | {"response": "b", "helpfulness": 0}])
    assert rows_of(twice) == [ranking("p", ("a", 0), ("b", 2))] and notes(twice) == [("1", "repeated_completion")]


def test_messages_whose_tree_lies_elsewhere_are_named(tmp_path):
    rows = [post("b", "so?", "prompter", parent_id="gone"), bot("c", 0, parent_id="b"), bot("d", 1, parent_id="b")]
    rows = [
        {name: value for name, value in row.items() if name != "replies"} | {"message_tree_id": "t"} for row in rows
    ]
    conversion = one(tmp_path, rows)
    assert {kind for _, kind in faults(conversion)} == {"no_partner"} and len(conversion.problems) == 3


def test_scores_that_contradict_a_pair_are_noted(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [pair | {"score_chosen": 7.0, "score_rejected": 7.0}, pair | {"chosen_score": 1, "rejected_score": 3},
            pair | {"chosen_score": 3, "rejected_score": 1}, pair]  # fmt: skip
    assert [place for place, kind in notes(one(tmp_path, rows)) if kind == "scores_disagree"] == ["1", "2"]


def test_parquet_values_that_json_has_not(tmp_path):
    row = {"prompt": "p", "at": datetime.datetime(2026, 11, 28, 1), "cost": decimal.Decimal("1.5"), "image": b"x",
           "more": [{"on": datetime.date(2026, 11, 28)}]}  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (conversion,) = read([str(tmp_path / "a.parquet")])
    wanted = {"prompt": "p", "at": "2026-11-28T01:00:00", "cost": 1.5, "image": None, "more": [{"on": "2026-11-28"}]}
    assert rows_of(conversion) == [wanted] and json.dumps(wanted)


def test_an_unknown_format_names_the_fields_it_found(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"labels": [1, 0], "steps": ["x"]}])
    with pytest.raises(UserError, match=r"no row is of a known format \(fields: labels, steps\): name one"):
        read([path])


@pytest.mark.parametrize("name", ["context", "history", "trajectory", "post", "conversation"])
def test_nor_does_one_whose_question_lies_in_another_column(tmp_path, name):
    said = "What is the capital of France?"
    value = said if name in ("context", "post") else [{"role": "user", "content": said}]
    row = {name: value, "chosen": "The capital of France is Paris.", "rejected": "The capital of France is Lyon."}
    conversion = one(tmp_path, [row])
    assert faults(conversion) == [("1", "missing_field")] and repr(name) in conversion.problems[0].what


def test_a_winner_of_0_or_1_alone_is_not_guessed_at(tmp_path):
    row = {"prompt": "p", "response_a": "a", "response_b": "b"}
    guessed = one(tmp_path, [row | {"winner": 1}, row | {"winner": 0}])
    assert faults(guessed) == [("1", "bad_judgement"), ("2", "bad_judgement")]
    others = [row | {"prompt": "q", "winner": 2}, row | {"prompt": "r", "winner": 0}]
    conversion = one(tmp_path, [row | {"winner": 1}, *others])
    assert rows_of(conversion) == [ranking("p", ("a", 0), ("b", 1)), ranking("q", ("b", 0), ("a", 1))]
    assert faults(conversion) == [("3", "all_ties")]


def test_a_prompt_and_its_response_are_a_demonstration(tmp_path):
    rows = [{"prompt": "p", "response": "r", "id": 3, "source": "x"}]
    assert rows_of(one(tmp_path, rows)) == [{"prompt": "p", "completion": "r", "id": 3, "source": "x"}]
    for rating in ({"quality": 2}, {"score": 0.5}, {"response_b": "s"}):
        assert faults(one(tmp_path, [{"prompt": "p", "response": "r", **rating}])) == [("1", "unread_answers")]


def test_limas_texts_are_said_in_turns(tmp_path):
    (row,) = rows_of(one(tmp_path, [{"conversations": ["hi", "yes", "so?", "no"], "source": "x"}]))
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2 and row["source"] == "x"


def test_llama_factorys_preferences_are_pairs(tmp_path):
    talk = [{"from": who, "value": text} for who, text in (("human", "Hello"), ("gpt", "Hi."), ("human", "A colour?"))]
    pair = {"chosen": {"from": "gpt", "value": "Blue."}, "rejected": {"from": "gpt", "value": "No."}}
    conversion = one(tmp_path, [{"conversations": talk, "system": "Be kind.", **pair}])
    (row,) = rows_of(conversion)
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert (row["prompt"][-1]["content"], row["chosen"], row["rejected"]) == ("A colour?", "Blue.", "No.")
    assert conversion.kind == "ranking" and not conversion.problems


def test_a_dialogue_as_prompt_beside_answers_alone_becomes_a_conversation(tmp_path):
    """Dahoas/rm-static's shape."""
    prompt = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: A colour?\n\nAssistant:"
    (row,) = rows_of(one(tmp_path, [{"prompt": prompt, "chosen": " Blue.", "rejected": " No."}]))
    assert [(turn["role"], turn["content"]) for turn in row["prompt"]] == [
        ("user", "Hello"), ("assistant", "Hi."), ("user", "A colour?")
    ]  # fmt: skip
    assert (row["chosen"].strip(), row["rejected"].strip()) == ("Blue.", "No.")


def test_columns_that_are_null_in_every_row_do_not_make_a_pair(tmp_path):
    """As Parquet files joined from several kinds have them."""
    conversion = one(tmp_path, [{"prompt": "p", "completion": "c", "chosen": None, "rejected": None}])
    assert conversion.problems == [] and rows_of(conversion)[0]["completion"] == "c"


@pytest.mark.parametrize("name", ["notes", "place", "judgements", "ranked"])
def test_a_column_may_have_any_name(tmp_path, name):
    rows = [{"prompt": "p", "output": ["a", "b"], name: "x"}]
    assert rows_of(one(tmp_path, rows)) == [ranking("p", ("a", 0), ("b", 1)) | {name: "x"}]
    rows = [{"prompt": "p", "response_a": "a", "response_b": "b", "winner": "a", name: "x"}]
    assert rows_of(one(tmp_path, rows)) == [ranking("p", ("a", 0), ("b", 1)) | {name: "x"}]


def test_joined_judgements_keep_the_columns_that_they_share(tmp_path):
    about = {"prompt": "p", "source": "mine", "language": "fr"}
    rows = [about | {"response_a": "a", "response_b": "b", "winner": "a", "id": 1}]
    rows += [about | {"response_a": "b", "response_b": "c", "winner": "a", "id": 2}]
    conversion = one(tmp_path, rows)
    assert rows_of(conversion) == [ranking("p", ("a", 0), ("b", 1), ("c", 2), source="mine", language="fr")]


def test_equal_predictions_are_named_and_the_others_joined(tmp_path):
    row = {"question": "q?", "passages": [], "prediction 1": "A", "prediction 2": "A", "prediction 3": "B"}
    row |= {"prediction 4": "C", "preference": [0, 1, 1, 1, 1, 1]}
    conversion = one(tmp_path, [row])
    assert faults(conversion) == [("1, judgement 1v2", "duplicate_completions")]
    assert rows_of(conversion) == [ranking("q?", ("A", 0), ("B", 1), ("C", 2))]


def test_argilla_best_first_several_users_and_what_is_no_answer(tmp_path):
    fields = {"request": "p", "reply_1": "a", "reply_2": "b"}
    answers = [
        {"user_id": "u", "value": ["reply_2", "reply_1"]},
        {"user_id": "v", "value": ["reply_1", "reply_2"], "status": "draft"},
    ]
    rows = [
        {"id": "r", "fields": fields, "responses": {"q": answers}}, {"fields": fields, "responses": {}},
        {"fields": fields, "responses": [{"user_id": "u", "status": "discarded", "values": None}]},
        {"fields": fields | {"reply_1": ""}, "responses": {"q": [answers[0]]}},
        {"fields": {"a": "1", "b": "2", "x": "3", "y": "4"}, "responses": {"q": [{"value": ["a", "b"]}]}},
    ]  # fmt: skip
    conversion = one(tmp_path, rows)
    assert rows_of(conversion) == [ranking("p", ("b", 0), ("a", 1), labeler="u", id="r")]
    assert faults(conversion) == [
        ("1, answer 2", "not_submitted"), ("2", "no_answer"), ("3", "not_submitted"), ("4", "empty_field"),
        ("5", "missing_field"),
    ]  # fmt: skip


ITEMS = [{"id": "x", "title": "A", "body": "a"}, {"id": "y", "title": "B", "body": "b"}]


def task(value: Any, **extra: Any) -> dict[str, Any]:
    result = {"type": "ranker", "from_name": "rank", "to_name": "list", "value": value}
    annotation = {"completed_by": {"id": 4, "email": "ann"}, "was_cancelled": False, "result": [result], **extra}
    return {"id": 1, "data": {"prompt": "p", "items": ITEMS}, "annotations": [annotation]}


def test_label_studio_ranker_and_pairwise(tmp_path):
    wanted = ranking("p", ("b", 0), ("a", 1), labeler="4", id=1)
    assert (
        rows_of(one(tmp_path, [task({"ranker": {"rank": ["y", "x"]}}), task({"ranker": ["y", "x"]})])) == [wanted] * 2
    )
    small = {
        "id": 1,
        "prompt": "p",
        "items": ITEMS,
        "rank": {"rank": ["y", "x"]},
        "annotator": 4,
        "annotation_id": 5,
    }
    assert rows_of(one(tmp_path, [small])) == [wanted]
    listed = small | {"rank": [{"ranker": {"rank": ["y", "x"]}}]}  # as its exporter leaves results that are no choices
    assert rows_of(one(tmp_path, [listed])) == [wanted]
    chosen = {"id": 1, "prompt": "p", "text1": "a", "text2": "b", "annotator": 4, "annotation_id": 5}
    conversion = one(tmp_path, [chosen | {"comparison": [{"type": "pairwise", "selected": "right"}]}])
    assert rows_of(conversion) == [ranking("p", ("a", 1), ("b", 0), labeler="4", id=1)]
    pair = task({"selected": "right"}) | {"data": {"prompt": "p", "text1": "a", "text2": "b"}}
    conversion = one(tmp_path, [pair])
    turned = task({"selected": "left"}) | {"data": {"prompt": "p", "text1": "a", "text2": "b"}}
    turned["annotations"][0]["result"][0]["to_name"] = ["text2", "text1"]  # the sides as its config has them
    assert rows_of(one(tmp_path, [turned])) == [ranking("p", ("b", 0), ("a", 1), labeler="4", id=1)]
    assert conversion.format == "label_studio"
    assert rows_of(conversion) == [ranking("p", ("a", 1), ("b", 0), labeler="4", id=1)]


def test_a_conversation_stays_the_prompt_in_annotation_tools(tmp_path):
    """No other text field takes its place, and a field that is no conversation is named."""
    for extra in ({"answer": "x"}, {"guidelines": "Rank by helpfulness", "model": "gpt"}, {}):
        row = task({"ranker": {"rank": ["y", "x"]}})
        row["data"] = {"prompt": TALK, "items": ITEMS, "id": "mine", **extra}
        (found,) = rows_of(one(tmp_path, [row]))
        assert found["prompt"] == TALK and found["id"] == "mine"
    row["data"] |= {"prompt": [3], "answer": "x"}
    assert faults(one(tmp_path, [row]))[0][1] == "wrong_type"


def test_label_studio_names_what_holds_no_ranking(tmp_path):
    good = task({"ranker": {"rank": ["y", "x"]}})
    skipped = task({"ranker": {"rank": ["y", "x"]}}, was_cancelled=True)
    buckets = task({"ranker": {"good": ["y"], "bad": ["x"]}})
    conversion = one(tmp_path, [good, skipped, good | {"annotations": []}, buckets, task({"choices": ["fine"]})])
    assert faults(conversion) == [("2", "not_submitted"), ("3", "no_answer"), ("4", "buckets"), ("5", "no_answer")]


# Traps


def test_trap_hh_pairs_with_two_prompts_or_an_empty_reply(tmp_path):
    good = {"chosen": HH + " yes", "rejected": HH + " no"}
    other = {"chosen": HH + " yes", "rejected": HH.replace("well", "ill") + " no"}
    empty = {"chosen": HH + " yes", "rejected": HH}
    question = {"chosen": HH + " yes\n\nHuman: more", "rejected": HH + " no\n\nHuman: more"}
    conversion = one(tmp_path, [good, other, empty, question, {"chosen": "Human", "rejected": "Human"}])
    assert faults(conversion) == [
        ("2", "prompt_mismatch"), ("3", "empty_field"), ("4", "bad_messages"), ("5", "bad_messages"),
    ]  # fmt: skip


def test_trap_hh_turns_of_one_role_in_a_row(tmp_path):
    twice = "\n\nHuman: hi\n\nHuman: so?\n\nAssistant: well\n\nAssistant:"
    conversion = one(tmp_path, [{"chosen": twice + " yes", "rejected": twice + " no"}])
    assert rows_of(conversion) == [{"prompt": "hi\n\nso?", "chosen": "well\n\nyes", "rejected": "well\n\nno"}]
    assert notes(conversion) == [("1", "merged_turns")]


def test_trap_sharegpt_turns(tmp_path):
    def talk(*turns: tuple[str, str]) -> dict[str, Any]:
        return {"conversations": [{"from": role, "value": text} for role, text in turns]}

    rows = [
        talk(("gpt", "hello"), ("human", "hi"), ("gpt", "yes"), ("human", "bye")), talk(("human", "hi")),
        talk(("human", "hi"), ("gpt", " ")), talk(("human", "hi"), ("alien", "yes")), talk(("gpt", "yes")),
    ]  # fmt: skip
    conversion = one(tmp_path, rows)
    assert rows_of(conversion) == [{"messages": [USER, YES]}]
    assert faults(conversion) == [
        ("2", "bad_messages"), ("3", "empty_field"), ("4", "bad_messages"), ("5", "bad_messages"),
    ]  # fmt: skip
    assert notes(conversion) == [("1", "cut_turns")] * 2


@pytest.mark.parametrize(
    ("texts", "wanted", "kind"),
    [
        (["a", "a ", "b"], [("a", 0), ("b", 2)], "repeated_completion"),  # nothing lies between the copies
        (["a", "b", "a", "c"], [("b", 1), ("c", 3)], "contradicted_completion"),
        (["a", "b", "a"], None, "duplicate_completions"),
        (["a", "a"], None, "duplicate_completions"),
        (["a"], None, "too_few_completions"),
        (["a", " "], None, "empty_field"),
    ],
)
def test_trap_a_completion_twice_in_a_list(tmp_path, texts, wanted, kind):
    conversion = one(tmp_path, [{"instruction": "i", "output": texts}])
    if wanted is None:
        assert faults(conversion) == [("1", kind)]
    else:
        assert rows_of(conversion) == [ranking("i", *wanted)] and notes(conversion) == [("1", kind)]


def test_trap_all_scores_equal(tmp_path):
    conversion = one(tmp_path, [{"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}])
    assert faults(conversion) == [("1", "all_ties")]
    for scores in ([1], [1, None], [1, True], [1, "2"]):
        assert faults(one(tmp_path, [{"prompt": "p", "responses": ["a", "b"], "scores": scores}])) == [
            ("1", "bad_score")
        ]


def test_trap_offsets_that_do_not_fit(tmp_path):
    question = {"question": "who?", "answers": [{"text": "dog", "answer_start": 4}]}
    other = {"question": "who?", "answers": [{"text": "cat", "answer_start": 5}, {"text": "dog", "answer_start": -1}]}
    conversion = one(tmp_path, [{"paragraphs": [SQUAD | {"qas": [question, other]}]}], "demonstration")
    assert faults(conversion) == [("1, paragraph 1, question 1", "answer_not_in_text")]
    assert [row["completion"] for row in rows_of(conversion)] == ["cat"]
    assert notes(conversion) == [("1, paragraph 1, question 2", "bad_offset")]


def test_trap_labels_of_one_kind(tmp_path):
    rows = [{"prompt": "p", "completion": c, "label": True} for c in "ab"]
    assert faults(one(tmp_path, rows)) == [("1", "one_label"), ("2", "one_label")]
    assert faults(one(tmp_path, [*rows, {"prompt": "q", "completion": "c", "label": False}], "demonstration")) == [
        ("3", "labelled_bad")
    ]


def test_trap_answers_that_name_a_model_are_noted(tmp_path):
    rows = [{"instruction": "i", "output": f"As a {n}, I"} for n in ("Language Model", "语言模型", "fox")]
    conversion = one(tmp_path, rows)
    assert notes(conversion) == [("1", "names_a_model"), ("2", "names_a_model")] and conversion.used == 3


def test_trap_byte_order_mark_quotes_and_ragged_rows_in_tables(tmp_path):
    path = tmp_path / "t.csv"
    text = 'Question,Best Answer,Correct Answers,Incorrect Answers\r\n"a, ""b""\nc?",x,x; y,z\r\nq,x\r\n\r\nq,x,x,z\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    (conversion,) = read([str(path)])
    first, second = conversion.rows
    assert first.row["prompt"] == 'a, "b"\nc?' and first.places == (f"{path}:2",)
    assert first.row["Correct Answers"] == ["x", "y"] and first.row["Incorrect Answers"] == ["z"]
    assert second.places == (f"{path}:6",) and "Question" in second.row
    assert [(p.place, p.kind) for p in conversion.problems] == [(f"{path}:4", "wrong_columns")]
    packed = tmp_path / "t.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [row.row for row in read([str(packed)])[0].rows] == [first.row, second.row]


def test_tab_separated(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("occupation\tbls_pct_female\ncook\t40\n", encoding="utf-8")
    (conversion,) = read([str(path)])
    assert [(p.place, p.kind) for p in conversion.problems] == [(f"{path}:2", "no_text")]


def test_broken_lines_are_named_whatever_the_format(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"instruction": "i", "output": "o"}\n{"instr\n\xff\n[1]\n{"instruction": "i"}\n')
    (conversion,) = read([str(path)])
    assert conversion.format == "alpaca" and conversion.used == 1
    assert sorted(faults(conversion)) == [
        ("2", "broken_json"), ("3", "encoding"), ("4", "not_a_dict"), ("5", "missing_field"),
    ]  # fmt: skip


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "quotes.csv").write_text('a,b\n1,"2" 3\n', encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "torn.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n" * 100)[:20])
    cases = {
        "none.csv": "no such file", "quotes.csv": "not a table", "latin.txt": "not UTF-8", "torn.csv.gz": "torn",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            read([str(tmp_path / name)])
    odd = lines(tmp_path / "odd.jsonl", [{"colour": "red"}])
    with pytest.raises(UserError, match="no row is of a known format .fields: colour.: name one with --format"):
        read([odd])
    with pytest.raises(UserError, match="alpaca gives no ranking: choose --to from"):
        read([lines(tmp_path / "b.jsonl", [{"instruction": "i", "output": "o"}])], to="ranking")
    with pytest.raises(UserError, match="--format nosuch: unknown"):
        read([odd], "nosuch")


def test_the_prompts_of_a_data_set_are_taken_once(tmp_path):
    rows = [{"instruction": i, "output": "o"} for i in ("a", " a", "b")]
    conversion = one(tmp_path, rows, "prompt")
    assert [row["prompt"] for row in rows_of(conversion)] == ["a", "b"]
    assert faults(conversion) == [("2", "repeated_prompt")]


def test_a_reader_that_loses_a_row_is_found_out(tmp_path, monkeypatch):
    from align.readers import chat

    lossy = FORMATS["alpaca"].__class__(
        FORMATS["alpaca"].matches,
        {"demonstration": lambda records, options: list(chat.alpaca_rows(records, options))[:1]},
    )
    monkeypatch.setitem(FORMATS, "alpaca", lossy)
    assert faults(one(tmp_path, [{"instruction": "i", "output": "o"}] * 3)) == [("2", "unnamed"), ("3", "unnamed")]


# Prose


def test_prose_is_cut_between_paragraphs_then_lines_then_words():
    assert documents("aaa\n\nbbb ccc\nddd", 9) == ["aaa\n\nbbb", "ccc\nddd"]
    assert documents("aaaa aa\n\nbbbb b\nc", 10) == ["aaaa aa", "bbbb b\nc"]
    assert documents("一二三四五", 2) == ["一二", "三四", "五"]
    assert documents(" \n", 5) == []


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 30))
def test_prose_loses_white_space_alone(text, longest):
    found = documents(text, longest)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(0 < len(document) <= longest and document == document.strip() for document in found)


def test_lines_of_a_text_file_may_end_as_on_windows(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one line\r\nanother\r\n\r\na second paragraph\r\n")
    assert [row for _, row in read_records(str(path))] == [{"text": "one line\nanother\n\na second paragraph\n"}]


def test_a_text_file_is_prose(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one two\n\nthree", encoding="utf-8-sig")
    (conversion,) = read([str(path)], options=Options(document_characters=8))
    assert rows_of(conversion) == [{"text": "one two"}, {"text": "three"}] and conversion.used == 1


# No input brings a reader down, and none loses a row

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "a", "1", "submitted", "\n\nHuman: a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*"ab", "text", "value", "user_id", "rank", "replies"]), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = re.findall(
    "[^,]+",
    "prompt,completion,completions,chosen,rejected,messages,label,text,instruction,input,output,history,instances,"
    "conversations,message_tree_id,question,gold,passages,preference,response1,response2,annotator1,winner,response_a,"
    "response_b,passage-id,questions,document,metadata,data,paragraphs,annotations,fields,responses,scores,id,options,"
    "annotation_id,turns,question_id,prediction 1,prediction 2,ans0,answer,answers,response_0,response_1,response_2,"
    "better_response_id,preference_strength,overall_preference,context,info,summaries,choice,system,margin,response",
)


@settings(max_examples=100)
@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=6) | JUNK, min_size=1, max_size=4))
def test_fuzz_every_row_is_used_or_named(tmp_path_factory, rows):
    path = lines(tmp_path_factory.mktemp("fuzz") / "a.jsonl", rows)
    detect_format(rows)
    for name, form in FORMATS.items():
        for to in {None, *form.readers} if name != "prose" else ():
            (conversion,) = read([path], name, to)
            places = [p.place for p in conversion.problems]
            places += [place for row in conversion.rows for place in (*row.places, *row.partners)]
            assert all(isinstance(problem, Problem) and problem.kind != "unnamed" for problem in conversion.problems)
            assert {place.split(",")[0] for place in places} >= {f"{path}:{n}" for n, _ in enumerate(rows, start=1)}


@given(st.lists(st.sampled_from(["a", '"', ",", "\t", "\r", "\n", "\x00", "\ufeff", "\xe9", "😀", '""'])))
def test_fuzz_a_table_is_read_or_refused_in_one_line(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("fuzz") / "t.csv"
    path.write_text("Question,Best Answer\r\n" + "".join(parts), encoding="utf-8", newline="")
    try:
        rows = list(read_records(str(path)))
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return
    assert all(isinstance(row, Problem) or list(row) == ["Question", "Best Answer"] for _, row in rows)


def test_formats_do_not_shadow_each_other():
    """The first row of each miniature is of its own format alone, or of later and more general ones."""
    order = list(FORMATS)
    for name, rows, _, _ in MINIATURES:
        matching = [other for other in order if FORMATS[other].matches(rows[0])]
        assert matching[0] == name == detect_format(rows)


CHOICES = [
    ("truthfulqa_mc", [{"question": "q", "mc1_targets": {"a": 0, "b": 1}, "mc2_targets": {"c": 1}}],
     [{"prompt": "q", "choices": ["a", "b"], "answer": [1], **EVAL}]),
    ("truthfulqa_mc", [{"question": "q", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}}],
     [{"prompt": "q", "choices": ["a", "b"], "answer": [0], **EVAL}]),
    ("trl", [{"prompt": "q", "choices": ["a", "b"], "answer": "B"}],
     [{"prompt": "q", "choices": ["a", "b"], "answer": "B"}]),
    ("bbq", [BBQ], [{"prompt": "a and b met.\nwho ran?", "choices": ["a", "b", "unknown"], "answer": 2, **EVAL}]),
    ("halluqa_mc", [{"question_id": 1, "question": "Question: q? A:one B:two ", "answer": "Answer: B"}],
     [{"prompt": "q?", "choices": ["one", "two"], "answer": 1, "question_id": 1, **EVAL}]),
    ("safetybench", [{"id": 3, "options": ["x", "y"], "question": "q"}, {"3": {"category": "c", "answer": 1}}],
     [{"prompt": "q", "choices": ["x", "y"], "answer": 1, "id": 3, **EVAL}]),
    ("crows_pairs", [{"sent_more": "a", "sent_less": "b", "bias_type": "age"}],
     [{"choices": ["a", "b"], "bias_type": "age", **EVAL}]),
    ("winogender", [{"sentid": f"cook.guest.1.{gender}.txt", "sentence": f"the cook said {they}"}
                    for gender, they in (("female", "she"), ("neutral", "they"), ("male", "he"))],
     [{"choices": ["the cook said he", "the cook said she"], "id": "cook.guest.1", **EVAL}]),
    ("mmlu", [{"question": "q", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 3}],
     [{"prompt": "q", "choices": ["a", "b", "c", "d"], "answer": 3, "subject": "s", **EVAL}]),
    ("arc", [{"id": "1", "question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}],
     [{"prompt": "q", "choices": ["a", "b"], "answer": 1, "id": "1", **EVAL}]),
    ("hellaswag", [{"ctx": "she", "endings": ["runs", "sits"], "label": "1", "ctx_a": "she"}],
     [{"prompt": "she", "choices": ["runs", "sits"], "answer": 1, **EVAL}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "expected"), CHOICES)
def test_choices(tmp_path, name, rows, expected):
    path = lines(tmp_path / "rows.jsonl", rows)
    (conversion,) = read([path], name if name == "safetybench" else None, "choice")
    assert conversion.format == name and [row.row for row in conversion.rows] == expected


def test_choices_are_columns_where_prompts_or_demonstrations_are_asked_for(tmp_path):
    """A reward for multiple choice reads them; a row that is ours in another way stays that."""
    asked = {"prompt": "q", "choices": ["a", "b"], "answer": "the second"}
    told = {"messages": [USER, YES], "question": "q", "choices": ["a", "b"], "answer": 0}
    for row, kind in ((asked, "prompt"), (told, "demonstration")):
        (conversion,) = read([lines(tmp_path / "rows.jsonl", [row])])
        assert (conversion.format, conversion.kind, conversion.problems) == ("trl", kind, [])
        assert conversion.rows[0].row["choices"] == ["a", "b"]
    mmlu = {"question": "q", "choices": ["a", "b"], "answer": 0}
    (conversion,) = read([lines(tmp_path / "rows.jsonl", [mmlu])], to="prompt")
    assert [row.row["prompt"] for row in conversion.rows] == ["q"]
    pair = {"choices": ["he", "she"]}
    (conversion,) = read([lines(tmp_path / "rows.jsonl", [pair])], to="prompt")
    assert [problem.kind for problem in conversion.problems] == ["no_text"]


def test_a_sentence_without_its_pair_is_named(tmp_path):
    rows = [{"sentid": "cook.guest.1.male.txt", "sentence": "he"}, {"sentid": "x", "sentence": "templates"}]
    (conversion,) = read([lines(tmp_path / "rows.jsonl", rows)], to="choice")
    assert [problem.kind for problem in conversion.problems] == ["no_text", "no_partner"] and not conversion.rows


def test_every_format_and_every_reason_is_documented():
    root = Path(__file__).parents[1]
    documented = set(re.findall(r"`([\w]+)`", (root / "docs" / "formats.md").read_text(encoding="utf-8")))
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((root / "align" / "readers").glob("*.py")))
    reasons = set(re.findall(r'(?:BadRow|Problem|Note|Refused|append)\([^"]*?"([a-z]+(?:_[a-z]+)+)"', source))
    assert len(reasons) > 30 and reasons <= documented, f"docs/formats.md lacks {sorted(reasons - documented)}"
    assert set(FORMATS) <= documented, f"docs/formats.md lacks {sorted(set(FORMATS) - documented)}"
