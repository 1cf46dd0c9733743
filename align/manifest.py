"""Where a finished stage's folder comes from (design section 5).

`manifest.json` has the stage's parents, data, config without secrets, versions, metrics and the hashes of its own
weights and tokenizer. It is written last, after a model's card. The next stage checks it with `check_parent`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import align
from align.card import model_card
from align.errors import UserError
from align.files import MANIFEST, atomic_file, hub_file, plain, sha256_file, write_json

SCHEMA = 1  # of manifest.json
TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
CONFIG_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json",
)  # fmt: skip
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")


# Hashes


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
        with atomic_file(Path(folder) / "README.md") as card:
            card.write_text(model_card(plain(manifest)), encoding="utf-8")
    write_json(Path(folder) / MANIFEST, manifest)
    return manifest


def read_manifest(folder: str | Path) -> Manifest | None:
    """None when the folder has none (a foreign model). Raises UserError when it is torn or of a newer schema."""
    path = Path(folder) / MANIFEST
    return _manifest(path) if path.is_file() else None


def published_manifest(path: str) -> Manifest | None:
    """Of a folder or of a model on the hub, where a file of that name may be anything."""
    fetched = hub_file(path, MANIFEST)
    if fetched is None:
        return read_manifest(path)
    with contextlib.suppress(UserError):
        return _manifest(fetched)
    return None


def _manifest(path: Path) -> Manifest:
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
