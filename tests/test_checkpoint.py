"""align/checkpoint.py: atomic writes, manifests, parents, the output folder's lock, resume."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from align import checkpoint as ck
from align.errors import UserError


def model(folder: Path, value: float = 0.0, tokenizer: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.full((4,), float(value))}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or {"model": {"vocab": {"a": 0}}}))
    return folder


def finished(folder: Path, stage: str = "sft", value: float = 0.0) -> Path:
    model(folder, value)
    ck.write_manifest(folder, stage, {"learning_rate": 1e-3}, seed=1)
    return folder


def own_checkpoint(folder: Path, step: int) -> Path:
    with ck.atomic_folder(folder / f"checkpoint-{step}") as path:
        model(path, step)
        ck.save_training_state(path, {"step": step})
        ck.mark_complete(path)
    return folder / f"checkpoint-{step}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Hashes


def test_weights_sha256_is_the_files_own_and_sees_one_changed_number(tmp_path):
    assert ck.weights_sha256(tmp_path) is None and ck.weights_sha256(tmp_path / "none") is None
    model(tmp_path, 1.0)
    first = ck.weights_sha256(tmp_path)
    assert first == ck.sha256_file(tmp_path / "model.safetensors")
    model(tmp_path, 1.5)
    second = ck.weights_sha256(tmp_path)
    save_file({"v": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    assert len({first, second, ck.weights_sha256(tmp_path)}) == 3


def test_tokenizer_sha256_ignores_what_the_last_call_left_behind(tmp_path):
    base = {"model": {"vocab": {"a": 0}}, "truncation": None, "padding": None}
    one = ck.tokenizer_sha256(model(tmp_path / "a", tokenizer=base))
    assert one == ck.tokenizer_sha256(model(tmp_path / "b", tokenizer=base | {"truncation": {"max_length": 3}}))
    assert one != ck.tokenizer_sha256(model(tmp_path / "c", tokenizer=base | {"model": {"vocab": {"b": 0}}}))
    slow = tmp_path / "slow"
    slow.mkdir()
    assert ck.tokenizer_sha256(slow) is None
    (slow / "vocab.json").write_text("{}")
    assert len(ck.tokenizer_sha256(slow)) == 64
    (tmp_path / "c" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is torn"):
        ck.tokenizer_sha256(tmp_path / "c")


def test_tokenizer_sha256_survives_a_round_trip(tmp_path, tiny_codec):
    from align.text import Codec

    tiny_codec.save(tmp_path / "a")
    again = Codec.load(str(tmp_path / "a"))
    again.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    again.save(tmp_path / "b")
    assert ck.sha256_file(tmp_path / "a/tokenizer.json") != ck.sha256_file(tmp_path / "b/tokenizer.json")
    assert ck.tokenizer_sha256(tmp_path / "a") == ck.tokenizer_sha256(tmp_path / "b")


# Atomic writes


def test_write_json_and_jsonl(tmp_path):
    ck.write_json(
        tmp_path / "new" / "a.json", {"x": float("nan"), "t": torch.tensor(2.0), "p": Path("b"), "z": (1, "你")}
    )
    assert json.loads((tmp_path / "new/a.json").read_text(encoding="utf-8")) == {
        "x": None,
        "t": 2.0,
        "p": "b",
        "z": [1, "你"],
    }
    ck.write_jsonl(tmp_path / "new" / "b.jsonl", ({"i": i} for i in range(2)))
    assert (tmp_path / "new/b.jsonl").read_text() == '{"i": 0}\n{"i": 1}\n'
    assert names(tmp_path / "new") == ["a.json", "b.jsonl"]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    ck.write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, where, full_disk)
    for write, value in ((ck.write_json, {"new": 1}), (ck.write_jsonl, [{"new": 1}])):
        with pytest.raises(UserError, match=r"a\.json: disk full: free some space and run again; nothing was written"):
            write(tmp_path / "a.json", value)
    with pytest.raises(UserError, match="disk full"):
        ck.save_training_state(tmp_path, {"step": 1})
    assert names(tmp_path) == ["a.json"] and json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_really_full_device(tmp_path):
    with pytest.raises(UserError, match="disk full"), ck.atomic_folder(tmp_path / "a"), open("/dev/full", "w") as file:
        file.write("x")
    assert names(tmp_path) == []


def test_rows_that_fail_leave_no_file(tmp_path):
    def rows():
        yield {"a": 1}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ck.write_jsonl(tmp_path / "a.jsonl", rows())
    assert names(tmp_path) == []


def test_atomic_folder_is_complete_or_as_before(tmp_path, monkeypatch):
    target = tmp_path / "x" / "checkpoint-1"
    for text in ("old", "new"):
        with ck.atomic_folder(target) as folder:
            (folder / "a").write_text(text)
            assert not (target / "a").exists() or (target / "a").read_text() == "old"
        assert (target / "a").read_text() == text and names(tmp_path / "x") == ["checkpoint-1"]
    for error in (KeyboardInterrupt, ValueError, RuntimeError):
        with pytest.raises(error), ck.atomic_folder(target) as folder:
            (folder / "a").write_text("half")
            raise error
    with pytest.raises(UserError, match="disk full"), ck.atomic_folder(target) as folder:
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="disk full"), ck.atomic_folder(target) as folder:
        (folder / "a").write_text("half")
    with pytest.raises(UserError, match=f"^{target}: disk full"), ck.atomic_folder(target) as folder:
        ck.write_json(folder / "a.json", {})
    assert (target / "a").read_text() == "new" and names(tmp_path / "x") == ["checkpoint-1"]


def test_atomic_folder_recovers_what_a_kill_left(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.replaced").mkdir()
    (tmp_path / ".a.replaced" / "good").write_text("")
    with pytest.raises(ValueError), ck.atomic_folder(tmp_path / "a"):
        raise ValueError
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["good"]


def test_atomic_contents_fills_an_output_folder_and_keeps_the_rest(tmp_path, monkeypatch):
    own_checkpoint(tmp_path, 1)
    with ck.atomic_contents(tmp_path) as folder:
        finished(folder)
    assert names(tmp_path) == [
        "README.md",
        "checkpoint-1",
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    before = ck.weights_sha256(tmp_path)
    assert ck.check_parent(str(tmp_path), "m", ("sft",))["weights_sha256"] == before
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="disk full"), ck.atomic_contents(tmp_path) as folder:
        model(folder, 5.0)
    assert ck.weights_sha256(tmp_path) == before and ".partial" not in names(tmp_path)
    assert ck.check_parent(str(tmp_path), "m", ("sft",))["stage"] == "sft"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ck.write_json(tmp_path / "file" / "a.json", {})
    with pytest.raises(UserError, match="cannot be written"):
        ck.start_output(tmp_path / "file")


# Manifest


@dataclass(frozen=True)
class Config:
    output_dir: str = "runs/x"
    max_new_tokens: int = 24
    hub_token: str = "hf_abcdefghijkl"
    learning_rate: float = 1e-3


def test_manifest_round_trip(tmp_path):
    from align.data import DataReport

    model(tmp_path)
    parents = [{"role": "model_name_or_path", "path": "a", "weights_sha256": "1", "tokenizer_sha256": "2"}]
    report = DataReport(("d.jsonl",), 3, 2, {"d.jsonl": "f" * 64}, {"empty_field": 1})
    wrote = ck.write_manifest(tmp_path, "sft", Config(), 7, parents, {"train": report}, {"loss": torch.tensor(0.5)})
    read = ck.read_manifest(tmp_path)
    assert read == wrote and read.schema == 1 and read.stage == "sft" and read.seed == 7
    assert read.data["train"]["dropped"] == {"empty_field": 1} and read.data["train"]["rows_used"] == 2
    assert read.metrics == {"loss": 0.5} and read.parents == parents
    assert read.weights_sha256 == ck.weights_sha256(tmp_path)
    assert read.tokenizer_sha256 == ck.tokenizer_sha256(tmp_path)
    assert read.config == {
        "output_dir": "runs/x", "max_new_tokens": 24, "hub_token": "[redacted]", "learning_rate": 1e-3,
    }  # fmt: skip
    assert {"align", "code", "python", "torch", "transformers", "trl", "accelerate", "peft"} <= set(read.versions)
    assert read.versions["torch"] == torch.__version__


def test_secrets_are_redacted_and_nothing_else():
    config = {
        "hf_token": "x", "WANDB_API_KEY": "x", "password": "x", "clientSecret": "x", "apikey": "x", "tokens": ["x"],
        "env": {"AUTH": "x", "keys": {"a": "x"}}, "url": "https://me:pw@host/x", "note": "use hf_abcdefghijklmnop",
    }  # fmt: skip
    assert '"x"' not in json.dumps(ck.redact(config)) and "pw" not in json.dumps(ck.redact(config))
    assert "abcdefgh" not in json.dumps(ck.redact(config))
    kept = {
        "max_new_tokens": 24,
        "tokenizer_name": "t",
        "hub_token": None,
        "monkey": "m",
        "save": [1, "a"],
        "token": "",
    }
    assert ck.redact(kept) == kept


def test_manifests_that_cannot_be_used(tmp_path):
    assert ck.read_manifest(tmp_path) is None and ck.read_manifest("org/name") is None
    path = tmp_path / "manifest.json"
    for content, message in (
        ("{", "is torn"), ("[]", "is no manifest"), ('{"schema": 1}', "is no manifest"),
        ('{"stage": "sft"}', "is no manifest"),
        ('{"schema": 2, "stage": "sft"}', "has schema 2, this version reads 1"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            ck.read_manifest(tmp_path)
    path.write_text('{"schema": 1, "stage": "sft", "added_later": 1}')
    assert ck.read_manifest(tmp_path).stage == "sft"


def test_code_version_names_a_commit_or_nothing():
    assert ck.code_version() is None or len(ck.code_version().removesuffix("-dirty")) == 40


# Parents


def test_a_fitting_parent_gives_its_manifest_entry(tmp_path):
    path = str(finished(tmp_path / "sft"))
    assert ck.check_parent(path, "model_name_or_path", ("base", "sft")) == {
        "role": "model_name_or_path", "path": path, "stage": "sft",
        "weights_sha256": ck.weights_sha256(path), "tokenizer_sha256": ck.tokenizer_sha256(path),
    }  # fmt: skip


def test_foreign_models_are_taken_without_a_stage(tmp_path):
    entry = ck.check_parent(str(model(tmp_path / "m")), "model_name_or_path", ("sft",))
    assert entry["stage"] is None and entry["weights_sha256"]
    hub = ck.check_parent("org/name", "model_name_or_path", ("sft",))
    assert hub == {"role": "model_name_or_path", "path": "org/name", "stage": None, "weights_sha256": None,
                   "tokenizer_sha256": None}  # fmt: skip


def test_wrong_stage_is_refused_by_name(tmp_path):
    path = finished(tmp_path / "rm", "rm")
    with pytest.raises(
        UserError, match=rf"^model_name_or_path: {path}: comes from stage rm: give .* stage sft or base"
    ):
        ck.check_parent(str(path), "model_name_or_path", ("sft", "base"))


def test_changed_weights_and_tokenizer_are_refused(tmp_path):
    path = finished(tmp_path / "sft")
    save_file({"w": torch.tensor([0.0, 0.0, 0.0, 1e-7])}, path / "model.safetensors")
    with pytest.raises(UserError, match="its weights changed since its manifest was written: run `make sft` again"):
        ck.check_parent(str(path), "reward_model_path", ("sft",))
    for change in (lambda file: file.write_text('{"a": 1}'), lambda file: file.unlink()):
        path = finished(tmp_path / "config")
        change(path / "config.json")
        (path / "adapter_config.json").write_text("{}")  # so that it still is a model
        with pytest.raises(UserError, match=r"config: config\.json (changed|is missing) since its manifest"):
            ck.check_parent(str(path), "model_name_or_path", ("sft",))
    path = finished(tmp_path / "other")
    (path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="its tokenizer changed"):
        ck.check_parent(str(path), "reward_model_path", ("sft",))


@pytest.mark.parametrize("path", ["runs/none/sft", "./a/b", "/a/b", "word", "a/b/c", "tests/none"])
def test_missing_local_checkpoints(path):
    with pytest.raises(UserError, match=f"^role: {path}: no such checkpoint: run `make sft` first or give its path"):
        ck.check_parent(path, "role", ("sft",))
    with pytest.raises(UserError, match="^role: missing"):
        ck.check_parent("", "role")


def test_incomplete_checkpoints(tmp_path):
    path = model(tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        ck.check_parent(str(tmp_path / "file"), "role")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    with pytest.raises(UserError, match="no model-00002.safetensors"):
        ck.check_parent(str(path), "role")
    (path / "model.safetensors.index.json").unlink()
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-3])
    with pytest.raises(UserError, match="model.safetensors is torn"):
        ck.check_parent(str(path), "role")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights as safetensors"):
        ck.check_parent(str(path), "role")
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        ck.check_parent(str(path), "role")


def test_tokenizers_that_differ_where_they_must_not(tmp_path):
    one, two = (ck.check_parent(str(model(tmp_path / name)), name) for name in ("policy", "reward"))
    three = ck.check_parent(str(model(tmp_path / "c", tokenizer={"model": 1})), "value")
    ck.require_same_tokenizer([one, ck.check_parent("org/name", "hub"), two])
    with pytest.raises(UserError) as refused:
        ck.require_same_tokenizer([one, two, three])
    assert str(tmp_path / "policy") in str(refused.value) and str(tmp_path / "c") in str(refused.value)


# Output folder and lock


def test_a_folder_with_another_run_is_refused_replaced_or_resumed(tmp_path):
    out = tmp_path / "new" / "sft"
    assert ck.start_output(out) == out and names(out) == ["run.lock"]
    ck.start_output(out)  # the same process may ask twice
    ck.release_output(out)
    assert names(out) == []
    own_checkpoint(out, 1)
    for content in ("checkpoint", "manifest"):
        with pytest.raises(UserError, match="already holds another run: set overwrite_output_dir: true"):
            ck.start_output(out)
        assert "run.lock" not in names(out), content
        finished(out)
    assert ck.is_finished(out, "latest") and not ck.is_finished(out, None)
    ck.start_output(out, resume=str(out / "checkpoint-1"))
    assert "manifest.json" not in names(out), "it goes on, so it is not finished"
    assert not ck.is_finished(out, "latest")
    ck.release_output(out)
    ck.start_output(out, overwrite=True)
    assert names(out) == ["run.lock"]
    ck.release_output(out)


def test_latest_does_not_take_a_folder_with_a_model_of_others(tmp_path):
    model(tmp_path)
    with pytest.raises(UserError, match="holds a model but no run to go on with"):
        ck.start_output(tmp_path, resume="latest")
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is torn"):
        ck.is_finished(tmp_path, "latest")


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    ck.start_output(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    ck.release_output(tmp_path)


def test_overwriting_never_empties_the_working_directory(tmp_path, monkeypatch):
    finished(tmp_path)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(UserError, match="is not overwritten"):
        ck.start_output(tmp_path, overwrite=True)
    assert (tmp_path / "manifest.json").exists()


def test_two_live_runs_cannot_write_one_folder(tmp_path):
    code = (
        "import sys; from align import checkpoint as c; c.start_output(sys.argv[1]); print('on', flush=True); input()"
    )
    root = str(Path(__file__).parents[1])
    run = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert other.stdout.readline() == "on\n"
        for how in ({}, {"overwrite": True}, {"resume": "latest"}):
            with pytest.raises(UserError, match=rf"another run writes here \(process {other.pid} on \S+\)"):
                ck.start_output(tmp_path, **how)
        ck.release_output(tmp_path)  # not ours
        assert (tmp_path / "run.lock").exists()
    finally:
        other.kill()
        other.wait()
    assert (tmp_path / "run.lock").exists()
    ck.start_output(tmp_path)  # the kernel gave its lock free
    assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
    ck.release_output(tmp_path)


@pytest.mark.parametrize("content", ["", "torn {", '{"pid": 1, "host": "elsewhere"}'])
def test_a_lock_file_that_nobody_holds_is_no_lock(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    ck.start_output(tmp_path)
    ck.release_output(tmp_path)
    assert names(tmp_path) == []


def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    ck.start_output(tmp_path)
    assert "has no locks" in capsys.readouterr().err
    ck.release_output(tmp_path)


def test_what_a_kill_left_is_tidied_when_the_folder_is_taken_again(tmp_path):
    own_checkpoint(tmp_path, 1).rename(tmp_path / ".checkpoint-1.replaced")
    own_checkpoint(tmp_path, 2)
    for name in (".checkpoint-2.replaced", ".checkpoint-3.partial", ".checkpoint-0.removed", ".partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".metrics.json.12.partial").write_text("")
    ck.start_output(tmp_path, resume="latest")
    ck.release_output(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


# Resume


def test_latest_is_the_highest_whole_one(tmp_path, capsys):
    for step in (2, 10, 9):
        own_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    assert ck.latest_checkpoint(tmp_path, None) is None
    assert ck.latest_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    weights = tmp_path / "checkpoint-10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2])
    capsys.readouterr()
    assert ck.latest_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-9"
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/checkpoint-10: model.safetensors is torn or missing: passed over\n"
        f"resuming from {tmp_path}/checkpoint-9\n"
    )
    with pytest.raises(UserError, match="resume_from_checkpoint: .*checkpoint-10: model.safetensors is torn"):
        ck.latest_checkpoint(tmp_path, str(tmp_path / "checkpoint-10"))


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path, capsys):
    for step in (2, 9, 10):
        own_checkpoint(tmp_path / "run", step)
    elsewhere = own_checkpoint(tmp_path / "other", 1)
    assert ck.latest_checkpoint(tmp_path / "run", str(elsewhere)) == elsewhere
    assert names(tmp_path / "run") == ["checkpoint-10", "checkpoint-2", "checkpoint-9"]
    chosen = tmp_path / "run" / "checkpoint-2"
    for _ in range(2):
        assert ck.latest_checkpoint(tmp_path / "run", str(chosen)) == chosen
        assert names(tmp_path / "run") == ["abandoned-checkpoint-10", "abandoned-checkpoint-9", "checkpoint-2"]
        assert ck.latest_checkpoint(tmp_path / "run", "latest") == chosen
    assert "checkpoint-9: comes after" in capsys.readouterr().err


def test_with_no_checkpoint_yet_latest_starts_from_the_beginning(tmp_path, capsys):
    (tmp_path / "checkpoint-5").mkdir()
    assert ck.latest_checkpoint(tmp_path, "latest") is None
    assert "has no complete.json: passed over" in (said := capsys.readouterr().err)
    assert "starting from the beginning" in said
    with pytest.raises(UserError, match="is no folder"):
        ck.latest_checkpoint(tmp_path, str(tmp_path / "none"))


def test_every_way_a_checkpoint_can_be_torn(tmp_path):
    path = own_checkpoint(tmp_path, 1)
    assert ck.checkpoint_fault(path) is None
    save_file({"w": torch.full((4,), 9.0)}, path / "model.safetensors")
    assert ck.checkpoint_fault(path) == "model.safetensors changed" and ck.checkpoint_fault(path, hashes=False) is None
    (path / "training_state.pt").unlink()
    assert ck.checkpoint_fault(path) in ("model.safetensors changed", "training_state.pt is torn or missing")
    for content in ("{", "[]", "{}", '{"files": {"config.json": 1}}'):
        (path / "complete.json").write_text(content)
        assert ck.checkpoint_fault(path) == "complete.json is torn"
    (path / "complete.json").unlink()
    assert ck.checkpoint_fault(path) == "has no complete.json"


def test_every_bit_of_every_file_of_a_checkpoint_counts(tmp_path):
    """Each byte of complete.json and every tenth of the rest flipped in one bit, and each file cut by a byte."""
    path = own_checkpoint(tmp_path, 1)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for i in range(0, len(whole), 1 if file.name == "complete.json" else 10):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
            assert ck.checkpoint_fault(path), (file.name, i)
        file.write_bytes(whole[:-1])
        assert ck.checkpoint_fault(path), file.name
        file.write_bytes(whole)
    assert ck.checkpoint_fault(path) is None


def test_rotate_keeps_the_newest_and_never_deletes_the_only_good_one(tmp_path):
    one, two, three, _ = (own_checkpoint(tmp_path, step) for step in (1, 2, 3, 5))
    (tmp_path / "checkpoint-4").mkdir()  # torn
    ck.rotate(three, 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5"]
    ck.rotate(three, 1, protected=[two])
    assert two.exists()
    ck.rotate(three, 0)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    weights = tmp_path / "checkpoint-5" / "model.safetensors"  # of before a resume, and no longer what it was
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    ck.rotate(three, 1)
    assert ck.latest_checkpoint(tmp_path, "latest") == three


def test_training_state_round_trip_and_faults(tmp_path):
    state = {"optimizer": {0: {"m": torch.arange(3.0)}, "rates": [1e-3, 2]}, "step": 4, "text": "a", "none": None}
    ck.save_training_state(tmp_path, state)
    got = ck.load_training_state(tmp_path)
    assert torch.equal(got["optimizer"][0]["m"], torch.arange(3.0)) and got["step"] == 4 and got["text"] == "a"
    assert names(tmp_path) == ["training_state.pt"]
    torch.save({"code": Config}, tmp_path / "foreign.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "training_state.pt").read_bytes()[:-9])
    for name in ("foreign.pt", "torn.pt"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            ck.load_training_state(tmp_path, name)
    with pytest.raises(UserError, match="no such file"):
        ck.load_training_state(tmp_path, "none.pt")
