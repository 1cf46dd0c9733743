"""PPO in two processes of one thread against one process of two threads: episodes a second, of the same run.

    python -m benchmarks.scaling [--folder runs/scaling] [--models 0.7M,6M] [--iterations 6] [--pairs 3]

The stage itself, on models of random weights, so that no response ends by habit. An iteration's seconds are those
between two rows of timing.jsonl; the first, which touches everything for the first time, is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from align.files import write_json, write_jsonl
from align.text import Codec
from benchmarks.models import make_model, reward_folder
from data.world.text import write_text

ROOT = Path(__file__).parents[1]
WORK = {  # rollout, tokens a response, rows of a microbatch and of a sampling batch
    "0.7M": {"rollout_batch_size": 128, "max_new_tokens": 40, "per_device_train_batch_size": 32},
    "6M": {"rollout_batch_size": 64, "max_new_tokens": 32, "per_device_train_batch_size": 16},
}


def flags(model: str, folder: Path, iterations: int) -> dict[str, str | int | float]:
    """The run's keys, one process or two: the global batch is the same."""
    make_model(model, folder / model)
    reward = reward_folder(folder / model, Codec.load(str(folder / model)))
    texts = list(write_text(0, "text", 600, frozenset()))
    for name, rows in (("prompts", [{"prompt": t[:80]} for t in texts]), ("text", [{"text": t} for t in texts])):
        write_jsonl(folder / f"{name}.jsonl", rows)
    work = WORK[model]
    return work | {
        "model_name_or_path": folder / model, "reward": f"[{{model: {reward}}}]",
        "train_file": folder / "prompts.jsonl", "pretraining_file": folder / "text.jsonl", "bf16": "false",
        "total_episodes": iterations * work["rollout_batch_size"], "num_mini_batches": 4, "max_prompt_length": 96,
        "ptx_coef": 0.3, "ptx_examples_per_episode": 0.5, "per_device_rollout_batch_size": work["rollout_batch_size"],
        "learning_rate": 1e-6, "transcript_iterations": 0, "overwrite_output_dir": "true",
    }  # fmt: skip


def rate(keys: dict, processes: int, output: Path) -> float:
    """Episodes a second of one run, over all processes."""
    words = [word for key, value in (keys | {"output_dir": output}).items() for word in (f"--{key}", str(value))]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "stages.ppo", *words]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(2 // processes), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    clock = [json.loads(line)["seconds"] for line in (output / "timing.jsonl").read_text().splitlines()]
    return keys["rollout_batch_size"] * (len(clock) - 1) / (clock[-1] - clock[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/scaling"), help="of models, data, outputs, results")
    parser.add_argument("--models", default=",".join(WORK))
    parser.add_argument("--iterations", type=int, default=6, help="two or more")
    parser.add_argument("--pairs", type=int, default=3, help="of runs, one process and two in turn")
    options = parser.parse_args()
    results = {}
    for model in options.models.split(","):
        keys = flags(model, options.folder, options.iterations)
        rates = {n: [] for n in (1, 2)}
        for pair in range(options.pairs):
            for processes in (1, 2) if pair % 2 == 0 else (2, 1):
                rates[processes].append(rate(keys, processes, options.folder / f"ppo-{model}-{processes}"))
        ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
        results[model] = {"one": rates[1], "two": rates[2], "ratios": ratios, "ratio": statistics.median(ratios)}
        one, two = (f"{statistics.median(rates[n]):.2f}" for n in (1, 2))
        spread = f"{results[model]['ratio']:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"{model}: one process {one} episodes/s, two {two}; ratio {spread}", flush=True)
    write_json(options.folder / "scaling.json", results)


if __name__ == "__main__":
    main()
