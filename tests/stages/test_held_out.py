"""Stage 3 on held-out prompts: what is measured, of which policy, and that nothing else changes by it."""

import filecmp
import json
import statistics

import pytest
import torch
from safetensors.torch import load_file

from align.errors import UserError
from align.generate import TorchSampler, uniform_numbers
from align.held_out import STREAM
from align.models import load_packed_policy
from align.text import Codec
from tests.stages.conftest import PPO

pytestmark = pytest.mark.xdist_group("stages")

KEYS = {"total_episodes": 48, "seed": 3, "ema_decay": 0.9, "save_iterations": 1, "learning_rate": 5e-3}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def measured(mini, tmp_path_factory):
    """Three iterations; the prompts are answered before, after the second and after the last."""
    output, prompts = tmp_path_factory.mktemp("held-out") / "ppo", mini.run / "data" / "prompts_validation.jsonl"
    keys = KEYS | {"validation_file": prompts, "validation_prompts": 5, "eval_iterations": 2}
    mini.stage("ppo", mini.run, output_dir=output, **keys)
    return output, keys


def test_prompts_are_answered_at_the_start_every_so_often_and_at_the_end(measured):
    output, _ = measured
    metrics, answers = rows(output / "metrics.jsonl"), rows(output / "validation.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert [row["step"] for row in metrics if "validation/scores" in row] == [0, 2, 3]
    assert [row["iteration"] for row in answers] == [0] * 5 + [2] * 5 + [3] * 5
    assert len({row["query"] for row in answers[:5]}) == 5
    assert [row["query"] for row in answers[:5]] == [row["query"] for row in answers[10:]]
    assert metrics[0]["episode"] == 0 and metrics[0]["validation/kl"] == pytest.approx(0, abs=1e-6)
    assert "validation/gain" not in metrics[0] and "validation/gold" in metrics[0]


def test_a_run_that_kl_stop_ends_measures_what_it_saves(mini, tmp_path):
    output, prompts = tmp_path / "ppo", mini.run / "data" / "prompts_validation.jsonl"
    keys = {"validation_file": prompts, "validation_prompts": 5, "eval_iterations": 3, "kl_stop": 1e-9}
    mini.stage("ppo", mini.run, output_dir=output, **KEYS | {"warmup_iterations": 0}, **keys)
    metrics, manifest = rows(output / "metrics.jsonl"), json.loads((output / "manifest.json").read_text())
    stopped = metrics[-1]["step"]
    assert 0 < stopped < 3 and [row["step"] for row in metrics if "validation/scores" in row] == [0, stopped]
    assert manifest["metrics"]["validation/scores"] == metrics[-1]["validation/scores"]


def test_gains_are_paired_with_the_start(measured):
    output, _ = measured
    metrics, answers = rows(output / "metrics.jsonl"), rows(output / "validation.jsonl")
    for step, after in ((2, answers[5:10]), (3, answers[10:])):
        row = metrics[step]
        pairs = zip(after, answers[:5], strict=True)
        gains = [now["score"] - then["score"] for now, then in pairs]
        half = 2.7764451 * statistics.stdev(gains) / 5**0.5  # Student's t of 4 degrees of freedom, 97.5%
        expected = statistics.mean(gains)
        assert row["validation/gain"] == pytest.approx(expected, abs=1e-5)
        assert row["validation/gain_low"] == pytest.approx(expected - half, abs=1e-5)
        assert row["validation/gain_high"] == pytest.approx(expected + half, abs=1e-5)
        assert row["validation/raw_scores"] == pytest.approx(statistics.mean(a["score"] for a in after), abs=1e-5)
        assert row["validation/gold_gain"] == pytest.approx(row["validation/gold"] - metrics[0]["validation/gold"])


def test_it_is_the_policy_that_is_saved_who_answers(mini, measured):
    """The averaged weights, not those that were just trained: their answers to the last measurement's prompts."""
    output, _ = measured
    answers = rows(output / "validation.jsonl")[10:]
    codec = Codec.load(output)
    prompts = {codec.query_text(codec.prompts([row["prompt"]])[0]): row["prompt"] for row in
               rows(mini.run / "data" / "prompts_validation.jsonl")}  # fmt: skip
    queries = codec.prompts([prompts[row["query"]] for row in answers])
    uniforms = uniform_numbers(5, PPO["max_new_tokens"], KEYS["seed"], STREAM)

    def answered(folder):
        policy = load_packed_policy(str(folder), None, torch.float32)
        episodes = TorchSampler(policy, codec.eos_id, codec.pad_id, 8)(queries, uniforms, 1.0)
        return [codec.decode(list(episode.response)) for episode in episodes]

    assert answered(output) == [row["response"] for row in answers]
    averaged, trained = (load_file(folder / "model.safetensors") for folder in (output, output / "checkpoint-3"))
    assert any(not torch.equal(averaged[name], trained[name]) for name in averaged)


def test_training_goes_on_as_if_nobody_had_asked(mini, measured, tmp_path):
    output, _ = measured
    mini.stage("ppo", mini.run, output_dir=tmp_path / "plain", **KEYS)
    assert filecmp.cmp(output / "model.safetensors", tmp_path / "plain" / "model.safetensors", shallow=False)
    own = [{k: v for k, v in row.items() if not k.startswith("validation/")} for row in rows(output / "metrics.jsonl")]
    assert own[1:] == rows(tmp_path / "plain" / "metrics.jsonl")
    assert not (tmp_path / "plain" / "validation.jsonl").exists()


def test_a_resumed_run_measures_the_same(mini, measured, tmp_path, monkeypatch):
    import stages.ppo

    output, keys = measured
    real = stages.ppo.collect_rollout

    def dies(*args):
        if args[-1] == 1:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stages.ppo, "collect_rollout", dies)
        with pytest.raises(KeyboardInterrupt):
            mini.stage("ppo", mini.run, output_dir=tmp_path / "cut", **keys)
    mini.stage("ppo", mini.run, output_dir=tmp_path / "cut", resume_from_checkpoint="latest", **keys)
    for name in ("metrics.jsonl", "validation.jsonl", "model.safetensors"):
        assert filecmp.cmp(output / name, tmp_path / "cut" / name, shallow=False), name


def test_prompts_of_both_files_are_named_or_left_out_of_training(mini, tmp_path):
    both = tmp_path / "both.jsonl"
    train = (mini.run / "data" / "prompts_ppo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    both.write_text("".join(train[:3]), encoding="utf-8")
    short = {"total_episodes": 16, "validation_file": both}
    with pytest.raises(UserError, match="the prompts of 3 of its 64 rows are also in another split"):
        mini.stage("ppo", mini.run, output_dir=tmp_path / "out", **short)
    mini.stage("ppo", mini.run, output_dir=tmp_path / "out", on_bad_rows="drop", **short)
    data = json.loads((tmp_path / "out" / "manifest.json").read_text())["data"]
    assert data["train_file"]["dropped"] == {"in_two_splits": 3} and data["validation_file"]["rows_used"] == 3


def test_one_prompt_has_no_interval(mini, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "Name a colour."}\n', encoding="utf-8")
    with pytest.raises(UserError, match="validation_file: 1 prompt that can be used; an interval needs 2 or more"):
        mini.stage("ppo", mini.run, output_dir=tmp_path / "out", validation_file=one)
