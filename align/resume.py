"""Where a stage's run begins: its folder, the checkpoint it goes on from, and what the two must share.

A checkpoint brings back weights, optimiser and schedule. A key that was changed meanwhile would be taken in part, in
silence, or end in a traceback, so what a run began with lies in its folder (`run.json`) and is compared. Until that
agrees nothing in the folder changes, or, where the user asked to overwrite, its checkpoints are set aside.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.checkpoint import begin_anew, checkpoints, latest_checkpoint, set_later_aside, start_output
from align.config import TrainerConfig, TrainingConfig
from align.errors import UserError
from align.files import MANIFEST, plain, write_json
from align.manifest import redact
from align.optimise import takes_muon, trainer_optim
from align.rows import DataReport
from align.runtime import broadcast, is_main_process, num_processes, wait_for_everyone
from align.track import announce, say_dropped

RUN = "run.json"
SCHEMA = 1
# Keys that make weights, an optimiser's state or an order of rows mean something else.
SHARED = (
    "seed", "max_length", "max_prompt_length", "all_answers", "pretraining_fraction", "rollout_batch_size",
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "use_peft", "value_use_peft", "batch_element", "ema_decay", "optim", "adam_beta1",
    "adam_beta2", "adam_epsilon",
)  # fmt: skip
ROWS_A_STEP = "per_device_train_batch_size x gradient_accumulation_steps x processes"
LORA = ("lora_r", "lora_alpha", "lora_target_modules")  # the same, where there is an adapter
RATES = ("learning_rate", "muon_learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps")  # of a Trainer
LATER = {"weight_decay": 0.0, "lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 0}  # what runs before had
DATA = ("train_file", "pretraining_file")
HOW = (  # where a run lies, what it says and keeps on its way, when it stops
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "logging_steps", "save_steps",
    "save_iterations", "save_total_limit", "transcript_iterations", "reward_timeout", "reward_retries", "kl_stop",
    "gradient_checkpointing", "microbatch_tokens", "per_device_rollout_batch_size", "per_device_eval_batch_size",
    "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode",
)  # fmt: skip
PPO_HOW = ("per_device_train_batch_size",)  # a Trainer's is part of its step


def start_run(
    config: TrainingConfig, parents: Sequence[dict[str, Any]], reports: Mapping[str, DataReport]
) -> tuple[Path, Path | None]:
    """The output folder, locked, and the checkpoint to go on from, if one was asked for and there is one.

    `parents` are the models whose weights the run starts from, `reports` what it reads. Raises UserError when the
    folder holds another run, and when the checkpoint is not whole or its run began with other keys, parents or rows;
    for "latest" with `overwrite_output_dir`, as `make` has it, the run begins anew instead, whatever key has changed.
    """
    output = start_output(config.output_dir, config.overwrite_output_dir, config.resume_from_checkpoint)
    say_dropped(reports)
    own = beginning(config, parents, reports)
    checkpoint = latest_checkpoint(output, config.resume_from_checkpoint)
    anew = config.overwrite_output_dir and config.resume_from_checkpoint == "latest"
    fault = None
    if checkpoint and is_main_process():
        fault = why_not(checkpoint, output, own, ("config", "settings") if anew else ("config",))
    fault = broadcast(fault)
    if fault and not anew:
        raise UserError(fault)
    if fault:
        announce(f"{fault}: begun anew, as overwrite_output_dir says; the old checkpoints")
        announce(f"stay in {output} as abandoned-checkpoint-N")
        begin_anew(output)
        checkpoint = None
    if is_main_process():
        if checkpoint and config.resume_from_checkpoint != "latest":  # else those after it are torn
            set_later_aside(output, checkpoint)
        claim(output, checkpoint, own)
    wait_for_everyone()
    return output, checkpoint


def claim(output: Path, checkpoint: Path | None, own: dict[str, Any]) -> None:
    """The folder is this run's from here on."""
    if checkpoint is not None:
        announce(f"resuming from {checkpoint}")
        say_changed(checkpoint, own["settings"])
    unknown = checkpoint is not None and is_in(checkpoint, output) and not (output / RUN).exists()
    if not unknown:  # else what it began with would be what it goes on with
        write_json(output / RUN, own)
    (output / MANIFEST).unlink(missing_ok=True)  # a run that goes on is not finished


def say_changed(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Name the keys that may change on the way, such as PPO's learning_rate, and did."""
    try:
        before = json.loads((checkpoint.resolve().parent / RUN).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError):  # `why_not` judges it
        return
    for key in sorted(key for key in settings.keys() & before.keys() if settings[key] != before[key]):
        announce(f"{key}: {json.dumps(before[key])} until here, {json.dumps(settings[key])} from here on")


def is_in(checkpoint: Path, output: Path) -> bool:
    return checkpoint.resolve().parent == output.resolve()


def beginning(
    config: TrainingConfig, parents: Sequence[dict[str, Any]], reports: Mapping[str, DataReport]
) -> dict[str, Any]:
    """What is compared: keys of the config, parents' hashes (or hub ids) by role, digests of the rows by key."""
    names = [*SHARED, *RATES] if isinstance(config, TrainerConfig) else [*SHARED]
    if getattr(config, "use_peft", False) or getattr(config, "value_use_peft", False):
        names += LORA
    keys = {name: getattr(config, name) for name in names if hasattr(config, name)}
    if isinstance(config, TrainerConfig):  # which finds its place in an epoch by them
        accumulated = getattr(config, "gradient_accumulation_steps", 1)
        keys[ROWS_A_STEP] = config.per_device_train_batch_size * accumulated * num_processes()
    if "optim" in keys and isinstance(config, TrainerConfig):
        keys["optim"] = "muon" if takes_muon(config) else trainer_optim(config)
    if "lora_target_modules" in keys:
        keys["lora_target_modules"] = sorted(keys["lora_target_modules"])
    weights = {parent["role"]: parent["weights_sha256"] or parent["path"] for parent in parents}
    data = {name: sorted(reports[name].sha256.values()) for name in DATA if name in reports}
    free = HOW if isinstance(config, TrainerConfig) else HOW + PPO_HOW
    settings = {name: value for name, value in redact(plain(config)).items() if name not in free}
    return {"schema": SCHEMA, "config": keys, "settings": settings, "parents": weights, "data": data}


def why_not(checkpoint: Path, output: Path, own: dict[str, Any], parts: Sequence[str]) -> str | None:
    """Why this run cannot go on from the checkpoint: its run began otherwise, `parts` of its keys compared, or `output`
    holds another. One without a `run.json` beside it is taken."""
    path, place = checkpoint.resolve().parent / RUN, f"resume_from_checkpoint: {checkpoint}"
    if not is_in(checkpoint, output) and checkpoints(output):
        remedy = "choose another folder, or one of its own checkpoints"
        return f"output_dir: {output}: holds another run than that of {checkpoint}: {remedy}"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["schema"] != SCHEMA:
            raise ValueError(f"its schema is {before['schema']!r}")
        _, parents, data = (dict(before[part]) for part in ("config", "parents", "data"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"{path}: is no run.json of this project ({type(error).__name__}: {error})"
        return f"{what}: delete it to resume without its check"
    for part in parts:
        keys = {name: value for name, value in LATER.items() if name in own[part]} | before.get(part, {})
        for key in sorted(keys, key=lambda key: (key in LORA, key)):  # LoRA's go with use_peft
            was, now = json.dumps(keys.get(key)), json.dumps(own[part].get(key))
            if was != now:
                return f"{place}: its {key} is {was}, not {now}; set it as it was"
    for what, then, now in (("weights", parents, own["parents"]), ("rows", data, own["data"])):
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                return f"{place}: its {name} had other {what}; give what it began with, or begin anew"
    return None
