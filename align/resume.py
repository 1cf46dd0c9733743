"""Where a stage's run begins: its folder, the checkpoint it goes on from, and what the two must share.

A checkpoint brings back weights, optimiser and schedule. A key that was changed meanwhile would be taken in part, in
silence, or end in a traceback, so what a run began with lies in its folder (`run.json`) and is compared. Until that
agrees nothing in the folder changes: a finished run stays finished.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.checkpoint import latest_checkpoint, start_output
from align.config import TrainerConfig, TrainingConfig
from align.errors import UserError
from align.files import MANIFEST, write_json
from align.runtime import is_main_process, wait_for_everyone

RUN = "run.json"
# Keys that make weights or an optimiser's state mean something else.
SHARED = (
    "use_peft", "value_use_peft", "lora_r", "lora_alpha", "lora_target_modules", "optim", "batch_element", "ema_decay",
)  # fmt: skip
RATES = ("learning_rate", "muon_learning_rate")  # a Trainer's schedule brings back its own; PPO's follows the config


def start_run(config: TrainingConfig, parents: Sequence[dict[str, Any]] = ()) -> tuple[Path, Path | None]:
    """The output folder, locked, and the checkpoint to go on from, if one was asked for and there is one.

    Raises UserError when the folder holds another run, and when the checkpoint is not whole, is of a run with other
    keys or parents than this one, or of none that can be gone on with.
    """
    output = start_output(config.output_dir, config.overwrite_output_dir, config.resume_from_checkpoint)
    own = what_is_shared(config, parents)
    checkpoint = latest_checkpoint(output, config.resume_from_checkpoint, lambda path: require_same_run(path, own))
    if is_main_process():
        write_json(output / RUN, own)
        (output / MANIFEST).unlink(missing_ok=True)  # a run that goes on is not finished
    wait_for_everyone()
    return output, checkpoint


def what_is_shared(config: TrainingConfig, parents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = (*SHARED, *RATES) if isinstance(config, TrainerConfig) else SHARED
    keys = {name: getattr(config, name) for name in names if hasattr(config, name)}
    weights = {parent["role"]: parent["weights_sha256"] for parent in parents if parent["weights_sha256"]}
    return json.loads(json.dumps({"schema": 1, "config": keys, "parents": weights}))


def require_same_run(checkpoint: Path, own: dict[str, Any]) -> None:
    """Raises UserError where the checkpoint's run began otherwise. A checkpoint without its run's folder is taken."""
    path = checkpoint.resolve().parent / RUN
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to resume without its check") from None
    for key, now in own["config"].items():
        was = before["config"].get(key, now)
        if was != now:
            raise UserError(f"resume_from_checkpoint: {checkpoint}: its {key} is {was}, not {now}; set it as it was")
    for role, now in own["parents"].items():
        if before["parents"].get(role, now) != now:
            remedy = "give the one that it began with, or begin anew"
            raise UserError(f"resume_from_checkpoint: {checkpoint}: its {role} had other weights: {remedy}")
