"""align prepare: limits, exclusions, one split for all files of a run, on miniatures; then preset smollm2's files."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

from align.errors import UserError
from align.prepare import main, opening
from align.splits import prompt_key

DATA = Path(os.environ.get("ALIGN_DATA", Path(__file__).parents[2] / "shared" / "data"))
ROOT = Path(__file__).resolve().parents[1]


def lines(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path):
    """60 questions with demonstrations and ranked answers, a benchmark, prose with ids, a list of those to leave."""
    data = tmp_path / "data"
    data.mkdir()
    asked = [f"question {i}?" for i in range(60)]
    lines(data / "sft.jsonl", [{"instruction": q, "input": "", "output": f"answer {i}"} for i, q in enumerate(asked)])
    lines(
        data / "ranked.jsonl",
        [{"instruction": q, "output": ["good", "bad " * (i % 3 + 1)]} for i, q in enumerate(asked)],
    )
    lines(data / "asked.jsonl", [{"prompt": q} for q in (*asked[:30], "only here?", "question 1?")])
    lines(data / "held.jsonl", [{"prompt": q} for q in asked[:5]])
    lines(data / "gsm.jsonl", [{"question": "2 + 2?", "answer": "#### 4"}])
    lines(data / "stories.jsonl", [{"text": f"story {i} " * 9, "id": f"s{i // 2}"} for i in range(20)])
    lines(data / "leave.jsonl", [{"story": "s1"}, {"story": "s3"}])
    return tmp_path


def prepare(folder: Path, outputs: dict, **changes) -> Path:
    config = folder / "data.yaml"
    config.write_text(yaml.safe_dump({"output_dir": "{run}/data", "outputs": outputs, **changes}), encoding="utf-8")
    assert main(["--config", str(config), "--run", str(folder / "run"), "--data_dir", str(folder / "data")]) == 0
    return folder / "run" / "data"


def output(kind: str, *sources: dict) -> dict:
    return {"kind": kind, "sources": list(sources)}


BOTH = {
    "demonstrations": output("demonstration", {"files": ["sft.jsonl"]}),
    "rankings": output("ranking", {"files": ["ranked.jsonl"], "language": "en"}),
}


def test_D1_a_prompt_lies_on_one_side_in_all_files(folder, capsys):
    run = prepare(folder, BOTH, validation_share=0.3)
    parts = {name: {row["prompt"] for row in read(run / f"{name}.jsonl")} for name in (
        "demonstrations", "demonstrations_validation", "rankings", "rankings_validation")}  # fmt: skip
    assert parts["demonstrations"] == parts["rankings"]
    assert parts["demonstrations_validation"] == parts["rankings_validation"]
    assert parts["rankings"].isdisjoint(parts["rankings_validation"])
    assert (
        len(parts["rankings"]) + len(parts["rankings_validation"]) == 60
        and 8 <= len(parts["rankings_validation"]) <= 30
    )
    assert read(run / "rankings.jsonl")[0]["language"] == "en" and read(run / "rankings.jsonl")[0]["source"] == "ranked"
    assert "60 of its 60 prompts are also in demonstrations from sft.jsonl" in capsys.readouterr().out


def test_what_a_source_holds_out_no_other_trains_on(folder):
    held = output("prompt", {"files": ["held.jsonl"], "split": "validation"})
    run = prepare(folder, BOTH | {"held": held})
    asked = {row["prompt"] for row in read(run / "held_validation.jsonl")}
    assert asked == {f"question {i}?" for i in range(5)} and not (run / "held.jsonl").exists()
    for name in ("demonstrations", "rankings"):
        assert asked.isdisjoint(row["prompt"] for row in read(run / f"{name}.jsonl"))
    named = [row for row in read(run / "dropped.jsonl") if row["kind"] == "held_out_elsewhere"]
    assert named and all("held.jsonl" in row["what"] for row in named)
    assert not any(
        "question" in value for row in named for value in map(str, row.values()) if "first question" not in value
    )


def test_limits_are_counted_and_draws_repeat(folder):
    limited = output("ranking", {"files": ["ranked.jsonl"], "max_characters": 20, "max_rows": 10})
    first = (prepare(folder, {"rankings": limited}) / "rankings.jsonl").read_text(encoding="utf-8")
    run = prepare(folder, {"rankings": limited})
    assert (run / "rankings.jsonl").read_text(encoding="utf-8") == first
    card = json.loads((run / "card.json").read_text(encoding="utf-8"))
    (source,) = card["sources"]
    long = sum(len(f"question {i}?") + len(("bad " * (i % 3 + 1)).strip()) > 20 for i in range(60))
    assert source["left_out"] == {"too_long": long} and source["over_max_rows"] == 60 - long - 10
    named = [row for row in read(run / "dropped.jsonl") if row["kind"] == "over_max_rows"]
    places = {row["place"] for row in named}
    assert len(named) == len(places) == source["over_max_rows"]
    ks = Counter(len(row["completions"]) for row in read(run / "rankings.jsonl"))
    assert source["completions"]["train"] == {str(k): count for k, count in ks.items()} == {"2": sum(ks.values())}
    assert sum(source["rows"].values()) == sum(card["rows"].values()) == 10
    other = (prepare(folder, {"rankings": limited}, seed=1) / "rankings.jsonl").read_text(encoding="utf-8")
    assert other != first


def test_D1_no_customer_on_two_sides_and_filters_hold(folder):
    """450 prompts of one customer, fewer of sixty others, one with an address in it, one that repeats an opening."""
    sizes = {f"c{i}": 1 + (i * 37) % 23 for i in range(60)} | {"heavy": 450}
    rows = [
        {"prompt": f"Do task {n} of {name}, in words", "customer": name} for name in sizes for n in range(sizes[name])
    ]
    letter = [{"prompt": f"Write to {name}@example.org", "customer": name} for name in sizes]
    lines(folder / "data" / "customers.jsonl", [*rows, *letter, {"prompt": rows[5]["prompt"] + "!", "customer": "c1"}])
    source = {
        "files": ["customers.jsonl"], "split_column": "customer", "max_rows_per": {"column": "customer"},
        "shared_prefix": 24, "drop_personal_data": True,
    }  # fmt: skip
    run = prepare(folder, {"prompts": output("prompt", source)}, validation_share=0.3)
    train, held = read(run / "prompts.jsonl"), read(run / "prompts_validation.jsonl")
    homes = {row["customer"] for row in train}, {row["customer"] for row in held}
    assert homes[0] | homes[1] == set(sizes) and not homes[0] & homes[1] and min(map(len, homes)) > 5
    assert Counter(row["customer"] for row in train + held)["heavy"] == 200
    assert not any("@" in row["prompt"] for row in train)
    assert {row["customer"] for row in held if "@" in row["prompt"]} == homes[1] - {"heavy"}, "held-out rows stay"
    dropped = read(run / "dropped.jsonl")
    assert Counter(row["kind"] for row in dropped) == {
        "over_max_rows_per": 251, "personal_data": len(homes[0] - {"heavy"}), "shared_prefix": 1
    }  # fmt: skip
    (repeated,) = (row["place"] for row in dropped if row["kind"] == "shared_prefix")
    assert repeated.endswith(f"customers.jsonl:{len(rows) + len(letter) + 1}")


def test_each_prompt_once_over_all_sources(folder):
    run = prepare(folder, {"prompts": output("prompt", {"files": ["asked.jsonl"]}, {"files": ["held.jsonl"]})})
    prompts = [row["prompt"] for name in ("prompts", "prompts_validation") for row in read(run / f"{name}.jsonl")]
    assert sorted(prompts) == sorted({*(f"question {i}?" for i in range(30)), "only here?"})
    kinds = [row["kind"] for row in read(run / "dropped.jsonl")]
    assert kinds == ["repeated_prompt"] * 6


def test_prose_is_split_and_excluded_by_the_work_it_was_cut_from(folder):
    left = {"file": "leave.jsonl", "field": "story", "column": "id"}
    source = {"files": ["stories.jsonl"], "exclude": left}
    run = prepare(folder, {"text": output("text", source)}, validation_share=0.4)
    parts = [{row["id"] for row in read(run / f"{name}.jsonl")} for name in ("text", "text_validation")]
    assert parts[0].isdisjoint(parts[1]) and parts[0] | parts[1] == {f"s{i}" for i in range(10)} - {"s1", "s3"}
    assert [row["kind"] for row in read(run / "dropped.jsonl")] == ["excluded"] * 4


def test_evaluation_rows_are_never_trained_on(folder):
    with pytest.raises(UserError, match="gsm.jsonl:1: is for evaluation only"):
        prepare(folder, {"prompts": output("prompt", {"files": ["gsm.jsonl"]})})
    run = prepare(folder, {"prompts": output("prompt", {"files": ["gsm.jsonl"], "split": "validation"})})
    assert read(run / "prompts_validation.jsonl")[0]["eval_only"] is True


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (
            {"x": output("ranking", {"files": ["ranked.jsonl"], "max_row": 3})},
            "sources.0..max_row: unknown key.*max_rows",
        ),
        ({"x": output("ranking", {"max_rows": 3})}, "sources.0..files: missing"),
        ({"x": output("rankings", {"files": ["ranked.jsonl"]})}, "kind: 'rankings' is not one of"),
        ({"x": output("text", {"files": ["ranked.jsonl"]})}, "gives no text"),
        ({"x": output("ranking", {"files": ["nowhere.jsonl"]})}, "nowhere.jsonl: no such file"),
        ({"x": output("ranking", {"files": ["ranked.jsonl"], "max_characters": 3})}, "outputs.x: none of its sources"),
        ({"x": output("ranking", {"files": ["ranked.jsonl"], "split": "test"})}, "split: 'test' is not one of"),
        ([], "outputs: .* is no mapping"),
        (
            BOTH | {"x": output("ranking", {"files": ["ranked.jsonl"], "context_characters": 0})},
            "outputs.x: ranked.jsonl: context_characters is 0 here and None in outputs.rankings",
        ),
    ],
)
def test_mistakes_are_one_line(folder, outputs, words):
    with pytest.raises(UserError, match=words) as caught:
        prepare(folder, outputs)
    assert "\n" not in str(caught.value)


def test_held_out_rows_have_a_limit_of_their_own(folder):
    """The training rows of `max_rows` stay the same rows, whatever is held out."""
    whole = prepare(folder, {"rankings": output("ranking", {"files": ["ranked.jsonl"]})})
    sides = {name: read(whole / f"{name}.jsonl") for name in ("rankings", "rankings_validation")}
    kept = {}
    for held in (1, 3):
        limited = {"files": ["ranked.jsonl"], "max_rows": 10, "max_validation_rows": held}
        run = prepare(folder, {"rankings": output("ranking", limited)})
        train, validation = read(run / "rankings.jsonl"), read(run / "rankings_validation.jsonl")
        assert len(train) == 10 and len(validation) == held
        assert all(row in sides["rankings"] for row in train)
        assert all(row in sides["rankings_validation"] for row in validation)
        kept[held] = train
        named = Counter(row["kind"] for row in read(run / "dropped.jsonl"))
        rest = {"over_max_rows": len(sides["rankings"]) - 10}
        assert named == rest | {"over_max_validation_rows": len(sides["rankings_validation"]) - held}
    assert kept[1] == kept[3]


def test_a_folder_of_something_else_is_kept(folder):
    (folder / "run" / "data").mkdir(parents=True)
    (folder / "run" / "data" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="holds something else"):
        prepare(folder, BOTH)
    with pytest.raises(UserError, match="data_dir: missing"):
        main(["--config", str(folder / "data.yaml"), "--run", "x"])


def test_the_real_files_of_preset_smollm2(tmp_path, capsys):
    """Held-out prompts in no training file; every unit that was read is used, dropped by name, or over max_rows."""
    if not DATA.is_dir():
        pytest.skip("no real data here; set ALIGN_DATA to the folder that holds it")
    config = ROOT / "configs" / "smollm2" / "data.yaml"
    assert main(["--config", str(config), "--run", str(tmp_path), "--data_dir", str(DATA)]) == 0
    run = tmp_path / "data"
    card = json.loads((run / "card.json").read_text(encoding="utf-8"))
    named = read(run / "dropped.jsonl")
    for source in card["sources"]:
        assert source["units_read"] == source["units_used"] + sum(source["dropped"].values())
        left_out = sum(source["left_out"].values()) + source["over_max_rows"]
        assert source["rows_read"] == sum(source["rows"].values()) + left_out
    counted = sum(sum(s[key].values()) for s in card["sources"] for key in ("dropped", "left_out", "notes"))
    assert len(named) == counted + sum(source["over_max_rows"] for source in card["sources"])
    annotated = Counter(row["source"] for row in read(run / "annotators_validation.jsonl"))
    assert annotated["squality"] == 60 and len(annotated) == 2
    assert {row["source"] for row in read(run / "text_validation.jsonl")}.isdisjoint({"input"})
    asking = ("demonstrations", "rankings", "prompts")
    train = {opening(row) for name in asking for row in read(run / f"{name}.jsonl")}
    held = {opening(row) for name in (*asking, "annotators") for row in read(run / f"{name}_validation.jsonl")}
    assert train.isdisjoint(held) and len(held) > 300
    words = {prompt_key(row["prompt"]) for row in read(run / "rankings.jsonl") if isinstance(row["prompt"], str)}
    printed = capsys.readouterr().out
    assert not [prompt for prompt in words if len(prompt) > 30 and prompt in printed]
    judged = {json.loads(line)["passage-id"] for line in (DATA / "squality/human-eval-all-responses.jsonl").open()}
    assert judged.isdisjoint(
        row.get("id") for name in ("text", "text_validation") for row in read(run / f"{name}.jsonl")
    )
