"""Intervals and win rates: small cases worked by hand, the coverage they promise, and what they refuse."""

import subprocess
import sys

import numpy as np
import pytest

from align.evaluate.win_rate import (
    Interval,
    Z,
    accuracy_gain,
    accuracy_interval,
    agreement,
    cluster_interval,
    compare,
    mean_interval,
    paired_gain,
    preferences,
    rate_interval,
    win_interval,
    win_rate,
)
from align.files import plain
from align.types import Ranking


def close(interval: Interval, mean: float, low: float, high: float) -> None:
    assert (interval.mean, interval.low, interval.high) == pytest.approx((mean, low, high), abs=2e-5)


def test_interval_prints_and_dumps():
    interval = Interval(0.612, 0.578, 0.641)
    assert str(interval) == "0.61 [0.58, 0.64]"
    assert plain({"x": [interval]}) == {"x": [{"mean": 0.612, "low": 0.578, "high": 0.641}]}


def test_mean_interval_by_hand():
    # sd = sqrt((2.25 + .25 + .25 + 2.25) / 3) = 1.290994; se = .645497; t(3) = 3.182446; half = 2.054260
    close(mean_interval([1, 2, 3, 4]), 2.5, 0.445740, 4.554260)


def test_paired_gain_by_hand():
    # differences 2, 1, 0: mean 1, sd 1, se = .577350; t(2) = 4.302653; half = 2.484138
    close(paired_gain([3, 5, 4], [1, 4, 4]), 1.0, -1.484138, 3.484138)


def test_wilson_by_hand():
    # n = 10, k = 8, z^2 = 3.841459: centre 9.920729 / 13.841459 = .716740,
    # half = 1.959964 / 13.841459 * sqrt(8 * 2 / 10 + .960365) = .226577
    close(rate_interval(8, 10), 0.8, 0.490162, 0.943318)
    assert rate_interval(0, 5).low == 0.0
    assert rate_interval(5, 5).high == 1.0


def test_win_interval_by_hand():
    # 2 wins, a tie, a loss: mean .625, n = 4, ties t = .25; 7.841459 p^2 - 8.841459 p + 1.802591 = 0
    # root = sqrt(78.171397 - 56.539771) = 4.650981; p = (8.841459 -+ 4.650981) / 15.682918
    close(win_interval([1, 1, 0.5, 0]), 0.625, 0.267201, 0.860325)


def test_win_interval_without_ties_is_wilson():
    wins = [1.0] * 8 + [0.0] * 2
    close(win_interval(wins), 0.8, 0.490162, 0.943318)
    close(win_interval([1.0] * 5), 1.0, rate_interval(5, 5).low, 1.0)


def test_cluster_interval_by_hand():
    # Two clusters, 1 of 2 and 3 of 3: draws give 2/4 (1 in 4), 4/5 (2 in 4) or 6/6 (1 in 4).
    close(cluster_interval([1, 3], [2, 3], seed=0), 0.8, 0.5, 1.0)
    assert cluster_interval([1, 0, 3], [2, 0, 3], seed=0) == cluster_interval([1, 3], [2, 3], seed=0)


def test_preferences_by_hand():
    assert preferences([1, 2, 3], [2, 2, 2]).tolist() == [0.0, 0.5, 1.0]


def test_O3_a_model_against_itself_wins_half():
    rng = np.random.default_rng(0)
    scores = rng.integers(1, 8, 501).astype(float)
    assert win_rate(scores, scores, seed=3) == Interval(0.5, 0.5, 0.5)
    answers = [f"answer {i}" for i in range(11)]

    def prefers_the_first(first, second):
        return 1.0

    assert win_rate(answers, answers, 0, prefers_the_first).mean == 0.5


def test_O3_ties_count_half():
    assert win_rate([1.0, 2.0, 2.0, 5.0], [2.0, 2.0, 1.0, 5.0], seed=0).mean == 0.5
    assert win_rate([2.0, 2.0], [1.0, 2.0], seed=0).mean == 0.75


def test_O3_order_is_random_and_a_taste_for_the_first_place_cancels():
    a, b = [("a", i) for i in range(200)], [("b", i) for i in range(200)]
    seen = []

    def prefers_the_first(first, second):
        seen.append(first[0])
        return 1.0

    assert win_rate(a, b, 0, prefers_the_first).mean == 0.5
    assert seen.count("a") == 100 and seen != sorted(seen)
    first = compare(prefers_the_first, a, b, seed=1).tolist()
    assert first == compare(prefers_the_first, a, b, seed=1).tolist() != compare(prefers_the_first, a, b, 2).tolist()


def test_O3_verdicts_are_mapped_back_and_the_interval_holds_the_rate():
    def longer(first, second):
        return float(len(first) > len(second))

    interval = win_rate(["aaa"] * 30, ["bb"] * 30, 5, longer)
    assert interval.mean == interval.high == 1.0
    assert 0.85 < interval.low < 1.0


def test_win_rate_is_antisymmetric():
    rng = np.random.default_rng(1)
    a, b = rng.integers(1, 8, (2, 300)).astype(float)
    one, other = win_rate(a, b, seed=0), win_rate(b, a, seed=9)
    close(one, 1 - other.mean, 1 - other.high, 1 - other.low)
    close(paired_gain(a, b), -paired_gain(b, a).mean, -paired_gain(b, a).high, -paired_gain(b, a).low)


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def test_t_interval_covers_95_percent_at_small_n():
    rng = np.random.default_rng(0)
    assert 0.935 < np.mean([covers(mean_interval(rng.normal(3, 2, 6)), 3) for _ in range(2000)]) < 0.965


@pytest.mark.parametrize("chances", [(0.5, 0.2, 0.3), (0.9, 0.08, 0.02), (0.1, 0.8, 0.1)])
def test_win_interval_covers_95_percent(chances):
    rng = np.random.default_rng(0)
    draws = rng.choice([1.0, 0.5, 0.0], p=chances, size=(2000, 60))
    rate = chances[0] + chances[1] / 2
    assert 0.93 < np.mean([covers(win_interval(row), rate) for row in draws]) < 0.98


def test_clusters_widen_the_interval_as_they_must():
    rng = np.random.default_rng(0)
    clustered, naive = [], []
    for _ in range(200):
        right = rng.binomial(10, rng.beta(1.4, 0.6, 60))  # 60 prompts of 10 pairs; true accuracy .7
        clustered.append(covers(cluster_interval(right, np.full(60, 10), seed=0, resamples=400), 0.7))
        naive.append(covers(rate_interval(int(right.sum()), 600), 0.7))
    assert 0.90 <= np.mean(clustered) <= 0.98
    assert np.mean(naive) < 0.75  # what treating pairs as independent would have claimed as 95%


def test_accuracy_interval_never_claims_certainty():
    assert accuracy_interval([1, 1, 0], ["p", "p", "p"], 0) == Interval(pytest.approx(2 / 3), 0.0, 1.0)
    close(accuracy_interval([1] * 6, ["p", "p", "q", "q", "r", "r"], 0), 1.0, rate_interval(3, 3).low, 1.0)
    half = accuracy_interval([1, 0, 1, 0], ["p", "p", "q", "q"], 0)  # each prompt half right
    close(half, 0.5, rate_interval(1, 2).low, rate_interval(1, 2).high)
    many = accuracy_interval([1, 0] * 40, [i // 2 for i in range(80)], 0)
    close(many, 0.5, rate_interval(20, 40).low, rate_interval(20, 40).high)
    # One prompt of 8 pairs and two of 1: (8 + 1 + 1)^2 / (64 + 1 + 1) = 1.5 prompts, so wider than 3.
    lopsided = accuracy_interval([1] * 10, ["p"] * 8 + ["q", "r"], 0)
    assert lopsided.low == pytest.approx(1 / (1 + Z**2 / (100 / 66))) and lopsided.low < rate_interval(3, 3).low


def test_under_ten_clusters_the_bootstrap_is_not_asked():
    # 6 of 9 prompts: n = 9, mean 2/3; 12.841459 p^2 - 15.841459 p + 4 = 0; root = sqrt(250.951823 - 205.463344)
    # = 6.744515; p = (15.841459 -+ 6.744515) / 25.682918
    close(accuracy_interval([1] * 6 + [0] * 3, range(9), 0), 2 / 3, 0.354202, 0.879416)
    # Gains 1 in 6 of 9: mean 2/3, sum of squares 6/9 + 3 x 4/9 = 2, x 9/8; error sqrt(2.25) / 9 = 1/6; t(8) = 2.306004
    close(accuracy_gain([1] * 6 + [0] * 3, [0] * 9, range(9), 0), 2 / 3, 2 / 3 - 2.306004 / 6, 1.0)
    # Ten show it enough: the share of ten draws in tenths.
    ten = accuracy_interval([1] * 6 + [0] * 4, range(10), 0)
    assert (ten.low * 10, ten.high * 10) == (pytest.approx(3), pytest.approx(9))


def test_clusters_count_by_what_they_tell_and_not_by_their_number():
    # 89 pairs of one prompt, all right, and eleven prompts of one pair, 8 right: 97 of 100, but as much as
    # 100^2 / (89^2 + 11) = 1.260716 prompts tell. 5.102175 p^2 - 6.287248 p + 1.186208 = 0;
    # root = sqrt(39.529487 - 24.208963) = 3.914144; p = (6.287248 -+ 3.914144) / 10.204350
    right, prompts = [1] * 97 + [0] * 3, [0] * 89 + list(range(1, 12))
    close(accuracy_interval(right, prompts, 0), 0.97, 0.232558, 0.999710)
    # Gains 1 on 3 of 5 pairs of one prompt and on 5 of eleven prompts of one pair: 8 of 16, as 16^2 / (25 + 11) = 7.1
    # tell: Student's interval. Sums less mean x count: 3 - 2.5, eleven times -+ .5: squares .25 + 2.75 = 3, times
    # 7.1 / 6.1; error sqrt(3.490909) / 16 = .116775; t(6.11) = 2.436172; half .284483
    gains, prompts = [1, 1, 1, 0, 0] + [1] * 5 + [0] * 6, [0] * 5 + list(range(1, 12))
    close(accuracy_gain(gains, [0] * 16, prompts, 0), 0.5, 0.215517, 0.784483)


def test_the_bootstrap_draws_by_its_seed():
    right = np.random.default_rng(0).integers(0, 9, 30)
    first = cluster_interval(right, np.full(30, 8), seed=1)
    assert first == cluster_interval(right, np.full(30, 8), seed=1) != cluster_interval(right, np.full(30, 8), seed=2)


def test_accuracy_gain_never_claims_certainty():
    # Wilson's bound on 0 of n is z^2 / (n + z^2) = 3.841 / (n + 3.841).
    close(accuracy_gain([1, 0, 1], [1, 0, 1], ["p", "q", "r"], 0), 0.0, -3.841459 / 6.841459, 3.841459 / 6.841459)
    close(accuracy_gain([1, 1], [0, 0], ["p", "q"], 0), 1.0, 1 - 2 * 3.841459 / 5.841459, 1.0)
    # Gains of four prompts 1, 0, 0, 1: mean .5, standard error .57735 / 2, t of 3 degrees 3.182446: clipped at 1.
    close(accuracy_gain([1, 1, 0, 1], [0, 1, 0, 0], range(4), 0), 0.5, 0.5 - 3.182446 * 0.5773503 / 2, 1.0)
    assert accuracy_gain([1, 0], [0, 0], ["p", "p"], 0) == Interval(0.5, -1.0, 1.0)


def test_few_clusters_are_covered_where_the_bootstrap_is_not():
    rng = np.random.default_rng(0)
    safe, gain, naive = [], [], []
    prompts = np.repeat(np.arange(5), 8)
    for _ in range(300):
        skill = np.repeat(rng.beta(1.4, 0.6, 5), 8)  # true accuracies .7 and .35
        right, other = rng.random(40) < skill, rng.random(40) < skill / 2
        safe.append(covers(accuracy_interval(right, prompts, 0), 0.7))
        gain.append(covers(accuracy_gain(right, other, prompts, 0), 0.35))
        naive.append(covers(cluster_interval(right.reshape(5, 8).sum(1), np.full(5, 8), 0, resamples=400), 0.7))
    assert np.mean(safe) >= 0.95 and np.mean(gain) >= 0.92
    assert np.mean(naive) < 0.88  # what was claimed as 95%


def test_agreement_by_hand():
    # Prompt 1: a < b < c against b < a < c: two of three pairs alike. Prompt 2: the first labeler ties a and b, so
    # two pairs are left, both alike. The second labeler's completions stand in another order. Together 4 of 5.
    rankings = [
        Ranking("1", ("a", "b", "c"), (1, 2, 3), "ann"),
        Ranking("1", ("c", "b", "a"), (3, 1, 2), "bob"),
        Ranking("2", ("a", "b", "c"), (1, 1, 2), "ann"),
        Ranking("2", ("a", "b", "c"), (1, 2, 3), "bob"),
        Ranking("3", ("a", "b"), (1, 2), "ann"),  # nobody else ranked it
        Ranking("1", ("a", "d"), (1, 2), "cid"),  # other completions of a known prompt
    ]
    found = agreement(rankings)
    assert (found.interval.mean, found.pairs, found.prompts) == (0.8, 5, 2)
    assert agreement(rankings[-2:]) is None
    assert agreement([rankings[0]] * 2) is None  # one labeler twice


def test_labelers_without_a_name_are_different_ones():
    found = agreement([Ranking("p", ("a", "b"), (1, 2))] * 2)
    assert (found.interval.mean, found.pairs, found.prompts) == (1.0, 1, 1)
    found = agreement([Ranking("p", ("a", "b"), ranks, who) for ranks, who in (((1, 2), None), ((2, 1), "ann"))])
    assert (found.interval.mean, found.pairs) == (0.0, 1)


def test_agreement_reads_conversations():
    prompt = ({"role": "user", "content": "hi"},)
    rankings = [Ranking(prompt, ("a", "b"), (1, 2), who) for who in ("ann", "bob", "cid")]
    found = agreement(rankings)
    assert (found.interval.mean, found.pairs, found.prompts) == (1.0, 3, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval([1.0]),
        lambda: mean_interval([1.0, float("nan")]),
        lambda: paired_gain([1, 2], [1, 2, 3]),
        lambda: win_rate([1.0, float("nan")], [1.0, 2.0], 0),
        lambda: win_rate([1.0], [1.0, 2.0], 0),
        lambda: win_interval([0.2, 0.4]),
        lambda: win_rate(["a", "b"], ["c", "d"], 0, lambda first, second: 7.0),
        lambda: cluster_interval([1], [2], 0),
        lambda: accuracy_interval([], [], 0),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError):
        call()


def test_win_rate_needs_no_torch():
    code = "import align.evaluate.win_rate, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
