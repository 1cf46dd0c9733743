"""Metrics to metrics.jsonl always and to a tracker when asked; transcripts; the Trainer's log through the same door.

metrics.jsonl holds nothing that depends on the clock, so that two runs with one seed write the same file; seconds go
to timing.jsonl. `docs/metrics.md` defines every key.
"""

import atexit
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.config import TrainingConfig
from align.errors import UserError, first_line
from align.files import plain, sync, write_json, write_jsonl
from align.manifest import redact
from align.maths.masks import response_tokens
from align.maths.reduce import masked_row_sum, masked_var
from align.maths.repetition import repeated_ngrams
from align.rows import DataReport
from align.runtime import is_main_process
from align.text import Codec
from align.types import Rollout, UpdateStats

MANY_DROPPED = 0.05  # of a data set's rows: a warning
TRACKER_WAIT = 60.0  # seconds that wandb gets to start, and to send what is left
LOGS = ("metrics.jsonl", "timing.jsonl", "transcripts.jsonl", "validation.jsonl")  # a stage appends as it trains
CLOCKED = ("_runtime", "_per_second", "total_flos", "time/")
SINCE_START = ("train_loss", "num_tokens")  # of this process: another after a resume


class Metrics:
    """Appends one row a step. The folder's logs start anew, or on resume where they stood at the checkpoint.

    With a config that says `report_to: wandb` or `tensorboard`, rows go there too.
    """

    def __init__(self, folder: str | Path, checkpoint: Path | None = None, config: TrainingConfig | None = None):
        self.path, self.timing = Path(folder) / "metrics.jsonl", Path(folder) / "timing.jsonl"
        self.tracker, self.start = None, time.perf_counter()
        if not is_main_process():
            return
        cut_logs(Path(folder), checkpoint)
        rows = read_jsonl(self.path)
        if config is not None and config.report_to == "wandb":
            self.tracker = Tracker(Path(folder), config, len(rows))
        if config is not None and config.report_to == "tensorboard":
            self.tracker = TensorBoard(Path(folder), rows[-1]["step"] + 1 if rows else 0)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if not is_main_process():
            return
        clocked = {k: v for k, v in metrics.items() if any(word in k for word in CLOCKED)}
        rest = {k: v for k, v in metrics.items() if k not in clocked}
        append_jsonl(self.path, [{"step": step, **rest}])
        seconds = {"step": step, "seconds": round(time.perf_counter() - self.start, 3)}
        append_jsonl(self.timing, [seconds | clocked])
        if self.tracker:
            self.tracker.log(step, rest | {k: v for k, v in clocked.items() if k.startswith("time/")})


def shown(row: Mapping[str, float]) -> str:
    """What a progress bar says of an iteration of PPO."""
    names = {"score": "objective/raw_scores", "kl": "objective/kl", "finished": "objective/finished"}
    return ", ".join(f"{name} {row[key]:.3g}" for name, key in names.items())


def run_name(folder: Path) -> str:
    """WANDB_NAME, else the folder with its parent's name: tiny/ppo, and not ppo in every run."""
    return os.environ.get("WANDB_NAME") or "/".join(folder.resolve().parts[-2:])


class Tracker:
    """wandb, as a guest: what it does wrong is told on stderr and never ends the run; its start and end have a minute.

    One wandb run a folder, also after a resume. `tracker.json` keeps its id and how many rows it was sent, so that none
    is sent twice when a resumed run computes it again; after a kill one may be missing.
    """

    def __init__(self, folder: Path, config: TrainingConfig, row: int):
        self.path, self.row, self.run = folder / "tracker.json", row, None  # `row`: of metrics.jsonl, the next one
        known = read_jsonl(self.path) if config.resume_from_checkpoint else []
        self.sent = known[0] if known else {"id": secrets.token_hex(4), "rows": 0}
        about = {
            "project": os.environ.get("WANDB_PROJECT", "align"), "name": run_name(folder), "id": self.sent["id"],
            "resume": "allow", "dir": str(folder), "config": redact(plain(config)),
        }  # fmt: skip
        if not self.tried(lambda: self.start(about, None)):
            self.tried(lambda: self.start(about, "offline"))
        atexit.register(self.finish)

    def start(self, about: dict[str, Any], mode: str | None) -> None:
        import wandb

        if mode == "offline":
            wandb.teardown()  # or the failed start still holds the run's id
        settings = wandb.Settings(init_timeout=TRACKER_WAIT, reinit="finish_previous")
        self.run = wandb.init(**about, mode=mode, settings=settings)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.row += 1
        if self.run is None or self.row <= self.sent["rows"]:
            return
        self.sent["rows"] = self.row
        write_jsonl(self.path, [self.sent])
        self.tried(lambda: self.run.log(metrics, step=step))

    def finish(self) -> None:
        """Sends what is left, for a while; what could not be sent lies in the folder for `wandb sync`."""
        thread = threading.Thread(target=lambda: self.tried(self.run.finish), daemon=True)
        if self.run is not None:
            thread.start()
            thread.join(TRACKER_WAIT)
        if thread.is_alive():
            print("warning: wandb has not sent everything; `wandb sync` does it later", file=sys.stderr)

    @staticmethod
    def tried(call: Callable[[], Any]) -> bool:
        try:
            call()
        except Exception as error:  # of wandb's or the network's; the numbers are in metrics.jsonl anyway
            print(f"warning: wandb: {type(error).__name__}: {first_line(error)}; the run goes on", file=sys.stderr)
            return False
        return True


class TensorBoard:
    """Event files in the folder's `tensorboard/`. What an earlier process wrote of `first` and later is taken back."""

    def __init__(self, folder: Path, first: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("report_to: tensorboard is not installed: pip install tensorboard") from None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a kill takes nothing


class MetricsCallback(TrainerCallback):
    """What a transformers Trainer logs, in the project's own file."""

    def __init__(self, metrics: Metrics):
        self.metrics = metrics

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        self.metrics.log(state.global_step, {k: v for k, v in (logs or {}).items() if k not in ("step", *SINCE_START)})


def ppo_metrics(rollout: Rollout, stats: UpdateStats, kl_coef: float, lr: float) -> dict[str, float]:
    """One iteration's row of metrics.jsonl, with TRL's names; definitions in docs/metrics.md."""
    mask = rollout.response_mask
    residual = masked_var(rollout.returns - rollout.values, mask)
    return (
        episode_metrics(rollout, "objective")
        | {
            "objective/entropy": stats.mean("entropy"),
            "policy/approxkl_avg": stats.mean("approxkl"),
            "policy/clipfrac_avg": stats.mean("policy_clipped"),
            "policy/grad_norm": stats.mean("policy_grad_norm", "steps"),
            "loss/policy_avg": stats.mean("policy_loss"),
            "loss/value_avg": stats.mean("value_loss"),
            "loss/ptx": stats.mean("ptx_loss", "ptx_tokens") if stats.sums["ptx_tokens"] else 0.0,
            "val/clipfrac_avg": stats.mean("value_clipped"),
            "val/ratio": stats.mean("ratio"),
            "val/max_ratio_deviation": stats.sums["max_ratio_deviation"],
            "val/explained_variance": float(1 - residual / masked_var(rollout.returns, mask).clamp(min=1e-8)),
            "val/num_eos_tokens": float(rollout.finished.sum()),
            "val/grad_norm": stats.mean("value_grad_norm", "steps"),
            "kl_coef": kl_coef,
            "lr": lr,
        }
        | sampling_metrics(rollout, stats)
        | part_metrics(rollout, "objective")
    )


def episode_metrics(rollout: Rollout, prefix: str) -> dict[str, float]:
    """Means over a rollout's episodes, whether they are trained on or not."""
    mask = rollout.response_mask
    kl = masked_row_sum(rollout.logprobs - rollout.ref_logprobs, mask)  # (B,) nats an episode
    non_score = masked_row_sum(rollout.rewards, mask) - rollout.scores
    responses = response_tokens(rollout.input_ids, rollout.query_lengths, mask.shape[1])  # (B, R)
    means = {
        "scores": rollout.scores,
        "raw_scores": rollout.raw_scores,
        "kl": kl,
        "non_score_reward": non_score,
        "rlhf_reward": rollout.scores + non_score,
        "response_tokens": rollout.response_lengths.float(),
        "finished": rollout.finished.float(),
        "repetition": repeated_ngrams(responses, rollout.response_lengths),
    }
    return {f"{prefix}/{name}": float(values.mean()) for name, values in means.items()}


def sampling_metrics(rollout: Rollout, stats: UpdateStats) -> dict[str, float]:
    """The sampler's log-probabilities against the trainer's, and the weights of another engine's tokens, where there
    are any. Names are TRL's."""
    row = {}
    if "mismatch" in stats.sums:
        row = {
            "sampling/sampling_logp_difference/mean": stats.mean("mismatch", "mismatch_tokens"),
            "sampling/sampling_logp_difference/max": stats.sums["max_mismatch"],
            "sampling/kl": stats.mean("mismatch_kl", "mismatch_tokens"),
        }
    if rollout.importance_weights is None:
        return row
    weights = rollout.importance_weights[rollout.response_mask]
    return row | {
        "sampling/importance_sampling_ratio/min": float(weights.min()),
        "sampling/importance_sampling_ratio/mean": float(weights.mean()),
        "sampling/importance_sampling_ratio/max": float(weights.max()),
        "sampling/masked_tokens": float((weights == 0).sum()),
    }


def part_metrics(rollout: Rollout, prefix: str) -> dict[str, float]:
    """Each part of the reward: its mean over episodes, and of a term's scores their spread over episodes too."""
    row = {f"{prefix}/{name}": float(scores.mean()) for name, scores in rollout.part_scores.items()}
    spread = {name: scores for name, scores in rollout.part_scores.items() if name.startswith("scores/")}
    return row | {
        f"{prefix}/scores_std/{name.removeprefix('scores/')}": float(scores.std(correction=0))
        for name, scores in spread.items()
    }


def overoptimisation_rows(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What the over-optimisation plot needs of a PPO run that logged a judge."""
    names = {"episode": "episode", "kl": "objective/kl", "proxy": "objective/raw_scores", "gold": "eval/gold"}
    return [{name: row[key] for name, key in names.items()} for row in rows if "eval/gold" in row]


class Transcripts:
    """Of every so many iterations some episodes as text, with their scores and KL, in a file of their own. 0: none."""

    def __init__(self, folder: str | Path, every: int = 1, count: int = 8, name: str = "transcripts.jsonl"):
        self.path, self.every, self.count = Path(folder) / name, every, count

    def write(self, iteration: int, rollout: Rollout, codec: Codec) -> None:
        if not self.every or iteration % self.every:
            return
        kl = masked_row_sum(rollout.logprobs - rollout.ref_logprobs, rollout.response_mask)
        ends = rollout.query_lengths + rollout.response_lengths
        rows = []
        for i in range(min(self.count, len(rollout))):
            query, end, ids = int(rollout.query_lengths[i]), int(ends[i]), rollout.input_ids[i].tolist()
            row = {"query": codec.query_text(ids[:query]), "response": codec.decode(ids[query:end])}
            numbers = {"score": float(rollout.raw_scores[i]), "kl": float(kl[i])}
            rows.append({"iteration": iteration, **row, "finished": bool(rollout.finished[i]), **numbers})
        append_jsonl(self.path, rows)


def save_log_sizes(output: Path, folder: Path) -> None:
    """Into a checkpoint: how far the logs of `output` had come, in bytes."""
    logs = [output / name for name in LOGS if (output / name).exists()]
    for path in logs:
        sync(path)
    write_json(folder / "logs.json", {path.name: path.stat().st_size for path in logs})


def cut_logs(output: Path, checkpoint: Path | None) -> None:
    """Cut what a resumed run will write again, torn lines with it; everything, where there is no checkpoint.

    A log's end is moved, not the log rewritten, so that a kill in here costs nothing.
    """
    output.mkdir(parents=True, exist_ok=True)
    sizes = json.loads((checkpoint / "logs.json").read_text(encoding="utf-8")) if checkpoint else {}
    for path in (output / name for name in LOGS if (output / name).exists()):
        os.truncate(path, min(sizes.get(path.name, 0), path.stat().st_size))


def append_jsonl(path: str | Path, rows: list[dict]) -> None:
    if is_main_process():
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of one of our own files; [] when there is none."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def say_dropped(reports: Mapping[str, DataReport]) -> None:
    """A line for each data set of which rows are not used: nobody should train on a part without knowing."""
    for name, report in reports.items():
        left_out = report.rows_read - report.rows_used
        if left_out:
            kinds = ", ".join(f"{count} {kind}" for kind, count in report.dropped.items())
            loud = "warning: " if left_out > MANY_DROPPED * report.rows_read else ""
            announce(f"{loud}{name}: {left_out} of {report.rows_read} rows are not used: {kinds}")


def announce(line: str) -> None:
    """One line for the person who watches, from the main process."""
    if is_main_process():
        print(line, flush=True)
