"""A made-up evaluation with the shape that the stage hands over: no model, no file, seeded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

USE_CASES = (
    "generation",
    "open_qa",
    "brainstorming",
    "chat",
    "rewrite",
    "summarization",
    "classification",
    "other",
    "closed_qa",
    "extraction",
)
FIELDS = (
    "fails_task",
    "unfit_for_customer",
    "hallucination",
    "satisfies_constraint",
    "sexual",
    "violent",
    "encourages_harm",
    "denigrates",
    "harmful_advice",
    "opinion",
    "moral_judgment",
)
MEANS = {"base": 2.0, "prompted": 3.0, "sft": 4.4, "ppo": 5.2, "ppo_ptx": 5.5}


def record(i: int, likert: float, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "id": f"p{i}",
        "prompt": f"Name three animals, number {i}.",
        "response": f"The cat, the dog and the fox ({i}).",
        "use_case": USE_CASES[i % len(USE_CASES)],
        "language": "zh" if i % 7 == 0 else "en",
        "constraint": "in three words" if i % 4 == 0 else None,
        "likert": likert,
        "fields": {name: bool(rng.random() < 0.1) for name in FIELDS},
        "finished": bool(rng.random() < 0.97),
        "response_tokens": int(rng.integers(5, 40)),
        "proxy": likert - 4.0 + float(rng.normal()),
        "kl": float(rng.random()),
    }


def records(n: int, mean: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    likert = np.clip(np.round(rng.normal(mean, 1.4, n)), 1, 7)
    return [record(i, float(x), rng) for i, x in enumerate(likert)]


def interval(mean: float, half: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def evaluation(n: int = 200, without: tuple[str, ...] = (), seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    policies: dict[str, Any] = {}
    for name, mean in MEANS.items():
        modes = {"sampled": records(n, mean, rng), "greedy": records(n, mean + 0.5, rng), "perplexity": 9.5}
        policies[name] = None if name in without else modes
    bins = [
        {
            "low": 0.5 + b / 20,
            "high": 0.55 + b / 20,
            "predicted": 0.52 + b / 20,
            "pairs": 300 - 25 * b,
            "observed": interval(0.51 + b / 22, 0.02 + 0.004 * b),
        }
        for b in range(10)
    ]
    return {
        "preset": "tiny",
        "policies": policies,
        "rm": {
            "accuracy": interval(0.73),
            "gold_accuracy": interval(0.85),
            "demonstration_mean": 1e-6,
            "pairs": 4321,
            "calibration": bins,
            "calibration_error": 0.031,
        },
        "labelers": {"agreement": interval(0.76)},
        "seconds": {"base": 100.0, "sft": 60.0, "collect": 50.0, "rm": 40.0, "ppo": 200.0, "evaluate": 30.0},
        "step_zero": {"ratio_max_deviation": 1e-7, "kl": 0.0, "value_minus_score": 0.0},
        "transcripts": [],
    }


def ppo_rows(n: int = 60, seed: int = 0) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        done = i / n
        rows.append(
            {
                "episode": 256 * (i + 1),
                "objective/scores": 2 * done**0.5 + rng.normal(0, 0.1),
                "objective/rlhf_reward": 1.7 * done**0.5 + rng.normal(0, 0.1),
                "objective/kl": 8 * done + abs(rng.normal(0, 0.3)),
                "objective/entropy": 30 - 9 * done + rng.normal(0, 0.8),
                "objective/response_tokens": 18 + 3 * done + rng.normal(0, 0.4),
                "objective/finished": min(1.0, 0.94 + 0.05 * done + rng.normal(0, 0.01)),
                "loss/value_avg": 0.6 * np.exp(-4 * done) + 0.1 + rng.normal(0, 0.02),
                "val/explained_variance": 0.7 - 1.5 * np.exp(-8 * done) + rng.normal(0, 0.04),
            }
        )
    return rows


def checkpoint_rows() -> list[dict[str, Any]]:
    """Gao et al.'s RL law: gold rises, then falls, while the proxy goes on rising."""
    kls = (0.0, 1.0, 3.0, 7.0, 14.0, 25.0, 45.0, 80.0)
    return [
        {
            "episode": 2000 * i,
            "kl": kl,
            "proxy": 0.55 * kl**0.5,
            "gold": interval(4.4 + kl**0.5 * (0.95 - 0.42 * np.log(max(kl, 1.0) ** 0.5 + 0.3)), 0.15),
        }
        for i, kl in enumerate(kls)
    ]


def sft_rows() -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(1, 61):
        epoch = step / 20
        rows.append({"step": step, "epoch": epoch, "loss": 1.2 + 2 * np.exp(-2 * epoch), "mean_token_accuracy": 0.7})
        if step % 20 == 0:
            rows.append(
                {
                    "step": step,
                    "epoch": epoch,
                    "eval_loss": 1.35 + 2 * np.exp(-2 * epoch),
                    "eval_mean_token_accuracy": 0.66,
                }
            )
    return rows


@pytest.fixture
def make_evaluation() -> Callable[..., dict[str, Any]]:
    return evaluation


@pytest.fixture
def training_rows() -> list[dict[str, float]]:
    return ppo_rows()


@pytest.fixture
def overoptimisation_rows() -> list[dict[str, Any]]:
    return checkpoint_rows()


@pytest.fixture
def sft_log() -> list[dict[str, float]]:
    return sft_rows()
