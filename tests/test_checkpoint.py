"""align/checkpoint.py: the output folder, its lock, resume."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import align.checkpoint
from align.checkpoint import (
    checkpoint_fault,
    is_finished,
    latest_checkpoint,
    load_training_state,
    release_output,
    rotate,
    save_training_state,
    set_later_aside,
    start_output,
)
from align.errors import UserError
from tests.folders import finished, model, names, own_checkpoint

# Output folder and lock


def test_a_folder_with_another_run_is_refused_replaced_or_resumed(tmp_path):
    out = tmp_path / "new" / "sft"
    assert start_output(out) == out and names(out) == ["run.lock"]
    start_output(out)  # the same process may ask twice
    release_output(out)
    assert names(out) == []
    own_checkpoint(out, 1)
    for content in ("checkpoint", "manifest"):
        with pytest.raises(UserError, match="already holds another run: set overwrite_output_dir: true"):
            start_output(out)
        assert "run.lock" not in names(out), content
        finished(out)
    assert is_finished(out, "latest") and not is_finished(out, None)
    start_output(out, resume=str(out / "checkpoint-1"))
    assert "manifest.json" in names(out), "whether it can go on is not known yet (align.resume)"
    release_output(out)
    start_output(out, overwrite=True)
    assert names(out) == ["run.lock"]
    release_output(out)


def test_latest_does_not_take_a_folder_with_a_model_of_others(tmp_path):
    model(tmp_path)
    with pytest.raises(UserError, match="holds a model but no run to go on with"):
        start_output(tmp_path, resume="latest")
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is torn"):
        is_finished(tmp_path, "latest")


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    start_output(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    release_output(tmp_path)


def test_overwriting_spares_a_model_that_no_stage_wrote(tmp_path):
    model(tmp_path)
    with pytest.raises(UserError, match="holds a model that no stage wrote; choose another folder"):
        start_output(tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").exists()


def test_overwriting_never_empties_the_working_directory(tmp_path, monkeypatch):
    finished(tmp_path)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(UserError, match="is not overwritten"):
        start_output(tmp_path, overwrite=True)
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
                start_output(tmp_path, **how)
        release_output(tmp_path)  # not ours
        assert (tmp_path / "run.lock").exists()
    finally:
        other.kill()
        other.wait()
    assert (tmp_path / "run.lock").exists()
    start_output(tmp_path)  # the kernel gave its lock free
    assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
    release_output(tmp_path)


@pytest.mark.parametrize("content", ["", "torn {", '{"pid": 1, "host": "elsewhere"}'])
def test_a_lock_file_that_nobody_holds_is_no_lock(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    start_output(tmp_path)
    release_output(tmp_path)
    assert names(tmp_path) == []


def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    start_output(tmp_path)
    assert "has no locks" in capsys.readouterr().err
    release_output(tmp_path)


def test_what_a_kill_left_is_tidied_when_the_folder_is_taken_again(tmp_path):
    own_checkpoint(tmp_path, 1).rename(tmp_path / ".checkpoint-1.replaced")
    own_checkpoint(tmp_path, 2)
    for name in (".checkpoint-2.replaced", ".checkpoint-3.partial", ".checkpoint-0.removed", ".partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".metrics.json.12.partial").write_text("")
    start_output(tmp_path, resume="latest")
    release_output(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_machine_that_does_not_see_the_folder_is_told(tmp_path, monkeypatch):
    naps = []
    monkeypatch.setattr(align.checkpoint.time, "sleep", naps.append)
    monkeypatch.setattr(align.checkpoint, "_claim", lambda folder, *_: None)  # as on the second machine
    with pytest.raises(UserError, match="not on this machine; all machines of a run need one shared folder"):
        start_output(tmp_path / "run")
    assert len(naps) == align.checkpoint.NETWORK_DELAY
    (tmp_path / "late").mkdir()
    monkeypatch.setattr(align.checkpoint.time, "sleep", lambda _: (tmp_path / "late" / "run.lock").touch())
    assert start_output(tmp_path / "late") == tmp_path / "late"


# Resume


def test_latest_is_the_highest_whole_one(tmp_path, capsys):
    for step in (2, 10, 9):
        own_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    assert latest_checkpoint(tmp_path, None) is None
    assert latest_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    weights = tmp_path / "checkpoint-10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2])
    capsys.readouterr()
    assert latest_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-9"
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/checkpoint-10: model.safetensors is torn or missing: passed over\n"
    )
    with pytest.raises(UserError, match="resume_from_checkpoint: .*checkpoint-10: model.safetensors is torn"):
        latest_checkpoint(tmp_path, str(tmp_path / "checkpoint-10"))


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path, capsys):
    for step in (2, 9, 10):
        own_checkpoint(tmp_path / "run", step)
    elsewhere = own_checkpoint(tmp_path / "other", 1)
    assert latest_checkpoint(tmp_path / "run", str(elsewhere)) == elsewhere
    assert names(tmp_path / "run") == ["checkpoint-10", "checkpoint-2", "checkpoint-9"]
    set_later_aside(tmp_path / "run", elsewhere)
    assert names(tmp_path / "run") == ["checkpoint-10", "checkpoint-2", "checkpoint-9"]
    chosen = tmp_path / "run" / "checkpoint-2"
    for _ in range(2):
        assert latest_checkpoint(tmp_path / "run", str(chosen)) == chosen
        set_later_aside(tmp_path / "run", chosen)
        assert names(tmp_path / "run") == ["abandoned-checkpoint-10", "abandoned-checkpoint-9", "checkpoint-2"]
        assert latest_checkpoint(tmp_path / "run", "latest") == chosen
    assert "checkpoint-9: comes after" in capsys.readouterr().err


def test_with_no_checkpoint_yet_latest_starts_from_the_beginning(tmp_path, capsys):
    (tmp_path / "checkpoint-5").mkdir()
    assert latest_checkpoint(tmp_path, "latest") is None
    assert "has no complete.json: passed over" in (said := capsys.readouterr().err)
    assert "starting from the beginning" in said
    with pytest.raises(UserError, match="is no folder"):
        latest_checkpoint(tmp_path, str(tmp_path / "none"))


def test_every_way_a_checkpoint_can_be_torn(tmp_path):
    path = own_checkpoint(tmp_path, 1)
    assert checkpoint_fault(path) is None
    save_file({"w": torch.full((4,), 9.0)}, path / "model.safetensors")
    assert checkpoint_fault(path) == "model.safetensors changed" and checkpoint_fault(path, hashes=False) is None
    (path / "training_state.pt").unlink()
    assert checkpoint_fault(path) in ("model.safetensors changed", "training_state.pt is torn or missing")
    for content in ("{", "[]", "{}", '{"files": {"config.json": 1}}'):
        (path / "complete.json").write_text(content)
        assert checkpoint_fault(path) == "complete.json is torn"
    (path / "complete.json").unlink()
    assert checkpoint_fault(path) == "has no complete.json"


def test_every_bit_of_every_file_of_a_checkpoint_counts(tmp_path):
    """Each byte of complete.json and every tenth of the rest flipped in one bit, and each file cut by a byte."""
    path = own_checkpoint(tmp_path, 1)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for i in range(0, len(whole), 1 if file.name == "complete.json" else 10):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
            assert checkpoint_fault(path), (file.name, i)
        file.write_bytes(whole[:-1])
        assert checkpoint_fault(path), file.name
        file.write_bytes(whole)
    assert checkpoint_fault(path) is None


def test_rotate_keeps_the_newest_and_never_deletes_the_only_good_one(tmp_path):
    one, two, three, _ = (own_checkpoint(tmp_path, step) for step in (1, 2, 3, 5))
    (tmp_path / "checkpoint-4").mkdir()  # torn
    rotate(three, 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5"]
    rotate(three, 0)
    assert not two.exists()
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    weights = tmp_path / "checkpoint-5" / "model.safetensors"  # of before a resume, and no longer what it was
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    rotate(three, 1)
    assert latest_checkpoint(tmp_path, "latest") == three


def test_a_protected_checkpoint_keeps_its_weights_alone_when_it_is_no_longer_one_to_resume_from(tmp_path, capsys):
    one, two, three = (own_checkpoint(tmp_path, step) for step in (1, 2, 3))
    rotate(three, 2, protected=[one, two])
    assert "training_state.pt" not in names(one) and "training_state.pt" in names(two)
    assert checkpoint_fault(one) is None and (one / "model.safetensors").exists()
    rotate(three, 2, protected=[two])  # one is no place to resume from, so it is neither counted nor deleted
    assert one.exists() and "training_state.pt" in names(two)
    with pytest.raises(UserError, match=f"{one}: holds weights alone.*: give a whole checkpoint, or latest"):
        latest_checkpoint(tmp_path, str(one))
    for newer in (two, three):
        (newer / "complete.json").unlink()
    assert latest_checkpoint(tmp_path, "latest") is None
    assert "checkpoint-1: holds weights alone" in capsys.readouterr().err


class Foreign:
    """Whose unpickling would run code of this module."""


def test_training_state_round_trip_and_faults(tmp_path):
    state = {"optimizer": {0: {"m": torch.arange(3.0)}, "rates": [1e-3, 2]}, "step": 4, "text": "a", "none": None}
    save_training_state(tmp_path, state)
    got = load_training_state(tmp_path)
    assert torch.equal(got["optimizer"][0]["m"], torch.arange(3.0)) and got["step"] == 4 and got["text"] == "a"
    assert names(tmp_path) == ["training_state.pt"]
    torch.save({"code": Foreign}, tmp_path / "foreign.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "training_state.pt").read_bytes()[:-9])
    for name in ("foreign.pt", "torn.pt"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            load_training_state(tmp_path, name)
    with pytest.raises(UserError, match="no such file"):
        load_training_state(tmp_path, "none.pt")


def test_the_home_folder_is_never_emptied(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    for folder in (tmp_path / "home" / "me", tmp_path / "home"):
        finished(folder)
        with pytest.raises(UserError, match="is not overwritten"):
            start_output(folder, overwrite=True)
        assert (folder / "manifest.json").exists()
