"""Agreement of labelers, what it allows a predictor, Bradley-Terry with ties: closed forms and simulated crowds."""

import math

import numpy as np
import pytest
from scipy.special import expit

from align.evaluate.people import bradley_terry, ceiling, ceiling_bounds, labelers_report
from align.types import Ranking

FLAT = 1e6  # a prior that says nothing


def test_two_items_have_a_closed_form():
    # 6 wins, 2 ties, 3 losses: the model is saturated, so P(win) = 6/11 ...: gap = ln(6/3), nu = 2 / sqrt(6 x 3).
    verdicts = [1.0] * 6 + [0.5] * 2 + [0.0] * 3
    strength, nu = bradley_terry([0] * 11, [1] * 11, verdicts, 2, FLAT)
    assert strength[0] - strength[1] == pytest.approx(math.log(2), abs=1e-4)
    assert nu == pytest.approx(2 / math.sqrt(18), abs=1e-4)


def test_without_ties_it_is_the_logistic_of_bradley_and_terry():
    # Minorise-maximise (Zermelo 1929) on three items in exact repetition, another algorithm for the same optimum.
    wins = np.array([[0, 7, 4], [3, 0, 6], [5, 2, 0]], dtype=float)
    p = np.ones(3)
    for _ in range(5000):
        games = wins + wins.T
        p = np.array([wins[i].sum() / sum(games[i, j] / (p[i] + p[j]) for j in range(3) if j != i) for i in range(3)])
        p /= p.prod() ** (1 / 3)
    first, second, verdicts = [], [], []
    for i in range(3):
        for j in range(3):
            first, second = first + [i] * int(wins[i, j]), second + [j] * int(wins[i, j])
            verdicts += [1.0] * int(wins[i, j])
    strength, nu = bradley_terry(first, second, verdicts, 3, FLAT)
    np.testing.assert_allclose(strength - strength.mean(), np.log(p), atol=1e-4)
    assert nu == 0.0


def test_planted_strengths_and_ties_are_found_again():
    rng = np.random.default_rng(0)
    planted, nu = np.array([1.0, 0.2, -0.4, -0.8]), 0.6
    i, j = np.triu_indices(4, 1)
    first, second = np.repeat(i, 4000), np.repeat(j, 4000)
    weights = np.stack(
        [np.exp(planted[first]), nu * np.exp((planted[first] + planted[second]) / 2), np.exp(planted[second])], axis=1
    )
    drawn = rng.random(len(first))[:, None] * weights.sum(1, keepdims=True) > np.cumsum(weights, axis=1)
    verdicts = np.array([1.0, 0.5, 0.0])[drawn.sum(1)]
    strength, found = bradley_terry(first, second, verdicts, 4, FLAT)
    np.testing.assert_allclose(strength - strength.mean(), planted - planted.mean(), atol=0.06)
    assert found == pytest.approx(nu, abs=0.03)


def test_what_nobody_ever_rejected_stays_finite_and_what_nobody_judged_is_0():
    strength, _ = bradley_terry([0, 0], [1, 1], [1.0, 1.0], 3)
    assert 0 < strength[0] < 10 and strength[1] == pytest.approx(-strength[0]) and strength[2] == 0.0


def test_ceiling_bounds_by_hand():
    # All pairs alike with q = 0.9: a = 0.81 + 0.01, c = 0.9. Half certain and half coin tosses: a = c = 0.75.
    assert ceiling_bounds(0.82) == pytest.approx((0.82, 0.9))
    assert ceiling_bounds(0.75)[0] == 0.75
    assert ceiling_bounds(0.5) == (0.5, 0.5) and ceiling_bounds(0.4) == (0.5, 0.5) and ceiling_bounds(1.0) == (1.0, 1.0)


@pytest.mark.parametrize("spread", [0.5, 1.5, 4.0])
def test_the_ceiling_is_what_a_simulated_crowd_allows(spread):
    rng = np.random.default_rng(1)
    gaps = spread * rng.standard_normal(400_000)
    one, other, third = (rng.random(len(gaps)) < expit(gaps) for _ in range(3))
    measured = np.mean(one == other)
    assert ceiling(measured) == pytest.approx(np.mean((gaps > 0) == third), abs=0.01)
    low, high = ceiling_bounds(measured)
    assert low < ceiling(measured) < high


def test_ceiling_at_its_ends():
    assert ceiling(0.5) == ceiling(0.3) == 0.5
    assert ceiling(1.0) == pytest.approx(1.0, abs=1e-3)
    assert 0.79 < ceiling(0.726) < 0.84  # the paper's labelers: between its bounds, 0.726 and 0.836


# Three labelers on "p" (x, y, z in any order) and two on "q"; scores order x > y > z and u > v.
# "p" (x, y): ann x, ben x, cat y. (x, z): x, x, tie. (y, z): tie, y, y. "q" (u, v): ann v, None v.
RANKINGS = [
    (Ranking("p", ("x", "y", "z"), (0, 1, 1), "ann"), [2.0, 1.0, 0.0]),
    (Ranking("p", ("z", "y", "x"), (2, 1, 0), "ben"), [0.0, 1.0, 2.0]),
    (Ranking("p", ("x", "y", "z"), (1, 0, 1), "cat"), [2.0, 1.0, 0.0]),
    (Ranking("q", ("u", "v"), (1, 0), "ann"), [1.0, 0.0]),
    (Ranking("q", ("v", "u"), (0, 1), None), [0.0, 1.0]),
]


def test_agreement_by_hand():
    report = labelers_report(RANKINGS, seed=0)
    # Untied by both: (x, y) ann-ben alike, ann-cat not, ben-cat not; (x, z) ann-ben; (y, z) ben-cat; (u, v) alike: 4/6.
    assert report["agreement"].mean == pytest.approx(4 / 6) and (report["pairs"], report["prompts"]) == (6, 2)
    # With ties 10 couples of verdicts, alike are the same 4.
    assert report["agreement_with_ties"].mean == pytest.approx(4 / 10)
    assert report["ties"] == pytest.approx(2 / 11)
    found = {name: (row["agreement"].mean, row["pairs"]) for name, row in report["by_labeler"].items()}
    assert found == {"ann": (3 / 4, 4), "ben": (3 / 4, 4), "cat": (pytest.approx(1 / 3), 3)}


def test_the_ceiling_is_of_the_agreement_without_ties():
    """Agreement 2/3; at most (1 + sqrt(4/3 - 1)) / 2 = (1 + 0.577350) / 2."""
    report = labelers_report(RANKINGS, seed=0)
    assert report["ceiling_bounds"] == pytest.approx([0.666667, 0.788675], abs=1e-6)
    assert report["ceiling"].mean == pytest.approx(ceiling(4 / 6)) and 0.667 < report["ceiling"].mean < 0.788


def test_consensus_by_hand():
    """x wins 2 of 3 over y and nothing is against it; y beats z twice; v beats u twice, where the scores are wrong."""
    consensus = labelers_report(RANKINGS, seed=0)["consensus"]
    assert consensus["pairs"] == 4 and consensus["accuracy"].mean == pytest.approx(3 / 4)
    assert consensus["tie_parameter"] > 0


def test_accuracy_beside_the_ceiling_is_on_the_pairs_that_it_is_for():
    """Both judgements of each couple untied by both: (x, y) right, right of ann and ben, right, wrong of ann and cat,
    of ben and cat; (x, z) and (y, z) right twice; (u, v) wrong twice: 8 of 12. What one judged alone does not count."""
    alone = (Ranking("r", ("m", "n"), (0, 1), "ann"), [0.0, 1.0])
    assert labelers_report([*RANKINGS, alone], seed=0)["accuracy"].mean == pytest.approx(8 / 12)
    # (m, n) is a tie to ben, so hard, and not among the pairs of the ceiling; (m, o) and (n, o) are right four times.
    ranks = {"ann": (0, 1, 2), "ben": (0, 0, 1)}
    tied = [(Ranking("s", ("m", "n", "o"), said, who), [1.0, 2.0, 0.0]) for who, said in ranks.items()]
    assert labelers_report([*RANKINGS, *tied], seed=0)["accuracy"].mean == pytest.approx(12 / 16)


def test_all_ties_leave_every_strength_at_0():
    strength, nu = bradley_terry([0, 0, 1], [1, 1, 2], [0.5, 0.5, 0.5], 3)
    np.testing.assert_allclose(strength, 0, atol=1e-6)
    assert math.isfinite(nu) and nu > 100


@pytest.mark.parametrize("rankings", [RANKINGS[:1], RANKINGS[:1] * 2], ids=["once", "twice"])
def test_one_labeler_alone_has_no_ceiling(rankings):
    report = labelers_report(rankings, seed=0)
    assert report["agreement"] is None and report["ceiling"] is None and report["consensus"] is None
    assert report["accuracy"] is None
    assert report["by_labeler"] == {} and report["ties"] == pytest.approx(1 / 3)


def test_a_subset_of_the_completions_is_enough_to_agree():
    two = [
        (Ranking("p", ("a", "b", "c"), (0, 1, 2), "ann"), [0, 0, 0]),
        (Ranking("p", ("b", "a"), (1, 0), "ben"), [0, 0]),
    ]
    report = labelers_report(two, seed=0)
    assert (report["agreement"].mean, report["pairs"]) == (1.0, 1)
