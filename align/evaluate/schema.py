"""The shape of a run's summary (schema 1), and where one leaves it.

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

Null is allowed for a policy that was not trained, for the seconds of a stage that was not run, for `rm` where no
rankings were given and a perplexity where no text was, for an agreement that no two labelers make possible, for the
`demonstration_mean` of somebody else's reward model, for `step_zero` when no policy comes from stage ppo, and for its
`value_minus_score` when the value model started from no term of the reward. All else is a finite number.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

SCHEMA = 1
POLICIES = ("base", "prompted", "sft", "ppo", "ppo_ptx")
STAGES = ("base", "sft", "collect", "rm", "ppo", "evaluate")
MODES = ("sampled", "greedy")
RM_KEYS = ("accuracy", "gold_accuracy", "demonstration_mean", "pairs")
STEP_ZERO_KEYS = ("ratio_max_deviation", "kl", "value_minus_score")
REWARD_KEYS = (
    "score", "gain_vs_sft", "gain_in_deviations", "win_rate_vs_sft", "kl", "response_tokens", "finished",
    "finished_gain_vs_sft", "repetition",
)  # fmt: skip
GOLD_KEYS = ("gold", "gain_vs_sft", "win_rate_vs_sft")

Check = Callable[[Any, str], list[str]]  # (value, its place) -> what is wrong with it
Shape = Mapping[str, Any] | Check  # the keys that must be there, each with its own shape; or a check


def check_summary(summary: Mapping[str, Any]) -> None:
    """Raise ValueError, naming every place, where `summary` leaves the schema above."""
    unjudged = isinstance(summary, Mapping) and "by_reward_model" in summary
    found = faults(summary, SUMMARY | UNJUDGED if unjudged else SUMMARY, "summary")
    if found:
        raise ValueError("summary breaks schema 1: " + "; ".join(found))


def faults(value: Any, shape: Shape, place: str) -> list[str]:
    """What is wrong with a value, by its place."""
    if not isinstance(shape, Mapping):
        return shape(value, place)
    if not isinstance(value, Mapping):
        return [f"{place} is {value!r}, not an object"]
    missing, extra = [k for k in shape if k not in value], [k for k in value if k not in shape]
    if missing or extra:
        return [f"{place} lacks {missing}"] * bool(missing) + [f"{place} has unknown {extra}"] * bool(extra)
    inside = "" if place == "summary" else f"{place}."
    return [fault for key in shape for fault in faults(value[key], shape[key], f"{inside}{key}")]


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    def check(value: Any, place: str) -> list[str]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return [f"{place} is {value!r}, not a finite number"]
        return [] if low <= value <= high else [f"{place} is {value}, outside [{low:g}, {high:g}]"]

    return check


def interval(low: float = -math.inf, high: float = math.inf) -> Check:
    def check(value: Any, place: str) -> list[str]:
        found = faults(value, dict.fromkeys(("mean", "low", "high"), number(low, high)), place)
        if found or value["low"] <= value["mean"] <= value["high"]:
            return found
        return [f"{place} is not ordered: {value['low']} <= {value['mean']} <= {value['high']} fails"]

    return check


def optional(shape: Shape) -> Check:
    return lambda value, place: [] if value is None else faults(value, shape, place)


def each(shape: Shape) -> Check:
    """Of every value of an object, whatever its keys."""
    return lambda value, place: [f for name, row in value.items() for f in faults(row, shape, f"{place}.{name}")]


def is_a(kind: type, what: str) -> Check:
    return lambda value, place: [] if type(value) is kind else [f"{place} is not {what}: {value!r}"]


def this_schema(value: Any, place: str) -> list[str]:
    return [] if value == SCHEMA else [f"{place} is {value!r}, not {SCHEMA}"]


def by_the_judge(value: Any, place: str) -> list[str]:
    """D: all null without a judge."""
    if isinstance(value, Mapping) and set(value) == set(GOLD_KEYS) and all(x is None for x in value.values()):
        return []
    return faults(value, {"gold": interval(), "gain_vs_sft": interval(), "win_rate_vs_sft": RATE}, place)


RATE = interval(0.0, 1.0)
POLICY = dict.fromkeys(MODES, by_the_judge) | {
    "proxy": number(), "kl": number(), "perplexity": optional(number(0.0)), "response_tokens": number(0.0),
    "finished": number(0.0, 1.0),
}  # fmt: skip
SUMMARY = {
    "schema": this_schema,
    "preset": is_a(str, "a string"),
    "seconds": dict.fromkeys(STAGES, optional(number(0.0))) | {"total": number(0.0)},
    "labelers": {"agreement": optional(RATE)},
    "rm": optional(
        {
            "accuracy": RATE, "gold_accuracy": optional(RATE), "demonstration_mean": optional(number()),
            "pairs": is_a(int, "a count"),
        }
    ),
    "policies": dict.fromkeys(POLICIES, optional(POLICY)),
    "step_zero": optional({"ratio_max_deviation": number(), "kl": number(), "value_minus_score": optional(number())}),
}  # fmt: skip
BY_REWARD = dict.fromkeys(REWARD_KEYS, interval()) | {"win_rate_vs_sft": RATE, "finished": RATE}
UNJUDGED = {
    "by_reward_model": each(
        {
            "sampled": BY_REWARD,
            "greedy": BY_REWARD | {"kl": optional(interval())},
            "perplexity_vs_sft": optional(number(0.0)),
        }
    )
}
