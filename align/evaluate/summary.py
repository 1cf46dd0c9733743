"""The stable summary of a run (schema 1): made from an evaluation, and checked before it is written.

    {"schema": 1, "preset": str, "seconds": {"base", "sft", "collect", "rm", "ppo", "evaluate", "total"},
     "labelers": {"agreement": I},
     "rm": {"accuracy": I, "gold_accuracy": I, "demonstration_mean", "pairs"},
     "policies": {"base": P, "prompted": P, "sft": P, "ppo": P, "ppo_ptx": P},
     "step_zero": {"ratio_max_deviation", "kl", "value_minus_score"}}
    P = {"sampled": D, "greedy": D, "proxy", "kl", "perplexity", "response_tokens", "finished"} or null
    D = {"gold": I, "gain_vs_sft": I, "win_rate_vs_sft": I};  I = {"mean", "low", "high"}

Without a judge every D holds nulls and "by_reward_model" is added, {policy: {mode: R, "perplexity_vs_sft"}}: what the
reward model, which is also what PPO climbed, says of the same answers, and perplexity as a ratio to SFT's.
    R = {"score": I, "gain_vs_sft": I, "gain_in_deviations": I, "win_rate_vs_sft": I, "kl": I or null,
         "response_tokens": I, "finished": I, "finished_gain_vs_sft": I, "repetition": I}
"gain_in_deviations" is the gain over the standard deviation of SFT's scores, taken as known. "kl" is null for greedy
answers: the mean log-ratio estimates a KL where the answers were sampled, at their own temperature.

Null is allowed for a policy that was not trained, for the seconds of a stage that was not run, for an agreement that
no two labelers make possible, for the `demonstration_mean` of somebody else's reward model, for `step_zero` when no
policy comes from stage ppo, and for its `value_minus_score` when the value model started from no term of the
reward. All else is a finite number.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from align.errors import UserError
from align.evaluate.win_rate import Interval, accuracy_gain, mean_interval, paired_gain, rate_interval, win_rate
from align.files import plain

SCHEMA = 1
POLICIES = ("base", "prompted", "sft", "ppo", "ppo_ptx")
STAGES = ("base", "sft", "collect", "rm", "ppo", "evaluate")
MODES = ("sampled", "greedy")
RECORD_MEANS = ("proxy", "kl", "response_tokens", "finished")
RM_KEYS = ("accuracy", "gold_accuracy", "demonstration_mean", "pairs")
STEP_ZERO_KEYS = ("ratio_max_deviation", "kl", "value_minus_score")

REWARD_KEYS = (
    "score", "gain_vs_sft", "gain_in_deviations", "win_rate_vs_sft", "kl", "response_tokens", "finished",
    "finished_gain_vs_sft", "repetition",
)  # fmt: skip
GOLD_KEYS = ("gold", "gain_vs_sft", "win_rate_vs_sft")

Record = Mapping[str, Any]  # one prompt's answer: id, prompt, response, likert, fields, finished, proxy, kl, ...


def policy_summary(records: Sequence[Record], sft_records: Sequence[Record], seed: int) -> dict[str, dict[str, float]]:
    """D of the schema: gold (mean Likert), paired gain and win rate against SFT on the same prompts, by position.

    All null where no judge read the answers.
    """
    _require_same_prompts(records, sft_records)
    if not judged(records):
        return dict.fromkeys(GOLD_KEYS)
    gold, sft_gold = ([float(r["likert"]) for r in rows] for rows in (records, sft_records))
    return plain(
        {
            "gold": mean_interval(gold),
            "gain_vs_sft": paired_gain(gold, sft_gold),
            "win_rate_vs_sft": win_rate(gold, sft_gold, seed),
        }
    )


def judged(records: Sequence[Record]) -> bool:
    """Whether a judge scored every answer."""
    return all(record.get("likert") is not None for record in records)


def _require_same_prompts(records: Sequence[Record], sft_records: Sequence[Record]) -> None:
    named, sft_named = (
        [r.get("prompt") if r.get("id") is None else r["id"] for r in rows] for rows in (records, sft_records)
    )
    if named != sft_named:
        raise ValueError("records and SFT records are not the answers to the same prompts in the same order")


def by_reward_model(policies: Mapping[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """{policy: {mode: R, "perplexity_vs_sft"}} of the schema, for every policy that was trained."""
    sft = policies["sft"]
    return {
        name: {
            "sampled": _reward_numbers(policy["sampled"], sft["sampled"], seed),
            "greedy": _reward_numbers(policy["greedy"], sft["greedy"], seed) | {"kl": None},
            "perplexity_vs_sft": float(policy["perplexity"] / sft["perplexity"]),
        }
        for name, policy in policies.items()
        if policy
    }


def _reward_numbers(records: Sequence[Record], sft_records: Sequence[Record], seed: int) -> dict[str, Any]:
    _require_same_prompts(records, sft_records)
    scores, sft_scores = ([float(r["proxy"]) for r in rows] for rows in (records, sft_records))
    ended, sft_ended = ([float(bool(r["finished"])) for r in rows] for rows in (records, sft_records))
    gain, spread = paired_gain(scores, sft_scores), float(np.std(sft_scores, ddof=1))
    numbers = {
        "score": mean_interval(scores),
        "gain_vs_sft": gain,
        "gain_in_deviations": Interval(*(number / spread if spread else 0.0 for number in astuple(gain))),
        "win_rate_vs_sft": win_rate(same_for_equal_answers(records, sft_records), sft_scores, seed),
        "finished": rate_interval(int(sum(ended)), len(ended)),
        "finished_gain_vs_sft": accuracy_gain(ended, sft_ended, range(len(ended)), seed),
        **{key: mean_interval([r[key] for r in records]) for key in ("kl", "response_tokens", "repetition")},
    }
    return plain({key: numbers[key] for key in REWARD_KEYS})


def same_for_equal_answers(records: Sequence[Record], sft_records: Sequence[Record]) -> list[float]:
    """The records' scores; of an answer that is SFT's word for word SFT's, which rounding in another batch moves."""
    pairs = zip(records, sft_records, strict=True)
    return [float((sft if sft["response"] == row["response"] else row)["proxy"]) for row, sft in pairs]


def summarise(evaluation: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """The summary of an evaluation, in the exact schema, checked."""
    policies = evaluation["policies"]
    unknown = sorted(set(policies) - set(POLICIES))
    if unknown:
        raise UserError(f"evaluation has policies {unknown} that the summary does not know; it knows {list(POLICIES)}")
    if not policies.get("sft"):
        raise UserError("evaluation has no sft policy, against which every gain and win rate is measured: add it")
    seconds = {stage: evaluation["seconds"].get(stage) for stage in STAGES}
    step_zero = evaluation.get("step_zero")
    summary = {
        "schema": SCHEMA,
        "preset": evaluation["preset"],
        "seconds": seconds | {"total": evaluation["seconds"].get("total", sum(s or 0.0 for s in seconds.values()))},
        "labelers": {"agreement": plain((evaluation.get("labelers") or {}).get("agreement"))},
        "rm": {key: plain(evaluation["rm"][key]) for key in RM_KEYS},
        "policies": {name: _policy(policies.get(name), policies["sft"], seed) for name in POLICIES},
        "step_zero": {key: step_zero[key] for key in STEP_ZERO_KEYS} if step_zero else None,
    }
    if not judged(policies["sft"]["sampled"]):
        summary["by_reward_model"] = by_reward_model(policies, seed)
    check_summary(summary)
    return summary


def check_summary(summary: Mapping[str, Any]) -> None:
    """Raise ValueError, naming every place, where `summary` leaves the schema above."""
    sections = ("schema", "preset", "seconds", "labelers", "rm", "policies", "step_zero")
    unjudged = isinstance(summary, Mapping) and "by_reward_model" in summary
    problems = _keys(summary, (*sections, "by_reward_model") if unjudged else sections, "summary")
    if not problems:
        problems = _check_sections(summary)
    if problems:
        raise ValueError("summary breaks schema 1: " + "; ".join(problems))


def _policy(policy: Mapping[str, Any] | None, sft: Mapping[str, Any], seed: int) -> dict[str, Any] | None:
    if not policy:
        return None
    modes = {mode: policy_summary(policy[mode], sft[mode], seed) for mode in MODES}
    means = {key: float(np.mean([record[key] for record in policy["sampled"]])) for key in RECORD_MEANS}
    return {
        **modes,
        "proxy": means["proxy"],
        "kl": means["kl"],
        "perplexity": float(policy["perplexity"]),
        "response_tokens": means["response_tokens"],
        "finished": means["finished"],
    }


def _check_sections(summary: Mapping[str, Any]) -> list[str]:
    policies = summary["policies"]
    problems = [] if summary["schema"] == SCHEMA else [f"schema is {summary['schema']!r}, not {SCHEMA}"]
    if not isinstance(summary["preset"], str):
        problems.append("preset is not a string")
    problems += _check_seconds(summary["seconds"])
    problems += _check_labelers(summary["labelers"])
    problems += _check_rm(summary["rm"])
    policy_keys = _keys(policies, POLICIES, "policies")
    if policy_keys:
        return problems + policy_keys
    for name, policy in policies.items():
        problems += _check_policy(policy, f"policies.{name}")
    problems += _check_by_reward_model(summary.get("by_reward_model", {}))
    if summary["step_zero"] is not None:
        problems += _check_step_zero(summary["step_zero"])
    return problems


def _check_step_zero(numbers: Any) -> list[str]:
    problems = _keys(numbers, STEP_ZERO_KEYS, "step_zero")
    if problems:
        return problems
    compared = [key for key in STEP_ZERO_KEYS if key != "value_minus_score" or numbers[key] is not None]
    return [problem for key in compared for problem in _number(numbers[key], f"step_zero.{key}")]


def _check_by_reward_model(table: Any) -> list[str]:
    problems = []
    for name, modes in table.items():
        problems += _number(modes.get("perplexity_vs_sft"), f"by_reward_model.{name}.perplexity_vs_sft", low=0.0)
        for mode in MODES:
            place = f"by_reward_model.{name}.{mode}"
            rates = ("win_rate_vs_sft", "finished")
            problems += _keys(modes[mode], REWARD_KEYS, place) or [
                problem
                for key in REWARD_KEYS
                if (key, mode) != ("kl", "greedy") or modes[mode][key] is not None
                for problem in _interval(modes[mode][key], f"{place}.{key}", rate=key in rates)
            ]
    return problems


def _check_seconds(seconds: Any) -> list[str]:
    problems = _keys(seconds, (*STAGES, "total"), "seconds")
    if problems:
        return problems
    for stage, value in seconds.items():
        if value is not None or stage == "total":
            problems += _number(value, f"seconds.{stage}", low=0.0)
    return problems


def _check_labelers(labelers: Any) -> list[str]:
    problems = _keys(labelers, ("agreement",), "labelers")
    if problems or labelers["agreement"] is None:
        return problems
    return _interval(labelers["agreement"], "labelers.agreement", rate=True)


def _check_rm(rm: Any) -> list[str]:
    problems = _keys(rm, RM_KEYS, "rm")
    if problems:
        return problems
    problems += _interval(rm["accuracy"], "rm.accuracy", rate=True)
    if rm["gold_accuracy"] is not None:
        problems += _interval(rm["gold_accuracy"], "rm.gold_accuracy", rate=True)
    if rm["demonstration_mean"] is not None:
        problems += _number(rm["demonstration_mean"], "rm.demonstration_mean")
    if type(rm["pairs"]) is not int or rm["pairs"] < 0:
        problems.append(f"rm.pairs is {rm['pairs']!r}, not a count")
    return problems


def _check_policy(policy: Any, place: str) -> list[str]:
    if policy is None:
        return []
    problems = _keys(policy, (*MODES, "proxy", "kl", "perplexity", "response_tokens", "finished"), place)
    if problems:
        return problems
    for mode in MODES:
        problems += _check_mode(policy[mode], f"{place}.{mode}")
    problems += _number(policy["proxy"], f"{place}.proxy")
    problems += _number(policy["kl"], f"{place}.kl")
    problems += _number(policy["perplexity"], f"{place}.perplexity", low=0.0)
    problems += _number(policy["response_tokens"], f"{place}.response_tokens", low=0.0)
    return problems + _number(policy["finished"], f"{place}.finished", low=0.0, high=1.0)


def _check_mode(mode: Any, place: str) -> list[str]:
    problems = _keys(mode, GOLD_KEYS, place)
    if problems or all(mode[key] is None for key in GOLD_KEYS):
        return problems
    problems += _interval(mode["gold"], f"{place}.gold")
    problems += _interval(mode["gain_vs_sft"], f"{place}.gain_vs_sft")
    return problems + _interval(mode["win_rate_vs_sft"], f"{place}.win_rate_vs_sft", rate=True)


def _interval(value: Any, place: str, rate: bool = False) -> list[str]:
    low, high = (0.0, 1.0) if rate else (-math.inf, math.inf)
    problems = _numbers(value, ("mean", "low", "high"), place, low, high)
    if not problems and not value["low"] <= value["mean"] <= value["high"]:
        problems.append(f"{place} is not ordered: {value['low']} <= {value['mean']} <= {value['high']} fails")
    return problems


def _numbers(value: Any, keys: Sequence[str], place: str, low: float = -math.inf, high: float = math.inf) -> list[str]:
    problems = _keys(value, keys, place)
    return problems or [p for key in keys for p in _number(value[key], f"{place}.{key}", low, high)]


def _number(value: Any, place: str, low: float = -math.inf, high: float = math.inf) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return [f"{place} is {value!r}, not a finite number"]
    return [] if low <= value <= high else [f"{place} is {value}, outside [{low:g}, {high:g}]"]


def _keys(value: Any, keys: Sequence[str], place: str) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"{place} is {value!r}, not an object"]
    missing, extra = [k for k in keys if k not in value], [k for k in value if k not in keys]
    problems = [f"{place} lacks {missing}"] if missing else []
    return problems + ([f"{place} has unknown {extra}"] if extra else [])
