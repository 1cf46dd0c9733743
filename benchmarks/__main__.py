"""Runs each workload on our side and the peer's by turns, in processes of their own, and writes the table.

    python -m benchmarks --data FOLDER --peer PEER_PYTHON --model MODEL [--workloads ppo-fixed,rm-qa] [--repeats 3]

The ratio is ours / peer's of neighbouring runs: their geometric mean, with the least and the greatest as its spread.
The limit is the rate of a 2048-cubed bfloat16 product measured between the runs, over the operations that the
workload needs (docs/benchmarks.md); a result says what part of it was reached.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
WORKLOADS = ("ppo-fixed", "ppo-ragged", "sampling-ragged", "rm-hh", "rm-qa")
# Of an episode, 2 a weight and token: sampling, reference, reward, value, policy once each, two trainings thrice.
PPO_FIXED_FLOPS = 64 * 22 * 134.5e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--peer", required=True, help="the peer's Python")
    parser.add_argument("--model", required=True)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=str(HERE / "results.json"))
    options = parser.parse_args()
    for workload in options.workloads.split(","):
        result = compare(workload, options)
        write(result, Path(options.output))
        print(row(result), flush=True)


def compare(workload: str, options: argparse.Namespace) -> dict:
    """Ours and the peer's by turns; which goes first changes from pair to pair."""
    ours = [sys.executable, "-m", "benchmarks.ours", options.model, workload, options.data]
    peer = [options.peer, str(HERE / "peer.py"), options.model, workload, options.data]
    runs: dict[str, list[dict]] = {"ours": [], "peer": []}
    limits = []
    for repeat in range(options.repeats):
        for side, command in (("ours", ours), ("peer", peer))[:: 1 if repeat % 2 == 0 else -1]:
            limits.append(matrix_limit())
            runs[side].append(run(command))
    ratios = [a["rate"] / b["rate"] for a, b in zip(runs["ours"], runs["peer"], strict=True)]
    rate = mean([a["rate"] for a in runs["ours"]])
    limit = mean(limits)
    return {
        "workload": workload,
        "ours": rate,
        "peer": mean([b["rate"] for b in runs["peer"]]),
        "unit": runs["ours"][0]["unit"],
        "ratio": math.exp(mean([math.log(ratio) for ratio in ratios])),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "memory_ratio": max(a["peak_gib"] for a in runs["ours"]) / max(b["peak_gib"] for b in runs["peer"]),
        "limit_fraction": rate * PPO_FIXED_FLOPS / limit if workload == "ppo-fixed" else None,
        "date": date.today().isoformat(),
        "machine": machine(),
        "limit_gflops": limit / 1e9,
        "phases": shares(runs["ours"]),
        "runs": runs,
    }


def run(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def matrix_limit(size: int = 2048, repeats: int = 20) -> float:
    """Operations a second of a bfloat16 matrix product."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    a @ a
    start = time.perf_counter()
    for _ in range(repeats):
        product = a @ a
    float(product[0, 0])
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def shares(runs: list[dict]) -> dict[str, float] | None:
    """Mean share of the time in each phase."""
    if "phases" not in runs[0]:
        return None
    return {name: mean([r["phases"][name] / r["seconds"] for r in runs]) for name in runs[0]["phases"]}


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def machine() -> str:
    import os

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return f"{device}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(result: dict, path: Path) -> None:
    """Replace this workload's entry in the list."""
    old = json.loads(path.read_text()) if path.exists() else []
    kept = [entry for entry in old if entry["workload"] != result["workload"]]
    path.write_text(json.dumps(sorted([*kept, result], key=lambda e: e["workload"]), indent=1) + "\n")


def row(result: dict) -> str:
    low, high = result["ratio_low"], result["ratio_high"]
    limit = "" if result["limit_fraction"] is None else f", {result['limit_fraction']:.0%} of the limit"
    return (
        f"{result['workload']}: {result['ours']:.2f} against {result['peer']:.2f} {result['unit']}, ratio "
        f"{result['ratio']:.2f} ({low:.2f} to {high:.2f}), memory {result['memory_ratio']:.2f}{limit}"
    )


if __name__ == "__main__":
    main()
