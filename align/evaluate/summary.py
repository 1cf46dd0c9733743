"""The summary of a run (`align.evaluate.schema`), made from an evaluation, and checked before it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from align.errors import UserError
from align.evaluate.schema import (
    GOLD_KEYS,
    MODES,
    POLICIES,
    REWARD_KEYS,
    RM_KEYS,
    SCHEMA,
    STAGES,
    STEP_ZERO_KEYS,
    check_summary,
)
from align.evaluate.win_rate import Interval, accuracy_gain, mean_interval, paired_gain, rate_interval, win_rate
from align.files import plain

RECORD_MEANS = ("proxy", "kl", "response_tokens", "finished")

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
            "perplexity_vs_sft": _ratio(policy["perplexity"], sft["perplexity"]),
        }
        for name, policy in policies.items()
        if policy
    }


def _ratio(mine: float | None, sft: float | None) -> float | None:
    return None if mine is None else float(mine / sft)


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
        "rm": {key: plain(evaluation["rm"][key]) for key in RM_KEYS} if evaluation["rm"] else None,
        "policies": {name: _policy(policies.get(name), policies["sft"], seed) for name in POLICIES},
        "step_zero": {key: step_zero[key] for key in STEP_ZERO_KEYS} if step_zero else None,
    }
    if not judged(policies["sft"]["sampled"]):
        summary["by_reward_model"] = by_reward_model(policies, seed)
    check_summary(summary)
    return summary


def _policy(policy: Mapping[str, Any] | None, sft: Mapping[str, Any], seed: int) -> dict[str, Any] | None:
    if not policy:
        return None
    modes = {mode: policy_summary(policy[mode], sft[mode], seed) for mode in MODES}
    means = {key: float(np.mean([record[key] for record in policy["sampled"]])) for key in RECORD_MEANS}
    return {
        **modes,
        "proxy": means["proxy"],
        "kl": means["kl"],
        "perplexity": plain(policy["perplexity"]),
        "response_tokens": means["response_tokens"],
        "finished": means["finished"],
    }
