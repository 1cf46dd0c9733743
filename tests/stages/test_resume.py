"""Killed and resumed, at the moments that are hard; told to end, and ending. Random moments: tests/chaos.py."""

import json
import os
import signal

import pytest

import align.trainer
import stages.ppo
from align.checkpoint import checkpoints, release_output
from align.postmortem import StopsAtNaN
from stages.__main__ import main

pytestmark = pytest.mark.xdist_group("stages")

LATEST = {"resume_from_checkpoint": "latest"}
EVERY = {
    "base": {"save_steps": 15, "max_steps": 38},  # rows of the log every 10 steps, 5 steps an epoch
    "sft": {"save_steps": 4, "logging_steps": 2, "residual_dropout": 0.1},
    "rm": {"save_steps": 2, "logging_steps": 3, "eval_steps": 2},
    "ppo": {"save_iterations": 1, "total_episodes": 48, "judge": "null"},
}


class Killed(BaseException):
    """Nothing in a stage catches it."""


def outcome(folder) -> dict[str, bytes]:
    """Metrics, transcripts and weights."""
    paths = [*folder.glob("*.jsonl"), *folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    kept = [path for path in paths if not path.parent.name.startswith("checkpoint") and path.name != "timing.jsonl"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    """The outcome of the uninterrupted run of a stage, made when first asked for."""
    found = {}

    def get(stage: str, **changes):
        key = (stage, *sorted(changes.items()))
        if key not in found:
            folder = tmp_path_factory.mktemp("whole")
            mini.stage(stage, mini.run, output_dir=folder, **EVERY[stage] | changes)
            found[key] = outcome(folder), [path.name for path in checkpoints(folder)]
        return found[key]

    return get


def die_after(patch, stage: str, step: int) -> None:
    """The process ends once checkpoint-`step` is written, before anything else is."""
    module = align.learn if stage == "ppo" else align.trainer
    rotate = module.rotate

    def dies(newest, *rest):
        rotate(newest, *rest)
        if newest.name == f"checkpoint-{step}":
            raise Killed

    patch.setattr(module, "rotate", dies)


MOMENTS = [
    ("base", 15, {}), ("base", 38, {}),  # within a row of the log; at the end, within an epoch
    ("sft", 4, {}), ("sft", 3, {}), ("sft", 9, {}),  # within an epoch; at its end, which is evaluated; at the last
    ("rm", 2, {}), ("rm", 2, {"use_peft": "true"}), ("ppo", 1, {}), ("ppo", 3, {}),
    ("ppo", 1, {"value_head_init": "fitted", "value_use_peft": "true"}),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "step", "changes"), MOMENTS)
def test_a_run_killed_after_a_checkpoint_goes_on_to_the_byte(mini, whole, tmp_path, monkeypatch, stage, step, changes):
    expected, saved = whole(stage, **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_after(patch, stage, step)
        mini.stage(stage, mini.run, output_dir=tmp_path, **EVERY[stage] | changes)
    assert (tmp_path / f"checkpoint-{step}").is_dir() and not (tmp_path / "manifest.json").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "to')
    mini.stage(stage, mini.run, output_dir=tmp_path, **EVERY[stage] | changes | LATEST)
    found = outcome(tmp_path)
    assert [name for name in expected if found.get(name) != expected[name]] == [] and found.keys() == expected.keys()
    assert [path.name for path in checkpoints(tmp_path)] == saved, "and keeps the same checkpoints"


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_one_command_starts_a_run_and_leaves_a_finished_one_alone(mini, whole, tmp_path, capsys, stage):
    mini.stage(stage, mini.run, output_dir=tmp_path, **EVERY[stage] | LATEST)
    assert "starting from the beginning" in capsys.readouterr().err
    assert outcome(tmp_path) == whole(stage)[0]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    mini.stage(stage, mini.run, output_dir=tmp_path, **EVERY[stage] | LATEST)
    assert "this run is finished and stays as it is" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize(
    ("stage", "number", "status"), [("base", 15, 143), ("sft", 15, 143), ("rm", 2, 130), ("ppo", 15, 143)]
)
def test_a_signal_saves_at_the_next_step_and_has_its_own_status(
    mini, whole, tmp_path, monkeypatch, capsys, stage, number, status
):
    """The signal arrives in the second step; the stage saves no checkpoints of its own."""
    steps = []

    def counted(step):
        def call(*args, **options):
            steps.append(1)
            if len(steps) == 2:
                os.kill(os.getpid(), number)
            return step(*args, **options)

        return call

    changes = EVERY[stage] | {"save_iterations" if stage == "ppo" else "save_steps": 0}
    place = (stages.ppo, "update") if stage == "ppo" else (StopsAtNaN, "get_batch_samples")
    with monkeypatch.context() as patch:
        patch.setattr(*place, counted(getattr(*place)))
        assert main([stage, *mini.arguments(stage, mini.run, output_dir=tmp_path, **changes)]) == status
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert last == f"stopped by {signal.Signals(number).name}; {tmp_path}/checkpoint-2 holds the run: " \
        "resume with --resume_from_checkpoint latest"  # fmt: skip
    assert main([stage, *mini.arguments(stage, mini.run, output_dir=tmp_path, **changes | LATEST)]) == 0
    assert outcome(tmp_path) == whole(stage)[0]


@pytest.mark.parametrize("stage", ["collect", "evaluate"])
def test_a_signal_ends_a_stage_that_does_not_train_at_once(mini, tmp_path, monkeypatch, capsys, stage):
    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal was to end this")

    monkeypatch.setattr(f"stages.{stage}.start_output", interrupted)
    assert main([stage, *mini.arguments(stage, mini.run, output_dir=tmp_path / "out")]) == 143
    assert capsys.readouterr().err.rstrip().splitlines()[-1].startswith("stopped by SIGTERM")
    assert not (tmp_path / "out").exists()


def test_a_second_signal_ends_at_once(monkeypatch):
    from align import interrupt

    with interrupt.handled(), interrupt.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the same request: Ctrl-C under a launcher comes twice
        assert interrupt.arrived() == signal.SIGTERM
        monkeypatch.setattr(interrupt, "SAME", -1.0)
        with pytest.raises(interrupt.Interrupted, match="stopped by SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_kl_stop_holds_for_the_resumed_run_too(mini, tmp_path, monkeypatch):
    """Killed between its last checkpoint and its end, it does not train on."""
    changes = EVERY["ppo"] | {"kl_stop": 1e-9, "save_iterations": 0}
    mini.stage("ppo", mini.run, output_dir=tmp_path / "whole", **changes)
    expected = json.loads((tmp_path / "whole" / "manifest.json").read_text())["metrics"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_after(patch, "ppo", len((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()))
        mini.stage("ppo", mini.run, output_dir=tmp_path / "cut", **changes)
    mini.stage("ppo", mini.run, output_dir=tmp_path / "cut", **changes | LATEST)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["metrics"] == expected
    assert expected["stopped"] and expected["objective/kl"] > 1e-9


def test_a_kl_coefficient_that_was_changed_holds_from_there_on(mini, tmp_path):
    changes = EVERY["ppo"] | {"total_episodes": 16, "kl_coef": 0.25}
    mini.stage("ppo", mini.run, output_dir=tmp_path, **changes)
    more = changes | {"total_episodes": 32, "kl_coef": 0.5, "resume_from_checkpoint": tmp_path / "checkpoint-1"}
    mini.stage("ppo", mini.run, output_dir=tmp_path, **more)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["kl_coef"] for row in rows] == [0.25, 0.5]


def test_a_resume_that_is_refused_leaves_the_finished_run(mini, tmp_path, capsys):
    changes = EVERY["rm"] | {"output_dir": tmp_path}
    mini.stage("rm", mini.run, **changes)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for wrong in (
        {"resume_from_checkpoint": "true"},
        {"resume_from_checkpoint": tmp_path / "checkpoint-2", "learning_rate": 0.5},
    ):
        assert main(["rm", *mini.arguments("rm", mini.run, **changes | wrong)]) == 2
        assert "resume_from_checkpoint: " in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == whole


def test_after_the_last_step_a_signal_ends_the_stage_at_once(mini, tmp_path, monkeypatch, capsys):
    """Scoring demonstrations may take longer than training did; a checkpoint would no longer be saved."""

    def scoring(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal was to end this")

    monkeypatch.setattr("stages.rm.normalise_on", scoring)
    assert main(["rm", *mini.arguments("rm", mini.run, output_dir=tmp_path / "out")]) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_reward_model_outlives_what_fails_after_its_training(mini, tmp_path, monkeypatch):
    """Without a checkpoint asked for: scoring runs out of memory, say, and the next start scores what was trained."""

    def fails(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("stages.rm.normalise_on", fails)
        with pytest.raises(MemoryError):
            mini.stage("rm", mini.run, output_dir=tmp_path / "rm")
    (checkpoint,) = (tmp_path / "rm").glob("checkpoint-*")
    release_output(tmp_path / "rm")
    mini.stage("rm", mini.run, output_dir=tmp_path / "rm", resume_from_checkpoint="latest")
    assert not checkpoint.exists(), "what nobody asked for does not stay"
    ours, whole = ((run / "rm" / "model.safetensors").read_bytes() for run in (tmp_path, mini.run))
    assert ours == whole
