"""Ours against the peer: a table, and results.json beside this file, results-fp32.json for hardware without bfloat16
products (or with --growth: growth.json and plots).

python -m benchmarks --data FOLDER --peer PEER_PYTHON --model MODEL [--workloads 'ppo-*,toy-rm-qa'] [--repeats 3]
python -m benchmarks --growth --peer PEER_PYTHON --model MODEL [--point_seconds 60] [--minutes 10]
"""

import argparse
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import torch

from align.errors import UserError
from align.runtime import has_bf16, tune_cpu
from benchmarks import compare, workloads

HERE = Path(__file__).parent
PEER_VERSION = "1.12.0"  # the last with PPO
RESULTS = {"bf16": "results.json", "fp32": "results-fp32.json"}
ON_A_CPU = ",".join(name for name in workloads.WORKLOADS if name not in workloads.GPU_WORKLOADS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of real data, laid out as docs/benchmarks.md says")
    parser.add_argument("--peer", required=True, help=f"a Python with TRL {PEER_VERSION}")
    parser.add_argument("--model", required=True, help="SmolLM2-135M, exported; the other models are made beside it")
    parser.add_argument(
        "--workloads", default="gpu-*" if torch.cuda.is_available() else ON_A_CPU,
        help="names or patterns, with commas between; default: those of a GPU where there is one, else the others",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16" if has_bf16() else "fp32",
        help="of the products, on both sides; weights that are trained are float32. Default: the hardware's best",
    )  # fmt: skip
    parser.add_argument("--growth", action="store_true", help="measure growth instead")
    parser.add_argument(
        "--point_seconds", type=float, default=60, help="a point of growth that takes longer is left out"
    )
    parser.add_argument("--minutes", type=float, default=10, help="of all growth; the peer comes last")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results.json, growth.json and the plots")
    options = parser.parse_args()
    try:
        specs = workloads.POINTS if options.growth else {n: workloads.SPECS[n] for n in chosen(options.workloads)}
        prepare(options, specs)
        if options.growth:
            from benchmarks.growth import grow

            sides = compare.Sides(options.model, "none", options.peer, options.precision)
            grow(sides, options.point_seconds, 60 * options.minutes, options.output)
            return
        sides = compare.Sides(options.model, options.data, options.peer, options.precision)
        results = options.output / RESULTS[options.precision]
        entries = []
        for name in specs:
            entries.append(compare.compare(name, sides, options.repeats))
            compare.merge(entries[-1], results)
            print(compare.table(entries[-1:]), flush=True)
        print("\n" + compare.table(entries))
    except UserError as error:
        sys.exit(f"error: {error}")


def chosen(patterns: str) -> list[str]:
    """The workloads that the patterns name, in their order; a pattern that names none is an error."""
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatch(name, pattern) for name in workloads.WORKLOADS):
            raise UserError(f"--workloads: {pattern!r} names none of {', '.join(workloads.WORKLOADS)}")
    return [name for name in workloads.WORKLOADS if any(fnmatch(name, pattern) for pattern in wanted)]


def prepare(options: argparse.Namespace, specs: dict[str, dict]) -> None:
    """Everything that the runs need, before the first of them."""
    if options.repeats < 1:
        raise UserError(f"--repeats: {options.repeats}; give 1 or more")
    sources = dict.fromkeys(spec["source"] for spec in specs.values() if spec["source"] in workloads.FILES)
    if sources and not options.data:
        raise UserError("--data: missing; name the folder of real data that docs/benchmarks.md describes")
    options.model, options.data = os.path.abspath(options.model), os.path.abspath(options.data or "none")
    for source in sources:
        file = Path(options.data, workloads.FILES[source])
        if not file.is_file():
            raise UserError(f"{file}: missing; DATA=folder (--data) must be laid out as docs/benchmarks.md says")
    models = {spec["model"] for spec in specs.values()}
    files = [Path(options.model, name) for name in ("config.json", "model.safetensors", "tokenizer.json")]
    if workloads.SMOLLM2 in models and not all(file.is_file() for file in files):
        raise UserError(f"{options.model}: no exported SmolLM2 there; take the folder away and run `make bench`")
    if any(spec["kind"] == "ppo" for spec in specs.values()):
        require_peer(options.peer)
    tune_cpu()  # the matrix product gets the threads that the runs get
    from benchmarks.models import make_model  # late: it loads transformers

    for name in sorted(models & workloads.MODELS.keys()):
        make_model(name, workloads.model_folder(options.model, {"model": name}))


def require_peer(python: str) -> None:
    """The peer's Python has the TRL that has PPO."""
    code = "import importlib.metadata as m; print(m.version('trl'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        raise UserError(f"{python}: no such Python; `make bench` makes the peer's environment") from None
    if done.stdout.strip() != PEER_VERSION:
        found = f"TRL {done.stdout.strip()}" if done.returncode == 0 else "no TRL"
        raise UserError(f"{python}: has {found}, not TRL {PEER_VERSION}; take .venv-bench away and run `make bench`")


if __name__ == "__main__":
    main()
