"""Metrics to metrics.jsonl always and to a tracker when asked; transcripts; the Trainer's log through the same door.

metrics.jsonl holds nothing that depends on the clock, so that two runs with one seed write the same file; seconds go
to timing.jsonl. `docs/metrics.md` defines every key.
"""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.runtime import is_main_process

CLOCKED = ("_runtime", "_per_second", "total_flos", "time/")


class Metrics:
    """Appends one row a step. On resume, rows past the resumed step are cut first."""

    def __init__(self, folder: str | Path, resume_step: int | None = None, name: str = "metrics.jsonl"):
        self.path, self.timing = Path(folder) / name, Path(folder) / "timing.jsonl"
        self.start = time.perf_counter()
        if not is_main_process():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.path, self.timing):
            kept = [] if resume_step is None else [r for r in read_jsonl(path) if r.get("step", 0) <= resume_step]
            path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if not is_main_process():
            return
        clocked = {k: v for k, v in metrics.items() if any(word in k for word in CLOCKED)}
        rest = {k: v for k, v in metrics.items() if k not in clocked}
        append_jsonl(self.path, [{"step": step, **rest}])
        seconds = {"step": step, "seconds": round(time.perf_counter() - self.start, 3)}
        append_jsonl(self.timing, [seconds | clocked])


class MetricsCallback(TrainerCallback):
    """What a transformers Trainer logs, in the project's own file."""

    def __init__(self, metrics: Metrics):
        self.metrics = metrics

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        self.metrics.log(state.global_step, {k: v for k, v in (logs or {}).items() if k != "step"})


def append_jsonl(path: str | Path, rows: list[dict]) -> None:
    if is_main_process():
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of one of our own files; [] when there is none."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def announce(line: str) -> None:
    """One line for the person who watches, from the main process."""
    if is_main_process():
        print(line, flush=True)
