"""align/convert.py and align/stats.py, by way of the command `align`."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.data import load_demonstrations, load_rankings
from align.validate import validate
from stages.__main__ import main

SECRET = "OFFENSIVE"


def lines(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def back(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def alpaca(prompt: str, answer: str = "yes") -> dict[str, str]:
    return {"instruction": prompt, "output": answer}


def hh(prompt: str, chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    start = f"\n\nHuman: {prompt}\n\nAssistant:"
    return {"chosen": f"{start} {chosen}", "rejected": f"{start} {rejected}"}


def test_convert_writes_rows_a_report_and_a_line_a_dropped_row(tmp_path, capsys):
    good = {"instruction": "i", "output": ["a", "b"]}
    path = lines(tmp_path / "ranks.jsonl", good, {"instruction": SECRET, "output": [SECRET, " " + SECRET]}, [SECRET])
    out = str(tmp_path / "deep" / "out.jsonl")
    assert main(["convert", path, "--output", out, "--language", "en"]) == 0
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err and printed.err == ""
    assert printed.out.splitlines() == [
        f"{path}:2: fewer than 2 different completions: a ranking needs 2 or more",
        f'{path}:3: is not a JSON object: write {{"field": ...}}',
        f"{path}: ranked_list -> ranking: 3 read, 1 used, 2 dropped (1 duplicate_completions, 1 not_a_dict); 1 rows",
        f"1 ranking rows in {out}",
        f"every dropped and mended row in {out}.report.json",
    ]
    completions = [{"completion": "a", "rank": 0.0}, {"completion": "b", "rank": 1.0}]
    assert back(out) == [{"prompt": "i", "completions": completions, "source": "ranks", "language": "en"}]
    report = Path(f"{out}.report.json").read_text(encoding="utf-8")
    assert SECRET not in report
    told = json.loads(report)
    assert told["outputs"] == {out: 1} and [(d["place"], d["kind"]) for d in told["dropped"]] == [
        (f"{path}:2", "duplicate_completions"), (f"{path}:3", "not_a_dict"),
    ]  # fmt: skip
    (data,) = told["data"]
    assert (data["units_read"], data["units_used"], data["rows"]) == (3, 1, 1) and len(data["sha256"][path]) == 64


def test_files_of_several_formats_become_one(tmp_path):
    files = [
        lines(tmp_path / "a.jsonl", hh("x")),
        lines(tmp_path / "b.jsonl", {"instruction": "y", "output": ["a", "b"]}),
    ]
    out = str(tmp_path / "out.jsonl")
    assert main(["convert", *files, "--output", out]) == 0
    rankings, _ = load_rankings(out)
    assert [(r.prompt, r.completions, r.columns["source"]) for r in rankings] == [
        ("x", ("yes", "no"), "a"), ("y", ("a", "b"), "b"),
    ]  # fmt: skip


def test_columns_can_be_renamed_before_a_format_is_found(tmp_path, capsys):
    out, named = str(tmp_path / "out.jsonl"), ["--rename", "q=prompt", "--rename", "a=completion"]
    assert main(["convert", lines(tmp_path / "a.jsonl", {"q": "x", "a": "yes"}), "--output", out]) == 2
    said = capsys.readouterr().err
    assert "(fields: q, a)" in said and "--rename" in said
    path = lines(
        tmp_path / "a.jsonl",
        {"q": "x", "a": "yes", "prompt": None},
        {"q": "z", "a": "no", "prompt": SECRET},
        {"q": "y"},
        [1],
    )
    both = lines(tmp_path / "b.jsonl", {"q": SECRET, "a": "yes", "prompt": SECRET})
    assert main(["convert", both, "--output", out, *named]) == 2
    assert "has a column 'prompt' beside the one that takes its name: rename it too" in capsys.readouterr().err
    assert main(["convert", path, "--output", out, "--to", "demonstration", *named]) == 0
    assert back(out) == [{"prompt": "x", "completion": "yes", "source": "a"}]
    told = json.loads(Path(f"{out}.report.json").read_text(encoding="utf-8"))
    assert told["renamed"] == {"q": "prompt", "a": "completion"}
    dropped = [(row["place"], row["kind"]) for row in told["dropped"]]
    assert dropped == [(f"{path}:2", "renamed_twice"), (f"{path}:3", "missing_field"), (f"{path}:4", "not_a_dict")]
    assert SECRET not in "".join(capsys.readouterr())


def test_a_row_that_has_the_new_name_alone_keeps_it(tmp_path):
    path, out = lines(tmp_path / "a.jsonl", {"q": "x"}, {"prompt": "y"}), str(tmp_path / "out.jsonl")
    assert main(["convert", path, "--output", out, "--rename", "q=prompt"]) == 0
    assert [row["prompt"] for row in back(out)] == ["x", "y"]


def test_two_columns_can_change_names(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "the answer", "completion": "the question"})
    out = str(tmp_path / "out.jsonl")
    swapped = ["--rename", "prompt=completion", "--rename", "completion=prompt"]
    assert main(["convert", path, "--output", out, *swapped]) == 0
    assert back(out) == [{"prompt": "the question", "completion": "the answer", "source": "a"}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["b=prompt"], "--rename b=prompt: none of the first 100 rows has a column 'b' (fields: q)"),
        (["q"], "'q' is not OLD=NEW"),
        (["q=prompt", "q=completion"], "each column is named once"),
        (["q=prompt", "b=prompt"], "no two get one name"),
    ],
)
def test_a_wrong_rename_is_said(tmp_path, capsys, given, said):
    path, names = lines(tmp_path / "a.jsonl", {"q": "x"}), [part for name in given for part in ("--rename", name)]
    try:
        code = main(["convert", path, "--output", str(tmp_path / "out.jsonl"), *names])
    except SystemExit as stop:  # argparse's
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err


def test_rows_keep_the_source_and_language_they_have(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "p", "source": "web", "language": "zh"}, {"prompt": "q"})
    out = str(tmp_path / "out.jsonl")
    assert main(["convert", path, "--output", out, "--source", "mine", "--language", "en"]) == 0
    assert [(row["source"], row["language"]) for row in back(out)] == [("web", "zh"), ("mine", "en")]
    shards = [lines(tmp_path / f"{name}.jsonl", alpaca(name)) for name in ("one", "one-more")]
    assert main(["convert", *shards, "--output", out]) == 0
    assert [(row["prompt"], row["source"]) for row in back(out)] == [("one", "one"), ("one-more", "one-more")]


def test_nothing_is_written_when_nothing_can_be(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", alpaca("p", ""))
    mixed = [lines(tmp_path / "b.jsonl", alpaca("p")), lines(tmp_path / "c.jsonl", hh("x"))]
    out = tmp_path / "out.jsonl"
    assert main(["convert", path, "--output", str(out)]) == 2
    assert "no row can be used" in capsys.readouterr().err
    assert main(["convert", *mixed, "--output", str(out)]) == 2
    assert "demonstration and ranking rows: choose one kind with --to" in capsys.readouterr().err
    assert main(["convert", "none.jsonl", "--output", str(out)]) == 2
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", path, "--output", str(out), "--validation_share", "1"])
    for outputs in ([path], [str(out), "--validation_output", str(out)]):
        with pytest.raises(SystemExit):
            main(["convert", path, "--output", *outputs])
    assert "each output is a file of its own" in capsys.readouterr().err and Path(path).is_file()
    assert not list(tmp_path.glob("out*"))


def test_the_same_prompt_is_held_out_whatever_the_file(tmp_path):
    """Demonstrations and rankings are converted apart, and yet neither trains on the other's validation prompts."""
    names = [f"question {i}" for i in range(200)]
    demos = lines(tmp_path / "d.jsonl", *(alpaca(name) for name in names))
    pairs = lines(tmp_path / "r.jsonl", *(hh(f"  {name} ") for name in reversed(names[:150])))
    prompts: dict[str, set[str]] = {}
    for path, name in ((demos, "sft"), (pairs, "rm")):
        train, held = (str(tmp_path / f"{name}_{part}.jsonl") for part in ("train", "validation"))
        arguments = ["--output", train, "--validation_output", held, "--validation_share", "0.2"]
        assert main(["convert", path, *arguments]) == 0
        prompts |= {
            f"{name} {part}": {row["prompt"] for row in back(file)} for part, file in (("train", train), ("held", held))
        }
        assert validate([train, held])[0] == 0
    assert prompts["sft train"].isdisjoint(prompts["rm held"]) and prompts["rm train"].isdisjoint(prompts["sft held"])
    assert prompts["rm held"] == prompts["sft held"] & set(names[:150])
    assert 20 <= len(prompts["sft held"]) <= 60  # a fifth of 200, by hash


def test_rows_with_a_system_message_or_content_parts_are_split_by_their_question(tmp_path):
    names = [f"question {i}" for i in range(60)]
    plain = lines(tmp_path / "plain.jsonl", *({"prompt": name, "completion": "a"} for name in names))
    system = lines(tmp_path / "s.jsonl", *({"prompt": name, "completion": "a", "system": "be kind"} for name in names))

    def turn(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    talks = ({"messages": [turn("user", name), turn("assistant", "a")]} for name in names)
    parts = lines(tmp_path / "parts.jsonl", *talks)
    held = []
    for path in (plain, system, parts):
        outputs = [f"{path}.{side}.jsonl" for side in ("train", "held")]
        assert main(["convert", path, "--output", outputs[0], "--validation_output", outputs[1]]) == 0
        held.append([demo.prompt for demo in load_demonstrations(outputs[1])[0]])
    assert 1 <= len(held[0]) < 60 and held[0] == [prompt[-1]["content"] for prompt in held[1]]
    assert held[0] == [prompt[0]["content"] for prompt in held[2]]
    assert all(prompt[0] == {"role": "system", "content": "be kind"} for prompt in held[1])


def test_answers_in_no_known_shape_are_not_converted_to_prompts(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", {"prompt": SECRET, "response": SECRET, "quality": 4})
    assert main(["convert", path, "--output", str(tmp_path / "out.jsonl")]) == 2
    printed = capsys.readouterr()
    assert "has answers beside its prompt ('response')" in printed.out and SECRET not in printed.out + printed.err
    assert not (tmp_path / "out.jsonl").exists()


def test_stats_tell_what_a_file_holds(tmp_path, capsys):
    def row(labeler: str, *ranks: int, prompt: str = "p") -> dict[str, Any]:
        texts = [{"completion": "x" * (i + 1), "rank": rank} for i, rank in enumerate(ranks)]
        return {"prompt": prompt, "completions": texts, "labeler": labeler, "language": "en"}

    rows = [row("ann", 0, 1, 1), row("bob", 1, 0, 2), row("ann", 1, 0, prompt="q"), row("ann", 1, 0, prompt="q")]
    ranks = lines(tmp_path / "r.jsonl", *rows, {"prompt": SECRET})
    demos = lines(tmp_path / "d.jsonl", {"prompt": " q", "completion": SECRET}, {"prompt": "zz", "completion": "c"})
    assert main(["stats", ranks, demos]) == 0
    printed = capsys.readouterr().out
    assert SECRET not in printed
    # Pairs that both ordered: (1, 2) ann 1 < 2, bob 2 < 1: no; (1, 3): yes; (2, 3) is a tie for ann.
    # Longer is better: ann's 2 strict pairs no, bob's (1, 2) yes and (1, 3), (2, 3) no, the two rows of q yes.
    assert printed.splitlines() == [
        f"{ranks}: trl -> ranking: 5 read, 4 used, 1 dropped (1 missing_field); 4 rows",
        "  prompts: 2 distinct, 2 in more than one row",
        "  prompt characters: median 1, 90% 1, longest 1",
        "  K: 2 x 2, 3 x 2",
        "  pairs: 8, 1 of them ties (12.5%)",
        "  the longer answer is better in 42.9% of the pairs that are no ties",
        "  agreement between labelers: 0.50 [0.00, 1.00] (95%) over 2 pairs that two of them ordered, of 1 prompts",
        "  completion characters: median 2, 90% 3, longest 3",
        "  repeated rows: 1",
        "  language: en 4",
        "  labeler: ann 3, bob 1",
        f"{demos}: trl -> demonstration: 2 read, 2 used, 0 dropped; 2 rows",
        "  prompts: 2 distinct, 0 in more than one row",
        "  prompt characters: median 2, 90% 2, longest 2",
        f"  completion characters: median {(len(SECRET) + 1) / 2:.0f}, 90% {len(SECRET)}, longest {len(SECRET)}",
        f"{demos}: 1 of its 2 prompts are also in {ranks}",
    ]


def test_stats_of_text(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    assert main(["stats", str(tmp_path / "a.txt")]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  text characters: median 8, 90% 8, longest 8"


def test_validate_names_a_foreign_format(tmp_path):
    cases = {
        lines(tmp_path / "a.jsonl", alpaca("p")): "is in the format alpaca: `align convert",
        lines(tmp_path / "o.jsonl", {"message_tree_id": "t", "prompt": {"text": "p"}}): "is in the format oasst",
        str(tmp_path / "t.csv"): "is a table or prose: `align convert",
    }
    for path, message in cases.items():
        code, text = validate([path])
        assert code == 1 and message in text
    assert validate([lines(tmp_path / "h.jsonl", hh("x"))])[0] == 0  # the stages read HH dialogues as they are


def test_converted_demonstrations_load(tmp_path):
    path = lines(
        tmp_path / "s.jsonl", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    )
    out = str(tmp_path / "out.jsonl")
    assert main(["convert", path, "--output", out]) == 0
    (demo,), _ = load_demonstrations(out)
    assert demo.prompt == ({"role": "user", "content": "a"},) and demo.completion[0]["content"] == "b"


def test_help_lists_the_tools(capsys):
    assert main(["--help"]) == 0
    assert all(f"  {name} " in capsys.readouterr().out for name in ("convert",))
    for name in ("convert", "stats"):
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0 and f"usage: align {name}" in capsys.readouterr().out
