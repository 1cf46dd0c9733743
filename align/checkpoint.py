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
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import align
from align.card import model_card
from align.errors import UserError
from align.lock import LOCK, release_lock, take_lock
from align.runtime import broadcast, is_main_process, wait_for_everyone

SCHEMA = 1
MANIFEST, COMPLETE = "manifest.json", "complete.json"
TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
CONFIG_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json",
)  # fmt: skip
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


def small_files(folder: str | Path) -> dict[str, str]:
    """What makes a model besides weights and tokenizer.json, with hashes: configs, templates, vocabularies."""
    paths = [Path(folder) / name for name in (*CONFIG_FILES, *TOKENIZER_FILES)]
    return {path.name: sha256_file(path) for path in paths if path.is_file()}


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
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """To disk: what a file or folder holds outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, obj: Any) -> None:
    """Write JSON whole or not at all. NaN and infinities become null: other languages' readers refuse them."""
    with _atomic_file(Path(path)) as temporary:
        temporary.write_text(_as_text(obj), encoding="utf-8")


def _as_text(obj: Any) -> str:
    return json.dumps(plain(obj), ensure_ascii=False, indent=2) + "\n"


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
    new, old = partial_name(path), path.with_name(f".{path.name}.replaced")
    with _plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():  # killed between _put's two renames
            os.rename(old, path)
        _remove(new.parent, old)
        new.mkdir(parents=True)
    try:
        with _plain_errors(path):
            yield new
            _put(new, path, old)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        _remove(new.parent, old)


def partial_name(path: Path) -> Path:
    """Where a folder is written until it is whole: under its own name, which the Trainer insists on."""
    return path.with_name(f".{path.name}.partial") / path.name


def _put(new: Path, path: Path, old: Path) -> None:
    """Everything in `new` to disk, then `new` in the place of `path`."""
    for file in (*_files(new), new):
        sync(file)
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    sync(path.parent)


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
            for file in _files(new):
                sync(file)
            (path / MANIFEST).unlink(missing_ok=True)
            _remove(*(path / file.name for file in files if (path / file.name).is_dir()))
            for file in files:
                os.replace(file, path / file.name)
            sync(path)
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
    files: dict[str, str] = field(default_factory=dict)  # the other files that make the model -> sha256
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
        parents=redact(plain(parents or [])),
        data=redact(plain(data or {})),
        config=redact(plain(config)),
        seed=seed,
        versions=versions(),
        metrics=plain(metrics or {}),
        weights_sha256=weights_sha256(folder),
        tokenizer_sha256=tokenizer_sha256(folder),
        files=small_files(folder),
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
        _check_files(manifest, folder, role)
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


def _check_files(manifest: Manifest, folder: Path, role: str) -> None:
    for name, then in manifest.files.items():
        path = folder / Path(name).name
        if not path.is_file() or sha256_file(path) != then:
            what = "changed" if path.is_file() else "is missing"
            remedy = f"run `make {manifest.stage}` again, or take {MANIFEST} away if the change was meant"
            raise UserError(f"{role}: {folder}: {name} {what} since its manifest was written: {remedy}")


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
    """Whether a file of tensors is whole, as far as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


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


# Output folder


def is_finished(output_dir: str | Path, resume: str | None) -> bool:
    """Whether "latest" is asked of a run that has ended: there is nothing to do, which is said."""
    finished = resume == "latest" and read_manifest(output_dir) is not None
    if finished and is_main_process():
        remedy = "to train again set overwrite_output_dir: true, to go on from a checkpoint name its folder"
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
    return folder


def _claim(folder: Path, overwrite: bool, resume: str | None) -> None:
    with _plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        take_lock(folder)
    atexit.register(release_output, folder)
    _claimed.append(folder)
    try:
        if not resume and _holds_run(folder):
            if not overwrite:
                remedy = "set overwrite_output_dir: true to replace it, resume_from_checkpoint: latest to go on"
                raise UserError(f"output_dir: {folder}: already holds another run: {remedy}, or choose another folder")
            _empty(folder)
        if resume and _holds_run(folder) and not _holds_start(folder):
            raise UserError(f"output_dir: {folder}: holds a model but no run to go on with; choose another folder")
        _tidy(folder)
        (folder / MANIFEST).unlink(missing_ok=True)  # a run that goes on is not finished
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
            _remove(path) if path.is_dir() else path.unlink()


def release_output(output_dir: str | Path) -> None:
    """Give the folder free. Does nothing when another process holds it."""
    release_lock(Path(output_dir))


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
    """A run of ours began here: it logged, or saved a checkpoint."""
    return (folder / "metrics.jsonl").is_file() or bool(checkpoints(folder))


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
    files = [path for path in _files(folder) if path != folder / COMPLETE]
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }
    write_json(folder / COMPLETE, _complete(listed))


def _complete(listed: dict[str, Any]) -> dict[str, Any]:
    own = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return {"schema": SCHEMA, "files": listed, "sha256": own}


def checkpoint_fault(folder: str | Path, hashes: bool = True) -> str | None:
    """Why a checkpoint is not whole, or None. `hashes` False compares sizes only."""
    folder = Path(folder)
    if not folder.is_dir():
        return "is no folder"
    try:
        text = (folder / COMPLETE).read_text(encoding="utf-8")
        listed = json.loads(text)["files"]
        if text != _as_text(_complete(listed)):
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


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders, by N."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def latest_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from, the same in all processes; None when `resume` is None.

    "latest" takes the highest whole `checkpoint-N`, and says on stderr which torn ones it passes over; with none it
    is None too, which is said: a scheduler starts and restarts a job with one command. A folder is taken when it is
    whole, else UserError; those of `output_dir` that come after it are set aside, or "latest" would go on with them.
    """
    if resume is None:
        return None
    return broadcast(_choose_checkpoint(output_dir, resume) if is_main_process() else None)


def _choose_checkpoint(output_dir: str | Path, resume: str) -> Path | None:
    if resume != "latest":
        fault = checkpoint_fault(resume)
        if fault:
            raise UserError(f"resume_from_checkpoint: {resume}: {fault}: give a whole checkpoint, or latest")
        found = checkpoints(output_dir)
        chosen = next((i for i, path in enumerate(found) if path.resolve() == Path(resume).resolve()), len(found))
        for later in found[chosen + 1 :]:
            aside = later.with_name(f"abandoned-{later.name}")
            _remove(aside)
            os.rename(later, aside)
            _tell(f"{later}: comes after {resume}: now {aside.name}")
        return Path(resume)
    for folder in reversed(checkpoints(output_dir)):
        fault = checkpoint_fault(folder)
        if fault is None:
            _tell(f"resuming from {folder}")
            return folder
        _tell(f"warning: {folder}: {fault}: passed over")
    _tell(f"resume_from_checkpoint: {output_dir} holds no whole checkpoint: starting from the beginning")
    return None


def _tell(line: str) -> None:
    if is_main_process():
        print(line, file=sys.stderr)


def rotate(newest: Path, keep: int, protected: Iterable[Path] = ()) -> None:
    """After `newest` was written: delete the oldest checkpoints before it so that `keep` remain, it among them.

    `newest` is whole and never deleted. Torn ones, those after it (of a run that was resumed further back) and
    `protected` ones are left and not counted.
    """
    if not is_main_process():
        return
    found = checkpoints(newest.parent)
    before = [path for path in found[: found.index(newest)] if path not in set(protected)]
    whole = [path for path in before if checkpoint_fault(path, hashes=False) is None]
    for folder in whole[: max(0, len(whole) - max(keep, 1) + 1)]:
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
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # what shards leave out is not read
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: give a checkpoint that a stage of align wrote") from None
    except Exception as error:  # a torn or foreign pickle raises almost anything
        raise UserError(f"{path}: cannot be read ({type(error).__name__}): resume from another checkpoint") from None
