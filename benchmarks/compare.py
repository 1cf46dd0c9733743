"""Ours against the peer's on one workload, by turns, in processes of their own; the entry of results.json.

The ratio is ours / peer's of neighbouring runs: their geometric mean, with the least and the greatest as its spread.
The limit is the rate of a large product in the runs' precision, measured before each run, over the operations that
the workload needs (docs/benchmarks.md); a result says what part of it was reached.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from align.errors import UserError
from align.files import write_json
from align.runtime import available_cpus
from benchmarks import workloads

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Sides:
    """What both sides are run with."""

    model: str
    data: str
    peer: str  # a Python with the last TRL that has PPO
    precision: str  # of the products: bf16 or fp32

    def command(self, side: str, names: str, spec: dict) -> list[str]:
        """Of the peer's side only PPO needs another Python: the newest TRL has the other trainers."""
        if side == "ours":
            bf16 = str(self.precision == "bf16").lower()
            return [sys.executable, "-m", "benchmarks.ours", self.model, names, self.data, f"bf16={bf16}"]
        python = self.peer if spec["kind"] == "ppo" else sys.executable
        return [python, str(ROOT / "benchmarks" / "peer.py"), self.model, names, self.data, self.precision]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def compare(name: str, sides: Sides, repeats: int) -> dict:
    """Pairs of runs; which side goes first changes from pair to pair."""
    runs: dict[str, list[dict]] = {"ours": [], "peer": []}
    limits = []
    for repeat in range(repeats):
        for side in ("ours", "peer")[:: 1 if repeat % 2 == 0 else -1]:
            limits.append(matrix_limit(sides.precision))
            runs[side].append(run(name, sides.command(side, name, workloads.SPECS[name])))
    return result(name, runs, mean(limits)) | {"precision": sides.precision}


def run(name: str, command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    if done.returncode != 0:
        raise UserError(failure(name, command, done.returncode, done.stderr))
    return parse(done.stdout.strip().splitlines()[-1])


def parse(line: str) -> dict | None:
    """A side's line of results; None for whatever else its libraries print."""
    return json.loads(line) if line.startswith('{"workload"') else None


def failure(name: str, command: list[str], code: int, stderr: str) -> str:
    """One line: killed processes leave no message, and memory is what they run out of."""
    if code == -9:
        return f"{name}: killed, so probably out of memory; close other programs or leave it out with --workloads"
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    return f"{name}: exit {code}: {last[:200]}; for the whole message run: {' '.join(command)}"


def result(name: str, runs: dict[str, list[dict]], limit: float) -> dict:
    """The entry of results.json. limit: operations a second of the machine."""
    ours, peers = runs["ours"], runs["peer"]
    for a, b in zip(ours, peers, strict=True):
        if (a["work"], a["unit"]) != (b["work"], b["unit"]):
            raise UserError(f"{name}: the sides did different work, {a['work']} and {b['work']}: mend benchmarks/")
    ratios = [a["rate"] / b["rate"] for a, b in zip(ours, peers, strict=True)]
    return {
        "workload": name,
        "ours": mean([a["rate"] for a in ours]),
        "peer": mean([b["rate"] for b in peers]),
        "unit": ours[0]["unit"],
        "ratio": math.exp(mean([math.log(ratio) for ratio in ratios])),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "memory_ratio": max(a["peak_gib"] for a in ours) / max(b["peak_gib"] for b in peers),
        "limit_fraction": mean([a["flops"] / a["seconds"] for a in ours]) / limit,
        "date": date.today().isoformat(),
        "machine": machine(),
        "peer_version": peers[0]["version"],
        "limit_gflops": limit / 1e9,
        "phases": shares(ours),
        "runs": runs,
    }


def shares(runs: list[dict]) -> dict[str, float] | None:
    """Mean share of the time in each phase."""
    if "phases" not in runs[0]:
        return None
    return {name: mean([r["phases"][name] / r["seconds"] for r in runs]) for name in runs[0]["phases"]}


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def matrix_limit(precision: str, repeats: int = 20) -> float:
    """Operations a second of a matrix product."""
    import torch

    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, dtype=dtype, device=device)
    float((a @ a)[0, 0])
    start = time.perf_counter()
    for _ in range(repeats):
        product = a @ a
    float(product[0, 0])
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return f"{device}, {available_cpus()} cores, torch {torch.__version__}"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def merge(entry: dict, path: Path) -> None:
    """Replace this workload's entry in the list; the others stay, each with its own date and machine."""
    kept = [old for old in read(path) if old["workload"] != entry["workload"]]
    write_json(path, sorted([*kept, entry], key=lambda e: e["workload"]))


def read(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError:
        raise UserError(f"{path}: is not JSON; mend it or take it away") from None


HEAD = ("workload", "ours", "peer", "unit", "ratio", "spread", "memory", "limit")


def table(entries: list[dict]) -> str:
    """What was measured, a line each, and where our time goes."""
    rows = [HEAD, *map(cells, entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for entry in entries:
        if entry["phases"]:
            parts = ", ".join(f"{name} {share:.0%}" for name, share in entry["phases"].items())
            lines.append(f"{entry['workload']}: {parts}")
    return "\n".join(lines)


def cells(entry: dict) -> tuple[str, ...]:
    limit = entry["limit_fraction"]
    return (
        entry["workload"], f"{entry['ours']:.2f}", f"{entry['peer']:.2f}", entry["unit"], f"{entry['ratio']:.2f}",
        f"{entry['ratio_low']:.2f} to {entry['ratio_high']:.2f}", f"{entry['memory_ratio']:.2f}",
        "" if limit is None else f"{limit:.0%}",
    )  # fmt: skip
