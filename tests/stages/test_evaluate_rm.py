"""`align evaluate rm` and `rm` in folds, through the true entry points."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from align.errors import UserError
from align.types import Ranking
from stages.__main__ import main
from stages.evaluate_rm import held_out_labelers, score

pytestmark = pytest.mark.xdist_group("stages")


@pytest.fixture
def report_of(mini, tmp_path, capsys):
    def made(**changes) -> dict:
        changes = {"output_dir": tmp_path / "report"} | changes
        code = main(["evaluate", "rm", *mini.arguments("evaluate_rm", mini.run, **changes)])
        assert code == 0, capsys.readouterr().err
        return json.loads((changes["output_dir"] / "report.json").read_text())

    return made


@pytest.fixture
def refused(mini, tmp_path, capsys):
    def check(*words: str, stage=("evaluate", "rm"), **changes) -> None:
        changes = {"output_dir": tmp_path / "out"} | changes
        capsys.readouterr()
        code = main([*stage, *mini.arguments("_".join(stage), mini.run, **changes)])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and all(word in errors[0] for word in words), errors
        assert not (tmp_path / "out" / "report.json").exists()

    return check


def interval(value: dict) -> bool:
    return set(value) == {"mean", "low", "high"} and value["low"] <= value["mean"] <= value["high"]


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_the_report_lies_in_the_models_folder_and_harms_nothing_there(mini, report_of, tmp_path, capsys):
    before = digests(mini.run / "rm")
    report = report_of(output_dir=mini.run / "rm")
    after = digests(mini.run / "rm")
    assert {name for name in before if before[name] != after[name]} == {"report.json"}
    new = {"report.md", "accuracy.png", "calibration.png", "scores.jsonl", "mistakes.md"}
    assert after.keys() - before.keys() == new
    for value in (report["accuracy"], report["baselines"]["length_only"], report["baselines"]["random"]):
        assert interval(value)
    assert report["peer"] is None and report["by_k"] and report["by_language"].keys() <= {"en", "zh"}
    assert 0 <= report["calibration_error"] <= 1 and report["score_spread"]["max_difference"] < 1e-4
    # What the stage itself said of the same rankings, by another path through the code.
    stage = json.loads((mini.run / "rm" / "manifest.json").read_text())["metrics"]
    assert report["accuracy"] == pytest.approx(stage["validation"]["accuracy"])
    assert report["held_out_labelers"]["accuracy"] == pytest.approx(stage["held_out_labelers"]["accuracy"])
    assert report["demonstration_mean"] == stage["demonstration_mean"]
    assert interval(report["labelers"]["agreement"]) and interval(report["labelers"]["ceiling"])


def test_texts_go_into_one_file_alone(mini, report_of, tmp_path, capsys):
    report_of()
    shown = capsys.readouterr()
    texts = set()
    for line in (mini.run / "rankings" / "validation.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts |= {row["prompt"], *(item["completion"] for item in row["completions"])}
    texts = {text for text in texts if len(text) > 12}
    folder = tmp_path / "report"
    written = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.suffix != ".png"}
    written |= {"stdout": shown.out, "stderr": shown.err}
    holding = {name for name, content in written.items() if any(text in content for text in texts)}
    assert holding == {"mistakes.md"}


def test_a_peer_by_its_model_and_by_its_scores_is_the_same(mini, report_of, tmp_path):
    """Ourselves as the peer differ by nothing; a peer read from scores.jsonl gives what its model gives."""
    mini.stage("rm", mini.run, output_dir=tmp_path / "peer", seed=5)
    same = report_of(peer_model_path=mini.run / "rm", output_dir=tmp_path / "same")["peer"]
    difference = same["difference"]  # none on these prompts, which says little of others
    assert difference["mean"] == 0.0 and -0.5 < difference["low"] == -difference["high"] < 0.0
    by_model = report_of(peer_model_path=tmp_path / "peer", output_dir=tmp_path / "a")["peer"]
    assert interval(by_model["accuracy"]) and by_model["difference"]["mean"] != 0.0
    report_of(reward_model_path=tmp_path / "peer", output_dir=tmp_path / "b")
    by_scores = report_of(peer_scores_file=tmp_path / "b" / "scores.jsonl", output_dir=tmp_path / "c")["peer"]
    assert {k: v for k, v in by_scores.items() if k != "name"} == {k: v for k, v in by_model.items() if k != "name"}


def test_long_rankings_are_counted_and_keep_their_line(mini, report_of, tmp_path):
    whole, cut = report_of(output_dir=tmp_path / "whole"), report_of(output_dir=tmp_path / "cut", max_length=32)
    dropped = cut["data"]["dropped"]["too_long"]
    assert dropped > 0 and cut["data"]["rows_used"] == whole["data"]["rows_used"] - dropped
    rows = [json.loads(line)["scores"] for line in (tmp_path / "cut" / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == whole["data"]["rows_used"] and rows.count(None) == dropped


class Characters:
    """Reads texts character by character, and scores a completion by their number."""

    def __init__(self, context: int | None):
        self.context = context

    def tokens(self, ranking) -> int:
        return max(len(ranking.prompt + completion) for completion in ranking.completions)

    def score(self, rankings, batch_size):
        return [[float(len(completion)) for completion in ranking.completions] for ranking in rankings]


@pytest.mark.parametrize(("context", "max_length"), [(20, 2048), (None, 20), (30, 20), (20, 30)])
def test_a_ranking_over_what_the_model_can_read_has_no_scores(context, max_length):
    """20 and 21 characters, prompt and longest completion."""
    rankings = [Ranking("abcd", ("x" * n, "yes"), (0, 1)) for n in (16, 17, 1)]
    config = SimpleNamespace(max_length=max_length, per_device_batch_size=2)
    assert score(Characters(context), rankings, "reward_model_path", config) == [[16.0, 3.0], None, [1.0, 3.0]]


def test_unseen_labelers_judged_prompts_that_were_not_trained_on(tmp_path):
    path = tmp_path / "held_out.jsonl"
    completions = [{"completion": "a cat", "rank": 0}, {"completion": "no", "rank": 1}]
    rows = [{"prompt": f"Name {what}.", "completions": completions, "labeler": "cat"} for what in ("a pet", "a bird")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    keys = {"max_length": 99, "per_device_batch_size": 2, "seed": 0, "held_out_file": str(path)}
    trained = [Ranking("Name a pet.", ("a cat", "no"), (0, 1), "ann")]
    with pytest.raises(UserError, match="the prompts of 1 of its 2 rows are also in another split"):
        held_out_labelers(Characters(None), trained, SimpleNamespace(on_bad_rows="stop", **keys))
    report = held_out_labelers(Characters(None), trained, SimpleNamespace(on_bad_rows="drop", **keys))
    assert (report["pairs"], report["prompts"], report["accuracy"].mean) == (1, 1, 1.0)


def test_what_the_report_refuses(mini, refused, tmp_path):
    refused("rankings_file", "missing", rankings_file="")
    refused("reward_model_path", "stage sft", reward_model_path=mini.run / "sft")
    refused("peer_scores_file", "one peer", peer_scores_file="x.jsonl", peer_model_path="y")
    refused("also in another split", train_file=mini.run / "rankings" / "validation.jsonl")
    refused("max_length", max_length=1)
    (tmp_path / "torn.json").write_text("{")
    refused("torn.json", labeler_folds_file=tmp_path / "torn.json")


def test_R12_rm_in_folds_by_labeler(mini, report_of, refused, tmp_path):
    changes = {"folds_by": "labeler", "num_folds": 2}
    refused("holds a reward model", stage=("rm",), output_dir=mini.run / "rm", overwrite_output_dir="true", **changes)
    mini.stage("rm", mini.run, output_dir=tmp_path / "folds", **changes)
    folds = json.loads((tmp_path / "folds" / "folds.json").read_text())
    names = [set(fold["groups"]) for fold in folds["folds"]]
    ranked = (mini.run / "rankings" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert not names[0] & names[1] and names[0] | names[1] == {json.loads(row)["labeler"] for row in ranked}
    assert sum(fold["train"] for fold in folds["folds"]) == len(ranked)
    assert interval(folds["in_group"]["accuracy"]) and interval(folds["held_out"]["accuracy"])
    assert not list((tmp_path / "folds").rglob("*.safetensors"))
    assert report_of(labeler_folds_file=tmp_path / "folds" / "folds.json")["folds"] == {
        "labeler": folds,
        "source": None,
    }


def test_shuffled_pairs_and_held_out_loss_over_epochs(mini, report_of, tmp_path):
    logs = {}
    for element in ("ranking", "pair"):
        changes = {"batch_element": element, "num_train_epochs": 2, "eval_steps": 3}
        mini.stage("rm", mini.run, output_dir=tmp_path / element, **changes)
        logs[element] = tmp_path / element / "metrics.jsonl"
        rows = [json.loads(line) for line in logs[element].read_text().splitlines()]
        evaluated = [row for row in rows if "eval_loss" in row]
        assert len(evaluated) > 1 and evaluated[-1]["epoch"] == 2 and all("eval_accuracy" in row for row in evaluated)
    steps = {name: path.read_text().count('"loss"') for name, path in logs.items()}
    assert steps["pair"] > 3 * steps["ranking"]  # a prompt of K = 4 has six pairs
    report_of(ranking_metrics_file=logs["ranking"], pair_metrics_file=logs["pair"])
    assert (tmp_path / "report" / "overfitting.png").stat().st_size > 10_000
