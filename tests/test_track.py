"""align/track.py: the metrics file, its resume, and every PPO metric by a loop over tokens."""

import atexit
import dataclasses
import json
import math
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from align.config import SFTConfig
from align.errors import UserError
from align.rows import DataReport
from align.track import (
    Metrics,
    MetricsCallback,
    Transcripts,
    ppo_metrics,
    read_jsonl,
    run_name,
    save_log_sizes,
    say_dropped,
)
from align.types import Rollout, UpdateStats


def test_rows_are_appended_and_the_clock_stays_out(tmp_path):
    metrics = Metrics(tmp_path / "run")
    metrics.log(1, {"loss": 0.5, "train_runtime": 3.0, "train_samples_per_second": 9.0, "total_flos": 1e9, "time/x": 1})
    metrics.log(2, {"loss": 0.25})
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    timing = read_jsonl(tmp_path / "run" / "timing.jsonl")
    assert timing[0]["train_runtime"] == 3.0 and timing[0]["time/x"] == 1 and timing[1].keys() == {"step", "seconds"}


def test_a_new_run_starts_a_new_file_and_a_resumed_one_goes_on(tmp_path):
    first = Metrics(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
        if step == 2:
            first.log(2, {"eval_loss": 0.0})
            (tmp_path / "checkpoint-2").mkdir()
            save_log_sizes(tmp_path, tmp_path / "checkpoint-2")
    first.log(2, {"after": 0.0})  # a row of the checkpoint's own step, written after it
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # torn by a kill
    resumed = Metrics(tmp_path, tmp_path / "checkpoint-2")
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 0.0},
    ]  # fmt: skip
    resumed.log(3, {"loss": 9.0})
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3]
    assert [row["step"] for row in read_jsonl(tmp_path / "timing.jsonl")] == [1, 2, 2, 3]
    Metrics(tmp_path)
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_trainer_logs_come_through_the_same_door(tmp_path):
    callback = MetricsCallback(Metrics(tmp_path))
    state = type("State", (), {"global_step": 4})()
    callback.on_log(None, state, None, logs={"loss": 1.0, "step": 99, "eval_runtime": 2.0})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 4, "loss": 1.0}]


def test_read_jsonl_of_nothing(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == []


JUNK = 1e30
LENGTHS, FINISHED = [2, 3], [True, False]
LOGPROBS = [[-1.0, -2.0, JUNK], [-0.5, -1.5, -0.25]]
REF = [[-1.5, -2.25, -JUNK], [-0.5, -1.0, -1.0]]
VALUES, RETURNS = [[0.5, 1.0, JUNK], [0.0, 0.5, -0.5]], [[1.0, 1.0, -JUNK], [0.5, 0.0, -1.0]]
SCORES, RAW = [1.5, -1.0], [1.5, 0.25]
REWARDS = [[-0.25, -0.125 + 1.5, JUNK], [0.0, 0.25, -0.375 - 1.0]]  # -0.5 x KL a token, the score on the last
SUMS = {
    "tokens": 10.0, "steps": 4.0, "ptx_tokens": 8.0, "entropy": 25.0, "approxkl": 0.5, "policy_clipped": 2.0,
    "policy_grad_norm": 6.0, "value_grad_norm": 2.0, "policy_loss": -1.0, "value_loss": 3.0, "value_clipped": 1.0,
    "ptx_loss": 20.0, "ratio": 10.5, "max_ratio_deviation": 0.125,
}  # fmt: skip


@pytest.fixture
def rollout() -> Rollout:
    lengths = torch.tensor(LENGTHS)
    zeros = torch.zeros(2, 3)
    return Rollout(
        input_ids=torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 0]]), query_lengths=torch.tensor([1, 1]),
        response_lengths=lengths, finished=torch.tensor(FINISHED),
        response_mask=torch.tensor([[True, True, False], [True, True, True]]), logprobs=torch.tensor(LOGPROBS),
        ref_logprobs=torch.tensor(REF), values=torch.tensor(VALUES), scores=torch.tensor(SCORES),
        raw_scores=torch.tensor(RAW), rewards=torch.tensor(REWARDS), advantages=zeros, returns=torch.tensor(RETURNS),
    )  # fmt: skip


def test_ppo_metrics_goldens(rollout):
    row = ppo_metrics(rollout, UpdateStats(SUMS), kl_coef=0.5, lr=1e-4)
    kl = [0.75, 0.25]  # (0.5 + 0.25), (0 - 0.5 + 0.75)
    real = [(v, r) for i in range(2) for v, r in zip(VALUES[i][: LENGTHS[i]], RETURNS[i][: LENGTHS[i]], strict=True)]

    def variance(numbers):
        mean = sum(numbers) / len(numbers)
        return sum((x - mean) ** 2 for x in numbers) / len(numbers)

    expected = {
        "objective/scores": 0.25, "objective/raw_scores": 0.875, "objective/kl": sum(kl) / 2,
        "objective/non_score_reward": -0.25, "objective/rlhf_reward": 0.0, "objective/entropy": 2.5,
        "objective/response_tokens": 2.5, "objective/finished": 0.5, "policy/approxkl_avg": 0.05,
        "policy/clipfrac_avg": 0.2, "policy/grad_norm": 1.5, "loss/policy_avg": -0.1, "loss/value_avg": 0.3,
        "loss/ptx": 2.5, "val/clipfrac_avg": 0.1, "val/ratio": 1.05, "val/max_ratio_deviation": 0.125,
        "val/explained_variance": 1 - variance([r - v for v, r in real]) / variance([r for _, r in real]),
        "val/num_eos_tokens": 1.0, "val/grad_norm": 0.5, "kl_coef": 0.5, "lr": 1e-4,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert all(math.isfinite(value) for value in row.values()), "junk in the padding reached a metric"


def test_parts_of_the_reward_in_the_metrics(rollout):
    parts = {"scores/rm": torch.tensor([1.0, 5.0]), "failures/f": torch.tensor([0.0, 1.0])}
    row = ppo_metrics(dataclasses.replace(rollout, part_scores=parts), UpdateStats(SUMS), kl_coef=0.5, lr=1e-4)
    found = {key: row[key] for key in row if key.endswith(("/rm", "/f"))}
    assert found == {"objective/scores/rm": 3.0, "objective/scores_std/rm": 2.0, "objective/failures/f": 0.5}


def test_repetition_reads_responses_alone(rollout):
    ids = torch.tensor([[7, 7, 7, 7, 7, 0, 0], [7, 4, 4, 4, 4, 0, 0]])  # a query of 3 and a response of 2; 1 and 4
    lengths = {"query_lengths": torch.tensor([3, 1]), "response_lengths": torch.tensor([2, 4])}
    wide = {name: torch.zeros(2, 4) for name in ("logprobs", "ref_logprobs", "values", "returns", "rewards")}
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    changed = dataclasses.replace(rollout, input_ids=ids, response_mask=mask, **lengths, **wide)
    row = ppo_metrics(changed, UpdateStats(SUMS), kl_coef=0.5, lr=1e-4)
    assert row["objective/repetition"] == pytest.approx(0.25), "0 of no 3-gram, 1 of 2"


def test_sampling_metrics_goldens(rollout):
    assert not [key for key in ppo_metrics(rollout, UpdateStats(SUMS), 0.5, 1e-4) if key.startswith("sampling/")]
    sums = SUMS | {"mismatch": 0.5, "mismatch_kl": 0.25, "max_mismatch": 0.375, "mismatch_tokens": 5.0}
    weighed = dataclasses.replace(rollout, importance_weights=torch.tensor([[0.5, 1.0, JUNK], [2.0, 0.0, 1.5]]))
    row = ppo_metrics(weighed, UpdateStats(sums), kl_coef=0.5, lr=1e-4)
    assert {key: value for key, value in row.items() if key.startswith("sampling/")} == pytest.approx({
        "sampling/sampling_logp_difference/mean": 0.1, "sampling/sampling_logp_difference/max": 0.375,
        "sampling/kl": 0.05, "sampling/importance_sampling_ratio/min": 0.0,
        "sampling/importance_sampling_ratio/mean": 1.0, "sampling/importance_sampling_ratio/max": 2.0,
        "sampling/masked_tokens": 1.0,
    })  # fmt: skip


def test_stats_add_up_and_maxima_do_not():
    total = UpdateStats.total([UpdateStats({"a": 1.0, "max_x": 0.5}), UpdateStats({"a": 2.0, "b": 3.0, "max_x": 0.25})])
    assert total.sums == {"a": 3.0, "b": 3.0, "max_x": 0.5}


def test_transcripts(rollout, tiny_codec, tmp_path):
    Transcripts(tmp_path, count=1).write(7, rollout, tiny_codec)
    Transcripts(tmp_path, count=5).write(8, rollout, tiny_codec)
    lines = (tmp_path / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["iteration"] for row in rows] == [7, 8, 8]
    assert rows[1] | {} == {
        "iteration": 8, "query": tiny_codec.tokenizer.decode([5]), "response": tiny_codec.decode([6, 7]),
        "finished": True, "score": 1.5, "kl": 0.75,
    }  # fmt: skip


class FakeWandb:
    """Stands for the module: what was sent, by run id; `faults` names what raises."""

    class Settings:
        def __init__(self, **settings):
            self.settings = settings

    def __init__(self, faults=()):
        self.faults, self.sent, self.modes = set(faults), [], []

    def init(self, id, mode, **about):
        self.modes.append(mode)
        if "init" in self.faults or (mode is None and "online" in self.faults):
            raise ConnectionError("no route to host\nand more")
        self.id = id
        return self

    def teardown(self):
        pass

    def log(self, metrics, step):
        if "log" in self.faults:
            raise BrokenPipeError
        self.sent.append((self.id, step, metrics))

    def finish(self):
        if "finish" in self.faults:
            threading.Event().wait(60)


@pytest.fixture
def wandb(monkeypatch):
    def use(*faults: str) -> FakeWandb:
        module = FakeWandb(faults)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    monkeypatch.setattr(atexit, "register", lambda _: None)
    return use


REPORTED = SFTConfig(output_dir="out", report_to="wandb")
BOARD = SFTConfig(output_dir="out", report_to="tensorboard")
RESUMED = SFTConfig(output_dir="out", report_to="wandb", resume_from_checkpoint="latest")


def test_a_resumed_run_sends_no_step_twice(tmp_path, wandb):
    """Killed twice, the second time before it has come as far as the first."""
    module, checkpoint = wandb(), tmp_path / "checkpoint-1"
    metrics = Metrics(tmp_path, None, REPORTED)
    metrics.log(1, {"loss": 1.0})
    checkpoint.mkdir()
    save_log_sizes(tmp_path, checkpoint)
    for rows in (3, 2, 4):
        for step, name in [(1, "eval"), (2, "loss"), (3, "loss"), (4, "loss")][:rows]:
            metrics.log(step, {name: float(step)})
        metrics = Metrics(tmp_path, checkpoint, RESUMED)
    assert [(step, list(row)) for _, step, row in module.sent] == [
        (1, ["loss"]), (1, ["eval"]), (2, ["loss"]), (3, ["loss"]), (4, ["loss"]),
    ]  # fmt: skip
    assert len({run for run, _, _ in module.sent}) == 1, "one wandb run a folder"
    Metrics(tmp_path, None, REPORTED).log(1, {"loss": 1.0})
    assert module.sent[-1][0] != module.sent[0][0], "a new run is another one"


@pytest.mark.parametrize(("faults", "modes"), [(["online"], [None, "offline"]), (["init"], [None, "offline"])])
def test_a_tracker_that_cannot_start_goes_offline_or_does_without(tmp_path, wandb, capsys, faults, modes):
    module = wandb(*faults)
    metrics = Metrics(tmp_path, None, REPORTED)
    metrics.log(1, {"loss": 1.0})
    assert module.modes == modes and len(module.sent) == (faults == ["online"])
    assert "warning: wandb: ConnectionError: no route to host; the run goes on\n" in capsys.readouterr().err
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_a_tracker_that_breaks_ends_no_run_and_holds_none_up(tmp_path, wandb, monkeypatch, capsys):
    wandb("log", "finish")
    monkeypatch.setattr("align.track.TRACKER_WAIT", 0.1)
    metrics = Metrics(tmp_path, None, REPORTED)
    metrics.log(1, {"loss": 1.0})
    metrics.tracker.finish()
    said = capsys.readouterr().err
    assert "BrokenPipeError" in said and "`wandb sync` does it later" in said


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="report_to: tensorboard is not installed: pip install"):
        Metrics(tmp_path, None, BOARD)


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path):
    """Killed at step 3, resumed from the checkpoint after step 1, as TensorBoard itself reads it."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    checkpoint = tmp_path / "checkpoint-1"
    metrics = Metrics(tmp_path, None, BOARD)
    metrics.log(0, {"loss": 30.0})  # of a run that was killed before its first checkpoint
    time.sleep(1.1)  # its files are named by the second
    metrics = Metrics(tmp_path, None, BOARD)
    metrics.log(0, {"loss": 3.0})
    metrics.log(1, {"loss": 1.0, "note": "no number"})
    checkpoint.mkdir()
    save_log_sizes(tmp_path, checkpoint)
    for step in (2, 3):
        metrics.log(step, {"loss": 10.0 * step})
    time.sleep(1.1)
    metrics = Metrics(tmp_path, checkpoint, BOARD)
    metrics.log(2, {"loss": 2.0, "time/sample": 0.5})
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert [(event.step, event.value) for event in seen.Scalars("loss")] == [(0, 3.0), (1, 1.0), (2, 2.0)]
    assert seen.Tags()["scalars"] == ["loss", "time/sample"]


def test_a_wandb_run_is_called_after_its_folders(monkeypatch):
    monkeypatch.delenv("WANDB_NAME", raising=False)
    assert run_name(Path("runs/tiny/ppo")) == "tiny/ppo"
    monkeypatch.setenv("WANDB_NAME", "mine")
    assert run_name(Path("runs/tiny/ppo")) == "mine"


def test_rows_that_are_not_used_are_said(capsys):
    few = DataReport(("a",), 100, 97, {}, {"too_long": 3})
    most = DataReport(("b",), 48, 12, {}, {"too_long": 30, "empty_field": 6})
    say_dropped({"train_file": few, "validation_file": most, "other": DataReport(("c",), 5, 5, {})})
    assert capsys.readouterr().out.splitlines() == [
        "train_file: 3 of 100 rows are not used: 3 too_long",
        "warning: validation_file: 36 of 48 rows are not used: 30 too_long, 6 empty_field",
    ]
