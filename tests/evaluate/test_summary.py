"""The summary's numbers, and that its schema lets nothing else through."""

import copy
import json

import pytest

from align.errors import UserError
from align.evaluate.schema import MODES, POLICIES, check_summary
from align.evaluate.summary import by_reward_model, policy_summary, summarise


def answers(*likert):
    return [{"id": i, "likert": x} for i, x in enumerate(likert)]


def test_policy_summary_by_hand():
    # Gains 2, 1, 0: mean 1 -+ 4.302653 / sqrt(3); two wins and a tie: 2.5 / 3.
    summary = policy_summary(answers(3, 5, 4), answers(1, 4, 4), seed=0)
    assert summary["gold"]["mean"] == 4.0
    assert summary["gain_vs_sft"] == pytest.approx({"mean": 1.0, "low": -1.484138, "high": 3.484138}, abs=1e-5)
    assert summary["win_rate_vs_sft"]["mean"] == pytest.approx(2.5 / 3)


def test_policy_summary_wants_the_same_prompts():
    with pytest.raises(ValueError, match="same prompts"):
        policy_summary(answers(1, 2), answers(1, 2)[::-1], seed=0)
    nameless = [{"prompt": prompt, "likert": 1} for prompt in "ab"]  # a file of prompts need not number them
    assert policy_summary(nameless, nameless, seed=0)["gold"]["mean"] == 1.0
    with pytest.raises(ValueError, match="same prompts"):
        policy_summary(nameless, nameless[::-1], seed=0)


def test_summarise_gives_the_schema(make_evaluation):
    evaluation = make_evaluation()
    summary = json.loads(json.dumps(summarise(evaluation)))
    check_summary(summary)
    assert set(summary) == {"schema", "preset", "seconds", "labelers", "rm", "policies", "step_zero"}
    assert summary["schema"] == 1 and tuple(summary["policies"]) == POLICIES
    assert summary["seconds"]["total"] == 480.0
    sampled = evaluation["policies"]["ppo_ptx"]["sampled"]
    ppo_ptx = summary["policies"]["ppo_ptx"]
    assert set(ppo_ptx) == {"sampled", "greedy", "proxy", "kl", "perplexity", "response_tokens", "finished"}
    assert ppo_ptx["kl"] == pytest.approx(sum(r["kl"] for r in sampled) / len(sampled))
    assert ppo_ptx["finished"] == pytest.approx(sum(r["finished"] for r in sampled) / len(sampled))
    assert summary["policies"]["sft"]["sampled"]["gain_vs_sft"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert summary["policies"]["sft"]["greedy"]["win_rate_vs_sft"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_a_policy_reports_its_own_means_of_its_sampled_answers(make_evaluation):
    evaluation = make_evaluation(n=4)
    for i, name in enumerate(POLICIES):
        policy = evaluation["policies"][name]
        policy["perplexity"] = 9.0 + i
        for j in range(4):  # each mean is that of the values and half of 1 or 0 more: 0.5
            more = {"proxy": i + j % 2, "kl": 10 + i + j % 2, "response_tokens": 20 + i + j % 2, "finished": j < i}
            policy["sampled"][j] |= more
            policy["greedy"][j] |= dict.fromkeys(more, 77)
    keys = ("proxy", "kl", "response_tokens", "finished", "perplexity")
    table = {name: [policy[key] for key in keys] for name, policy in summarise(evaluation)["policies"].items()}
    assert table == {
        "base": [0.5, 10.5, 20.5, 0.0, 9.0],
        "prompted": [1.5, 11.5, 21.5, 0.25, 10.0],
        "sft": [2.5, 12.5, 22.5, 0.5, 11.0],
        "ppo": [3.5, 13.5, 23.5, 0.75, 12.0],
        "ppo_ptx": [4.5, 14.5, 24.5, 1.0, 13.0],
    }


def test_a_total_that_was_measured_is_kept(make_evaluation):
    """It covers what ran between the stages too; without one it is their sum, a stage that was not run being 0."""
    evaluation = make_evaluation(n=4)
    evaluation["seconds"]["collect"] = None
    assert summarise(evaluation)["seconds"]["total"] == 430.0, "100 + 60 + 40 + 200 + 30"
    evaluation["seconds"]["total"] = 512.0
    assert summarise(evaluation)["seconds"]["total"] == 512.0


def test_by_reward_model_by_hand():
    """SFT scores 0, 2, 4 (deviation 2), PPO 2, 4, 12: gains 2, 2, 8, mean 4, half-width 4.302653 x 2; finished -1, 0, 1
    and 0 in the mean. Greedy SFT 0, 1, 2 (deviation 1), PPO -1, 0, 1: each loses 1, all else alike."""
    about = {
        "sampled": {"kl": 1.0, "response_tokens": 3, "repetition": 0.0},
        "greedy": {"kl": 4.0, "response_tokens": 5, "repetition": 0.5},
    }
    ends = {"sft": (True, False, False), "ppo": (False, False, True)}
    scores = {
        "sft": {"sampled": (0, 2, 4), "greedy": (0, 1, 2)},
        "ppo": {"sampled": (2, 4, 12), "greedy": (-1, 0, 1)},
    }
    policies = {
        name: {mode: [{"id": i, "proxy": s, "finished": mode == "greedy" or ends[name][i], "response": f"{name} {s}",
                       **about[mode]}
                      for i, s in enumerate(scores[name][mode])] for mode in MODES}
        | {"perplexity": 10.0 if name == "sft" else 10.2}
        for name in scores
    }  # fmt: skip
    table = by_reward_model(policies, seed=0)
    ppo = table["ppo"]["sampled"]
    assert ppo["gain_vs_sft"] == pytest.approx({"mean": 4.0, "low": 4 - 8.605306, "high": 4 + 8.605306}, abs=1e-5)
    assert ppo["gain_in_deviations"] == pytest.approx(
        {"mean": 2.0, "low": 2 - 4.302653, "high": 2 + 4.302653}, abs=1e-5
    )
    ended = ppo["finished_gain_vs_sft"]
    assert ended == pytest.approx({"mean": 0.0, "low": -1.0, "high": 1.0}, abs=1e-5), "2.48, and a share ends at 1"
    assert table["ppo"]["perplexity_vs_sft"] == pytest.approx(1.02)
    greedy = table["ppo"]["greedy"]
    assert ppo["kl"]["mean"] == 1.0 and greedy["kl"] is None
    means = {key: numbers["mean"] for key, numbers in greedy.items() if numbers}
    assert means == {
        "score": 0.0, "gain_vs_sft": -1.0, "gain_in_deviations": -1.0, "win_rate_vs_sft": 0.0, "response_tokens": 5.0,
        "finished": 1.0, "finished_gain_vs_sft": 0.0, "repetition": 0.5,
    }  # fmt: skip
    assert {name: [table[name][mode]["score"]["mean"] for mode in MODES] for name in table} == {
        "sft": [2.0, 1.0],
        "ppo": [6.0, 0.0],
    }
    policies["ppo"]["sampled"].reverse()
    with pytest.raises(ValueError, match="same prompts"):
        by_reward_model(policies, seed=0)


def test_equal_answers_tie_whatever_another_batch_rounds():
    about = {"kl": 0.0, "response_tokens": 3, "repetition": 0.0, "finished": True}
    rows = {
        name: [{"proxy": p, "response": r, **about} for p, r in zip(proxies, ("same", "same", name), strict=True)]
        for name, proxies in {"sft": (1.0, 2.0, 0.0), "ppo": (1.000001, 1.999999, 3.0)}.items()
    }
    policies = {name: {"sampled": rows[name], "greedy": rows[name], "perplexity": 1.0} for name in rows}
    sampled = by_reward_model(policies, seed=0)["ppo"]["sampled"]
    assert sampled["win_rate_vs_sft"]["mean"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert sampled["finished_gain_vs_sft"]["high"] > 0, "three prompts of which none changed are no proof of that"


def test_policies_that_were_not_trained_are_null(make_evaluation):
    evaluation = make_evaluation(without=("ppo",))
    assert summarise(evaluation)["policies"]["ppo"] is None
    del evaluation["policies"]["prompted"]
    assert summarise(evaluation)["policies"]["prompted"] is None
    evaluation = make_evaluation(without=("ppo", "ppo_ptx"))
    evaluation["step_zero"] = None
    evaluation["labelers"] = {"agreement": None}
    assert summarise(evaluation)["step_zero"] is None


def test_a_policy_of_others_has_no_step_zero(make_evaluation):
    evaluation = make_evaluation()
    evaluation["step_zero"] = None
    summary = summarise(evaluation)
    assert summary["step_zero"] is None and summary["policies"]["ppo"] is not None


def test_summarise_names_what_it_cannot_use(make_evaluation):
    with pytest.raises(UserError, match="no sft policy"):
        summarise(make_evaluation(without=("sft",)))
    evaluation = make_evaluation()
    evaluation["policies"]["dpo"] = evaluation["policies"]["ppo"]
    with pytest.raises(UserError, match="dpo"):
        summarise(evaluation)


BREAKS = {
    "schema is 2": lambda s: s.update(schema=2),
    "preset is not a string": lambda s: s.update(preset=None),
    "summary lacks ['rm']": lambda s: s.pop("rm"),
    "summary has unknown ['extra']": lambda s: s.update(extra=1),
    "seconds lacks ['ppo']": lambda s: s["seconds"].pop("ppo"),
    "seconds.total is None": lambda s: s["seconds"].update(total=None),
    "seconds.sft is -1": lambda s: s["seconds"].update(sft=-1),
    "labelers.agreement.low is -0.1, outside": lambda s: s["labelers"]["agreement"].update(low=-0.1),
    "rm.pairs is not a count: 3.5": lambda s: s["rm"].update(pairs=3.5),
    "rm.accuracy.high is 1.2, outside": lambda s: s["rm"]["accuracy"].update(high=1.2),
    "policies lacks ['ppo']": lambda s: s["policies"].pop("ppo"),
    "policies has unknown ['dpo']": lambda s: s["policies"].update(dpo=None),
    "policies.sft.kl is nan": lambda s: s["policies"]["sft"].update(kl=float("nan")),
    "policies.sft.finished is True": lambda s: s["policies"]["sft"].update(finished=True),
    "policies.sft.finished is 1.5, outside": lambda s: s["policies"]["sft"].update(finished=1.5),
    "policies.ppo.greedy is None": lambda s: s["policies"]["ppo"].update(greedy=None),
    "policies.ppo.sampled.gold is not ordered": lambda s: s["policies"]["ppo"]["sampled"]["gold"].update(low=6.9),
    "step_zero lacks ['kl']": lambda s: s["step_zero"].pop("kl"),
}


@pytest.mark.parametrize("message", BREAKS)
def test_check_summary_refuses(make_evaluation, message):
    summary = copy.deepcopy(summarise(make_evaluation(n=20)))
    BREAKS[message](summary)
    with pytest.raises(ValueError) as error:
        check_summary(summary)
    assert message in str(error.value)
