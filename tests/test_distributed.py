"""Two gloo processes give the losses and weights of one (fp32, 1e-5), in each stage that trains."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.text import Codec

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("dist")]
ROOT = Path(__file__).parents[1]
WORDS = [
    "cow",
    "dog",
    "bird",
    "hot",
    "cold",
    "fox",
    "boat",
    "farm",
    "short",
    "story",
    "three",
    "animals",
    "苹果",
    "香蕉",
    "梨",
    "opposite",
    "word",
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_codec) -> Path:
    """Random models with the tiny tokenizer, and a few rows of each kind; lengths and K vary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.models import load_scalar_model, save_scalar_model

    folder = tmp_path_factory.mktemp("dist")
    codec: Codec = tiny_codec
    config = LlamaConfig(
        vocab_size=len(codec.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=codec.eos_id,
        pad_token_id=codec.pad_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    policy.save_pretrained(folder / "policy")
    codec.save(folder / "policy")
    scalar = load_scalar_model(str(folder / "policy"), fresh_head=True)
    save_scalar_model(scalar, folder / "reward", codec.pad_id)
    codec.save(folder / "reward")

    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    def ranking(i: int) -> dict:
        completions = {f"{text(1, 5)} {k}" for k in range(rng.randint(2, 6))}
        rows = [{"completion": c, "rank": k % 3} for k, c in enumerate(sorted(completions))]
        return {"prompt": f"{text(1, 4)} {i}", "completions": rows, "labeler": "ann"}

    for name, count in (("demonstrations", 24), ("held_out", 8)):
        write(folder / f"{name}.jsonl", [{"prompt": f"{name} {i}", "completion": text(1, 9)} for i in range(count)])
    write(folder / "rankings.jsonl", [ranking(i) for i in range(24)])
    write(folder / "rankings_held_out.jsonl", [ranking(i) for i in range(100, 108)])
    write(folder / "prompts.jsonl", [{"prompt": f"{text(1, 5)} {i}", "id": str(i)} for i in range(16)])
    write(folder / "text.jsonl", [{"text": text(2, 12)} for _ in range(30)])
    return folder


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(stage: str, processes: int, flags: dict, env: dict | None = None) -> subprocess.Popen:
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    module = ["tests.launched", stage, *words]
    if processes > 1:
        torchrun = ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
        module = [*torchrun, "-m", *module]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    fixed = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return subprocess.Popen(
        [sys.executable, "-m", *module], cwd=ROOT, env=clean | fixed | (env or {}), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(job: subprocess.Popen, seconds: float = 240) -> str:
    """What the job says until it ends."""
    try:
        return job.communicate(timeout=seconds)[0]
    finally:
        if job.poll() is None:
            job.kill()


def both(stage: str, folder: Path, flags: dict, one: dict, two: dict) -> list[Path]:
    """The stage in one process and in two; the folders they wrote."""
    outputs = [folder / f"{stage}-{number}" for number in (1, 2)]
    jobs = [
        launch(stage, number, flags | changes | {"output_dir": output})
        for number, changes, output in zip((1, 2), (one, two), outputs, strict=True)
    ]
    for job, processes in zip(jobs, (1, 2), strict=True):
        succeeded(job, processes)
    return outputs


def succeeded(job: subprocess.Popen, processes: int) -> None:
    """The job ended well, and each process left its group itself, before the interpreter took it down."""
    said = finish(job)
    errors = "\n".join(line for line in said.splitlines() if line.startswith("error:"))
    assert job.returncode == 0, errors or said[-3000:]
    assert said.count("a process group is left: False") == processes


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_weights(a: Path, b: Path, start: Path) -> None:
    one, two, before = (load_file(folder / "model.safetensors") for folder in (a, b, start))
    assert one.keys() == two.keys()
    worst = max(float((one[name] - two[name]).abs().max()) for name in one)
    moved = max(float((one[name] - before[name]).abs().max()) for name in one if name in before)
    assert worst <= 1e-5 < moved, (worst, moved)


def check_metrics(a: Path, b: Path, keys: tuple[str, ...]) -> None:
    one, two = rows(a), rows(b)
    assert len(one) == len(two) > 0
    for first, second in zip(one, two, strict=True):
        for key in first:
            if key.startswith(keys):
                assert second[key] == pytest.approx(first[key], rel=1e-5, abs=1e-5), (first["step"], key)


def ppo_flags(world: Path) -> dict:
    return {
        "model_name_or_path": world / "policy", "reward": f"[{{model: {world / 'reward'}}}]",
        "train_file": world / "prompts.jsonl", "pretraining_file": world / "text.jsonl", "bf16": "false",
        "total_episodes": 32, "rollout_batch_size": 16, "num_mini_batches": 2, "per_device_train_batch_size": 3,
        "per_device_rollout_batch_size": 4, "max_prompt_length": 64, "max_new_tokens": 8, "ptx_coef": 0.5,
        "ptx_examples_per_episode": 1, "learning_rate": 1e-4, "value_learning_rate": 1e-4, "adam_epsilon": 1e-3,
        "warmup_iterations": 1, "ema_decay": 0.5, "kl_target": 0.1, "importance_weight_cap": 2,
    }  # fmt: skip


LORA = {"use_peft": "true", "value_use_peft": "true", "gradient_checkpointing": "true", "lora_r": 4}


@pytest.mark.parametrize("more", [{}, pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_P16_ppo_in_two_processes(world, more):
    # In two processes a token limit cuts microbatches too, unlike in either.
    one, two = both("ppo", world, ppo_flags(world) | more, {}, {"microbatch_tokens": 60})
    check_metrics(one, two, ("objective/", "loss/", "val/", "policy/", "sampling/", "kl_coef", "lr"))
    check_weights(one, two, world / "policy")
    check_weights(one / "value_model", two / "value_model", world / "reward")


@pytest.mark.slow
def test_two_processes_that_stop_keep_one_whole_batch(world):
    """The first minibatch's step throws the value model so far that the second overflows, in both processes."""
    output = world / "ppo-stopped"
    job = launch("ppo", 2, ppo_flags(world) | {"value_learning_rate": 1e37, "output_dir": output})
    said = finish(job)
    assert job.returncode != 0 and "; its batch is in " in said
    assert [path.name for path in output.glob("*stopped*")] == ["stopped-0"]
    about = json.loads((output / "stopped-0" / "batch.json").read_text(encoding="utf-8"))
    assert about["iteration"] == 0 and len(about["rows"]) == 8 and "value" in about["why"]
    assert len(load_file(output / "stopped-0" / "batch.safetensors")["input_ids"]) == 8, "both processes' rows"


def test_P16_rm_in_two_processes(world):
    flags = {
        "model_name_or_path": world / "policy", "train_file": world / "rankings.jsonl",
        "validation_file": world / "rankings_held_out.jsonl", "demonstrations_file": world / "demonstrations.jsonl",
        "bf16": "false", "learning_rate": 1e-4, "adam_epsilon": 1e-3, "logging_steps": 1,
        "muon_learning_rate": 1e-4, "eval_steps": 2,
    }  # fmt: skip
    one, two = both("rm", world, flags, {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2})
    check_metrics(one, two, ("loss", "grad_norm", "accuracy", "margin", "learning_rate", "eval_"))
    check_weights(one, two, world / "policy")


def test_P16_sft_in_two_processes(world):
    flags = {
        "model_name_or_path": world / "policy", "train_file": world / "demonstrations.jsonl",
        "validation_file": world / "held_out.jsonl", "bf16": "false", "learning_rate": 1e-4, "adam_epsilon": 1e-3,
        "logging_steps": 1, "num_train_epochs": 3, "max_length": 100, "muon_learning_rate": 1e-4,
    }  # fmt: skip
    one, two = both("sft", world, flags, {"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 4})
    check_metrics(one, two, ("loss", "grad_norm", "learning_rate", "eval_loss"))
    check_weights(one, two, world / "policy")


def test_an_error_in_one_process_ends_both(world):
    """Soon, and by name: the other waits in a collective that nobody will join."""
    flags = {"reward": "[{function: tests.launched:rank_one_raises}]", "reward_retries": 0}
    job = launch("ppo", 2, ppo_flags(world) | flags | {"output_dir": world / "ppo-failed"})
    said = finish(job, 90)
    assert job.returncode != 0 and "ValueError: no score today" in said
