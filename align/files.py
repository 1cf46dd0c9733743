"""Files written whole or not at all, and what goes wrong as one line that says how to mend it; their digests."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from align.errors import UserError

MANIFEST = "manifest.json"  # of a finished stage's folder, written last
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_file(path: str | Path, name: str) -> Path | None:
    """A file of a model on the hub, fetched or from the cache; None where it has none, and for a folder."""
    if os.path.exists(path):
        return None
    from transformers.utils import cached_file  # late: seconds, which a folder need not wait for

    quiet = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
    try:
        found = cached_file(str(path), name, **{f"_raise_exceptions_for_{what}": flag for what, flag in quiet.items()})
    except (OSError, ValueError):  # no such model, or not a name that one could have: whoever loads it says so
        return None
    return None if found is None else Path(found)


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
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
        if "No space left" in str(error) or is_full(_existing(path)):
            raise _disk_full(path) from None
        raise


def is_full(folder: Path) -> bool:
    """Whether its disk has no megabyte left."""
    return shutil.disk_usage(folder).free < 1 << 20


class _DiskFull(UserError):
    pass


def _disk_full(path: Path) -> UserError:
    return _DiskFull(f"{path}: disk full: free some space and run again; nothing was written")


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path` once written and synced to disk, or is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with write_errors(path):
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
    with atomic_file(Path(path)) as temporary:
        temporary.write_text(json_text(obj), encoding="utf-8")


def json_text(obj: Any) -> str:
    """As `write_json` writes it."""
    return json.dumps(plain(obj), ensure_ascii=False, indent=2) + "\n"


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, whole or not at all."""
    with atomic_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
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
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():  # killed between _put's two renames
            os.rename(old, path)
        remove_folders(new.parent, old)
        new.mkdir(parents=True)
    try:
        with write_errors(path):
            yield new
            _put(new, path, old)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        remove_folders(new.parent, old)


def partial_name(path: Path) -> Path:
    """Where a folder is written until it is whole: under its own name, which the Trainer insists on."""
    return path.with_name(f".{path.name}.partial") / path.name


def _put(new: Path, path: Path, old: Path) -> None:
    """Everything in `new` to disk, then `new` in the place of `path`."""
    for file in (*files_under(new), new):
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
    with write_errors(path):
        remove_folders(new)
        new.mkdir(parents=True)
    try:
        with write_errors(path):
            yield new
            files = sorted(new.iterdir(), key=lambda file: (file.name == MANIFEST, file.name))
            for file in files_under(new):
                sync(file)
            (path / MANIFEST).unlink(missing_ok=True)
            remove_folders(*(path / file.name for file in files if (path / file.name).is_dir()))
            for file in files:
                os.replace(file, path / file.name)
            sync(path)
    finally:
        remove_folders(new)


def files_under(folder: Path) -> list[Path]:
    """All files at any depth, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remove_folders(*folders: Path) -> None:
    """Those that exist; what cannot be removed stays."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
