"""Two and four gloo processes give the metrics and weights of one (fp32, 1e-5), whole and sharded."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from align.checkpoint import load_training_state
from align.text import Codec
from align.trainer import LengthGroups
from benchmarks import communication

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

    for name, count in (("demonstrations", 21), ("held_out", 8)):
        write(folder / f"{name}.jsonl", [{"prompt": f"{name} {i}", "completion": text(1, 9)} for i in range(count)])
    write(folder / "rankings.jsonl", [ranking(i) for i in range(21)])
    write(folder / "rankings_held_out.jsonl", [ranking(i) for i in range(100, 108)])
    write(folder / "one_ranking.jsonl", [ranking(200)])
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


def outputs(stage: str, folder: Path, flags: dict, *runs: tuple[int, dict, bool]) -> list[Path]:
    """The folders that the stage wrote, run with so many processes, changed flags, and its models sharded or not."""
    found = []
    for number, (processes, changes, sharded) in enumerate(runs):
        key = json.dumps([stage, processes, sharded, flags | changes, os.environ.get("ENDS_AT_ONCE")], default=str)
        if key not in DONE:
            output = folder / f"{stage}-{number}"
            job = launch(stage, processes, flags | changes | {"output_dir": output}, SHARDED if sharded else None)
            succeeded(job, processes)
            DONE[key] = output
        found.append(DONE[key])
    return found


DONE: dict[str, Path] = {}  # runs of this session that several tests compare with
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


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
        "warmup_iterations": 1, "ema_decay": 0.5, "kl_target": 0.1, "importance_weight_cap": 2, "save_iterations": 1,
        "transcript_iterations": 1,
    }  # fmt: skip


def rm_flags(world: Path) -> dict:
    return {
        "model_name_or_path": world / "policy", "train_file": world / "rankings.jsonl",
        "validation_file": world / "rankings_held_out.jsonl", "demonstrations_file": world / "demonstrations.jsonl",
        "held_out_file": world / "one_ranking.jsonl", "bf16": "false", "learning_rate": 1e-4, "adam_epsilon": 1e-3,
        "logging_steps": 1, "muon_learning_rate": 1e-4, "eval_steps": 2,
    }  # fmt: skip


def sft_flags(world: Path) -> dict:
    return {
        "model_name_or_path": world / "policy", "train_file": world / "demonstrations.jsonl",
        "validation_file": world / "held_out.jsonl", "bf16": "false", "learning_rate": 1e-4, "adam_epsilon": 1e-3,
        "logging_steps": 1, "num_train_epochs": 3, "max_length": 100, "muon_learning_rate": 1e-4,
    }  # fmt: skip


PPO_METRICS = ("objective/", "validation/", "loss/", "val/", "policy/", "sampling/", "kl_coef", "lr")
LORA = {"use_peft": "true", "value_use_peft": "true", "gradient_checkpointing": "true", "lora_r": 4}
MUON = {"optim": "muon"}
FITTED = {"value_head_init": "fitted", "missing_eos_penalty": "null"}  # else all returns are one number here
SAMPLER = {"old_logprobs": "sampler", "importance_weight_cap": "null"} | LORA  # the frozen trunk is then read first
FEW_TOKENS = {"microbatch_tokens": 60}  # cuts microbatches otherwise than a count of rows, in each process its own


def check_ppo(one: Path, other: Path, world: Path) -> None:
    """Metrics, transcripts, weights, and what a resume reads."""
    check_metrics(one, other, PPO_METRICS)
    check_transcripts(one, other)
    check_weights(one, other, world / "policy")
    check_weights(one / "value_model", other / "value_model", world / "reward")
    for step in (1, 2):
        first, second = (load_training_state(folder / f"checkpoint-{step}") for folder in (one, other))
        for state in (first, second):
            state["random"] = state["random"][0]  # one a process
        check_same(first, second, f"checkpoint-{step}")


def check_same(a: object, b: object, where: str) -> None:
    """Nested dicts and lists of tensors and numbers, within 1e-5."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        pairs = [(a[key], b[key], f"{where}.{key}") for key in a]
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        pairs = [(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    elif isinstance(a, torch.Tensor):
        assert a.shape == b.shape and a.dtype == b.dtype, where
        assert torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-5), (where, (a - b).abs().max())
        return
    else:
        assert b == (pytest.approx(a, rel=1e-5, abs=1e-5) if isinstance(a, float) else a), where
        return
    for pair in pairs:
        check_same(*pair)


def check_transcripts(a: Path, b: Path, name: str = "transcripts.jsonl") -> None:
    """The same prompts in the same order, and the same words sampled from them."""
    one, two = ([json.loads(line) for line in (f / name).open(encoding="utf-8")] for f in (a, b))
    texts = [[{k: v for k, v in row.items() if isinstance(v, str)} for row in rows] for rows in (one, two)]
    assert texts[0] == texts[1] and len(texts[0]) > 0


@pytest.mark.parametrize(
    ("processes", "sharded", "more", "changes"),
    [
        pytest.param(2, False, {}, FEW_TOKENS, id="2"),
        pytest.param(2, True, {}, FEW_TOKENS, id="2-sharded"),
        pytest.param(2, False, LORA, FEW_TOKENS, id="2-lora", marks=pytest.mark.slow),
        pytest.param(2, True, LORA, FEW_TOKENS, id="2-sharded-lora", marks=pytest.mark.slow),
        pytest.param(2, True, SAMPLER, {}, id="2-sharded-lora-sampler", marks=pytest.mark.slow),
        pytest.param(2, True, MUON, {}, id="2-sharded-muon", marks=pytest.mark.slow),
        pytest.param(2, True, {"frozen_quantization": "int8"}, {}, id="2-sharded-int8", marks=pytest.mark.slow),
        pytest.param(2, False, FITTED, FEW_TOKENS, id="2-fitted-values", marks=pytest.mark.slow),
        pytest.param(4, False, {}, FEW_TOKENS, id="4", marks=pytest.mark.slow),
        pytest.param(4, True, {}, FEW_TOKENS, id="4-sharded", marks=pytest.mark.slow),
    ],
)
def test_P16_ppo_in_several_processes(world, tmp_path, processes, sharded, more, changes):
    more |= {"validation_file": world / "held_out.jsonl", "validation_prompts": 5, "eval_iterations": 1}
    one, other = outputs("ppo", tmp_path, ppo_flags(world) | more, (1, {}, False), (processes, changes, sharded))
    check_transcripts(one, other, "validation.jsonl")
    if "use_peft" in more or "optim" in more or "frozen_quantization" in more:
        check_metrics(one, other, PPO_METRICS)
        check_weights(one, other, world / "policy")
        check_weights(one / "value_model", other / "value_model", world / "reward")
    else:
        check_ppo(one, other, world)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("first", "then"), [((1, False), (2, True)), ((2, True), (1, False)), ((2, True), (2, False))])
def test_ppo_resumes_with_other_processes(world, tmp_path, first, then, more):
    """Sharded and saved, loaded whole, and the reverse: the second iteration is the uninterrupted run's."""
    flags = ppo_flags(world) | more
    whole, saved = outputs("ppo", tmp_path, flags, (1, {}, False), (first[0], {}, first[1]))
    resumed = tmp_path / "resumed"
    changes = {"output_dir": resumed, "resume_from_checkpoint": saved / "checkpoint-1"}
    succeeded(launch("ppo", then[0], flags | changes, SHARDED if then[1] else None), then[0])
    (first_row, second_row), (again,) = rows(whole), rows(resumed)
    for key in second_row:
        if key.startswith(PPO_METRICS):
            assert again[key] == pytest.approx(second_row[key], rel=1e-5, abs=1e-5), key
    assert first_row["step"] == 1 and again["step"] == 2
    check_weights(whole, resumed, world / "policy")
    check_weights(whole / "value_model", resumed / "value_model", world / "reward")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("sft", 3), ("sft", 4), ("rm", 3)])
@pytest.mark.parametrize(
    ("first", "then"), [((1, False), (2, True)), ((2, True), (1, False)), ((2, False), (1, False))]
)
def test_a_trainer_resumes_with_other_processes(world, tmp_path, stage, step, first, then):
    """From a checkpoint between two epochs (sft, 3) or in the middle of one to the weights of the uninterrupted run. In
    SFT's second epoch (4) the rows have another order than in its first."""
    flags = {"sft": sft_flags, "rm": rm_flags}[stage](world) | {"save_steps": step, "save_total_limit": 9}
    total = {"sft": 8, "rm": 4}[stage]  # rows a step

    def size(processes: int) -> dict:
        return {"per_device_train_batch_size": total // processes}

    alone, saving = (1, size(1), False), (first[0], size(first[0]), first[1])
    whole, saved = outputs(stage, tmp_path, flags, alone, saving)
    resumed = tmp_path / "resumed"
    changes = {"output_dir": resumed, "resume_from_checkpoint": saved / f"checkpoint-{step}"} | size(then[0])
    succeeded(launch(stage, then[0], flags | changes, SHARDED if then[1] else None), then[0])
    check_weights(whole, resumed, world / "policy")


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["", "sharded"])
def test_a_process_whose_episodes_all_end_at_once(world, tmp_path, sharded, monkeypatch):
    """Every second query is answered with EOS alone: with two processes, all of the second one's."""
    monkeypatch.setenv("ENDS_AT_ONCE", "1")
    one, two = outputs("ppo", tmp_path, ppo_flags(world), (1, {}, False), (2, {}, sharded))
    check_ppo(one, two, world)


@pytest.mark.slow
def test_two_processes_that_stop_keep_one_whole_batch(world, tmp_path):
    """The first minibatch's step throws the value model so far that the second overflows, in both processes."""
    output = tmp_path / "stopped"
    job = launch("ppo", 2, ppo_flags(world) | {"value_learning_rate": 1e37, "output_dir": output})
    said = finish(job)
    assert job.returncode != 0 and "; its batch is in " in said
    assert [path.name for path in output.glob("*stopped*")] == ["stopped-0"]
    about = json.loads((output / "stopped-0" / "batch.json").read_text(encoding="utf-8"))
    assert about["iteration"] == 0 and len(about["rows"]) == 8 and "value" in about["why"]
    assert len(load_file(output / "stopped-0" / "batch.safetensors")["input_ids"]) == 8, "both processes' rows"


ADAPTER = {"use_peft": "true", "gradient_checkpointing": "true", "lora_r": 4, "muon_learning_rate": "null"}


@pytest.mark.parametrize(
    ("processes", "sharded", "changes", "more"),
    [
        pytest.param(2, False, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, {}, id="2"),
        *(pytest.param(*case, marks=pytest.mark.slow, id=name) for name, *case in [
            ("4", 4, False, {"per_device_train_batch_size": 1}, {}),
            ("2-sharded", 2, True, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, {}),
            ("2-sharded-lora", 2, True, {"per_device_train_batch_size": 2}, ADAPTER),
            ("2-fitted-head", 2, False, {"per_device_train_batch_size": 2}, {"head_init": "fitted"}),
        ]),
    ],
)  # fmt: skip
def test_P16_rm_in_several_processes(world, tmp_path, processes, sharded, changes, more):
    """21 rankings, 4 a step: the last step has one, and a process without any; so has scoring one of the files."""
    alone = (1, {"per_device_train_batch_size": 4}, False)
    one, other = outputs("rm", tmp_path, rm_flags(world) | more, alone, (processes, changes, sharded))
    check_metrics(one, other, ("loss", "grad_norm", "accuracy", "margin", "learning_rate", "eval_"))
    check_weights(one, other, world / "policy")
    check_same(*(json.loads((folder / "report.json").read_text()) for folder in (one, other)), "report.json")


@pytest.mark.parametrize(
    ("processes", "sharded", "changes", "more"),
    [
        pytest.param(2, False, {"per_device_train_batch_size": 4}, {}, id="2"),
        *(pytest.param(*case, marks=pytest.mark.slow, id=name) for name, *case in [
            ("1x8", 1, False, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, {}),
            ("4", 4, False, {"per_device_train_batch_size": 2}, {}),
            ("2-sharded", 2, True, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}),
            ("2-sharded-lora", 2, True, {"per_device_train_batch_size": 4}, ADAPTER),
        ]),
    ],
)  # fmt: skip
def test_P16_sft_in_several_processes(world, tmp_path, processes, sharded, changes, more):
    """21 demonstrations, 8 a step: the last step has five."""
    alone = (1, {"per_device_train_batch_size": 8}, False)
    one, other = outputs("sft", tmp_path, sft_flags(world) | more, alone, (processes, changes, sharded))
    check_metrics(one, other, ("loss", "grad_norm", "learning_rate", "eval_loss", "mean_token_accuracy", "num_tokens"))
    check_weights(one, other, world / "policy")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_collect_in_several_processes(world, tmp_path, processes):
    flags = {
        "model_name_or_path": world / "policy", "prompts_file": world / "prompts.jsonl", "max_new_tokens": 8,
        "max_prompt_length": 64, "per_device_batch_size": 4,
    }  # fmt: skip
    one, other = outputs("collect", tmp_path, flags, (1, {}, False), (processes, {}, False))
    first, second = ((folder / "train_to_label.jsonl").read_bytes() for folder in (one, other))
    assert first == second and first.count(b"\n") == 16


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "sharded"), [(2, False), (2, True), (4, True)])
def test_a_step_moves_the_bytes_of_theory(processes, sharded):
    found = communication.count(processes, sharded)
    assert {kind: size for kind, size in found["counted"].items() if size} == found["theory"]
    assert found["sampling"] == (found["policy"] if sharded else 0)


@pytest.mark.slow
def test_evaluate_in_several_processes(world, tmp_path):
    flags = {
        "sft_path": world / "policy", "reward_model_path": world / "reward", "judge": "tests.launched:judge",
        "prompts_file": world / "prompts.jsonl", "text_file": world / "text.jsonl", "max_new_tokens": 8,
        "rankings_file": world / "rankings_held_out.jsonl", "per_device_batch_size": 4, "best_of": 3,
    }  # fmt: skip
    found = []
    for processes in (1, 2):
        run = tmp_path / f"run-{processes}"
        outputs("evaluate", run, flags | {"run_dir": run}, (processes, {}, False))
        found.append(json.loads((run / "evaluation.json").read_text(encoding="utf-8")))
        del found[-1]["seconds"]
    check_same(*found, "evaluation")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, LORA, SAMPLER], ids=["full", "lora", "lora-sampler"])
def test_sharded_half_precision(world, tmp_path, more):
    """Weights are cast as they are gathered; frozen trunks lie in bfloat16 under float32 adapters."""
    flags = ppo_flags(world) | more | {"bf16": "true"}
    one, two = outputs("ppo", tmp_path, flags, (1, {}, False), (2, {}, True))
    for key in ("objective/raw_scores", "loss/policy_avg", "objective/entropy"):
        first, second = rows(one)[0][key], rows(two)[0][key]
        assert second == pytest.approx(first, rel=0.05, abs=0.02), key


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_row_is_learned_once_an_epoch(world_size):
    """And a step's rows are the same for any number of processes; what fills the last step up is no row."""
    lengths = [3 + i % 7 for i in range(21)]
    batch = 8 // world_size
    fillers = -len(lengths) % 8
    sampler = LengthGroups(lengths, 8, seed=0, fillers=fillers)
    batches = BatchSampler(sampler, batch, drop_last=False)
    shards = [list(BatchSamplerShard(batches, world_size, rank, even_batches=True)) for rank in range(world_size)]
    assert len({len(shard) for shard in shards}) == 1
    steps = [sorted(row for rows in step for row in rows if row < 21) for step in zip(*shards, strict=True)]
    alone = [sorted(rows) for rows in BatchSampler(LengthGroups(lengths, 8, seed=0), 8, drop_last=False)]
    assert steps == alone and sorted(row for step in steps for row in step) == list(range(21))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_P16_base_in_several_processes(world, tmp_path, processes):
    """30 documents, 8 a step: the fourth step of an epoch has six, and with four processes two fillers."""
    flags = {
        "train_file": world / "text.jsonl", "validation_file": world / "prose.jsonl", "vocab_size": 300,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_steps": 6,
        "decay_steps": 2, "warmup_steps": 2, "logging_steps": 1, "bf16": "false", "max_position_embeddings": 128,
    }  # fmt: skip
    write(world / "prose.jsonl", [{"text": f"{word} and a boat"} for word in WORDS])
    alone, several = ((n, {"per_device_train_batch_size": 8 // n}, False) for n in (1, processes))
    one, other = outputs("base", tmp_path, flags, alone, several)
    check_metrics(one, other, ("loss", "grad_norm", "learning_rate", "eval_"))
    for name, x in load_file(one / "model.safetensors").items():
        assert torch.allclose(load_file(other / "model.safetensors")[name], x, rtol=1e-5, atol=1e-5), name


def test_an_error_in_one_process_ends_both(world, tmp_path):
    """Soon, and by name: the other waits in a collective that nobody will join."""
    flags = {"reward": "[{function: tests.launched:rank_one_raises}]", "reward_retries": 0}
    job = launch("ppo", 2, ppo_flags(world) | flags | {"output_dir": tmp_path / "failed"})
    said = finish(job, 90)
    assert job.returncode != 0 and "ValueError: no score today" in said


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_with_a_checkpoint(world, tmp_path):
    """And the run goes on from it, alone, to the numbers of a run that no signal met."""
    reward = {"value_model_path": world / "reward", "save_iterations": 0}
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    told = reward | {"reward": "[{function: tests.launched:rank_one_is_told_to_end}]"}
    job = launch("ppo", 2, ppo_flags(world) | told | {"output_dir": cut})
    said = finish(job, 120)
    assert job.returncode != 0 and "stopped by SIGTERM" in said and f"{cut}/checkpoint-1 holds the run" in said
    again = {"output_dir": cut, "resume_from_checkpoint": "latest"}
    for changes in (again, {"output_dir": whole}):
        succeeded(launch("ppo", 1, ppo_flags(world) | told | changes), 1)  # one process: nobody is rank 1
    check_metrics(whole, cut, ("objective/", "loss/", "policy/grad_norm", "val/grad_norm"))
