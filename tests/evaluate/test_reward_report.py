"""Accuracy of reward scores, against two rankings worked by hand."""

import json

import numpy as np
import pytest
from scipy.special import expit

from align.evaluate import reward_report
from align.evaluate.reward_report import gold_accuracy, ranking_accuracy
from align.evaluate.win_rate import Interval
from align.files import plain
from align.types import Ranking

# "p": the first is best, the others tie: pairs (0, 1) with gap 0 - 1 = -1, wrong, and (0, 2) with gap 0, half right.
# "q": the second is best: gap 2, right. Together 1.5 of 3; margin (-1 + 0 + 2) / 3.
SCORED = [
    (Ranking("p", ("aa", "a", "aaaa"), (1, 2, 2), "ann", {"use_case": "chat", "language": "en"}), [0.0, 1.0, 0.0]),
    (Ranking("q", ("b", "bb"), (3, 1), "bob", {"use_case": "rewrite", "language": "en"}), [0.0, 2.0]),
]


def test_accuracy_by_hand():
    report = ranking_accuracy(SCORED, seed=0)
    assert (report["accuracy"].mean, report["pairs"], report["prompts"]) == (0.5, 3, 2)
    assert report["margin"] == pytest.approx(1 / 3)


def test_breakdowns_by_hand():
    report = ranking_accuracy(SCORED, seed=0)
    assert {k: (v["accuracy"].mean, v["pairs"]) for k, v in report["by_k"].items()} == {"2": (1.0, 1), "3": (0.25, 2)}
    assert {k: v["accuracy"].mean for k, v in report["by_labeler"].items()} == {"ann": 0.25, "bob": 1.0}
    assert {k: v["accuracy"].mean for k, v in report["by_rank_distance"].items()} == {"1": 0.25, "2": 1.0}
    assert {k: v["accuracy"].mean for k, v in report["by_column"]["use_case"].items()} == {"chat": 0.25, "rewrite": 1.0}
    assert report["by_language"]["en"]["prompts"] == 2 and list(report["by_source"]) == ["unknown"]
    assert "by_column" in report and ranking_accuracy(SCORED, 0, columns=("nothing",))["by_column"] == {}
    # Better over worse in characters: 2 / 1 and 2 / 4 in "p" (half right of a tie, wrong), 2 / 1 in "q" (right).
    found = {k: (v["accuracy"].mean, v["pairs"]) for k, v in report["by_length"].items()}
    assert found == {"up to 1/2": (0.5, 1), "5/4 to 2": (0.5, 2)}


def test_a_completion_of_no_length_is_no_crash():
    report = ranking_accuracy([(Ranking("p", ("", "a long one"), (1, 0)), [0.0, 1.0])], seed=0)
    assert list(report["by_length"]) == ["over 2"] and report["accuracy"].mean == 1.0


def test_calibration_by_hand():
    # Favourites: sigmoid(1) = .7311 and wrong; .5 and a tie, half; sigmoid(2) = .8808 and right.
    report = ranking_accuracy(SCORED, seed=0)
    found = [(b["predicted"], b["observed"].mean, b["pairs"]) for b in report["calibration"]]
    expected = [(0.5, 0.5, 1), (0.731059, 0.0, 1), (0.880797, 1.0, 1)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert report["calibration_error"] == pytest.approx((0.0 + 0.731059 + 0.119203) / 3, abs=1e-6)


def test_calibration_error_weighs_a_bin_by_its_pairs():
    # Three ties of 0.5, half right, and sigmoid(1) = .731059 that is wrong: (3 x 0 + .731059) / 4, not / 2 bins.
    gaps = (0.0, 0.0, 0.0, -1.0)
    scored = [(Ranking(f"p{i}", ("a", "b"), (1, 2)), [gap, 0.0]) for i, gap in enumerate(gaps)]
    assert ranking_accuracy(scored, seed=0)["calibration_error"] == pytest.approx(0.182765, abs=1e-6)


def test_ties_are_counted_and_cost_nothing():
    report = ranking_accuracy(SCORED, seed=0)
    assert report["ties"] == 1
    # -ln sigmoid of the gaps -1, 0 and 2.
    assert report["log_loss"] == pytest.approx((1.3132617 + 0.6931472 + 0.1269280) / 3, abs=1e-6)


def test_length_only_by_hand():
    # Better against worse: 2 > 1 characters, 2 < 4, 2 > 1: the longer is right on two of three; the model on 1.5.
    report = ranking_accuracy(SCORED, seed=0)
    assert report["baselines"]["length_only"].mean == pytest.approx(2 / 3)
    assert report["gain"]["length_only"].mean == pytest.approx(1.5 / 3 - 2 / 3)


def by_length(taste, n=80, seed=0):
    """Two completions a prompt; labelers like the one whose length `taste` scores higher."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        a, b = (int(x) for x in rng.choice(np.geomspace(10, 4000, 200), 2, replace=False))
        rows.append((Ranking(f"p{i}", ("x" * a, "y" * b), (0, 1) if taste(a) > taste(b) else (1, 0)), [0.0, 0.0]))
    return rows


@pytest.mark.parametrize(
    ("taste", "longer"),
    [(lambda n: n, (1.0, 1.0)), (lambda n: -n, (0.0, 0.0)), (lambda n: -abs(np.log(n / 200)), (0.3, 0.7))],
)
def test_the_fitted_baseline_finds_any_taste_in_length(taste, longer):
    """The longer, the shorter, or those near 200 characters."""
    found = ranking_accuracy(by_length(taste), seed=0)["baselines"]
    assert longer[0] <= found["length_only"].mean <= longer[1]
    assert found["length_fitted"].mean > 0.9


def test_gains_are_over_each_baseline():
    """Labelers like the shorter: "the longer" is right nowhere, the fit everywhere, scores that tie on half."""
    report = ranking_accuracy(by_length(lambda n: -n), seed=0)
    assert {name: found.mean for name, found in report["baselines"].items()} == {
        "length_only": 0.0, "length_fitted": 1.0, "random": 0.5,
    }  # fmt: skip
    assert {name: gain.mean for name, gain in report["gain"].items()} == {"length_only": 0.5, "length_fitted": -0.5}


def test_the_fitted_baseline_leaves_out_whole_prompts(monkeypatch):
    """Three labelers rank the same two completions: a prompt's three pairs are fitted on together or not at all."""
    fits, logistic = [], reward_report._logistic

    def spy(features):
        fits.append(np.unique(features.round(9), axis=0, return_counts=True)[1].tolist())
        return logistic(features)

    monkeypatch.setattr(reward_report, "_logistic", spy)
    texts = [("x" * (10 + i), "y" * (20 + 7 * i)) for i in range(10)]  # no two prompts of the same lengths
    rankings = [Ranking(f"p{i}", pair, (1, 2), who) for who in ("ann", "bob", "cid") for i, pair in enumerate(texts)]
    ranking_accuracy([(ranking, [0.0, 0.0]) for ranking in rankings], seed=0)
    assert fits == [[3] * 8] * 5, "ten prompts in five folds"


def test_the_fit_is_pulled_towards_0():
    # One win: the w at which its slope 1 / (1 + e^w) is the pull w. e^.401058 = 1.493404, and .401058 x 2.493404 = 1.
    assert reward_report._logistic(np.array([[1.0]])) == pytest.approx([0.401058], abs=1e-4)


def test_the_fitted_baseline_is_not_tested_on_what_it_was_fitted_on():
    """Lengths that say nothing: in-sample a fit would beat 0.5 on so few prompts, out of sample it must not."""
    rng = np.random.default_rng(3)
    means = []
    for seed in range(40):
        sizes = rng.integers(1, 99, (12, 2))
        rows = [(Ranking(f"p{i}", ("x" * a, "y" * b), (0, 1)), [0.0, 0.0]) for i, (a, b) in enumerate(sizes)]
        means.append(ranking_accuracy(rows, seed)["baselines"]["length_fitted"].mean)
    assert np.mean(means) == pytest.approx(0.5, abs=0.08)


def test_random_scorers_by_enumeration():
    """One ranking of 3: of the 6 orders one has 0 of 3 pairs right, two 1, two 2 and one 3. 40 lone pairs: binomial."""
    three = [(Ranking("p", ("a", "b", "c"), (0, 1, 2)), [0.0, 0.0, 0.0])]
    assert ranking_accuracy(three, seed=0)["baselines"]["random"] == Interval(0.5, 0.0, 1.0)
    lone = [(Ranking(f"p{i}", ("a", "b"), (0, 1)), [0.0, 0.0]) for i in range(40)]
    random = ranking_accuracy(lone, seed=0)["baselines"]["random"]
    assert (random.low, random.high) == (pytest.approx(0.35, abs=0.026), pytest.approx(0.65, abs=0.026))


def test_random_scorers_give_a_completion_one_score_in_all_its_pairs():
    """The 36 pairs of nine completions: orders with m of 36 pairs right number as permutations with m inversions, of
    which 2.2% have 8 or fewer and 3.8% 9: [9 / 36, 27 / 36]. Of 36 independent pairs 2.5% have 12 or fewer."""
    nine = [(Ranking("p", tuple("abcdefghi"), tuple(range(9))), [0.0] * 9)]
    random = ranking_accuracy(nine, seed=0)["baselines"]["random"]
    assert (random.low, random.high) == (pytest.approx(9 / 36, abs=1.1 / 36), pytest.approx(27 / 36, abs=1.1 / 36))


@pytest.mark.parametrize(("sign", "accuracy"), [(1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)])
def test_perfect_constant_and_inverted_models(sign, accuracy):
    rankings = [Ranking(f"p{i}", ("a", "bb", "cc", "d"), (2, 0, 1, 1)) for i in range(5)]
    report = ranking_accuracy([(r, [-sign * rank for rank in r.ranks]) for r in rankings], seed=0)
    assert report["accuracy"].mean == accuracy and (report["pairs"], report["ties"]) == (25, 5)
    if sign == 0.0:
        assert report["log_loss"] == pytest.approx(np.log(2)) and report["calibration_error"] == 0.0


def test_gold_accuracy_by_hand():
    # "p": (0, 1) ties in gold; (0, 2) ties in score, half; (1, 2) right. "q": right. 2.5 of 3.
    assert gold_accuracy(SCORED, [[1, 1, 0], [0, 1]]).mean == pytest.approx(2.5 / 3)


def test_scores_of_a_bradley_terry_world_are_calibrated():
    rng = np.random.default_rng(0)
    scored = []
    for i in range(600):
        a, b = rng.normal(0, 1.5, 2)
        ranks = (1, 2) if rng.random() < expit(a - b) else (2, 1)
        scored.append((Ranking(f"p{i}", ("x", "y"), ranks), [float(a), float(b)]))
    report = ranking_accuracy(scored, seed=0)
    assert report["calibration_error"] < 0.06
    overconfident = [(ranking, [3 * s for s in scores]) for ranking, scores in scored]
    assert ranking_accuracy(overconfident, seed=0)["calibration_error"] > 0.1


def test_the_same_prompt_by_two_labelers_is_one_cluster():
    twice = [SCORED[0], (Ranking("p", ("aa", "a"), (1, 2), "cid"), [1.0, 0.0])]
    report = ranking_accuracy(twice, seed=0)
    assert (report["prompts"], report["pairs"]) == (1, 3)
    assert (report["accuracy"].low, report["accuracy"].high) == (0.0, 1.0)


def test_ranks_sort_as_numbers_and_json_holds_it():
    ranking = Ranking("p", tuple("abcdefghijk"), tuple(range(11)))
    report = ranking_accuracy([(ranking, [float(-i) for i in range(11)])], seed=0)
    assert list(report["by_rank_distance"]) == [str(i) for i in range(1, 11)]
    assert json.loads(json.dumps(plain(report)))["accuracy"]["mean"] == 1.0


@pytest.mark.parametrize("scores", [[0.0], [0.0, float("nan"), 1.0]])
def test_bad_scores_are_refused(scores):
    with pytest.raises(ValueError):
        ranking_accuracy([(SCORED[0][0], scores)], seed=0)


def test_all_ties_are_refused():
    with pytest.raises(ValueError, match="untied"):
        ranking_accuracy([(Ranking("p", ("a", "b"), (1, 1)), [0.0, 1.0])], seed=0)
