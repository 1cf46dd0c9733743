"""align/validate.py: `align validate FILE...`."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.manifest import write_manifest
from align.rows import DataReport
from align.validate import SHOWN, detect_kind, main, training_leaks, validate


def lines(path: Path, *rows: object) -> str:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return str(path)


def ranked(prompt: str, *ranks: object) -> dict:
    return {"prompt": prompt, "completions": [{"completion": f"c{i}", "rank": rank} for i, rank in enumerate(ranks)]}


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("demonstration", {"prompt": "p", "completion": "c"}),
        ("demonstration", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ("ranking", ranked("p", 1, 2)),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "b"}),
        ("preference", {"chosen": "a x", "rejected": "a y"}),
        ("prompt", {"prompt": "p", "id": 1}),
        ("text", {"text": "t"}),
    ],
)
def test_kind_is_found_from_the_columns(tmp_path, kind, row):
    assert detect_kind([row, 5, None]) == kind
    code, text = validate([lines(tmp_path / "a.jsonl", row)])
    assert code == 0 and f"a.jsonl: {kind}: 1 row, none bad" in text


def test_one_line_a_bad_row_then_a_summary_and_never_the_text(tmp_path):
    secret = "OFFENSIVE"
    path = lines(
        tmp_path / "r.jsonl", ranked("a", 1, 2), ranked("b", 1, 2, 3), {"prompt": "c"}, ranked("d", 1, secret),
        b'{"prompt": "' + secret.encode(), [secret], ranked(secret, 1, 1), ranked("g", 2, 1),
    )  # fmt: skip
    code, text = validate([path])
    assert code == 1 and secret not in text
    assert text.splitlines() == [
        f"{path}:3: 'completions' is missing: add it, or give a file of the right kind",
        f"{path}:4: the rank of completion 2 is no number: write a number, lower is better",
        f"{path}:5: is not JSON (column 22): write one JSON object a row",
        f'{path}:6: is not a JSON object: write {{"field": ...}}',
        f"{path}:7: all completions have the same rank: take the row out, it prefers nothing",
        f"{path}: ranking: 8 rows, 5 bad (1 missing_field, 1 bad_rank, 1 broken_json, 1 not_a_dict, 1 all_ties); "
        "3 distinct prompts; K: 2 x 2, 3 x 1",
    ]


def test_shown_rows_are_capped(tmp_path):
    path = lines(tmp_path / "p.jsonl", *[{"prompt": ""}] * (SHOWN + 7), {"prompt": "p"})
    _, text = validate([path])
    assert len(text.splitlines()) == SHOWN + 2
    assert f"{path}: 7 more bad rows not shown: `align validate --all` shows them" in text
    assert f"{SHOWN + 8} rows, {SHOWN + 7} bad ({SHOWN + 7} empty_field)" in text


def test_all_bad_rows_are_shown_when_asked_for(tmp_path, capsys):
    path = lines(tmp_path / "p.jsonl", *[{"prompt": ""}] * (SHOWN + 7), {"prompt": "p"})
    for argv in (["--all", path], [path, "--all"]):
        assert main(argv) == 1
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == SHOWN + 8 and f"{path}:{SHOWN + 7}: 'prompt' is empty" in shown[-2]
    assert main(["--all"]) == 2 and main([path, "--none"]) == 2


def test_notes_of_what_is_not_learned(tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.5}
    assert validate([lines(tmp_path / "p.jsonl", pair)])[1].endswith("; 1 margin_not_used")
    assert validate([lines(tmp_path / "m.jsonl", {"messages": turns})])[1].endswith("; 1 earlier_answers_not_learned")


def test_answers_in_no_known_shape_are_no_prompts(tmp_path):
    rows = [{"prompt": "p", "response_a": "a", "response_b": "b"}, {"prompt": "q", "answer": "4"}]
    code, text = validate([lines(tmp_path / "p.jsonl", *rows)])
    assert code == 1 and "2 rows, 1 bad (1 unread_answers); 1 distinct prompts" in text and "'response_a'" in text


def test_a_prompt_in_two_files_of_one_kind_is_bad(tmp_path):
    train = lines(tmp_path / "train.jsonl", {"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "x"})
    other = lines(tmp_path / "other.jsonl", {"prompt": "c", "completion": "x"}, {"prompt": " b", "completion": "y"})
    code, text = validate([train, other])
    assert code == 1 and f"{other}:2: its prompt is also at {train}:2: split by prompt" in text
    assert "1 bad (1 in_two_splits)" in text


def test_a_prompt_in_files_of_two_kinds_is_reported_only(tmp_path):
    demos = lines(tmp_path / "d.jsonl", {"prompt": "a", "completion": "x"})
    ranks = lines(tmp_path / "r.jsonl", ranked("a", 1, 2))
    code, text = validate([demos, ranks])
    assert code == 0 and text.splitlines()[-1] == (
        f"{ranks}: 1 of its 1 prompts are also in {demos}, such as {ranks}:1 and {demos}:1"
    )
    pairs = lines(tmp_path / "p.jsonl", {"prompt": "a", "chosen": "1", "rejected": "2"})
    assert validate([ranks, pairs])[0] == 1  # preferences are rankings


def test_notes_of_merged_duplicates(tmp_path):
    row = {"prompt": "p", "completions": [{"completion": c, "rank": r} for c, r in (("a", 1), ("a", 1), ("b", 2))]}
    code, text = validate([lines(tmp_path / "r.jsonl", row)])
    assert code == 0 and text.endswith("K: 2 x 1; 1 merged_duplicates")


def test_files_that_cannot_be_checked(tmp_path):
    good = lines(tmp_path / "good.jsonl", {"prompt": "p"})
    cases = {
        "none.jsonl": "no such file",
        lines(tmp_path / "empty.jsonl"): "has no rows",
        lines(tmp_path / "odd.jsonl", {"question": "q"}): "no row is of a known kind",
        lines(tmp_path / "torn.jsonl", b"{"): "is not JSON",
        lines(tmp_path / "mixed.jsonl", b"{", {"question": "q"}): "has no field of a known kind",
    }
    for path, message in cases.items():
        code, text = validate([path, good])
        assert code == 1 and message in text and f"{good}: prompt: 1 row, none bad" in text


def test_main(tmp_path, capsys):
    good = lines(tmp_path / "good.jsonl", {"prompt": "p"})
    assert main([good]) == 0 and "none bad" in capsys.readouterr().out
    assert main([str(tmp_path / "none.jsonl")]) == 1
    capsys.readouterr()
    assert main([]) == 2 and capsys.readouterr().err.startswith("usage: align validate")
    assert main(["--help"]) == 0 and capsys.readouterr().out.startswith("usage: align validate")


@given(st.lists(st.binary(max_size=30) | st.sampled_from([b'{"prompt": 1}', b'{"text": "a"}', b'{"chosen": []}'])))
def test_fuzz_never_a_traceback(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_bytes(b"\n".join(rows))
    code, text = validate([str(path)])
    assert code in (0, 1) and text


def test_real_hh_rlhf():
    root = Path(os.environ.get("ALIGN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    if not path.exists():
        pytest.skip("the hh-rlhf file is not here; set ALIGN_DATA to the folder that holds it")
    code, text = validate([str(path)])
    assert code == 1 and len(text.splitlines()) == 10
    assert "preference: 2312 rows, 9 bad (5 prompt_mismatch, 4 empty_field); 2301 distinct prompts; K: 2 x 2303" in text


def test_training_leaks_are_found_by_the_manifests(tmp_path):
    train = lines(tmp_path / "train.jsonl", {"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "x"})
    report = DataReport((train, "gone.jsonl"), 2, 2, {})
    write_manifest(tmp_path / "sft", "sft", {}, 0, data={"train_file": report, "validation_file": report})
    (tmp_path / "foreign").mkdir()
    folders = [str(tmp_path / "sft"), None, str(tmp_path / "foreign"), str(tmp_path / "sft")]
    assert training_leaks(folders, ["c"]) == []
    assert training_leaks(folders, [" b", "c"]) == [
        f"{train}: 1 of the 2 prompts given for evaluation were trained on, such as at {train}:2: split by prompt"
    ]


def test_without_prompts_no_training_file_is_read(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a manifest was asked for its files")

    monkeypatch.setattr("align.validate.ancestry", never)
    assert training_leaks([str(tmp_path)], []) == []


def test_training_leaks_of_parents_are_found_too(tmp_path):
    """A PPO policy alone, whose SFT model learned from the prompt."""
    train = lines(tmp_path / "train.jsonl", {"prompt": "a", "completion": "x"})
    write_manifest(tmp_path / "sft", "sft", {}, 0, data={"train_file": DataReport((train,), 1, 1, {})})
    parents = [{"role": "model_name_or_path", "path": str(tmp_path / name)} for name in ("sft", "ppo", "gone")]
    write_manifest(tmp_path / "ppo", "ppo", {}, 0, parents=parents)
    assert [line.split(":")[0] for line in training_leaks([str(tmp_path / "ppo")], ["a"])] == [train]
    assert training_leaks([str(tmp_path / "ppo")], ["b"]) == []
