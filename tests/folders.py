"""Folders as stages leave them, and files of rows, for tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from align.checkpoint import mark_complete, save_training_state
from align.files import atomic_folder
from align.manifest import write_manifest


def model(folder: Path, value: float = 0.0, tokenizer: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.full((4,), float(value))}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or {"model": {"vocab": {"a": 0}}}))
    return folder


def finished(folder: Path, stage: str = "sft", value: float = 0.0) -> Path:
    model(folder, value)
    write_manifest(folder, stage, {"learning_rate": 1e-3}, seed=1)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def own_checkpoint(folder: Path, step: int) -> Path:
    with atomic_folder(folder / f"checkpoint-{step}") as path:
        model(path, step)
        save_training_state(path, {"step": step})
        mark_complete(path)
    return folder / f"checkpoint-{step}"


def lines(path: Path, *rows: object) -> str:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return str(path)
