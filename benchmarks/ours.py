"""Workloads on our stages; a JSON line each with the rate, the peak memory and the seconds of each phase.

python -m benchmarks.ours MODEL WORKLOAD[,WORKLOAD...] DATA [KEY=VALUE ...]      further keys go to the stage's config
"""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import TrainingArguments

from align.config import ModelTerm, PPOConfig
from align.files import write_jsonl
from align.generate import make_sampler, uniform_numbers
from align.learn import build_learner, build_rollout_models
from align.models import disable_dropout, load_packed_policy, load_policy, load_scalar_model
from align.ranking import RankingCollator, encode_rankings, split_pairs
from align.reward_models import value_start
from align.rollout import Query, RolloutModels, collect_rollout
from align.runtime import Runtime, tune_cpu
from align.text import Codec
from align.track import read_jsonl
from align.trainer import RankingTrainer
from align.types import Prompt, Ranking, Rollout
from align.update import Learner, update
from benchmarks import workloads
from benchmarks.models import reward_folder
from benchmarks.workloads import measured
from stages import sft


def main(smollm2: str, names: str, data: str, *settings: str) -> None:
    tune_cpu()
    changes = {key: yaml.safe_load(value) for key, value in (setting.split("=", 1) for setting in settings)}
    for name in names.split(","):
        spec = workloads.SPECS[name]
        runner = {"ppo": ppo, "rm": reward, "sampling": sampling, "sft": fine_tuning}[spec["kind"]]
        workloads.start_measuring()
        with tempfile.TemporaryDirectory() as output:
            result = runner(spec, workloads.model_folder(smollm2, spec), Path(data), output, changes)
        print(json.dumps({"workload": name, **result}), flush=True)
        gc.collect()  # a Trainer and its model hold each other


def operations(spec: dict, model: torch.nn.Module, tokens: int) -> dict:
    """What the work needs, whoever does it (docs/benchmarks.md)."""
    return {"tokens": tokens, "flops": workloads.FLOPS[spec["kind"]] * multiplied_weights(spec["kind"], model) * tokens}


def multiplied_weights(kind: str, model: torch.nn.Module) -> int:
    """A reward model's embedding is looked up only; a policy's, which is tied, is its output layer too."""
    weights = sum(p.numel() for p in model.parameters())
    return weights - model.inner.get_input_embeddings().weight.numel() if kind == "rm" else weights


@dataclass(frozen=True)
class Stage3:
    """What an iteration of PPO needs."""

    config: PPOConfig
    queries: list[Query]
    runtime: Runtime
    learner: Learner
    models: RolloutModels

    def iterate(self, iteration: int) -> tuple[Rollout, float]:
        """One rollout and its update, and its optimiser steps."""
        batch = self.config.rollout_batch_size
        part = self.queries[iteration * batch : (iteration + 1) * batch]
        rollout = collect_rollout(part, self.models, self.config, self.runtime, self.config.kl_coef, iteration)
        stats = update(rollout, self.learner, lambda _: [], self.config, self.runtime, iteration)
        return rollout, stats.sums["steps"]


def stage_3(
    spec: dict, model: Path, data: Path, output: str, changes: dict, make_runtime: Callable[..., Runtime] = Runtime
) -> Stage3:
    codec = Codec.load(str(model))
    count, batch = spec["episodes"], spec["batch"]
    queries = [Query(Prompt(""), tuple(ids)) for ids in workloads.queries(data, codec.tokenizer, spec)]
    settings = {
        "model_name_or_path": str(model), "reward": (ModelTerm(reward_folder(model, codec)),), "train_file": "none",
        "output_dir": output, "total_episodes": count, "rollout_batch_size": batch,
        "num_mini_batches": spec["minibatches"], "per_device_train_batch_size": batch // spec["minibatches"],
        "per_device_rollout_batch_size": batch, "microbatch_tokens": spec["microbatch_tokens"],
        "max_new_tokens": spec["new_tokens"], "temperature": workloads.TEMPERATURE,
        "ptx_coef": 0.0, "ema_decay": None, "bf16": True, "old_logprobs": "sampler", "warmup_iterations": 0,
    }  # fmt: skip
    config = PPOConfig(**(settings | changes))
    runtime = make_runtime(config.seed, config.bf16)
    start = value_start(config, codec)
    learner = build_learner(config, start, runtime)
    return Stage3(config, queries, runtime, learner, build_rollout_models(config, codec, start, learner, runtime))


def ppo(spec: dict, model: Path, data: Path, output: str, changes: dict) -> dict:
    stage = stage_3(spec, model, data, output, changes)
    start, drawn, episodes, steps = time.perf_counter(), 0, 0, 0
    for iteration in range(spec["episodes"] // spec["batch"]):
        rollout, taken = stage.iterate(iteration)
        steps += int(taken)
        drawn += int(rollout.response_mask.sum())
        episodes += len(rollout)
    finish()
    seconds, phases = time.perf_counter() - start, stage.runtime.seconds
    phases = phases | {"other": seconds - sum(phases.values())}
    needs = operations(spec, stage.learner.policy, drawn + sum(len(query.tokens) for query in stage.queries))
    work = {"episodes": episodes, "steps": steps}
    return measured(spec["episodes"], "episodes/s", seconds, work, phases=phases, response_tokens=drawn, **needs)


def finish() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sampling(spec: dict, model: Path, data: Path, output: str, changes: dict) -> dict:
    """Sampling as PPO does it: float32 master weights, cast once for the rollout, inside the time."""
    codec = Codec.load(str(model))
    queries = workloads.queries(data, codec.tokenizer, spec)
    runtime = Runtime(0, bf16=changes.get("bf16", True))
    policy = load_packed_policy(str(model)).to(runtime.device)
    sampler = make_sampler(policy, codec.eos_id, codec.pad_id, changes.get("slots", spec["slots"]))
    uniforms = uniform_numbers(len(queries), spec["new_tokens"], 0, 0)
    start = time.perf_counter()
    with runtime.autocast():
        episodes = sampler(queries, uniforms, workloads.TEMPERATURE)
    seconds = time.perf_counter() - start
    drawn = sum(len(episode.response) for episode in episodes)
    needs = operations(spec, policy, drawn + sum(map(len, queries)))
    return measured(drawn, "tokens/s", seconds, {"queries": len(queries)}, **needs)


def reward(spec: dict, model: Path, data: Path, output: str, changes: dict) -> dict:
    codec = Codec.load(str(model))
    rows = workloads.load_rankings(data, spec)
    rankings = [Ranking(row["prompt"], tuple(row["answers"]), tuple(map(float, row["ranks"]))) for row in rows]
    encoded = encode_rankings(rankings, codec)
    pairs = len(split_pairs(encoded))  # what is trained, not what the peer is given
    scalar = load_scalar_model(str(model), fresh_head=True)
    disable_dropout(scalar)
    settings = {"per_device_train_batch_size": spec["prompts_a_step"], "bf16": True, "learning_rate": 1e-5}
    args = TrainingArguments(
        output_dir=output, num_train_epochs=1, use_cpu=not torch.cuda.is_available(), report_to="none",
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
        **(settings | changes),
    )  # fmt: skip
    trainer = RankingTrainer(
        model=scalar, args=args, train_dataset=encoded, data_collator=RankingCollator(codec.pad_id)
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    needs = operations(spec, scalar, sum(row["ranking"].tokens for row in encoded))
    return measured(pairs, "pairs/s", seconds, {"pairs": pairs}, **needs)


def fine_tuning(spec: dict, model: Path, data: Path, output: str, changes: dict) -> dict:
    """The stage itself, from its files to its model folder; of its time the Trainer's part: steps, one evaluation of
    the held-out rows and one checkpoint. What comes before and after has nothing beside it on the peer's side."""
    files = {"train_file": f"{output}/train.jsonl", "validation_file": f"{output}/validation.jsonl"}
    for file, rows in zip(files.values(), workloads.demonstrations(data, spec), strict=True):
        write_jsonl(file, rows)
    settings = workloads.SFT | files | {
        "model_name_or_path": str(model), "output_dir": f"{output}/run", "bf16": True,
        "per_device_train_batch_size": spec["batch"],
    }  # fmt: skip
    sft.main([f"--{key}={value}" for key, value in (settings | changes).items()])
    seconds = read_jsonl(f"{output}/run/timing.jsonl")[-1]["train_runtime"]
    (state,) = Path(output, "run").glob("checkpoint-*/trainer_state.json")
    state = json.loads(state.read_text(encoding="utf-8"))
    tokens = max(row.get("num_tokens", 0) for row in state["log_history"])
    work = {"tokens": int(tokens), "steps": state["global_step"]}
    return measured(tokens, "tokens/s", seconds, work, **operations(spec, load_policy(str(model)), int(tokens)))


if __name__ == "__main__":
    main(*sys.argv[1:])
