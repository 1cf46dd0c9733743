"""One workload on the peer, TRL, through its public API; prints one JSON line. Runs in the peer's own environment.

python peer.py MODEL WORKLOAD DATA [PRECISION]      PRECISION: bf16 (autocast, float32 masters), fp32
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import torch
import transformers
import workloads
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def main(model: str, workload: str, data: str, precision: str = "bf16") -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token if workload.startswith("sampling") else "<|endoftext|>"
    runner = {"ppo": ppo, "rm": reward, "sampling": sampling}[workload.split("-")[0]]
    print(json.dumps({"workload": workload, **runner(model, workload, Path(data), precision, tokenizer)}))


def timed(count: int, unit: str, work) -> dict:
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"rate": count / seconds, "unit": unit, "seconds": seconds, "peak_gib": peak}


def scorer(model: str, pad_id: int, dtype: torch.dtype):
    loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32).to(dtype)
    loaded.config.pad_token_id = pad_id
    return loaded


def ppo(model: str, workload: str, data: Path, precision: str, tokenizer) -> dict:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    size = workloads.PPO[workload]
    fixed = workload == "ppo-fixed"
    count, batch = size["episodes"], size["batch"]
    queries = workloads.fixed_queries(count, 32) if fixed else workloads.chat_queries(data, tokenizer, count)
    frozen = torch.float32 if precision == "fp32" else torch.bfloat16
    rows = Dataset.from_dict({"input_ids": queries})
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch // size["minibatches"],
        gradient_accumulation_steps=size["minibatches"], num_mini_batches=size["minibatches"], num_ppo_epochs=1,
        total_episodes=count, response_length=size["new_tokens"], local_rollout_forward_batch_size=batch,
        stop_token="eos", missing_eos_penalty=1.0, bf16=precision == "bf16", use_cpu=not torch.cuda.is_available(),
        report_to="none", num_sample_generations=0, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows.select(range(8)),
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(model, dtype=frozen),
        reward_model=scorer(model, tokenizer.pad_token_id, frozen),
        value_model=scorer(model, tokenizer.pad_token_id, torch.float32),
    )  # fmt: skip
    return timed(count, "episodes/s", trainer.train)


def reward(model: str, workload: str, data: Path, precision: str, tokenizer) -> dict:
    from trl import RewardConfig, RewardTrainer

    tokenizer.padding_side = "right"
    pairs = workloads.pairs_of(workloads.load_rankings(data, workload))
    args = RewardConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=workloads.RANKINGS[workload]["pairs_a_batch"],
        num_train_epochs=1, max_length=2048, bf16=precision == "bf16", use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=scorer(model, tokenizer.pad_token_id, torch.float32), args=args,
        train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
    )  # fmt: skip
    return timed(len(pairs), "pairs/s", trainer.train)


def sampling(model: str, workload: str, data: Path, precision: str, tokenizer) -> dict:
    """transformers' generate, in batches of 32 in the prompts' order, on weights already in the sampling precision."""
    queries = workloads.chat_queries(data, tokenizer, 64)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    drawn = []

    def work() -> None:
        for start in range(0, len(queries), 32):
            inputs = tokenizer.pad({"input_ids": queries[start : start + 32]}, return_tensors="pt")
            out = policy.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=128,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
            for row in out.tolist():
                ends = tokenizer.eos_token_id in row
                drawn.append(row.index(tokenizer.eos_token_id) + 1 if ends else len(row))

    torch.manual_seed(0)
    result = timed(1, "tokens/s", work)
    return result | {"rate": sum(drawn) / result["seconds"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
