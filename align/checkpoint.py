"""Folders that are complete or absent: manifests, hashes, atomic writes, locks, resume (design section 5).

A finished stage ends with `manifest.json`, written last: its parents, data, config, versions, metrics and the hashes
of its own weights and tokenizer. The next stage checks it with `check_parent`. A checkpoint to resume from ends with
`complete.json`, written last: its files and their hashes. Weights are safetensors; other state is read with
`weights_only=True`, so that no file runs code.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import align
from align.card import model_card
from align.errors import UserError
from align.runtime import is_main_process, wait_for_everyone

SCHEMA = 1
MANIFEST, COMPLETE, LOCK = "manifest.json", "complete.json", "run.lock"
TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


# Hashes


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(folder: str | Path) -> str | None:
    """One digest over the bytes of all safetensors in name order (of a single file: its sha256); None without any."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def tokenizer_sha256(folder: str | Path) -> str | None:
    """Digest of what maps text to ids; None without a tokenizer.

    Padding and truncation are left out of it: libraries store their last call's settings in tokenizer.json, which
    would make one tokenizer look like two.
    """
    fast = Path(folder) / "tokenizer.json"
    if fast.is_file():
        try:
            content = json.loads(fast.read_text(encoding="utf-8"))
            content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
        except (ValueError, AttributeError):
            raise UserError(f"{fast}: is torn: copy the tokenizer again") from None
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    digest = hashlib.sha256()
    files = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest() if files else None


# Atomic writes


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """What goes wrong in writing `path`, as a UserError. Libraries report a full disk each in its own way."""
    try:
        yield
    except _DiskFull:  # from a write inside a folder that is still temporary: name the folder the user knows
        raise _disk_full(path) from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise _disk_full(path) from None
        if error.errno in NO_ACCESS:
            raise UserError(f"{path}: cannot be written ({error.strerror}): choose another place") from None
        raise
    except (RuntimeError, SafetensorError) as error:
        space_left = shutil.disk_usage(_existing(path)).free
        if "No space left" in str(error) or space_left < 1 << 20:
            raise _disk_full(path) from None
        raise


class _DiskFull(UserError):
    pass


def _disk_full(path: Path) -> UserError:
    return _DiskFull(f"{path}: disk full: free some space and run again; nothing was written")


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


@contextlib.contextmanager
def _atomic_file(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path` once written and synced to disk, or is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _plain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, obj: Any) -> None:
    """Write JSON whole or not at all. NaN and infinities become null: other languages' readers refuse them."""
    text = json.dumps(plain(obj), ensure_ascii=False, indent=2) + "\n"
    with _atomic_file(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, whole or not at all."""
    with _atomic_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(plain(row), ensure_ascii=False) + "\n")


def plain(obj: Any) -> Any:
    """Dataclasses, mappings, tuples, paths and one-element tensors or arrays as plain JSON values."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: plain(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple, set, frozenset)):
        return [plain(value) for value in (sorted(obj) if isinstance(obj, (set, frozenset)) else obj)]
    if isinstance(obj, Path):
        return str(obj)
    if hasattr(obj, "tolist"):  # tensors and numpy's numbers and arrays
        return plain(obj.tolist())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty sibling folder; renamed to `path` (replacing it) when the block succeeds, removed when not.

    Raises UserError when the disk is full or the place cannot be written; `path` is then as it was before.
    """
    path = Path(path)
    new, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    with _plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():  # killed between the two renames below
            os.rename(old, path)
        _remove(new, old)
        new.mkdir()
    try:
        with _plain_errors(path):
            yield new
            for file in _files(new):
                _sync(file)
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        _remove(new, old)


@contextlib.contextmanager
def atomic_contents(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder whose files move into `path` when the block succeeds, `manifest.json` last.

    For a stage's output folder, which also holds its checkpoints, lock and metrics and so cannot be replaced whole.
    An older manifest goes first, so that no mixture of two runs ever looks finished. Errors as in `atomic_folder`.
    """
    path = Path(path)
    new = path / ".partial"
    with _plain_errors(path):
        _remove(new)
        new.mkdir(parents=True)
    try:
        with _plain_errors(path):
            yield new
            files = sorted(new.iterdir(), key=lambda file: (file.name == MANIFEST, file.name))
            for file in files:
                _sync(file)
            (path / MANIFEST).unlink(missing_ok=True)
            _remove(*(path / file.name for file in files if (path / file.name).is_dir()))
            for file in files:
                os.replace(file, path / file.name)
    finally:
        _remove(new)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


# Manifest


@dataclass(frozen=True)
class Manifest:
    """Where a finished stage's folder comes from."""

    stage: str
    parents: list[dict[str, Any]] = field(default_factory=list)  # role, path, stage, weights_sha256, tokenizer_sha256
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> DataReport as a dict
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    versions: dict[str, str | None] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None
    tokenizer_sha256: str | None = None
    schema: int = SCHEMA


def write_manifest(
    folder: str | Path,
    stage: str,
    config: Any,
    seed: int,
    parents: list[dict[str, Any]] | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write `manifest.json`, and before it a model's card; call it last, it marks the folder complete.

    `config` is the stage's dataclass or a dict (secrets are redacted), `data` maps a name to a DataReport or a dict.
    """
    manifest = Manifest(
        stage=stage,
        parents=plain(parents or []),
        data=plain(data or {}),
        config=redact(plain(config)),
        seed=seed,
        versions=versions(),
        metrics=plain(metrics or {}),
        weights_sha256=weights_sha256(folder),
        tokenizer_sha256=tokenizer_sha256(folder),
    )
    if (Path(folder) / "config.json").is_file():
        with _atomic_file(Path(folder) / "README.md") as card:
            card.write_text(model_card(plain(manifest)), encoding="utf-8")
    write_json(Path(folder) / MANIFEST, manifest)
    return manifest


def read_manifest(folder: str | Path) -> Manifest | None:
    """None when the folder has none (a foreign model). Raises UserError when it is torn or of a newer schema."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: is torn: run the stage again, or take the file away") from None
    names = {f.name for f in dataclasses.fields(Manifest)}
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, int) or not isinstance(content.get("stage"), str):
        raise UserError(f"{path}: is no manifest: run the stage again, or take the file away")
    if schema > SCHEMA:
        raise UserError(f"{path}: has schema {schema}, this version reads {SCHEMA}: use a newer version of align")
    return Manifest(**{key: value for key, value in content.items() if key in names})


SECRET_WORDS = {"token", "tokens", "key", "keys", "pwd", "passwd", "passphrase", "auth"}
SECRET_PARTS = ("password", "secret", "apikey", "credential")
SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)\w{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")


def redact(value: Any, name: str = "") -> Any:
    """`value` without secrets: text under a key that sounds like one, and what looks like one anywhere.

    Numbers are never secrets, so `max_new_tokens` and `total_tokens` keep theirs.
    """
    words = set(re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
    secret = bool(words & SECRET_WORDS) or any(part in name.lower() for part in SECRET_PARTS)
    if isinstance(value, Mapping):
        return {key: redact(item, f"{name}_{key}" if secret else key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if not isinstance(value, str):
        return value
    return "[redacted]" if secret and value else SECRET_VALUE.sub("[redacted]", value)


def versions() -> dict[str, str | None]:
    """Versions of Python, of the libraries and of this code (with its git hash where it runs from a clone)."""
    found: dict[str, str | None] = {"align": align.__version__, "code": code_version()}
    found["python"] = platform.python_version()
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def code_version() -> str | None:
    """The git commit of this code, with "-dirty" when tracked files differ from it; None outside a clone of it."""
    root = Path(align.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# Parents


def check_parent(path: str, role: str, stages: tuple[str, ...] = ()) -> dict[str, Any]:
    """The manifest entry of a model that a stage starts from, after checking that it fits.

    `role` is the config key that names it; `stages` are the stages it may come from (none given: any). A folder
    without a manifest and a hub id are foreign models: nothing is known of their stage. Raises UserError when a local
    folder is missing, incomplete, of the wrong stage, or no longer what its manifest says.
    """
    if not path:
        raise UserError(f"{role}: missing: give a checkpoint folder or a hub id org/name")
    folder = Path(path)
    if not folder.exists():
        if _looks_local(path):
            target = f"run `make {stages[0]}` first or " if stages else ""
            raise UserError(f"{role}: {path}: no such checkpoint: {target}give its path (or a hub id org/name)")
        return {"role": role, "path": path, "stage": None, "weights_sha256": None, "tokenizer_sha256": None}
    fault = _model_fault(folder)
    if fault:
        raise UserError(f"{role}: {path}: {fault}: give the folder of a finished stage or of a model")
    manifest = read_manifest(folder)
    weights, tokenizer = weights_sha256(folder), tokenizer_sha256(folder)
    if manifest is not None:
        _check_manifest(manifest, path, role, stages, weights, tokenizer)
    stage = manifest.stage if manifest else None
    return {"role": role, "path": path, "stage": stage, "weights_sha256": weights, "tokenizer_sha256": tokenizer}


def _check_manifest(
    manifest: Manifest, path: str, role: str, stages: tuple[str, ...], weights: str | None, tokenizer: str | None
) -> None:
    if stages and manifest.stage not in stages:
        wanted = " or ".join(stages)
        raise UserError(f"{role}: {path}: comes from stage {manifest.stage}: give a checkpoint of stage {wanted}")
    for name, then, now in (
        ("weights", manifest.weights_sha256, weights),
        ("tokenizer", manifest.tokenizer_sha256, tokenizer),
    ):
        if then != now:
            remedy = f"run `make {manifest.stage}` again, or take {MANIFEST} away if the change was meant"
            raise UserError(f"{role}: {path}: its {name} changed since its manifest was written: {remedy}")


def _looks_local(path: str) -> bool:
    if path.startswith(("/", ".", "~", "runs/")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return True
    return Path(path).parent.is_dir()


def _model_fault(folder: Path) -> str | None:
    """Why this is no complete model, or None."""
    if not folder.is_dir():
        return "is a file, not a folder"
    if not ((folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()):
        return "is no complete checkpoint (no config.json)"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return "has no weights as safetensors"
    for index in folder.glob("*.safetensors.index.json"):
        with contextlib.suppress(ValueError, AttributeError, KeyError):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(name for name in shards if not (folder / name).is_file())
            if missing:
                return f"is no complete checkpoint (no {missing[0]})"
    return next((f"{path.name} is torn" for path in files if not _readable(path)), None)


def _readable(path: Path) -> bool:
    """Whether a file of tensors is whole, as far as its header (safetensors) or its directory (torch, a zip) says."""
    if path.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return True
        except (SafetensorError, OSError):
            return False
    return True


def require_same_tokenizer(entries: list[dict[str, Any]]) -> None:
    """Raise UserError when two parents (`check_parent`) have different tokenizers. Unknown ones (hub ids) pass."""
    known = [entry for entry in entries if entry["tokenizer_sha256"]]
    for entry in known[1:]:
        if entry["tokenizer_sha256"] != known[0]["tokenizer_sha256"]:
            first, second = (f"{e['role']} ({e['path']})" for e in (known[0], entry))
            raise UserError(f"{second}: its tokenizer is not that of {first}: train both from one base model")


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


# Output folder and lock


def start_output(output_dir: str | Path, overwrite: bool = False, resume: str | None = None) -> Path:
    """Make a stage's output folder and lock it for this process until `release_output` or the process ends.

    Raises UserError when another live run has it, and when it holds a run or a model, unless `resume` (goes on) or
    `overwrite` (removes what is there). Only the main process acts; the others wait.
    """
    folder = Path(output_dir)
    if is_main_process():
        _claim(folder, overwrite, resume)
    wait_for_everyone()
    return folder


def _claim(folder: Path, overwrite: bool, resume: str | None) -> None:
    with _plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _take_lock(folder, resume)
    atexit.register(release_output, folder)
    _claimed.append(folder)
    try:
        if resume or not _holds_run(folder):
            return
        if not overwrite:
            remedy = "set overwrite_output_dir: true to replace it, resume_from_checkpoint: latest to go on"
            raise UserError(f"output_dir: {folder}: already holds another run: {remedy}, or choose another folder")
        _empty(folder)
    except UserError:
        release_output(folder)
        raise


def full_disk(error: Exception) -> UserError | None:
    """What to tell the user if `error` comes of a full disk, or None.

    Libraries raise OSError, RuntimeError or SafetensorError for it, some without a word of the disk.
    """
    folder = next((f for f in reversed(_claimed) if f.exists() and shutil.disk_usage(f).free < 1 << 20), None)
    named = "No space left" in str(error) or (isinstance(error, OSError) and error.errno in DISK_FULL)
    unnamed = folder is not None and isinstance(error, (OSError, RuntimeError, SafetensorError))
    if not (named or unnamed):
        return None
    place = folder or (error.filename if isinstance(error, OSError) else None) or "output_dir"
    remedy = "free some space and run again (with --resume_from_checkpoint latest if it has checkpoints)"
    return UserError(f"{place}: disk full: {remedy}")


def remove_torn_checkpoints() -> None:
    """In the output folders of this process: what a failed write left of a checkpoint."""
    for folder in _claimed:
        _remove(*(path for path in folder.glob("checkpoint-*") if checkpoint_fault(path, hashes=False)))


_claimed: list[Path] = []  # output folders of this process


def _holds_run(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()]
    return any(
        name in (MANIFEST, "config.json", "adapter_config.json")
        or name.endswith(".safetensors")
        or name.startswith("checkpoint-")
        for name in names
    )


def _empty(folder: Path) -> None:
    """Remove everything but the lock. Never the working directory, the home folder, or what contains them."""
    real = folder.resolve()
    for precious in (Path.cwd().resolve(), Path.home().resolve()):
        if precious.is_relative_to(real):
            raise UserError(f"output_dir: {folder}: holds {precious}, and is not overwritten: choose another folder")
    with _plain_errors(folder):
        for path in folder.iterdir():
            if path.name == LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _take_lock(folder: Path, resume: str | None) -> None:
    """One live run a folder. A dead process's lock is taken over; another machine's cannot be asked, so only a
    resume, which says that the run is dead, takes it over."""
    path, mine = folder / LOCK, _identity(os.getpid())
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        holder = _read_lock(path)
        if not holder:  # caught between another run's creating and its filling the file, or torn
            time.sleep(0.2)
            holder = _read_lock(path)
        host, pid = holder.get("host"), holder.get("pid")
        here = host == socket.gethostname()
        alive = holder == _identity(pid) if here and isinstance(pid, int) else bool(host) and not resume
        if alive and holder != mine:
            where = f"process {pid}" + ("" if here else f" on {host}")
            remedy = f"wait for it, or delete {path} if it is dead"
            raise UserError(f"output_dir: {folder}: another run writes here ({where}): {remedy}") from None
        write_json(path, mine)
        return
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(mine, file)


def _identity(pid: int) -> dict[str, Any] | None:
    """A process of this machine, or None when there is none. Its start time tells it from a later one of the same
    number (a container's first process is always number 1)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return None
    started = ""
    with contextlib.suppress(OSError, IndexError):  # no /proc outside Linux
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return {"pid": pid, "host": socket.gethostname(), "started": started}


def _read_lock(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def release_output(output_dir: str | Path) -> None:
    """Give the folder free. Does nothing when another process holds it."""
    path = Path(output_dir) / LOCK
    if path.exists() and _read_lock(path) == _identity(os.getpid()):
        path.unlink(missing_ok=True)


# Checkpoints to resume from


def mark_complete(folder: str | Path) -> None:
    """Write `complete.json` (each file's size and sha256); call it last, after it the checkpoint counts."""
    folder = Path(folder)
    files = [path for path in _files(folder) if path != folder / COMPLETE]
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }
    write_json(folder / COMPLETE, {"schema": SCHEMA, "files": listed})


def checkpoint_fault(folder: str | Path, hashes: bool = True) -> str | None:
    """Why a checkpoint is not whole, or None. `hashes` False compares sizes only.

    One without `complete.json` is whole when it is a transformers Trainer's: its `trainer_state.json`, written last,
    and tensors that can be opened.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "is no folder"
    if not (folder / COMPLETE).is_file():
        return _trainer_fault(folder)
    try:
        listed = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        for name, stated in listed.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != stated["bytes"]:
                return f"{name} is torn or missing"
            if hashes and sha256_file(path) != stated["sha256"]:
                return f"{name} changed"
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        return f"{COMPLETE} is torn"
    return None


def _trainer_fault(folder: Path) -> str | None:
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"has no {COMPLETE}"
    except (OSError, ValueError):
        return "trainer_state.json is torn"
    if not any(folder.glob("*.safetensors")):
        return "has no weights as safetensors"
    return next((f"{path.name} is torn" for path in sorted(folder.iterdir()) if not _readable(path)), None)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders, by N."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def latest_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from; None when `resume` is None.

    "latest" takes the highest whole `checkpoint-N`, and says on stderr which torn ones it passes over; a folder is
    taken when it is whole. Raises UserError when there is nothing to resume from.
    """
    if resume is None:
        return None
    if resume != "latest":
        fault = checkpoint_fault(resume)
        if fault:
            raise UserError(f"resume_from_checkpoint: {resume}: {fault}: give a whole checkpoint, or latest")
        return Path(resume)
    for folder in reversed(checkpoints(output_dir)):
        fault = checkpoint_fault(folder)
        if fault is None:
            return folder
        if is_main_process():
            print(f"warning: {folder}: {fault}: passed over", file=sys.stderr)
    remedy = "leave resume_from_checkpoint out to start anew, or set save_steps or save_iterations next time"
    raise UserError(f"resume_from_checkpoint: {output_dir} holds no whole checkpoint: {remedy}")


def rotate(output_dir: str | Path, keep: int) -> None:
    """Delete the oldest whole checkpoints so that `keep` (at least one) remain. Torn ones are left and not counted."""
    if not is_main_process():
        return
    whole = [folder for folder in checkpoints(output_dir) if checkpoint_fault(folder, hashes=False) is None]
    for folder in whole[: max(0, len(whole) - max(keep, 1))]:
        doomed = folder.with_name(f".{folder.name}.removed")  # renamed first: a kill midway leaves no half checkpoint
        os.rename(folder, doomed)
        _remove(doomed)


def save_training_state(folder: str | Path, tensors: Mapping[str, Any], name: str = "training_state.pt") -> None:
    """Nested dicts and lists of tensors, numbers and text (optimiser, random state, cursors), whole or not at all."""
    with _atomic_file(Path(folder) / name) as temporary:
        torch.save(dict(tensors), temporary)


def load_training_state(folder: str | Path, name: str = "training_state.pt") -> dict[str, Any]:
    """What `save_training_state` wrote, on the CPU. Raises UserError when it is missing, torn, or holds code."""
    path = Path(folder) / name
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: give a checkpoint that a stage of align wrote") from None
    except Exception as error:  # a torn or foreign pickle raises almost anything
        raise UserError(f"{path}: cannot be read ({type(error).__name__}): resume from another checkpoint") from None
