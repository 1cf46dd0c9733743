"""R12: folds by labeler and by source share nothing with what a model learned from, and are not swapped."""

import json

import pytest

from align.config import RMConfig
from align.errors import UserError
from align.evaluate.folds import make_folds, refuse_model, summarise_folds
from align.manifest import write_manifest
from align.types import Ranking
from stages import rm


def ranking(prompt: str, labeler: str | None = None, **columns) -> Ranking:
    return Ranking(prompt, ("a", "b"), (0.0, 1.0), labeler, columns)


# Volumes: ann 4, ben 3, cat 2, dan 1; "p0" is ranked by ann and ben both; one row has no labeler.
TRAIN = [
    *(ranking(f"p{i}", "ann") for i in range(4)),
    *(ranking(f"p{i}", "ben") for i in (0, 4, 5)),
    *(ranking(f"p{i}", "cat") for i in (6, 7)),
    ranking("p8", "dan"),
    ranking("p9", None),
]
VALIDATION = [ranking(f"v{i}", name) for i, name in enumerate(("ann", "ben", "cat", "dan", "eve"))]


def test_R12_folds_are_disjoint_and_of_like_volume():
    folds = make_folds(TRAIN, VALIDATION, "labeler", 2)
    assert [fold.groups for fold in folds] == [("ann", "dan"), ("ben", "cat")]  # 5 rankings each
    for fold in folds:
        learned = {row.labeler for row in fold.train}
        assert not learned & set(fold.groups) and None in learned
        assert {row.labeler for row in fold.held_out} == set(fold.groups)
        assert {row.labeler for row in fold.in_group} == learned - {None}
        seen = {row.prompt for row in fold.train}
        assert not seen & {row.prompt for row in (*fold.in_group, *fold.held_out)}
    # ann's p0 is left out of the test, since ben's ranking of it is learned from; eve is in no fold.
    assert sorted(row.prompt for row in folds[0].held_out) == ["p1", "p2", "p3", "p8", "v0", "v3"]
    assert sorted(row.prompt for row in folds[0].in_group) == ["v1", "v2"]


def test_R12_every_labeler_is_held_out_exactly_once():
    folds = make_folds(TRAIN, VALIDATION, "labeler", 5)  # more folds than labelers: one each
    assert sorted(name for fold in folds for name in fold.groups) == ["ann", "ben", "cat", "dan"]


def test_R12_in_group_and_held_out_are_not_swapped():
    """A model that is right on those it learned from and wrong on the others, reported so."""
    folds = make_folds(TRAIN, VALIDATION, "labeler", 2)
    scored = [
        {"in_group": [(r, [1.0, 0.0]) for r in fold.in_group], "held_out": [(r, [0.0, 1.0]) for r in fold.held_out]}
        for fold in folds
    ]
    report = summarise_folds(folds, scored, "labeler", seed=0)
    assert report["in_group"]["accuracy"].mean == 1.0 and report["held_out"]["accuracy"].mean == 0.0
    assert report["drop"].mean == 1.0 and report["folds"][0]["groups"] == ["ann", "dan"]
    assert (report["in_group"]["pairs"], report["held_out"]["pairs"]) == (4, 6 + 6)


def test_R12_the_stage_trains_on_a_folds_own_rankings_and_reports_each_test_under_its_name(monkeypatch, tmp_path):
    """With a model that is right on the labelers whose rankings it was given, and wrong on all others."""

    def train(config, codec, rankings, *_):
        return {row.labeler for row in rankings}

    def score_rankings(learned, rows, *_):
        return [(row, [1.0, 0.0] if row.labeler in learned else [0.0, 1.0]) for row in rows]

    monkeypatch.setattr(rm, "train", train)
    monkeypatch.setattr(rm, "score_rankings", score_rankings)
    config = RMConfig(
        output_dir=str(tmp_path / "folds"), model_name_or_path="sft", train_file="train", validation_file="validation",
        folds_by="labeler", num_folds=2,
    )  # fmt: skip
    rm.cross_validate(config, None, TRAIN, {"validation": VALIDATION}, [], {})
    report = json.loads((tmp_path / "folds" / "folds.json").read_text())
    assert (report["in_group"]["accuracy"]["mean"], report["held_out"]["accuracy"]["mean"]) == (1.0, 0.0)
    for fold in report["folds"]:
        assert (fold["in_group"]["accuracy"]["mean"], fold["held_out"]["accuracy"]["mean"]) == (1.0, 0.0)


def test_other_labelers_are_as_far_apart_as_the_folds_are():
    """Pairs are many and labelers few: of labelers never seen the folds' own spread tells, not the prompts'."""
    folds = make_folds(TRAIN, VALIDATION, "labeler", 2)
    right = ([1.0, 0.0], [0.0, 1.0])  # the first fold's labelers are all right, the second's all wrong
    scored = [
        {"in_group": [], "held_out": [(r, list(scores)) for r in fold.held_out]}
        for fold, scores in zip(folds, right, strict=True)
    ]
    report = summarise_folds(folds, scored, "labeler", seed=0)
    # Two folds: mean 0.5, standard error 0.5, Student's t with one degree of freedom 12.706.
    assert report["others"].mean == 0.5 and report["others"].high == pytest.approx(0.5 + 0.5 * 12.7062, rel=1e-4)
    assert report["held_out"]["accuracy"].high < 1


def test_folds_by_source():
    rows = [ranking(f"p{i}", source="oasst" if i < 3 else "hh") for i in range(5)] + [ranking("p5")]
    folds = make_folds(rows, [ranking("v", source="hh")], "source", 5)
    assert [fold.groups for fold in folds] == [("oasst",), ("hh",)]
    assert [len(fold.held_out) for fold in folds] == [3, 3] and [len(fold.in_group) for fold in folds] == [1, 0]
    report = summarise_folds(folds, [{"in_group": [], "held_out": [(rows[0], [1.0, 0.0])]}] * 2, "source", seed=0)
    assert report["in_group"] is None and report["drop"] is None


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([ranking("p", "ann"), ranking("q", None)], "names 1 labeler"),
        ([ranking("p", "a"), ranking("p", "b")], "prompt"),
    ],
)
def test_what_cannot_be_folded(rows, words):
    with pytest.raises(UserError, match=words):
        make_folds(rows, [], "labeler", 2)


def test_folds_never_replace_a_reward_model(tmp_path):
    refuse_model(str(tmp_path))
    write_manifest(tmp_path, "rm", {}, seed=0)
    with pytest.raises(UserError, match="holds a reward model"):
        refuse_model(str(tmp_path))
