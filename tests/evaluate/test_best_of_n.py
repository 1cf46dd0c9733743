"""align/evaluate/best_of_n.py: against all subsets, against exact distributions, and laws that were planted."""

import math
from itertools import combinations, product

import numpy as np
import pytest

from align.evaluate.best_of_n import Law, best_of_report, expected_best, fit_law, kl_best_of, sizes


def over_all_subsets(proxy, scores, n: int) -> float:
    """Mean over the sets of n answers of the score of the one with the highest proxy, of tied ones their mean."""
    total = 0.0
    subsets = list(combinations(range(len(proxy)), n))
    for subset in subsets:
        best = max(proxy[i] for i in subset)
        kept = [scores[i] for i in subset if proxy[i] == best]
        total += sum(kept) / len(kept)
    return total / len(subsets)


@pytest.mark.parametrize("levels", [1, 2, 4, 1000], ids="{} levels of proxy".format)
def test_expected_best_is_the_mean_over_all_subsets(levels):
    rng = np.random.default_rng(levels)
    proxy, gold = rng.integers(0, levels, (5, 9)).astype(float), rng.normal(size=(5, 9))
    for scores in (proxy, gold):
        found = expected_best(proxy, scores)
        assert found.shape == (9, 5)
        for n, p in product(range(1, 10), range(5)):
            assert found[n - 1, p] == pytest.approx(over_all_subsets(proxy[p], scores[p], n), abs=1e-12)


def test_best_of_1_is_the_mean_and_best_of_all_the_maximum():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 1000)), rng.normal(size=(3, 1000))
    by_proxy, by_gold = expected_best(proxy, proxy), expected_best(proxy, gold)
    np.testing.assert_allclose([by_proxy[0], by_gold[0]], [proxy.mean(1), gold.mean(1)], atol=1e-12)
    np.testing.assert_allclose(by_proxy[-1], proxy.max(1), atol=1e-12)
    np.testing.assert_allclose(by_gold[-1], gold[range(3), proxy.argmax(1)], atol=1e-12)
    assert (np.diff(by_proxy, axis=0) > 0).all()


def test_the_order_of_answers_changes_nothing():
    rng = np.random.default_rng(1)
    proxy, gold = rng.integers(0, 3, (1, 40)).astype(float), rng.normal(size=(1, 40))
    order = rng.permutation(40)
    np.testing.assert_allclose(expected_best(proxy[:, order], gold[:, order]), expected_best(proxy, gold), atol=1e-12)


def test_it_is_unbiased():
    """Of 6 normal answers a prompt: the maximum of 3 of them is 3 / (2 sqrt(pi)) on average."""
    proxy = np.random.default_rng(2).normal(size=(40_000, 6))
    found = expected_best(proxy, proxy)[2]
    assert abs(found.mean() - 3 / (2 * math.sqrt(math.pi))) < 4 * found.std() / math.sqrt(len(found))


@pytest.mark.parametrize(("count", "wanted"), [(2, [1, 2]), (3, [1, 2, 3]), (16, [1, 2, 4, 8, 16]), (6, [1, 2, 4, 6])])
def test_sizes_double_up_to_what_was_drawn(count, wanted):
    assert sizes(count) == wanted


# O1


def exact_kl(base, proxy, n: int) -> float:
    """KL(best-of-n, base) by enumerating every n draws; of tied ones each is kept alike."""
    kept = np.zeros(len(base))
    for draws in product(range(len(base)), repeat=n):
        best = max(proxy[i] for i in draws)
        ties = [i for i in draws if proxy[i] == best]
        for i in ties:
            kept[i] += math.prod(base[j] for j in draws) / len(ties)
    return sum(p * math.log(p / q) for p, q in zip(kept, base, strict=True) if p)


def test_O1_kl_of_best_of_n():
    wanted = {1: 0.0, 4: 0.636, 8: 1.204, 16: 1.835, 64: 3.175, 256: 4.549, 1000: 5.909, 60000: 10.002}
    for n, kl in wanted.items():
        assert kl_best_of(n) == pytest.approx(kl, abs=5e-4)


def uniform_kl(outputs: int, n: int) -> float:
    """KL of best-of-n over so many equally likely outputs of different proxy, which is the maximum of n dice."""
    shares = [(k / outputs) ** n - ((k - 1) / outputs) ** n for k in range(1, outputs + 1)]
    return sum(share * math.log(share * outputs) for share in shares if share)


def test_O1_the_formula_is_a_bound_that_many_outputs_reach():
    assert uniform_kl(5, 16) == pytest.approx(1.480, abs=5e-4) and uniform_kl(5, 16) < kl_best_of(16)
    assert uniform_kl(3, 4) == pytest.approx(exact_kl([1 / 3] * 3, [0, 1, 2], 4))
    assert 0.999 * kl_best_of(16) < uniform_kl(20_000, 16) <= kl_best_of(16)
    rng = np.random.default_rng(3)
    for n, levels in product((2, 3, 4), (2, 4, 100)):
        base, proxy = rng.dirichlet(np.ones(4)), rng.integers(0, levels, 4)
        assert exact_kl(base, proxy, n) <= kl_best_of(n) + 1e-12


# O2


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.2, 0.3), (0.7, -0.05), (-0.4, 0.1)])
def test_O2_planted_laws_are_found(form, alpha, beta):
    kl = np.array([0.0, *(kl_best_of(2**i) for i in range(1, 11))])
    d = np.sqrt(kl)
    bend = d if form == "best_of_n" else np.log(np.maximum(d, 1e-300))
    gains = d * (alpha - beta * bend)
    law = fit_law(form, kl, gains)
    assert (law.alpha, law.beta) == pytest.approx((alpha, beta), rel=0.01)
    np.testing.assert_allclose(law.gain(kl), gains, atol=1e-9)
    noise = np.random.default_rng(4).normal(0, 0.02, (400, len(kl)))  # what is measured of the gains
    fits = [fit_law(form, kl, gains + row) for row in noise]
    means = np.mean([(fit.alpha, fit.beta) for fit in fits], 0)
    spread = np.std([(fit.alpha, fit.beta) for fit in fits], 0) / 20
    assert (np.abs(means - (alpha, beta)) < 4 * spread).all()


@pytest.mark.parametrize("law", [Law("best_of_n", 1.2, 0.3), Law("rl", 1.2, 0.6), Law("best_of_n", -0.4, 0.1)], ids=str)
def test_O2_the_peak_is_where_the_law_is_highest(law):
    d = np.linspace(0, 10, 100_001)
    assert law.peak == pytest.approx(d[np.argmax(law.gain(d**2))], abs=2e-4)


def test_O2_without_a_bend_there_is_no_peak_and_with_one_distance_no_law():
    for form in ("best_of_n", "rl"):
        assert Law(form, 1.0, 0.0).peak is None and Law(form, 1.0, -0.1).peak is None
        assert fit_law(form, [0.0, -0.1, 0.5, 0.5], [0.0, 0.0, 1.0, 1.1]) is None


# The report's numbers


def test_a_policy_is_beside_the_n_that_is_as_far():
    """10 answers a prompt, of proxy 0 to 9 shifted by the prompt's number, and gold that falls as the proxy rises."""
    answers = [{"proxy": [p + i for i in range(10)], "gold": [-2.0 * i for i in range(10)]} for p in range(3)]
    records = [{"proxy": p + 7.5, "likert": -12.0, "kl": kl} for p, kl in enumerate((0.6, 0.7, 0.7))]
    found = best_of_report(answers, {"sft": None, "ppo": None, "ppo_ptx": {"sampled": records}})
    assert [row["n"] for row in found["curve"]] == [1, 2, 4, 8, 10] and list(found["policies"]) == ["ppo_ptx"]
    beside = found["policies"]["ppo_ptx"]
    assert beside["n"] == 4 and beside["kl"].mean == pytest.approx(2 / 3)
    best = over_all_subsets(range(10), range(10), 4)  # of prompt 0
    proxy, gold = beside["proxy"], beside["gold"]
    assert proxy["best_of"].mean == pytest.approx(best + 1) and proxy["score"].mean == pytest.approx(8.5)
    gain = proxy["gain"]
    assert [gain.low, gain.mean, gain.high] == pytest.approx([7.5 - best] * 3)  # as much on every prompt: paired
    assert gold["gain"].mean == pytest.approx(-12 + 2 * best)
    reaches = next(n for n in range(1, 11) if over_all_subsets(range(10), range(10), n) >= 7.5)
    assert proxy["matched_by"] == reaches and gold["matched_by"] == 1
    assert found["laws"]["proxy"]["alpha"] > 0 > found["laws"]["gold"]["alpha"]
    assert found["laws"]["gold"]["peak_kl"] in (0.0, None)


def test_the_laws_are_of_the_gain_over_best_of_1():
    """Of normal proxies the fitted law gives the curve back, and a constant added to all scores changes none."""
    proxy = np.random.default_rng(5).normal(size=(500, 32))
    found, moved = (best_of_report([{"proxy": row} for row in proxy + added], {}) for added in (0.0, 100.0))
    law = found["laws"]["proxy"]
    assert (law["alpha"], law["beta"]) == pytest.approx([moved["laws"]["proxy"][key] for key in ("alpha", "beta")])
    fitted = Law("best_of_n", law["alpha"], law["beta"])
    for row in found["curve"]:
        assert fitted.gain(row["kl"]) == pytest.approx(row["proxy"].mean - found["curve"][0]["proxy"].mean, abs=0.03)


def test_without_a_judge_there_is_no_gold_and_what_no_n_reaches_says_so():
    records = [{"proxy": 5.0, "likert": None, "kl": kl} for kl in (8.0, 9.0)]
    found = best_of_report([{"proxy": [0.0, 1.0]}] * 2, {"ppo": {"sampled": records}})
    assert found["curve"][1]["gold"] is None and found["laws"] == {"proxy": None, "gold": None}  # one distance: no law
    beside = found["policies"]["ppo"]
    assert beside["n"] == 2 and beside["gold"] is None and beside["proxy"]["matched_by"] is None
