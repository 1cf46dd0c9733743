"""align/files.py: whole or not at all, and what goes wrong in one line."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from align.checkpoint import save_training_state, start_output
from align.errors import UserError
from align.files import atomic_contents, atomic_folder, write_json, write_jsonl
from align.manifest import check_parent, weights_sha256
from tests.folders import finished, model, names, own_checkpoint


def test_write_json_and_jsonl(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"x": float("nan"), "t": torch.tensor(2.0), "p": Path("b"), "z": (1, "你")})
    assert json.loads((tmp_path / "new/a.json").read_text(encoding="utf-8")) == {
        "x": None,
        "t": 2.0,
        "p": "b",
        "z": [1, "你"],
    }
    write_jsonl(tmp_path / "new" / "b.jsonl", ({"i": i} for i in range(2)))
    assert (tmp_path / "new/b.jsonl").read_text() == '{"i": 0}\n{"i": 1}\n'
    assert names(tmp_path / "new") == ["a.json", "b.jsonl"]


def disk_is_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_is_full_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, where, disk_is_full)
    for write, value in ((write_json, {"new": 1}), (write_jsonl, [{"new": 1}])):
        with pytest.raises(UserError, match=r"a\.json: disk full: free some space and run again; nothing was written"):
            write(tmp_path / "a.json", value)
    with pytest.raises(UserError, match="disk full"):
        save_training_state(tmp_path, {"step": 1})
    assert names(tmp_path) == ["a.json"] and json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_really_full_device(tmp_path):
    with pytest.raises(UserError, match="disk full"), atomic_folder(tmp_path / "a"), open("/dev/full", "w") as file:
        file.write("x")
    assert names(tmp_path) == []


def test_rows_that_fail_leave_no_file(tmp_path):
    def rows():
        yield {"a": 1}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_jsonl(tmp_path / "a.jsonl", rows())
    assert names(tmp_path) == []


def test_atomic_folder_is_complete_or_as_before(tmp_path, monkeypatch):
    target = tmp_path / "x" / "checkpoint-1"
    for text in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / "a").write_text(text)
            assert not (target / "a").exists() or (target / "a").read_text() == "old"
        assert (target / "a").read_text() == text and names(tmp_path / "x") == ["checkpoint-1"]
    for error in (KeyboardInterrupt, ValueError, RuntimeError):
        with pytest.raises(error), atomic_folder(target) as folder:
            (folder / "a").write_text("half")
            raise error
    with pytest.raises(UserError, match="disk full"), atomic_folder(target) as folder:
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it
    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(UserError, match="disk full"), atomic_folder(target) as folder:
        (folder / "a").write_text("half")
    with pytest.raises(UserError, match=f"^{target}: disk full"), atomic_folder(target) as folder:
        write_json(folder / "a.json", {})
    assert (target / "a").read_text() == "new" and names(tmp_path / "x") == ["checkpoint-1"]


def test_atomic_folder_recovers_what_a_kill_left(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.replaced").mkdir()
    (tmp_path / ".a.replaced" / "good").write_text("")
    with pytest.raises(ValueError), atomic_folder(tmp_path / "a"):
        raise ValueError
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["good"]


def test_atomic_contents_fills_an_output_folder_and_keeps_the_rest(tmp_path, monkeypatch):
    own_checkpoint(tmp_path, 1)
    with atomic_contents(tmp_path) as folder:
        finished(folder)
    assert names(tmp_path) == [
        "README.md",
        "checkpoint-1",
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    before = weights_sha256(tmp_path)
    assert check_parent(str(tmp_path), "m", ("sft",))["weights_sha256"] == before
    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(UserError, match="disk full"), atomic_contents(tmp_path) as folder:
        model(folder, 5.0)
    assert weights_sha256(tmp_path) == before and ".partial" not in names(tmp_path)
    assert check_parent(str(tmp_path), "m", ("sft",))["stage"] == "sft"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "file" / "a.json", {})
    with pytest.raises(UserError, match="cannot be written"):
        start_output(tmp_path / "file")
