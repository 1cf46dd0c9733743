"""Workloads on the peer, TRL, through its public API; a JSON line each. PPO runs in the peer's own environment.

python peer.py MODEL WORKLOAD[,WORKLOAD...] DATA [PRECISION]      PRECISION: bf16 (autocast, float32 masters), fp32
"""

import gc
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import torch
import transformers
import workloads
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from workloads import measured


def main(smollm2: str, names: str, data: str, precision: str = "bf16") -> None:
    if "OMP_NUM_THREADS" not in os.environ:  # the user's word counts on both sides
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    transformers.logging.set_verbosity_error()
    peer = f"trl {version('trl')}, transformers {version('transformers')}"
    for name in names.split(","):
        spec = workloads.SPECS[name]
        model = str(workloads.model_folder(smollm2, spec))
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if spec["kind"] in ("ppo", "rm") and tokenizer.pad_token_id == tokenizer.eos_token_id:
            tokenizer.pad_token = "<|endoftext|>"  # it would mask the EOS that it is to learn
        runner = {"ppo": ppo, "rm": reward, "sampling": sampling, "sft": fine_tuning}[spec["kind"]]
        workloads.start_measuring()
        with tempfile.TemporaryDirectory() as output:
            result = runner(spec, model, Path(data), output, precision, tokenizer)
        print(json.dumps({"workload": name, "version": peer, **result}), flush=True)
        gc.collect()


def seconds_of(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def scorer(model: str, pad_id: int, dtype: torch.dtype):
    loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32).to(dtype)
    loaded.config.pad_token_id = pad_id
    return loaded


def common(output: str, precision: str) -> dict:
    return {
        "output_dir": output, "bf16": precision == "bf16", "use_cpu": not torch.cuda.is_available(),
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def ppo(spec: dict, model: str, data: Path, output: str, precision: str, tokenizer) -> dict:
    """TRL's rollout is per_device_train_batch_size x gradient_accumulation_steps episodes. It accumulates from one
    minibatch to the next, so with 1 each minibatch goes through the models at once and takes an optimiser step."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    count, batch = spec["episodes"], spec["batch"]
    frozen = torch.float32 if precision == "fp32" else torch.bfloat16
    rows = Dataset.from_dict({"input_ids": workloads.queries(data, tokenizer, spec)})
    args = PPOConfig(
        **common(output, precision), per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_mini_batches=spec["minibatches"], num_ppo_epochs=1, total_episodes=count,
        response_length=spec["new_tokens"], temperature=workloads.TEMPERATURE, local_rollout_forward_batch_size=batch,
        stop_token="eos", missing_eos_penalty=1.0, num_sample_generations=0, save_strategy="no",
    )  # fmt: skip
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows.select(range(8)),
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(model, dtype=frozen),
        reward_model=scorer(model, tokenizer.pad_token_id, frozen),
        value_model=scorer(model, tokenizer.pad_token_id, torch.float32),
    )  # fmt: skip
    seconds = seconds_of(trainer.train)
    work = {"episodes": trainer.state.episode, "steps": steps_taken(trainer.optimizer)}
    return measured(count, "episodes/s", seconds, work)


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """As the optimiser itself counted; the trainer counts rollouts, and calls `step` where accelerate takes none."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def reward(spec: dict, model: str, data: Path, output: str, precision: str, tokenizer) -> dict:
    from trl import RewardConfig, RewardTrainer

    tokenizer.padding_side = "right"
    pairs = workloads.pairs_of(workloads.load_rankings(data, spec))
    args = RewardConfig(
        **common(output, precision), per_device_train_batch_size=spec["pairs_a_step"], num_train_epochs=1,
        max_length=None, gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    trainer = RewardTrainer(
        model=scorer(model, tokenizer.pad_token_id, torch.float32), args=args,
        train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
    )  # fmt: skip
    return measured(len(pairs), "pairs/s", seconds_of(trainer.train), {"pairs": len(trainer.train_dataset)})


def fine_tuning(spec: dict, model: str, data: Path, output: str, precision: str, tokenizer) -> dict:
    """SFTTrainer on the rows that our stage trains on, token for token, with one evaluation and one checkpoint too."""
    from trl import SFTConfig, SFTTrainer

    train, held_out = (
        Dataset.from_list([workloads.demonstration_tokens(tokenizer, row) for row in rows])
        for rows in workloads.demonstrations(data, spec)
    )
    args = SFTConfig(
        **common(output, precision), **workloads.SFT, per_device_train_batch_size=spec["batch"],
        per_device_eval_batch_size=spec["batch"], gradient_checkpointing=False, weight_decay=0.0,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, eval_strategy="epoch",
        save_strategy="epoch",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=args,
        train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history
    count = int(max(row.get("num_tokens", 0) for row in log))
    work = {"tokens": count, "steps": trainer.state.global_step}
    return measured(count, "tokens/s", next(row["train_runtime"] for row in log if "train_runtime" in row), work)


def sampling(spec: dict, model: str, data: Path, output: str, precision: str, tokenizer) -> dict:
    """transformers' generate, in batches in the prompts' order, on weights already in the sampling precision."""
    queries = workloads.queries(data, tokenizer, spec)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(device)
    drawn = []

    def work() -> None:
        for start in range(0, len(queries), spec["batch"]):
            inputs = tokenizer.pad({"input_ids": queries[start : start + spec["batch"]]}, return_tensors="pt")
            out = policy.generate(
                **inputs.to(device), do_sample=True, temperature=workloads.TEMPERATURE, top_k=0, top_p=1.0,
                max_new_tokens=spec["new_tokens"], eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
            for row in out.tolist():
                ends = tokenizer.eos_token_id in row
                drawn.append(row.index(tokenizer.eos_token_id) + 1 if ends else len(row))

    torch.manual_seed(0)
    seconds = seconds_of(work)
    return measured(sum(drawn), "tokens/s", seconds, {"queries": len(drawn)})


if __name__ == "__main__":
    main(*sys.argv[1:])
