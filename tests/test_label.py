"""align/label.py: the pages on which people rank, driven in Node as a browser would, and the rankings they give."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from align.data import load_rankings
from align.label import deal, read_tasks
from stages.__main__ import main

SECRET = "OFFENSIVE"
HOSTILE = "</script><script>alert(1)</script><!-- & \u2028 ' \" 中文"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")


def to_label(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def unranked(prompt: object, *texts: str, **columns: object) -> dict:
    return {"prompt": prompt, "completions": [{"completion": text, "rank": None} for text in texts], **columns}


def make_pages(folder: Path, *rows: object, labelers: tuple[str, ...] = ("ann",), flags: tuple[str, ...] = ()) -> Path:
    path = to_label(folder / "train_to_label.jsonl", *rows)
    assert main(["label", path, "--labelers", *labelers, "--output", str(folder / "pages"), *flags]) == 0
    return folder / "pages"


def data_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def browse(page: Path, *steps: list, refuse: bool = False) -> dict:
    """The page's lines after it was opened and after each step, and the files that it downloaded."""
    script = str(Path(__file__).parent / "label_browser.js")
    words = json.dumps({"steps": steps, "refuse": refuse})
    run = subprocess.run(["node", script, str(page)], input=words, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_pages_hold_rows_without_ranks_each_answer_once(tmp_path, capsys):
    rows = [
        unranked("p", "a", "b", " a ", finished=[True, True, False], use_case="chat"),
        {"prompt": [{"role": "user", "content": "q"}], "completions": ["c", "d"], "labeler": "old"},
        unranked(SECRET, SECRET, SECRET),
        {"prompt": SECRET, "chosen": "x", "rejected": "y"},
        [SECRET],
    ]
    pages = make_pages(tmp_path, *rows)
    printed = capsys.readouterr().out
    assert SECRET not in printed and "3 of 5 rows left out" in printed and "2 prompts, 2 to 2 answers each" in printed
    kinds = ("too_few_completions", "missing_field", "not_a_dict")
    assert all(f"1 {kind}" in printed for kind in kinds) and f"{tmp_path}/train_to_label.jsonl:3: " in printed
    first, second = data_of(pages / "ann.html")["tasks"]
    assert json.loads(first["head"]) == {"prompt": "p", "use_case": "chat"}
    assert list(map(json.loads, first["items"])) == [{"completion": "a"}, {"completion": "b"}]
    assert (first["texts"], first["messages"]) == (["a", "b"], [{"role": "prompt", "content": "p"}])
    assert second["messages"] == [{"role": "user", "content": "q"}] and "labeler" not in second["head"]


def test_hostile_text_stays_data(tmp_path):
    page = make_pages(tmp_path, unranked(HOSTILE, HOSTILE, "b")) / "ann.html"
    text = page.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text and text.count("<script") == 2 and "<!-- &" not in text
    (task,) = data_of(page)["tasks"]
    assert json.loads(task["head"]) == {"prompt": HOSTILE} and task["texts"] == [HOSTILE, "b"]


def test_prompts_are_dealt_evenly_and_orders_by_chance(tmp_path):
    path = to_label(tmp_path / "a.jsonl", *(unranked(f"p{i}", *"abcdef") for i in range(60)))
    tasks, _ = read_tasks([path])
    dealt = deal(tasks, ["ann", "bob", "eve"], 2, seed=0)
    prompts = {name: [json.loads(task["head"])["prompt"] for task in own] for name, own in dealt.items()}
    assert [len(set(own)) for own in prompts.values()] == [len(own) for own in prompts.values()] == [40, 40, 40]
    assert sorted(sum(prompts.values(), [])) == sorted([f"p{i}" for i in range(60)] * 2)
    pairs = {frozenset(name for name, own in prompts.items() if f"p{i}" in own) for i in range(60)}
    assert len(pairs) == 3  # nobody shares with one other alone
    orders = [tuple(task["order"]) for own in dealt.values() for task in own]
    assert all(sorted(order) == list(range(6)) for order in orders) and len(set(orders)) > 80
    assert deal(tasks, ["ann", "bob", "eve"], 2, seed=0) == dealt != deal(tasks, ["ann", "bob", "eve"], 2, seed=1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--labelers", "ann/../x"], "names a file"),
        (["--labelers", "ann", "Ann"], "one is given twice"),
        (["--labelers", "ann", "--per_prompt", "2"], "between 1 and the 1 labelers"),
        (["--labelers", "ann", "bob"], "1 prompts are too few: none for"),
        (["--labelers", "ann", "--instructions", "nowhere.txt"], "--instructions: nowhere.txt: cannot be read"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, flags, said):
    path = to_label(tmp_path / "a.jsonl", unranked("p", "a", "b"))
    try:
        code = main(["label", path, "--output", str(tmp_path / "pages"), *flags])
    except SystemExit as stop:  # argparse's
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err and not (tmp_path / "pages").exists()


def test_no_answers_to_rank_is_an_error(tmp_path, capsys):
    path = to_label(tmp_path / "a.jsonl", {"prompt": "p"})
    assert main(["label", path, "--labelers", "ann", "--output", str(tmp_path / "pages")]) == 2
    assert "no row has answers to rank" in capsys.readouterr().err


@needs_node
def test_ranks_given_by_clicks_and_keys_are_rankings_that_rm_reads(tmp_path, capsys):
    page = make_pages(tmp_path, unranked("p", "a", "b", "c", use_case="chat"), unranked("q", "d", HOSTILE)) / "ann.html"
    steps = [
        ["rank", "b", 1], ["rank", "a", 2], ["key", "Enter"], ["rank", "c", 2], ["key", "Enter"],
        ["key", "2"], ["key", "1"], ["click", "download"],
    ]  # fmt: skip
    assert browse(page, ["click", "download"])["downloads"] == []
    seen = browse(page, *steps)
    log = seen["log"]
    assert log[0]["progress"] == "prompt 1 of 2: 0 ranked, 0 skipped, 2 wait" and log[0]["prompt"] == ["prompt", "p"]
    assert log[0]["message"] == "Give every answer a rank." and sorted(log[0]["answers"]) == ["a", "b", "c"]
    assert log[3] == log[2], "Enter went on from a prompt that is half ranked"
    assert log[4]["message"] == "Ranked: Enter or Next waiting."
    assert [log[4]["ranks"][log[4]["answers"].index(text)] for text in "abc"] == [2, 1, 2]
    assert log[5]["prompt"] == ["prompt", "q"] and log[-1]["message"] == "All done: download the rankings."
    order = data_of(page)["tasks"][1]["order"]  # the first that is shown got 2
    ((name, text),) = seen["downloads"]
    assert name == "rankings-pages-ann.jsonl"
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    first, second = load_rankings(str(file))[0]
    assert (first.prompt, first.completions, first.ranks, first.labeler) == ("p", ("a", "b", "c"), (2, 1, 2), "ann")
    assert first.columns["use_case"] == "chat" and second.completions == ("d", HOSTILE)
    assert second.ranks == ((2, 1) if order == [0, 1] else (1, 2))
    assert main(["validate", str(file)]) == 0 and "none bad" in capsys.readouterr().out


@needs_node
def test_ties_of_all_answers_are_no_ranking_and_skipped_prompts_stay_out(tmp_path):
    rows = [unranked("p", "a", "b"), unranked("q", "c", "d"), unranked("r", "e", "f")]
    page = make_pages(tmp_path, *rows) / "ann.html"
    steps = [
        ["key", "1"], ["key", "1"], ["key", "Enter"], ["click", "skip"], ["rank", "c", 1], ["rank", "d", 2],
        ["click", "next"], ["click", "download"], ["click", "previous"], ["click", "previous"], ["rank", "a", 2],
        ["click", "waiting"], ["click", "download"],
    ]  # fmt: skip
    seen = browse(page, *steps)
    log = seen["log"]
    assert log[2]["message"].startswith("All answers have one rank") and log[3]["prompt"] == ["prompt", "p"]
    assert log[4]["progress"] == "prompt 2 of 3: 0 ranked, 1 skipped, 2 wait"
    assert log[8]["progress"] == "prompt 3 of 3: 1 ranked, 1 skipped, 1 wait"
    first, second = ([json.loads(line) for line in text.splitlines()] for _, text in seen["downloads"])
    assert [row["prompt"] for row in first] == ["q"]
    assert log[10]["message"] == "Skipped; a rank takes it back." and log[12]["prompt"] == ["prompt", "r"]
    assert [(row["prompt"], [item["rank"] for item in row["completions"]]) for row in second] == [
        ("p", [2, 1]), ("q", [1, 2]),
    ]  # fmt: skip


@needs_node
def test_work_is_there_again_when_the_page_is_opened_or_a_download_is_loaded(tmp_path):
    rows = [unranked("p", "a", "b"), unranked("q", "c", "d")]
    page = make_pages(tmp_path, *rows) / "ann.html"
    ranked = [["rank", "a", 2], ["rank", "b", 1], ["click", "download"]]
    done = browse(page, *ranked, ["open"])
    assert done["log"][-1]["progress"] == "prompt 2 of 2: 1 ranked, 0 skipped, 1 wait"
    assert not any(line["warning"] for line in done["log"])
    text = done["downloads"][0][1]
    torn, no_rank = text + '{"labeler"', text.replace('"rank": 2', '"rank": null')
    steps = [["load", bad] for bad in (text.replace("ann", "bob"), torn, no_rank)]
    loaded = browse(page, *steps, ["cancel"], ["load", text], ["click", "download"])
    said = [line["message"] for line in loaded["log"]]
    refused = "That file is not one of this page's downloads."
    assert said[1:4] == ["0 rankings taken from the file.", refused, refused]
    assert loaded["log"][4]["progress"].endswith("0 ranked, 0 skipped, 2 wait")
    assert said[5] == "1 rankings taken from the file." and loaded["log"][5]["prompt"] == ["prompt", "q"]
    assert loaded["downloads"][0][1] == text
    newer = browse(page, ["rank", "a", 1], ["rank", "b", 2], ["load", text])["log"][-1]
    assert newer["message"] == "0 rankings taken from the file.", "an older file took newer ranks away"


@needs_node
def test_equal_rows_stay_apart_and_other_columns_as_they_were(tmp_path):
    columns = {"id": 1234567890123456789, "score": float("nan"), "system": "be kind"}
    rows = [unranked("p", "a", "b", **columns), unranked("p", "a", "b", **columns | {"system": "be brief"})]
    page = make_pages(tmp_path, *rows, rows[0]) / "ann.html"
    first, second, third = (task["key"] for task in data_of(page)["tasks"])
    other_page = ["store", f"align label ann {third}", {"ranks": [2, 1], "skipped": False}]
    steps = [["rank", "a", 1], ["rank", "b", 2], ["click", "next"], ["rank", "a", 2], ["rank", "b", 1], other_page]
    ((_, text),) = browse(page, *steps, ["click", "download"])["downloads"]
    made = [json.loads(line) for line in text.splitlines()]
    assert [row["label_task"] for row in made] == [first, second, third]
    assert [(row["id"], row["score"], row["system"]) for row in made] == [
        (1234567890123456789, None, "be kind"), (1234567890123456789, None, "be brief"),
        (1234567890123456789, None, "be kind"),
    ]  # fmt: skip
    assert [[item["rank"] for item in row["completions"]] for row in made] == [[1, 2], [2, 1], [2, 1]]
    again = make_pages(tmp_path, unranked("new", "x", "y"), *rows) / "ann.html"
    assert {first, second} < {task["key"] for task in data_of(again)["tasks"]}


@needs_node
def test_enter_presses_no_button_that_was_clicked_before(tmp_path):
    rows = [unranked("p", "a", "b"), unranked("q", "c", "d"), unranked("r", "e", "f")]
    log = browse(make_pages(tmp_path, *rows) / "ann.html", ["click", "skip"], ["key", "1"], ["key", "Enter"])["log"]
    assert log[-1]["prompt"] == ["prompt", "q"] and log[-1]["progress"].endswith("1 skipped, 2 wait")


@needs_node
def test_a_browser_that_keeps_nothing_is_told_of(tmp_path):
    page = make_pages(tmp_path, unranked("p", "a", "b")) / "ann.html"
    log = browse(page, ["key", "1"], ["key", "2"], refuse=True)["log"]
    assert log[0]["warning"] == "" and log[-1]["warning"].startswith("This browser keeps nothing")
    assert log[-1]["progress"] == "prompt 1 of 1: 1 ranked, 0 skipped, 0 wait"
