"""align/data.py and rows.py: formats, bad rows, real files, lengths (D2)."""

import dataclasses
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data import (
    load_demonstrations,
    load_prompts,
    load_rankings,
    load_texts,
    parse_ranking,
    parse_row,
)
from align.errors import UserError
from align.lengths import choice_lengths, demonstration_lengths, drop_long, ranking_lengths
from align.rows import Problem, read_rows
from align.types import Choice, Demonstration, Prompt, Ranking
from tests.folders import lines

USER, REPLY, OTHER = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("assistant", "no")))


def real(name: str) -> str:
    root = Path(os.environ.get("ALIGN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / name).exists():
        pytest.skip(f"real data file {name} is not here; set ALIGN_DATA to the folder that holds it")
    return str(root / name)


def only_problem(tmp_path: Path, load, row: object) -> Problem:
    """The one Problem of a file whose second row is `row`, by way of "stop" and of "drop"."""
    good = {
        "prompt": "p", "text": "t", "completion": "c",
        "completions": [{"completion": "a", "rank": 0}, {"completion": "b", "rank": 1}],
    }  # fmt: skip
    path = lines(tmp_path / "rows.jsonl", good, row, good)
    _, report = load(path, "drop")
    assert report.rows_read == 3 and report.rows_used == 2 and sum(report.dropped.values()) == 1
    with pytest.raises(UserError) as stopped:
        load(path)
    assert str(stopped.value).startswith(f"{path}:2: ") and "\n" not in str(stopped.value)
    kind = next(iter(report.dropped))
    return Problem(f"{path}:2", kind, str(stopped.value), "")


def ranked(*pairs: tuple) -> dict:
    return {"prompt": "p", "completions": [{"completion": c, "rank": r} for c, r in pairs]}


# Happy formats


@pytest.mark.parametrize(
    "row", [{"prompt": "p", "completion": "c", "id": 7}, {"prompt": [USER], "completion": [REPLY]}]
)
def test_demonstration_prompt_completion(tmp_path, row):
    (demo,), report = load_demonstrations(lines(tmp_path / "d.jsonl", row))
    assert demo.prompt == (row["prompt"] if isinstance(row["prompt"], str) else (USER,))
    assert demo.completion == (row["completion"] if isinstance(row["completion"], str) else (REPLY,))
    assert demo.columns == ({"id": 7} if "id" in row else {})
    assert (report.rows_read, report.rows_used, report.dropped) == (1, 1, {})


def test_demonstration_messages(tmp_path):
    (demo,), _ = load_demonstrations(lines(tmp_path / "d.jsonl", {"messages": [USER, OTHER, USER, REPLY], "n": 1}))
    assert demo == Demonstration((USER, OTHER, USER), (REPLY,), {"n": 1})


def test_ranking_keeps_order_ranks_ties_labeler_and_columns(tmp_path):
    row = ranked(("a", 2), ("b", 1.5), ("c", 2)) | {"labeler": "ann", "source": "x", "likert": [1, 2, 1], "id": 3}
    (got,), _ = load_rankings(lines(tmp_path / "r.jsonl", row))
    assert got == Ranking("p", ("a", "b", "c"), (2.0, 1.5, 2.0), "ann", {"source": "x", "likert": [1, 2, 1], "id": 3})


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p", "a", "b"),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]}, (USER,), (REPLY,), (OTHER,)),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, (USER,), (REPLY,), (OTHER,)),
        ({"prompt": "hi", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, (USER,), (REPLY,), (OTHER,)),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: same x", "rejected": "\n\nHuman: a\n\nAssistant: same y"},
            "\n\nHuman: a\n\nAssistant:", " same x", " same y",
        ),
        ({"chosen": "The sky is green.", "rejected": "The sky is grey."}, "The sky is", " green.", " grey."),
        ({"chosen": "天空是蓝色", "rejected": "天空是绿色"}, "天空是", "蓝色", "绿色"),
    ],
)  # fmt: skip
def test_preference_is_a_ranking_of_two(tmp_path, row, prompt, chosen, rejected):
    (got,), _ = load_rankings(lines(tmp_path / "p.jsonl", row | {"margin": 2.5}))
    assert got == Ranking(prompt, (chosen, rejected), (0.0, 1.0), None, {"margin": 2.5})


def test_prompt_keeps_every_other_column(tmp_path):
    (got,), _ = load_prompts(lines(tmp_path / "p.jsonl", {"prompt": "p", "id": 4, "answer": [1]}))
    assert got == Prompt("p", {"id": 4, "answer": [1]})


SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("load", "row"),
    [
        (load_prompts, {"prompt": "hi"}),
        (load_prompts, {"prompt": [SYSTEM, USER]}),
        (load_demonstrations, {"prompt": [USER], "completion": "c"}),
        (load_demonstrations, {"messages": [USER, REPLY]}),
        (load_rankings, ranked(("a", 1), ("b", 2)) | {"prompt": "hi"}),
        (load_rankings, {"prompt": "hi", "chosen": "a", "rejected": "b"}),
        (load_rankings, {"chosen": [USER, REPLY], "rejected": [USER, OTHER]}),
        (load_rankings, {"prompt": "hi", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}),
    ],
)
def test_a_text_system_is_the_first_message(tmp_path, load, row):
    (got,), _ = load(lines(tmp_path / "s.jsonl", row | {"system": " be kind\n", "id": 1}))
    assert got.prompt == (SYSTEM, USER) and got.columns == {"id": 1}
    (plain,), _ = load(lines(tmp_path / "s.jsonl", row))
    for other in ("", " ", None, 3, ["x"]):  # no message: a column like any other
        (got,), _ = load(lines(tmp_path / "s.jsonl", row | {"system": other}))
        assert got.prompt == plain.prompt and got.columns == {"system": other}


def test_two_system_messages_are_refused(tmp_path):
    problem = only_problem(tmp_path, load_prompts, {"prompt": [SYSTEM, USER], "system": "be brief"})
    assert problem.kind == "bad_messages" and "'system'" in problem.what


def test_margins_and_earlier_answers_are_noted(tmp_path):
    _, report = load_rankings(lines(tmp_path / "p.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0}))
    assert report.notes == {"margin_not_used": 1}
    rows = [{"messages": [USER, OTHER, USER, REPLY]}, {"prompt": [USER, OTHER, USER], "completion": "c"}]
    rows += [{"messages": [USER, REPLY]}, {"prompt": "p", "completion": "c"}]
    demonstrations, report = load_demonstrations(lines(tmp_path / "d.jsonl", *rows))
    assert len(demonstrations) == 4 and report.notes == {"earlier_answers_not_learned": 2}


def test_text_parts_of_a_message_are_joined(tmp_path):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"text": "yes"}]}]}
    assert load_demonstrations(lines(tmp_path / "d.jsonl", row))[0] == [Demonstration((USER,), (REPLY,))]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("content", "kind", "what"),
    [
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}], "bad_messages", "an image"),
        ([{"type": "text", "text": None}], "bad_messages", "not text"),
        (["a"], "bad_messages", "not text"),
        ([], "empty_field", "empty message"),
        (None, "bad_messages", "no message"),
    ],
)
def test_messages_without_text(tmp_path, content, kind, what):
    problem = only_problem(tmp_path, load_prompts, {"prompt": [{"role": "user", "content": content}]})
    assert problem.kind == kind and what in problem.what


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, CALL, REPLY]},
        {"messages": [USER, CALL | {"content": ""}]},
        {"messages": [USER, CALL | {"content": "I look it up."}]},
        {"prompt": "p", "completion": [CALL | {"content": "I look it up."}]},
        {"prompt": [USER], "chosen": [REPLY], "rejected": [CALL | {"content": "I look it up."}]},
        {"chosen": [USER, REPLY], "rejected": [USER, CALL | {"content": "I look it up."}]},
    ],
)
def test_calls_of_tools_are_refused_by_name(tmp_path, row):
    load = load_rankings if "chosen" in row else load_demonstrations
    problem = only_problem(tmp_path, load, row)
    assert problem.kind == "bad_messages" and "tool call" in problem.what


def test_a_call_beside_text_may_stand_in_a_prompt(tmp_path):
    turns = [USER, CALL | {"content": "I look it up."}, {"role": "tool", "content": "4"}]
    assert load_prompts(lines(tmp_path / "p.jsonl", {"prompt": turns}))[0][0].prompt == tuple(turns)


def test_answers_beside_a_prompt_make_it_no_prompt(tmp_path):
    row = {"prompt": "p", "response_0": "a", "response_1": "b", "safer_response_id": 0}
    problem = only_problem(tmp_path, load_prompts, row)
    assert problem.kind == "unread_answers" and "('response_0', 'response_1')" in problem.what
    (got,), _ = load_prompts(lines(tmp_path / "p.jsonl", row | {"completion": "c"}))  # ours: its prompt was asked for
    assert got.prompt == "p"


def test_texts(tmp_path):
    assert load_texts(lines(tmp_path / "t.jsonl", {"text": " a\nb "}))[0] == [" a\nb "]


def test_equal_completions_of_one_rank_are_merged_and_noted(tmp_path):
    (got,), report = load_rankings(lines(tmp_path / "r.jsonl", ranked(("a", 1), ("b", 2), (" a\n", 1))))
    assert got.completions == ("a", "b") and report.notes == {"merged_duplicates": 1} and report.dropped == {}


ROWS = [{"prompt": "你好", "completion": "a"}, {"prompt": "q", "completion": "b"}]


def test_every_container_gives_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")  # no newline at the end
    (tmp_path / "bom.jsonl").write_text(text.replace("\n", "\r\n\r\n"), encoding="utf-8-sig")
    (tmp_path / "lines.json").write_text(text, encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(ROWS), encoding="utf-8-sig")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    want = [Demonstration("你好", "a"), Demonstration("q", "b")]
    for path in tmp_path.iterdir():
        assert load_demonstrations(str(path))[0] == want, path.name


def test_parquet_rankings(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([ranked(("a", 0), ("b", 1)), {"prompt": "q"}]), tmp_path / "r.parquet")
    (got,), report = load_rankings(str(tmp_path / "r.parquet"), "drop")
    assert got == Ranking("p", ("a", "b"), (0.0, 1.0)) and report.dropped == {"missing_field": 1}


def test_hub_ids_go_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split, revision):
        asked.append((name, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, report = load_demonstrations("org/name,org/name@v1:test[:5%]")
    assert len(rows) == 4 and asked == [("org/name", "train", None), ("org/name", "test[:5%]", "v1")]
    assert len(set(report.sha256.values())) == 1 and len(report.sha256["org/name"]) == 64

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("a\nb")))
    with pytest.raises(UserError, match=r"^org/name: no local file, and no data set from the hub \(a\)"):
        load_prompts("org/name")


def test_subsets_of_hub_data_sets(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load_dataset(*names, split, revision):
        asked.append((*names, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_prompts("org/name/sub-1.0,org/name/sub:test,org/name/sub@v1,org/name/sub@refs/pr/1:train[:5%]")
    assert asked == [
        ("org/name", "sub-1.0", "train", None), ("org/name", "sub", "test", None), ("org/name", "sub", "train", "v1"),
        ("org/name", "sub", "train[:5%]", "refs/pr/1"),
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    lines(tmp_path / "org" / "name" / "sub.jsonl", {"prompt": "of the disk"})
    assert load_prompts("org/name/sub.jsonl")[0][0].prompt == "of the disk"
    with pytest.raises(UserError, match="no such file"):
        load_prompts("org/name/other")
    assert len(asked) == 4


@pytest.mark.parametrize(
    "path", ["nowhere.jsonl", "org/nowhere.parquet", "/a/b", "./a/b", "tests/nothing", "word", "a:b"]
)
def test_missing_files_are_named(path):
    with pytest.raises(UserError, match="no such file"):
        load_prompts(path)


def test_files_that_cannot_be_read(tmp_path):
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"prompt": "p"}\n' * 1000)[:-20])
    for name, content in (("a.parquet", b"PAR1 no"), ("a.csv", b"prompt\np"), ("b.jsonl.gz", b"no gzip")):
        (tmp_path / name).write_bytes(content)
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=path.name):
            load_prompts(str(path))


def test_no_rows_is_an_error_even_when_dropping(tmp_path):
    with pytest.raises(UserError, match="no prompt that can be used"):
        load_prompts(lines(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"\(1 broken_json\)"):
        load_prompts(lines(tmp_path / "bad.jsonl", b"{"), "drop")
    with pytest.raises(UserError, match="no data file given"):
        load_prompts(" , ")


def test_several_files_and_their_report(tmp_path):
    a, b = lines(tmp_path / "a.jsonl", {"prompt": "1"}), lines(tmp_path / "b.jsonl", {"prompt": "2"}, {"prompt": ""})
    for paths in (f"{a}, {b}", [a, b]):
        prompts, report = load_prompts(paths, "drop")
        assert [p.prompt for p in prompts] == ["1", "2"]
        assert report.paths == (a, b) and set(report.sha256) == {a, b} and report.dropped == {"empty_field": 1}
    more = report.with_dropped("too_long", 1)
    assert (more.rows_read, more.rows_used, more.dropped) == (3, 1, {"empty_field": 1, "too_long": 1})
    assert report.rows_used == 2 and json.loads(json.dumps(more.as_dict()))["dropped"]["too_long"] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rows_used = 0


# Every kind of bad row


ANY_BAD = [
    (b'{"prompt": "p"', "broken_json"),
    (b"[" * 100_000, "broken_json"),
    (b"1" * 5000, "broken_json"),
    (b'{"prompt": "\xff"}', "encoding"),
    ('{"prompt": "é"}'.encode("utf-16"), "encoding"),
    (b'{"prompt": "\\ud800", "text": "a"}', "encoding"),
    ([1], "not_a_dict"),
    ("text", "not_a_dict"),
    (None, "not_a_dict"),
]


@pytest.mark.parametrize(("row", "kind"), ANY_BAD)
@pytest.mark.parametrize("load", [load_demonstrations, load_rankings, load_prompts, load_texts])
def test_unreadable_rows(tmp_path, load, row, kind):
    assert only_problem(tmp_path, load, row).kind == kind


BAD_DEMONSTRATIONS = [
    ({"prompt": "p"}, "missing_field"),
    ({"completion": "c"}, "missing_field"),
    ({"prompt": None, "completion": "c"}, "missing_field"),
    ({"prompt": " \n", "completion": "c"}, "empty_field"),
    ({"prompt": "p", "completion": ""}, "empty_field"),
    ({"prompt": [], "completion": "c"}, "empty_field"),
    ({"prompt": [{"role": "user", "content": " "}], "completion": "c"}, "empty_field"),
    ({"prompt": 5, "completion": "c"}, "wrong_type"),
    ({"prompt": ["hi"], "completion": "c"}, "bad_messages"),
    ({"prompt": [{"from": "human", "value": "hi"}], "completion": "c"}, "bad_messages"),
    ({"prompt": [{"role": "human", "content": "hi"}], "completion": "c"}, "bad_messages"),
    ({"prompt": [USER, REPLY], "completion": "c"}, "bad_messages"),
    ({"prompt": "p", "completion": [USER, REPLY]}, "bad_messages"),
    ({"messages": [USER]}, "bad_messages"),
    ({"messages": [REPLY]}, "bad_messages"),
    ({"messages": "hi"}, "bad_messages"),
    ({"messages": [USER, REPLY, REPLY]}, "bad_messages"),
]


@pytest.mark.parametrize(("row", "kind"), BAD_DEMONSTRATIONS)
def test_bad_demonstrations(tmp_path, row, kind):
    assert only_problem(tmp_path, load_demonstrations, row).kind == kind


BAD_RANKINGS = [
    ({"prompt": "p"}, "missing_field"),
    ({"completions": ranked(("a", 1), ("b", 2))["completions"]}, "missing_field"),
    ({"prompt": "p", "completions": "ab"}, "wrong_type"),
    ({"prompt": "p", "completions": ["a", "b"]}, "wrong_type"),
    (ranked(), "too_few_completions"),
    (ranked(("a", 1)), "too_few_completions"),
    (ranked(("a", 1), ("", 2)), "empty_field"),
    ({"prompt": "p", "completions": [{"rank": 1}, {"completion": "b", "rank": 2}]}, "missing_field"),
    (ranked(("a", 1), ("b", None)), "missing_field"),
    (ranked(("a", 1), ("b", "x")), "bad_rank"),
    (ranked(("a", 1), ("b", "2")), "bad_rank"),
    (ranked(("a", 1), ("b", True)), "bad_rank"),
    (ranked(("a", 1), ("b", float("nan"))), "bad_rank"),
    (ranked(("a", 1), ("b", float("inf"))), "bad_rank"),
    (ranked(("a", 1), ("b", 10**400)), "bad_rank"),
    (ranked(("a", 1), ("b", 2), ("a", 3)), "duplicate_completions"),
    (ranked(("a", 1), ("a ", 1)), "duplicate_completions"),
    (ranked(("a", 1), ("b", 1), ("c", 1)), "all_ties"),
    ({"prompt": "p", "chosen": "a"}, "missing_field"),
    ({"prompt": "p", "chosen": "a", "rejected": "  "}, "empty_field"),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "duplicate_completions"),
    ({"prompt": "p", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, "prompt_mismatch"),
    ({"prompt": [REPLY, USER], "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, "prompt_mismatch"),
    ({"chosen": "a", "rejected": "b"}, "prompt_mismatch"),
    ({"chosen": "same text", "rejected": "same text"}, "duplicate_completions"),
    ({"chosen": "same text", "rejected": "same "}, "empty_field"),
    ({"chosen": "a\n\nAssistant: x", "rejected": "b\n\nAssistant: x"}, "prompt_mismatch"),
    ({"chosen": "a\n\nAssistant: x", "rejected": "a x"}, "prompt_mismatch"),
    ({"chosen": "a\n\nAssistant:", "rejected": "a\n\nAssistant: x"}, "empty_field"),
    ({"chosen": [USER, REPLY], "rejected": "no"}, "prompt_mismatch"),
    ({"chosen": [USER, REPLY], "rejected": [{"role": "user", "content": "ho"}, OTHER]}, "prompt_mismatch"),
    ({"chosen": [USER, REPLY], "rejected": [USER, REPLY, USER, OTHER]}, "prompt_mismatch"),
    ({"chosen": [USER, REPLY], "rejected": [USER, USER]}, "bad_messages"),
]


@pytest.mark.parametrize(("row", "kind"), BAD_RANKINGS)
def test_bad_rankings(tmp_path, row, kind):
    assert only_problem(tmp_path, load_rankings, row).kind == kind


def test_bad_prompts_and_texts(tmp_path):
    assert only_problem(tmp_path, load_prompts, {"text": "t"}).kind == "missing_field"
    assert only_problem(tmp_path, load_texts, {"prompt": "p"}).kind == "missing_field"
    assert only_problem(tmp_path, load_texts, {"text": [USER]}).kind == "wrong_type"


def test_stop_names_the_first_counts_the_rest_and_shows_no_text(tmp_path):
    good, secret = ranked(("a", 1), ("b", 2)), "OFFENSIVE"
    bad = [ranked((secret, 1), ("b", secret)), ranked(("", 1), ("b", 2)), ranked(("a", 1)), ranked(("a", 1))]
    path = lines(tmp_path / "r.jsonl", good, *bad)
    with pytest.raises(UserError) as stopped:
        load_rankings(path)
    assert str(stopped.value) == (
        f"{path}:2: the rank of completion 2 is no number: write a number, lower is better (and 3 more bad rows: "
        "2 too_few_completions, 1 empty_field; `align validate FILE` lists them, on_bad_rows: drop skips them)"
    )


def test_broken_json_list_says_where(tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "p"},\n{"prompt": }]')
    with pytest.raises(UserError, match=r"a\.json: is not JSON \(line 2, column 12\)"):
        load_prompts(str(tmp_path / "a.json"))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "p", "user", "a b", "\n\nAssistant:"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "prompt",
                    "completion",
                    "completions",
                    "rank",
                    "messages",
                    "role",
                    "content",
                    "chosen",
                    "rejected",
                    "text",
                    "system",
                    "answers",
                    "tool_calls",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
LINE = st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode())


@settings(max_examples=150, deadline=None)
@given(st.lists(LINE, max_size=5), st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".parquet"]))
def test_fuzz_any_bytes_raise_nothing_but_user_errors(tmp_path_factory, rows, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"rows{suffix}"
    path.write_bytes(b"\n".join(rows))
    for load in (load_demonstrations, load_rankings, load_prompts, load_texts):
        for mode in ("stop", "drop"):
            try:
                records, report = load(str(path), mode)
            except UserError as error:
                assert "\n" not in str(error)
                continue
            assert len(records) == report.rows_used == report.rows_read - sum(report.dropped.values())


# Real files


def test_real_hh_rlhf():
    path = real("hh-rlhf/harmless-base-test.jsonl.gz")
    rankings, report = load_rankings(path, "drop")
    assert report.rows_read == 2312 and len(rankings) == 2303
    assert report.dropped == {"prompt_mismatch": 5, "empty_field": 4}
    assert all(r.prompt.endswith("\n\nAssistant:") and r.ranks == (0.0, 1.0) for r in rankings)
    places = [(p.kind, int(p.place.rpartition(":")[2]) - 1) for p in all_problems("ranking", path)]
    assert [n for kind, n in places if kind == "prompt_mismatch"] == [1254, 1688, 1950, 1952, 2036]
    assert [n for kind, n in places if kind == "empty_field"] == [86, 516, 925, 1103]


def all_problems(kind: str, path: str) -> list[Problem]:

    parsed = [parse_row(kind, place, row, Counter()) for place, row in read_rows(path)]
    return [record for record in parsed if isinstance(record, Problem)]


def test_real_rankings_with_repeated_responses(tmp_path):
    with open(real("oasst-zh/oaast_rm_zh.json"), encoding="utf-8") as file:
        rows = [
            {
                "prompt": row["instruction"],
                "completions": [{"completion": text, "rank": rank} for rank, text in enumerate(row["output"])],
            }
            for row in json.load(file)
        ]
    rankings, report = load_rankings(lines(tmp_path / "zh.jsonl", *rows), "drop")
    assert report.rows_read == 775 and report.dropped == {"duplicate_completions": 6} and len(rankings) == 769


def test_real_prompts_without_final_newline():
    assert len(load_prompts(real("cvalues-zh/cvalues_responsibility_prompts.jsonl"))[0]) == 664


def test_real_json_strings_are_no_rows():
    path = real("oasst-en/prompt_lottery_en_250_text.jsonl")
    assert [p.kind for p in all_problems("prompt", path)] == ["not_a_dict"] * 250


# D2: lengths


class Words:
    """One token a word, EOS after a response."""

    def prompts(self, prompts):
        return [prompt.split() for prompt in prompts]

    def responses(self, completions):
        return [[*completion.split(), "EOS"] for completion in completions]


def test_D2_prompts_over_the_cap_are_dropped_and_counted_never_cut(tmp_path):
    path = lines(tmp_path / "p.jsonl", *({"prompt": "w " * n} for n in (1, 3, 4, 9)))
    rows, report = load_prompts(path)
    kept, less = drop_long(rows, Words(), 3, report)
    assert kept == rows[:2]
    assert less.dropped == {"too_long": 2} and (less.rows_used, less.rows_read) == (2, 4) and report.dropped == {}
    assert drop_long(rows, Words(), 9, report) == (rows, report)
    with pytest.raises(UserError, match="every row is over 0 tokens"):
        drop_long(rows, Words(), 0, report)


def test_D2_lengths_count_the_whole_sequence(tmp_path):
    demonstration = Demonstration("a b", "c d e")
    ranking = Ranking("a b", ("c", "d e f g", "h i"), (0.0, 1.0, 2.0))
    assert demonstration_lengths([demonstration] * 2, Words()) == [2 + 3 + 1] * 2
    assert ranking_lengths([ranking] * 2, Words()) == [2 + 4 + 1] * 2
    choices = [Choice("a b", ("c d", "e")), Choice(None, ("a", "b c"))]
    assert choice_lengths(choices, Words()) == [2 + 2, 1 + 2]
    _, report = load_rankings(lines(tmp_path / "r.jsonl", ranked(("a", 0), ("b", 1))))
    assert drop_long([ranking], Words(), 7, report, ranking_lengths)[0] == [ranking]


def test_an_answer_labelled_bad_is_no_demonstration(tmp_path):
    """TRL's unpaired preferences, given to SFT as they are."""
    said = [{"prompt": "q", "completion": c, "label": c == "good"} for c in ("good", "bad")]
    path = lines(tmp_path / "kto.jsonl", *said)
    rows, report = load_demonstrations(path, "drop")
    assert [row.completion for row in rows] == ["good"] and report.dropped == {"labelled_bad": 1}


@pytest.mark.parametrize("extra", [{"name": None}, {"content": [{"type": "text", "text": "hi"}]}])
def test_a_stated_prompt_may_hold_nulls_and_content_parts(extra):
    """As Parquet's columns and newer data sets have them; it is the prompt that the conversations begin with."""
    user = USER | extra
    row = {"prompt": [user], "chosen": [user, REPLY | {"name": None}], "rejected": [user, OTHER | {"name": None}]}
    assert parse_ranking(row, Counter()).prompt == (USER,)
