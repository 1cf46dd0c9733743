"""One PPO iteration twice, on padded rows through transformers' attention and `generate`, and on packs through our own:
the seconds of each phase, and where those of the slowest go, operation by operation.

python -m benchmarks.profiling MODEL DATA [FILE]      writes FILE (benchmarks/profile.md)
"""

import contextlib
import datetime
import gc
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from align.errors import UserError
from align.runtime import Runtime, has_bf16, on_cpu, tune_cpu
from benchmarks import workloads
from benchmarks.compare import machine
from benchmarks.ours import stage_3

SPEC = workloads.SPECS["ppo-ragged"] | {"episodes": 16, "batch": 16, "new_tokens": 64}
PATHS = {"padded rows": "sdpa", "packs": None}  # attn_implementation
ROWS = 12  # operations shown


class ProfiledRuntime(Runtime):
    """Counts the operations of one phase, and their own seconds."""

    def __init__(self, seed: int, bf16: bool, phase: str | None):
        super().__init__(seed, bf16)
        self.phase, self.calls, self.spent = phase, Counter(), Counter()

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        if phase != self.phase:
            with super().timed(phase):
                yield
            return
        with profile(activities=[ProfilerActivity.CPU]) as recorded, super().timed(phase):
            yield
        for event in recorded.key_averages():
            self.calls[event.key] += event.count
            self.spent[event.key] += event.self_cpu_time_total / 1e6


def iteration(model: Path, data: Path, attention: str | None, phase: str | None = None) -> ProfiledRuntime:
    """A rollout and its update; `phase` is profiled."""
    with tempfile.TemporaryDirectory() as output:
        changes = {"attn_implementation": attention, "bf16": has_bf16()}
        stage = stage_3(SPEC, model, data, output, changes, lambda *keys: ProfiledRuntime(*keys, phase))
        stage.iterate(0)
    return stage.runtime


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(runtime: ProfiledRuntime) -> str:
    total = runtime.spent.total()
    rows = [
        [f"`{name}`", f"{runtime.calls[name]:,}", f"{seconds:.2f}", f"{seconds / total:.0%}"]
        for name, seconds in runtime.spent.most_common(ROWS)
    ]
    return table(["operation", "calls", "seconds of its own", "share"], rows)


def main(model: str, data: str, file: str = "benchmarks/profile.md") -> None:
    if not on_cpu():
        raise UserError("bench-profile: counts what a CPU does, here a GPU would work; set ACCELERATE_USE_CPU=true")
    tune_cpu()
    seconds, profiled = {}, {}
    iteration(Path(model), Path(data), None)  # what a process does once is not of either path
    for name, attention in PATHS.items():
        seconds[name] = iteration(Path(model), Path(data), attention).seconds
        gc.collect()
    slowest = max(seconds["padded rows"], key=seconds["padded rows"].get)
    for name, attention in PATHS.items():
        profiled[name] = iteration(Path(model), Path(data), attention, slowest)
        gc.collect()
    phases = [[phase, *(f"{times.get(phase, 0):.2f}" for times in seconds.values())] for phase in seconds["packs"]]
    phases.append(["all", *(f"{sum(times.values()):.2f}" for times in seconds.values())])
    precision = "bfloat16" if has_bf16() else "float32"
    work = f"{SPEC['episodes']} chat prompts, up to {SPEC['new_tokens']} new tokens, SmolLM2-135M"
    about = f"{datetime.date.today()}, {machine()}, {precision}: {work}."
    parts = [
        "# Where a PPO iteration's time goes, before and after",
        f"{about} `python -m benchmarks.profiling MODEL DATA` wrote this file; one run each.",
        table(["phase, seconds", *PATHS], phases),
        *(f"## {slowest}, {name}\n\n{shown(runtime)}" for name, runtime in profiled.items()),
    ]
    Path(file).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{file}: {slowest} profiled")


if __name__ == "__main__":
    main(*sys.argv[1:])
