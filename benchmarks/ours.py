"""One workload on our stages; prints one JSON line with the rate, the peak memory and the seconds of each phase.

python -m benchmarks.ours MODEL WORKLOAD DATA [KEY=VALUE ...]      further keys go to the stage's config
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from transformers import TrainingArguments

from align.config import ModelTerm, PPOConfig
from align.generate import make_sampler, uniform_numbers
from align.learn import build_actors, build_learner
from align.models import disable_dropout, load_packed_policy, load_scalar_model, save_scalar_model
from align.ranking import RankingCollator, encode_rankings
from align.reward_models import value_start
from align.rollout import Query, collect_rollout
from align.runtime import Runtime, tune_cpu
from align.text import Codec
from align.trainer import RankingTrainer
from align.types import Prompt, Ranking
from align.update import update
from benchmarks import workloads


def main(model: str, workload: str, data: str, *settings: str) -> None:
    tune_cpu()
    changes = {key: yaml.safe_load(value) for key, value in (setting.split("=", 1) for setting in settings)}
    runner = {"ppo": ppo, "rm": reward, "sampling": sampling}[workload.split("-")[0]]
    print(json.dumps({"workload": workload, **runner(model, workload, Path(data), changes)}))


def measured(count: float, unit: str, seconds: float, **more) -> dict:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"rate": count / seconds, "unit": unit, "seconds": seconds, "peak_gib": peak, **more}


def reward_folder(model: str, codec: Codec) -> str:
    """A reward model's folder: the language model's body with a fresh head."""
    folder = Path(model).parent / f"{Path(model).name}-reward"
    if not (folder / "config.json").exists():
        save_scalar_model(load_scalar_model(model, fresh_head=True), folder, codec.pad_id)
        codec.save(folder)
    return str(folder)


def ppo(model: str, workload: str, data: Path, changes: dict) -> dict:
    size, codec = workloads.PPO[workload], Codec.load(model)
    count, batch = size["episodes"], size["batch"]
    fixed = workload == "ppo-fixed"
    tokens = workloads.fixed_queries(count, 32) if fixed else workloads.chat_queries(data, codec.tokenizer, count)
    settings = {
        "model_name_or_path": model, "reward": (ModelTerm(reward_folder(model, codec)),), "train_file": "none",
        "output_dir": tempfile.mkdtemp(), "total_episodes": count, "rollout_batch_size": batch,
        "num_mini_batches": size["minibatches"], "per_device_train_batch_size": batch // size["minibatches"],
        "per_device_rollout_batch_size": batch, "microbatch_tokens": 1024, "max_new_tokens": size["new_tokens"],
        "ptx_coef": 0.0, "ema_decay": None, "bf16": True, "old_logprobs": "sampler", "warmup_iterations": 0,
    }  # fmt: skip
    config = PPOConfig(**(settings | changes))
    runtime = Runtime(config.seed, config.bf16)
    learner = build_learner(config, value_start(config, codec), runtime)
    actors = build_actors(config, codec, learner, runtime)
    queries = [Query(Prompt(""), tuple(ids)) for ids in tokens]
    start, drawn = time.perf_counter(), 0
    for iteration in range(count // batch):
        part = queries[iteration * batch : (iteration + 1) * batch]
        rollout = collect_rollout(part, actors, config, runtime, config.kl_coef, iteration)
        update(rollout, learner, lambda _: [], config, runtime, iteration)
        drawn += int(rollout.response_mask.sum())
    seconds = time.perf_counter() - start
    phases = runtime.seconds | {"other": seconds - sum(runtime.seconds.values())}
    return measured(count, "episodes/s", seconds, phases=phases, response_tokens=drawn)


def sampling(model: str, workload: str, data: Path, changes: dict) -> dict:
    """Sampling as PPO does it: float32 master weights, cast once for the rollout, inside the time."""
    codec = Codec.load(model)
    queries = workloads.chat_queries(data, codec.tokenizer, 64)
    runtime = Runtime(0, bf16=changes.get("bf16", True))
    policy = load_packed_policy(model)
    sampler = make_sampler(policy, codec.eos_id, codec.pad_id, changes.get("slots", 64))
    uniforms = uniform_numbers(len(queries), 128, 0, 0)
    start = time.perf_counter()
    with runtime.autocast():
        episodes = sampler(queries, uniforms, 1.0)
    seconds = time.perf_counter() - start
    return measured(sum(len(episode.response) for episode in episodes), "tokens/s", seconds)


def reward(model: str, workload: str, data: Path, changes: dict) -> dict:
    codec = Codec.load(model)
    rows = workloads.load_rankings(data, workload)
    pairs = len(workloads.pairs_of(rows))
    rankings = [Ranking(row["prompt"], tuple(row["answers"]), tuple(map(float, row["ranks"]))) for row in rows]
    scalar = load_scalar_model(model, fresh_head=True)
    disable_dropout(scalar)
    prompts_a_batch = workloads.RANKINGS[workload]["pairs_a_batch"] if workload == "rm-hh" else 1
    settings = {"per_device_train_batch_size": prompts_a_batch, "bf16": True, "learning_rate": 1e-5}
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=1, use_cpu=not torch.cuda.is_available(), report_to="none",
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
        **(settings | changes),
    )  # fmt: skip
    trainer = RankingTrainer(
        model=scalar, args=args, train_dataset=encode_rankings(rankings, codec),
        data_collator=RankingCollator(codec.pad_id),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    return measured(pairs, "pairs/s", time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
