"""A mini run of the whole pipeline through the true entry points, made once a session."""

import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["ACCELERATE_USE_CPU"] = "true"

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
WORLD = {
    "num_documents": 300, "num_text_validation": 20, "num_demonstrations": 96, "num_demonstrations_validation": 24,
    "num_rm_prompts": 48, "num_rm_prompts_validation": 12, "num_ppo_prompts": 64, "num_validation_prompts": 8,
    "num_test_prompts": 12, "num_few_shot": 2,
}  # fmt: skip
BASE = {
    "max_steps": 40, "decay_steps": 10, "warmup_steps": 5, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400, "logging_steps": 10,
}  # fmt: skip
PPO = {
    "total_episodes": 32, "rollout_batch_size": 16, "num_mini_batches": 4, "per_device_train_batch_size": 4,
    "max_new_tokens": 6, "warmup_iterations": 2, "transcript_iterations": 1,
    "validation_file": "null",  # tests/stages/test_held_out.py has its own
}  # fmt: skip
SHORT = {"max_new_tokens": 6}


def flags(values: dict) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def arguments(name: str, run: Path, **changes) -> list[str]:
    fast = {"base": BASE, "sft": {"logging_steps": 1}, "collect": SHORT | {"max_k": 5}, "rm": {"logging_steps": 1}}
    values = (fast | {"ppo": PPO, "evaluate": SHORT | {"num_transcripts": 4}}).get(name, {})
    if name != "evaluate":
        values = {"bf16": "false"} | values
    return ["--config", str(CONFIGS / f"{name}.yaml"), "--run", str(run), *flags(values | changes)]


def run_stage(name: str, run: Path, **changes) -> None:
    importlib.import_module(f"stages.{name}").main(arguments(name, run, **changes))


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> SimpleNamespace:
    from data.world.__main__ import main as world

    run = tmp_path_factory.mktemp("mini")
    world(["--output_dir", str(run / "data"), *flags(WORLD)])
    for stage in ("base", "sft", "collect", "rm", "ppo"):
        run_stage(stage, run)
    return SimpleNamespace(run=run, arguments=arguments, stage=run_stage)


@pytest.fixture(scope="session")
def evaluated(mini) -> Path:
    """The same run, evaluated. A policy of forty steps writes nothing the judge could tell apart, so the rankings that
    test the reward model set demonstrations against nonsense."""
    demonstrations = (mini.run / "data" / "demonstrations_validation.jsonl").read_text(encoding="utf-8").splitlines()
    lines = []
    for row in map(json.loads, demonstrations):
        completions = [{"completion": row.pop("completion"), "rank": 0}, {"completion": " of of of", "rank": 1}]
        for labeler in ("ann", "ben"):
            ranking = row | {"completions": completions, "labeler": labeler, "finished": [True, True]}
            lines.append(json.dumps(ranking, ensure_ascii=False) + "\n")
    (mini.run / "contrast.jsonl").write_text("".join(lines), encoding="utf-8")
    run_stage("evaluate", mini.run, rankings_file=mini.run / "contrast.jsonl")
    return mini.run
