"""What the report of a reward model adds to its accuracy: peers, transfer, mistakes, tables; by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from align.errors import UserError
from align.evaluate.people import labelers_report
from align.evaluate.plots import plot_overfitting, plot_reward_accuracy
from align.evaluate.reward_report import ranking_accuracy, require_scores
from align.evaluate.rm_report import (
    compare,
    read_scores,
    scores_row,
    tables,
    transfer,
    worst_mistakes,
    write_markdown,
)
from align.files import plain
from align.types import Ranking

# Ours: right on both pairs of "p" it has (0 over 1, 0 over 2), wrong on "q", right on "r".
SCORED = [
    (Ranking("p", ("a", "bb", "ccc"), (0, 1, 1), "ann", {"source": "x", "language": "en"}), [2.0, 1.0, 0.0]),
    (Ranking("q", ("d", "e"), (0, 1), "ben", {"source": "y", "language": "zh"}), [0.0, 3.0]),
    (Ranking("r", ("f", "g"), (0, 1), None, {"source": "x"}), [1.0, 0.0]),
]
# The peer: right and wrong on "p", right on "q", no score for "r".
PEER = [[1.0, 0.0, 2.0], [1.0, 0.0], None]


def test_a_peer_by_hand():
    peer = compare("other", SCORED, PEER, seed=0)
    assert (peer["name"], peer["rankings"], peer["pairs"]) == ("other", 2, 3)
    assert peer["accuracy"].mean == pytest.approx(2 / 3)
    # Ours minus the peer's on the same three pairs: 0, 1 and -1; on K > 2 0 and 1.
    assert peer["difference"].mean == pytest.approx(0.0) and peer["difference_over_2"].mean == pytest.approx(0.5)
    found = {k: v.mean for k, v in peer["difference_by_k"].items()}
    assert found == {"2": pytest.approx(-1.0), "3": pytest.approx(0.5)}
    assert {k: v.mean for k, v in peer["difference_by_language"].items()} == {"en": 0.5, "zh": -1.0}


def test_pairing_makes_a_small_difference_visible():
    """Two models that share their mistakes but for a few: unpaired, their intervals overlap."""
    rng = np.random.default_rng(0)
    scored, peer = [], []
    for i in range(400):
        right = rng.random() < 0.6
        scored.append((Ranking(f"p{i}", ("a", "b"), (0, 1)), [1.0, 0.0] if right else [0.0, 1.0]))
        peer.append([0.0, 1.0] if not right or i % 12 == 0 else [1.0, 0.0])
    found, ours = compare("peer", scored, peer, seed=0), ranking_accuracy(scored, seed=0)
    assert found["accuracy"].high > ours["accuracy"].low
    assert found["difference"].low > 0


def test_a_peer_that_scored_nothing_is_refused():
    with pytest.raises(UserError, match="scored none"):
        compare("other", SCORED, [None] * 3, seed=0)


def test_transfer_by_hand():
    trained = [Ranking("t", ("a", "b"), (0, 1), None, {"source": "x"}), Ranking("u", ("a", "b"), (0, 1))]
    found = transfer(SCORED, trained, seed=0)
    assert found["trained"]["accuracy"].mean == 1.0 and found["trained"]["sources"] == ["x"]
    assert found["held_out"]["accuracy"].mean == 0.0 and found["held_out"]["sources"] == ["y"]
    assert transfer(SCORED, trained[1:], seed=0) is None
    assert transfer(SCORED[:1], trained, seed=0)["held_out"] is None


def test_scores_survive_the_file_and_what_is_not_theirs_is_refused(tmp_path):
    rankings = [ranking for ranking, _ in SCORED]
    path = tmp_path / "scores.jsonl"

    def write(*rows) -> str:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    rows = [scores_row(r, s) for r, s in zip(rankings, PEER, strict=True)]
    assert read_scores(write(*rows), rankings) == PEER
    assert read_scores(write(*({"scores": s} for s in PEER)), rankings) == PEER  # another tool's, without marks
    for bad, words in (
        (rows[:2], "2 lines for 3 rankings"),
        ([rows[1], rows[0], rows[2]], "jsonl:1: scores another ranking"),
        ([rows[0], {"scores": [1.0]}, rows[2]], "jsonl:2: 2 completions need as many numbers"),
        ([rows[0], {"scores": ["1", 2]}, rows[2]], "jsonl:2"),
        ([rows[0], {"scores": [float("nan"), 2]}, rows[2]], "jsonl:2"),
        ([rows[0], {"score": [1, 2]}, rows[2]], "jsonl:2: has no scores"),
        ([rows[0], [1, 2], rows[2]], "jsonl:2: has no scores"),
    ):
        with pytest.raises(UserError, match=words):
            read_scores(write(*bad), rankings)


def test_a_model_that_gives_no_numbers_is_refused():
    require_scores([[1.0, 2.0]], "peer_model_path")
    with pytest.raises(UserError, match="^peer_model_path"):
        require_scores([[1.0, float("nan")]], "peer_model_path")


def test_the_worst_mistakes_are_one_a_prompt_and_worst_first():
    scored = [
        (Ranking("mild", ("good", "bad", "worse"), (0, 1, 2), "ann"), [0.0, 0.5, 1.0]),  # three mistakes, worst gap -1
        (Ranking("grave\nprompt", ("fine", "foul\n# not a title"), (0, 1), "ben", {"source": "s"}), [0.0, 4.0]),
        (Ranking("none", ("yes", "no"), (0, 1)), [1.0, 0.0]),
    ]
    text = worst_mistakes(scored, 20)
    assert text.count("\n## ") == 2 and text.index("foul") < text.index("mild")
    assert "## 1. gap -4.000, difference in rank 1, labeler ben, source s" in text
    assert "## 2. gap -1.000, difference in rank 2, labeler ann" in text and "Score +1.000:\n\n    worse" in text
    assert "\n# not a title" not in text and "yes" not in text  # texts are indented, so they cannot pass for ours
    assert worst_mistakes(scored, 1).count("\n## ") == 1


@pytest.fixture
def report():
    """Of made-up rankings by three labelers with everything in it."""
    rng = np.random.default_rng(0)
    scored, peer = [], []
    for i in range(40):
        quality = rng.normal(0, 1, 2 + i % 4)
        for labeler in ("ann", "ben", "cat"):
            noisy = quality + rng.gumbel(0, 1, len(quality))
            ranks = tuple(float(x) for x in np.argsort(np.argsort(-noisy)))
            texts = tuple("x" * (5 + k) for k in range(len(quality)))
            columns = {"source": f"s{i % 3}", "language": "en" if i % 5 else "zh"}
            scored.append((Ranking(f"p{i}", texts, ranks, labeler, columns), list(quality)))
            peer.append(list(quality[::-1]))
    folds = {"accuracy": {"mean": 0.7, "low": 0.6, "high": 0.8}, "pairs": 9, "prompts": 3}
    cross = {"folds_by": "labeler", "in_group": folds, "held_out": None, "drop": None}
    cross["folds"] = [{"groups": ["ann"], "train": 3, "in_group": folds, "held_out": folds}]
    spread = {"max_difference": 1e-6, "score_std": 1.0, "rows": 8, "ways": {"way": 1e-6}, "flipped_pairs": {"way": 0}}
    made = ranking_accuracy(scored, 0) | {
        "model": "runs/x/rm",
        "labelers": labelers_report(scored, 0),
        "held_out_labelers": None,
        "transfer": transfer(scored, [Ranking("t", ("a", "b"), (0, 1), None, {"source": "s0"})], 0),
        "peer": compare("peer", scored, peer, 0),
        "score_spread": spread,
        "folds": {"labeler": cross, "source": None},
    }
    return json.loads(json.dumps(plain(made)))  # as it comes back from report.json


def test_tables_hold_the_reports_numbers(report, tmp_path):
    found = {table.title: table for table in tables(report)}
    overview = dict(row[:2] for row in found["Accuracy"].rows)
    accuracy = report["accuracy"]
    assert overview["this model"] == f"{accuracy['mean']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}]"
    assert {"peer: peer", "this model, trained sources", "this model, held out sources"} <= overview.keys()
    assert [row[0] for row in found["Accuracy: Completions ranked (K)"].rows] == ["2", "3", "4", "5"]
    assert {row[0] for row in found["Accuracy: Source"].rows} == {"s0", "s1", "s2"}
    assert found["Cross-validation"].rows[-1][:3] == ["all folds by labeler", "0.70 [0.60, 0.80]", "-"]
    assert found["Score under batching and padding"].rows == [["way", "1.00e-06", "0"]]
    write_markdown(tmp_path, report, {"Accuracy": tmp_path / "accuracy.png"})
    text = (tmp_path / "report.md").read_text()
    assert "![Accuracy](accuracy.png)" in text and "mistakes.md" in text and "xxxxx" not in text


def around(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.25, "high": mean + 0.5}


def test_each_number_stands_in_its_row(report):
    """All numbers differ; each interval is 0.25 below its mean and 0.5 above it."""
    lone = report | {"accuracy": around(0.31), "peer": None, "transfer": None}
    lone["baselines"] = {"length_only": around(0.32), "length_fitted": around(0.33), "random": around(0.34)}
    lone["gain"] = {"length_only": around(0.35), "length_fitted": around(0.36)}
    lone["labelers"] = {
        "agreement": around(0.41), "agreement_with_ties": around(0.42), "ties": 0.43, "ceiling": around(0.44),
        "ceiling_bounds": [0.45, 0.46], "accuracy": around(0.47), "consensus": {"accuracy": around(0.48)},
        "by_labeler": {"ann": {"agreement": around(0.49)}}, "pairs": 5, "prompts": 2,
    }  # fmt: skip
    found = {table.title: table.markdown().splitlines()[4:] for table in tables(lone)}
    assert found["Accuracy"] == [
        "| scorer | accuracy | this model minus it |",
        "|---|---:|---:|",
        "| this model | 0.31 [0.06, 0.81] |  |",
        "| the longer is better | 0.32 [0.07, 0.82] | 0.35 [0.10, 0.85] |",
        "| length, fitted on other prompts | 0.33 [0.08, 0.83] | 0.36 [0.11, 0.86] |",
        "| random scores (range of 95% of such scorers) | 0.34 [0.09, 0.84] |  |",
        "| this model, pairs that two labelers judged | 0.47 [0.22, 0.97] |  |",
        "| ceiling there: perfect predictor of the mean labeler | 0.44 [0.19, 0.94] |  |",
    ]
    assert found["Labelers"] == [
        "| measure | value |",
        "|---|---:|",
        "| two labelers order a pair alike | 0.41 [0.16, 0.91] |",
        "| the same verdict, ties included | 0.42 [0.17, 0.92] |",
        "| judgements that are ties | 43.0% |",
        "| ceiling, gaps in quality normal | 0.44 [0.19, 0.94] |",
        "| ceiling, whatever the gaps | 0.45 to 0.46 |",
        "| this model on those pairs | 0.47 [0.22, 0.97] |",
        "| this model against the labelers' joint order there | 0.48 [0.23, 0.98] |",
        "| labeler ann with the others | 0.49 [0.24, 0.99] |",
    ]


def test_a_bare_report_has_its_tables_too(report):
    bare = report | dict.fromkeys(("peer", "transfer", "score_spread", "held_out_labelers"))
    alone = {
        "agreement": None,
        "ceiling": None,
        "accuracy": None,
        "ceiling_bounds": None,
        "consensus": None,
        "by_labeler": {},
    }
    titles = [table.title for table in tables(bare | {"labelers": alone, "folds": {"labeler": None, "source": None}})]
    assert titles[:2] == ["Accuracy", "Accuracy: Completions ranked (K)"]
    assert not {"Labelers", "Cross-validation", "Score under batching and padding"} & set(titles)


def drawn(path) -> bool:
    pixels = np.asarray(Image.open(path).convert("L"))
    return min(pixels.shape) >= 400 and (pixels < 200).mean() > 0.005


def test_pictures(report, tmp_path):
    assert drawn(plot_reward_accuracy(report, tmp_path / "accuracy.png"))
    rows = [{"epoch": e / 4, "eval_loss": 0.7 - e / 99, "eval_accuracy": 0.5 + e / 99} for e in range(12)]
    both = plot_overfitting([*rows, {"epoch": 1, "loss": 0.5}], rows[::2], tmp_path / "both.png")
    one = plot_overfitting(rows, [], tmp_path / "one.png")
    assert drawn(both) and drawn(one) and both.read_bytes() != one.read_bytes()
    assert plot_overfitting([], [], tmp_path / "none.png").stat().st_size > 5000
