"""A run's folder and its checkpoints: locked, complete or absent, resumed from (design section 5).

A checkpoint to resume from ends with `complete.json`, written last: its files and their hashes. Weights are
safetensors; other state is read with `weights_only=True`, so that no file runs code. What a finished stage writes last
is in `align.manifest`.
"""

import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from align.errors import UserError
from align.files import (
    DISK_FULL,
    MANIFEST,
    atomic_file,
    atomic_folder,
    files_under,
    is_full,
    json_text,
    partial_name,
    remove_folders,
    sha256_file,
    write_errors,
    write_json,
)
from align.lock import LOCK, release_lock, take_lock
from align.manifest import read_manifest
from align.runtime import broadcast, is_main_process, wait_for_everyone

COMPLETE = "complete.json"
OURS = (MANIFEST, "run.json", "metrics.jsonl")  # one of them is in a folder where a stage has run
RESUMABLE = ("trainer_state.json", "training_state.pt")  # a Trainer's, PPO's: one of them is in what can be resumed
STATE = (*RESUMABLE, "optimizer.pt", "scheduler.pt", "rng_state*.pth", "sums-*.json")
NETWORK_DELAY = 90  # seconds after which a network file system shows a new name on another machine

# Output folder


def is_finished(output_dir: str | Path, resume: str | None) -> bool:
    """Whether "latest" is asked of a run that has ended: there is nothing to do, which is said."""
    finished = resume == "latest" and read_manifest(output_dir) is not None
    if finished and is_main_process():
        remedy = (
            "to train again leave resume_from_checkpoint out and set overwrite_output_dir: true, to go on from a "
            "checkpoint name its folder"
        )
        print(f"{output_dir}: this run is finished and stays as it is; {remedy}")
    return finished


def start_output(output_dir: str | Path, overwrite: bool = False, resume: str | None = None) -> Path:
    """Make a stage's output folder and lock it for this process until `release_output` or the process ends.

    Raises UserError when another live run has it, and when it holds a run or a model, unless `resume` (goes on) or
    `overwrite` (removes what is there). Only the main process acts; the others wait.
    """
    folder = Path(output_dir)
    if is_main_process():
        _claim(folder, overwrite, resume)
    wait_for_everyone()
    _require_shared(folder)
    return folder


def _require_shared(folder: Path) -> None:
    """The folder that the main process has locked is there on this machine too."""
    for _ in range(NETWORK_DELAY):
        if (folder / LOCK).exists():
            return
        time.sleep(1)
    raise UserError(f"output_dir: {folder}: not on this machine; all machines of a run need one shared folder")


def _claim(folder: Path, overwrite: bool, resume: str | None) -> None:
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        take_lock(folder)
    atexit.register(release_output, folder)
    _claimed.append(folder)
    try:
        if not resume and _holds_run(folder):
            if not overwrite:
                remedy = "set overwrite_output_dir: true to replace it, resume_from_checkpoint: latest to go on"
                raise UserError(f"output_dir: {folder}: already holds another run: {remedy}, or choose another folder")
            if not _holds_start(folder):
                raise UserError(f"output_dir: {folder}: holds a model that no stage wrote; choose another folder")
            _empty(folder)
        if resume and _holds_run(folder) and not _holds_start(folder):
            raise UserError(f"output_dir: {folder}: holds a model but no run to go on with; choose another folder")
        _tidy(folder)
    except UserError:
        release_output(folder)
        raise


def _tidy(folder: Path) -> None:
    """Remove what a killed run left half-written or half-removed, and put back what it was about to replace."""
    for old in folder.glob(".*.replaced"):
        place = folder / old.name[1:].removesuffix(".replaced")
        if not place.exists():
            os.rename(old, place)
    for pattern in (".*.replaced", ".*.partial", ".partial", ".*.removed"):
        for path in folder.glob(pattern):
            remove_folders(path) if path.is_dir() else path.unlink()


def release_output(output_dir: str | Path) -> None:
    """Release the folder's lock. Does nothing when another process holds it."""
    release_lock(Path(output_dir))


def full_disk(error: Exception) -> UserError | None:
    """What to tell the user if `error` comes of a full disk, or None.

    Libraries raise OSError, RuntimeError or SafetensorError for it, some without a word of the disk.
    """
    folder = next((f for f in reversed(_claimed) if f.exists() and is_full(f)), None)
    named = "No space left" in str(error) or (isinstance(error, OSError) and error.errno in DISK_FULL)
    unnamed = folder is not None and isinstance(error, (OSError, RuntimeError, SafetensorError))
    if not (named or unnamed):
        return None
    place = folder or (error.filename if isinstance(error, OSError) else None) or "output_dir"
    remedy = "free some space and run again (with --resume_from_checkpoint latest if it has checkpoints)"
    return UserError(f"{place}: disk full: {remedy}")


_claimed: list[Path] = []  # output folders of this process


def _holds_run(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()]
    return any(
        name in (MANIFEST, "config.json", "adapter_config.json")
        or name.endswith(".safetensors")
        or name.startswith("checkpoint-")
        for name in names
    )


def _holds_start(folder: Path) -> bool:
    """A run of ours began here: it wrote its manifest, its start or its log, or saved a checkpoint."""
    return any((folder / name).is_file() for name in OURS) or bool(checkpoints(folder))


def begin_anew(folder: Path) -> None:
    """Empty a folder that this process has locked, its checkpoints set aside. Only the main process acts."""
    if is_main_process():
        for path in checkpoints(folder):
            _set_aside(path)
        _empty(folder, keep="abandoned-")
    wait_for_everyone()


def _empty(folder: Path, keep: str = LOCK) -> None:
    """Remove everything but the lock and what begins with `keep`. Never the working directory, the home folder, or what
    contains them."""
    real = folder.resolve()
    for precious in (Path.cwd().resolve(), Path.home().resolve()):
        if precious.is_relative_to(real):
            raise UserError(f"output_dir: {folder}: holds {precious}, and is not overwritten: choose another folder")
    with write_errors(folder):
        for path in folder.iterdir():
            if path.name == LOCK or path.name.startswith(keep):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


# Checkpoints to resume from


@contextlib.contextmanager
def checkpoint_folder(path: str | Path) -> Iterator[Path]:
    """Like `atomic_folder`, for all processes together: each writes its part, the main one marks the whole complete
    and puts it in place."""
    path = Path(path)
    with contextlib.ExitStack() as stack:
        if is_main_process():
            stack.enter_context(atomic_folder(path))
        wait_for_everyone()
        yield partial_name(path)
        wait_for_everyone()
        if is_main_process():
            mark_complete(partial_name(path))
    wait_for_everyone()


def mark_complete(folder: str | Path) -> None:
    """Write `complete.json`, each file's size and sha256 and its own; call it last, after it the checkpoint counts."""
    folder = Path(folder)
    files = [path for path in files_under(folder) if path != folder / COMPLETE]
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }
    write_json(folder / COMPLETE, _complete(listed))


def _complete(listed: dict[str, Any]) -> dict[str, Any]:
    own = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return {"schema": 1, "files": listed, "sha256": own}


def checkpoint_fault(folder: str | Path, hashes: bool = True) -> str | None:
    """Why a checkpoint is not whole, or None. `hashes` False compares sizes only."""
    folder = Path(folder)
    if not folder.is_dir():
        return "is no folder"
    try:
        text = (folder / COMPLETE).read_text(encoding="utf-8")
        listed = json.loads(text)["files"]
        if text != json_text(_complete(listed)):
            return f"{COMPLETE} is torn"
        for name, stated in listed.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != stated["bytes"]:
                return f"{name} is torn or missing"
            if hashes and sha256_file(path) != stated["sha256"]:
                return f"{name} changed"
    except FileNotFoundError:
        return f"has no {COMPLETE}"
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return f"{COMPLETE} is torn"
    return None


def resume_fault(folder: str | Path, hashes: bool = True) -> str | None:
    """Why no run can go on from a checkpoint, or None."""
    fault = checkpoint_fault(folder, hashes)
    if fault is None and not any(name in _listed(folder) for name in RESUMABLE):
        return "holds weights alone, as SFT's older epochs do"
    return fault


def _listed(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / COMPLETE).read_text(encoding="utf-8"))["files"]


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders, by N."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def latest_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from, the same in all processes; None when `resume` is None. Nothing changes on disk.

    "latest" takes the highest whole `checkpoint-N`, and says on stderr which torn ones it passes over; with none it
    is None too, which is said: a scheduler starts and restarts a job with one command. A folder is taken when it is
    whole, else UserError.
    """
    if resume is None:
        return None
    choose = _newest_whole if resume == "latest" else lambda _: _require_whole(Path(resume))
    return broadcast(choose(Path(output_dir)) if is_main_process() else None)


def _require_whole(folder: Path) -> Path:
    fault = resume_fault(folder)
    if fault:
        raise UserError(f"resume_from_checkpoint: {folder}: {fault}: give a whole checkpoint, or latest")
    return folder


def set_later_aside(output_dir: Path, chosen: Path) -> None:
    """Those of `output_dir` that come after the one a run goes on from, or "latest" would go on with them. The main
    process calls this."""
    found = checkpoints(output_dir)
    place = next((i for i, path in enumerate(found) if path.resolve() == chosen.resolve()), len(found))
    for later in found[place + 1 :]:
        _tell(f"{later}: comes after {chosen}: now {_set_aside(later).name}")


def _set_aside(checkpoint: Path) -> Path:
    aside = checkpoint.with_name(f"abandoned-{checkpoint.name}")
    remove_folders(aside)
    os.rename(checkpoint, aside)
    return aside


def _newest_whole(output_dir: Path) -> Path | None:
    for folder in reversed(checkpoints(output_dir)):
        fault = resume_fault(folder)
        if fault is None:
            return folder
        _tell(f"warning: {folder}: {fault}: passed over")
    _tell(f"resume_from_checkpoint: {output_dir} holds no whole checkpoint: starting from the beginning")
    return None


def _tell(line: str) -> None:
    if is_main_process():
        print(line, file=sys.stderr)


def rotate(newest: Path, keep: int, protected: Iterable[Path] = ()) -> None:
    """After `newest` was written: of those before it the last ones stay, so that `keep` can be resumed from, it among
    them. Older ones are deleted; `protected` ones keep their weights alone.

    `newest` is whole and never touched. Torn ones and those after it (of a run that was resumed further back) are left
    and not counted.
    """
    if not is_main_process():
        return
    found, protected = checkpoints(newest.parent), set(protected)
    whole = [path for path in found[: found.index(newest)] if resume_fault(path, hashes=False) is None]
    for folder in whole[: max(0, len(whole) - max(keep, 1) + 1)]:
        if folder in protected:
            _strip(folder)
            continue
        doomed = folder.with_name(f".{folder.name}.removed")  # renamed first: a kill midway leaves no half checkpoint
        os.rename(folder, doomed)
        remove_folders(doomed)


def _strip(checkpoint: Path) -> None:
    """Remove what only a resume reads, most of it the optimiser's state. A kill midway leaves it whole."""
    listed = _listed(checkpoint)
    doomed = {name for name in listed for pattern in STATE if fnmatch(name, pattern)}
    write_json(checkpoint / COMPLETE, _complete({name: listed[name] for name in listed if name not in doomed}))
    for name in doomed:
        (checkpoint / name).unlink()


def save_training_state(folder: str | Path, tensors: Mapping[str, Any], name: str = "training_state.pt") -> None:
    """Nested dicts and lists of tensors, numbers and text (optimiser, random state, cursors), whole or not at all."""
    with atomic_file(Path(folder) / name) as temporary:
        torch.save(dict(tensors), temporary)


def load_training_state(folder: str | Path, name: str = "training_state.pt") -> dict[str, Any]:
    """What `save_training_state` wrote, on the CPU. Raises UserError when it is missing, torn, or holds code."""
    path = Path(folder) / name
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # what shards leave out is not read
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: give a checkpoint that a stage of align wrote") from None
    except Exception as error:  # a torn or foreign pickle raises almost anything
        raise UserError(f"{path}: cannot be read ({type(error).__name__}): resume from another checkpoint") from None


MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)


def copy_weights(checkpoint: str | Path, folder: str | Path) -> None:
    """The model (or adapter) of a training checkpoint, without its optimiser and random state."""
    for pattern in MODEL_FILES:
        for file in sorted(Path(checkpoint).glob(pattern)):
            shutil.copyfile(file, Path(folder) / file.name)
