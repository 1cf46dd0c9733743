"""What a user gets wrong: exit status 2, one `error:` line on stderr, nothing half-written, no traceback."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import align.trainer
from align.checkpoint import checkpoint_fault
from align.errors import UserError
from data.world.__main__ import main as world_main
from stages.__main__ import main

pytestmark = pytest.mark.xdist_group("stages")


@pytest.fixture
def refused(mini, capsys):
    def check(stage: str, *words: str, **changes) -> str:
        capsys.readouterr()
        code = main([stage, *mini.arguments(stage, mini.run, **changes)])
        out = capsys.readouterr()
        errors = [line for line in out.err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1, out.err
        assert "Traceback" not in out.err + out.out
        assert out.err.rstrip().splitlines()[-1] == errors[0], "the error is the last line"
        for word in words:
            assert word in errors[0]
        return errors[0]

    return check


def empty(folder) -> bool:
    """Absent, or holding nothing that looks like a model or a run; a batch kept for inspection is neither."""
    if not folder.exists():
        return True
    left = {path.name for path in folder.rglob("*") if path.is_file() and path.parent.name != "stopped-0"}
    return not {n for n in left if n.endswith((".safetensors", ".partial")) or n in ("manifest.json", "config.json")}


@pytest.mark.parametrize("stage", ["base", "sft", "collect", "rm", "ppo", "evaluate"])
def test_unknown_key(refused, tmp_path, stage):
    refused(stage, "--sede", "did you mean 'seed'?", output_dir=tmp_path / "out", sede=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "stage, key",
    [
        ("sft", "model_name_or_path"), ("collect", "model_name_or_path"), ("rm", "model_name_or_path"),
        ("ppo", "model_name_or_path"), ("ppo", "value_model_path"), ("evaluate", "reward_model_path"),
        ("sft", "reward_model_path"), ("evaluate", "sft_path"),
    ],
)  # fmt: skip
def test_missing_checkpoint(refused, tmp_path, stage, key):
    refused(stage, key, "no such checkpoint", **{key: tmp_path / "gone", "output_dir": tmp_path / "out"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "stage, key, given",
    [
        ("sft", "model_name_or_path", "rm"),
        ("rm", "model_name_or_path", "rm"),
        ("ppo", "model_name_or_path", "base"),
        ("ppo", "value_model_path", "sft"),
        ("evaluate", "reward_model_path", "sft"),
        ("collect", "model_name_or_path", "rm"),
        ("evaluate", "sft_path", "rm"),
    ],
)
def test_wrong_stage(refused, mini, tmp_path, stage, key, given):
    refused(stage, key, f"comes from stage {given}", **{key: mini.run / given, "output_dir": tmp_path / "out"})
    assert not (tmp_path / "out").exists()


def test_a_reward_model_without_a_head_and_without_a_manifest(refused, mini, tmp_path):
    shutil.copytree(mini.run / "sft", tmp_path / "foreign", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "foreign" / "manifest.json").unlink()
    refused("ppo", "score", reward=f"[{{model: {tmp_path / 'foreign'}}}]", output_dir=tmp_path / "out")
    assert empty(tmp_path / "out")


@pytest.mark.parametrize(
    "reward, words",
    [
        ("[{{model: {run}/gone}}]", ["reward[0].model", "no such checkpoint"]),
        ("[{{model: {run}/rm}}, {{models: [{run}/rm, {run}/sft]}}]", ["reward[1].models[1]", "comes from stage sft"]),
        ("[{{model: {run}/rm, weight: heavy}}]", ["--reward[0].weight", "'heavy' is not a float"]),
        ("[{{model: {run}/rm}}, {{model: {run}/rm}}]", ["reward[1].name", "'rm' is the name of reward[0] too"]),
    ],
)
def test_a_reward_that_cannot_be(refused, mini, tmp_path, reward, words):
    refused("ppo", *words, reward=reward.format(run=mini.run), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sft_looks_at_its_reward_model_before_it_trains(refused, mini, tmp_path):
    shutil.copytree(mini.run / "base", tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").unlink()
    words = ["reward_model_path", "LlamaForCausalLM without a head"]
    refused("sft", *words, reward_model_path=tmp_path / "foreign", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tampered_weights(refused, mini, tmp_path):
    folder = tmp_path / "sft"
    shutil.copytree(mini.run / "sft", folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for stage in ("collect", "rm", "ppo"):
        line = refused(stage, "weights changed", model_name_or_path=folder, output_dir=tmp_path / "out")
        assert str(folder) in line
    assert not (tmp_path / "out").exists()


def test_torn_weights(refused, mini, tmp_path):
    folder = tmp_path / "sft"
    shutil.copytree(mini.run / "sft", folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("ppo", "model_name_or_path", model_name_or_path=folder, output_dir=tmp_path / "out")


def nan_reward(prompts, completions, **columns):
    return [float("nan")] * len(prompts)


def short_reward(prompts, completions, **columns):
    return [0.0]


def raising_reward(prompts, completions, **columns):
    raise ZeroDivisionError("division by zero")


@pytest.fixture
def rewards_module(monkeypatch):
    import sys
    import types

    module = types.ModuleType("bad_rewards")
    module.nan, module.short, module.raising = nan_reward, short_reward, raising_reward
    monkeypatch.setitem(sys.modules, "bad_rewards", module)


@pytest.mark.parametrize("stage", ["base", "sft", "rm"])
def test_a_training_that_overflows_stops_and_keeps_its_batch(refused, mini, tmp_path, stage):
    out = tmp_path / "out"
    line = refused(stage, "grad_norm is", "at step ", "stopped-0", learning_rate=1e30, output_dir=out)
    kept = load_file(out / "stopped-0" / "batch.safetensors")
    assert any(name.endswith("input_ids") for name in kept)
    assert json.loads((out / "stopped-0" / "batch.json").read_text())["why"] in line
    assert not (out / "manifest.json").exists()


def test_a_loss_that_is_not_finite_stops_though_its_gradient_is(refused, tmp_path, monkeypatch):
    real = align.trainer.batch_ranking_loss

    def infinite(model, inputs):
        loss, stats = real(model, inputs)
        return loss + float("inf"), stats

    monkeypatch.setattr(align.trainer, "batch_ranking_loss", infinite)
    refused("rm", "loss is inf at step 1", "stopped-0", output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_reward_that_returns_nan(refused, rewards_module, tmp_path):
    refused("ppo", "reward", "nan", "stopped-0", reward="[{function: bad_rewards:nan}]", output_dir=tmp_path / "out")
    kept = sorted(path.name for path in (tmp_path / "out" / "stopped-0").iterdir())
    assert kept == ["batch.json", "batch.safetensors"]
    # What is kept is no run: the folder may be used again as it is.
    refused("ppo", "reward", "nan", "stopped-0", reward="[{function: bad_rewards:nan}]", output_dir=tmp_path / "out")
    assert empty(tmp_path / "out")


def test_reward_that_returns_too_few(refused, rewards_module, tmp_path):
    changes = {"reward": "[{function: bad_rewards:short}]", "reward_retries": 0}
    refused("ppo", "returned 1 scores for 16", **changes, output_dir=tmp_path / "out")
    assert empty(tmp_path / "out")


def test_reward_that_cannot_be_imported(refused, tmp_path):
    refused("ppo", "reward[0].function", reward="[{function: no.such:thing}]", output_dir=tmp_path / "out")
    assert empty(tmp_path / "out")


@pytest.mark.parametrize(
    "stage, folder",
    [("base", "base"), ("sft", "sft"), ("collect", "rankings"), ("rm", "rm"), ("ppo", "ppo"), ("evaluate", "ppo")],
)
def test_output_folder_that_holds_another_run(refused, mini, stage, folder):
    def content():
        return {p: p.read_bytes() for p in (mini.run / folder).rglob("*") if p.is_file() and p.name != "run.lock"}

    before = content()
    why = ("holds ppo_ptx_path",) if stage == "evaluate" else ("already holds another run", "overwrite_output_dir")
    refused(stage, *why, output_dir=mini.run / folder)
    assert before == content()


@pytest.mark.parametrize(
    "stage, key", [("sft", "train_file"), ("rm", "train_file"), ("ppo", "train_file"), ("collect", "prompts_file")]
)
def test_bad_rows_are_named_by_line(refused, mini, tmp_path, stage, key):
    good = {
        "sft": "data/demonstrations",
        "rm": "rankings/train",
        "ppo": "data/prompts_ppo",
        "collect": "data/prompts_rm",
    }
    lines = (mini.run / f"{good[stage]}.jsonl").read_text(encoding="utf-8").splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*lines[:3], '{"prompt": ', *lines[3:]]) + "\n", encoding="utf-8")
    refused(stage, f"{bad}:4", **{key: bad, "output_dir": tmp_path / "out"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "key", "more"),
    [
        ("ppo", "train_file", {}), ("collect", "prompts_file", {}), ("sft", "train_file", {"completion": "italy"}),
        ("rm", "train_file", {"chosen": "italy", "rejected": "mars"}),
    ],
)  # fmt: skip
def test_rows_marked_for_evaluation_alone(refused, tmp_path, stage, key, more):
    path = tmp_path / "benchmark.jsonl"
    path.write_text(json.dumps({"prompt": "where is rome ?", "eval_only": True, **more}) + "\n", encoding="utf-8")
    refused(stage, str(path), "eval_only", **{key: path, "output_dir": tmp_path / "out"})
    assert empty(tmp_path / "out")


def test_rows_over_the_cap_are_dropped_from_all_that_a_reward_model_reads(mini, tmp_path):
    """One long row in each file: held-out rankings and demonstrations, too, are counted and left out."""
    long, data = "word " * 400, mini.run / "data"
    files = {
        "train_file": (mini.run / "rankings" / "train.jsonl", {"chosen": long, "rejected": "no"}),
        "validation_file": (mini.run / "rankings" / "validation.jsonl", {"chosen": long + "too", "rejected": "no"}),
        "held_out_file": (mini.run / "rankings" / "held_out.jsonl", {"chosen": long + "also", "rejected": "no"}),
        "demonstrations_file": (data / "demonstrations.jsonl", {"completion": long}),
    }
    changes = {"output_dir": tmp_path / "out", "max_length": 256}
    for number, (key, (path, row)) in enumerate(files.items()):
        text = path.read_text(encoding="utf-8") + json.dumps({"prompt": f"say it {number}", **row}) + "\n"
        (tmp_path / f"{key}.jsonl").write_text(text, encoding="utf-8")
        changes[key] = tmp_path / f"{key}.jsonl"
    mini.stage("rm", mini.run, **changes)
    reports = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["data"]
    assert [report["dropped"].get("too_long") for report in reports.values()] == [1, 1, 1, 1], reports.keys()


def test_evaluate_leaves_out_what_its_models_cannot_read(mini, tmp_path, capsys):
    prompts = mini.run / "data" / "prompts_test.jsonl"
    long = tmp_path / "prompts.jsonl"
    row = json.loads(prompts.read_text(encoding="utf-8").splitlines()[0]) | {"prompt": "word " * 400}
    long.write_text(prompts.read_text(encoding="utf-8") + json.dumps(row) + "\n", encoding="utf-8")
    absent = tmp_path / "none.jsonl"  # ends it before the work
    changes = {"prompts_file": long, "text_file": absent, "output_dir": tmp_path / "out", "ppo_path": tmp_path / "gone"}
    assert main(["evaluate", *mini.arguments("evaluate", mini.run, **changes)]) == 2
    out = capsys.readouterr().out
    assert f"{long}: 1 of " in out and "left out" in out
    assert f"ppo_path: {tmp_path / 'gone'} holds no model: not evaluated" in out


def test_evaluate_says_which_of_its_prompts_were_trained_on(mini, tmp_path, capsys):
    trained = mini.run / "data" / "prompts_ppo.jsonl"
    changes = {"prompts_file": trained, "text_file": tmp_path / "none.jsonl", "output_dir": tmp_path / "out"}
    assert main(["evaluate", *mini.arguments("evaluate", mini.run, **changes)]) == 2  # stopped by the missing text
    leaks = [line for line in capsys.readouterr().out.splitlines() if "were trained on" in line]
    assert len(leaks) == 1 and leaks[0].startswith(f"{trained}: 64 of the ") and f"such as at {trained}:1" in leaks[0]


def test_missing_data_file(refused, tmp_path):
    refused("ppo", "gone.jsonl", "no such file", train_file=tmp_path / "gone.jsonl", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_left_under_the_prompt_cap(refused, tmp_path):
    refused("ppo", "every row is over 1 tokens", max_prompt_length=1, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batch_sizes_that_do_not_divide(refused, tmp_path):
    refused("ppo", "does not divide", rollout_batch_size=18, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_D2_prompt_and_response_over_the_models_context(refused, mini, tmp_path):
    context = json.loads((mini.run / "sft" / "config.json").read_text())["max_position_embeddings"]
    refused("ppo", "max_new_tokens", max_new_tokens=context, output_dir=tmp_path / "out")
    assert empty(tmp_path / "out")


def test_a_folder_that_is_no_checkpoint_is_not_resumed_from(refused, tmp_path):
    changes = {"resume_from_checkpoint": tmp_path / "none", "output_dir": tmp_path / "out"}
    refused("ppo", "resume_from_checkpoint", "is no folder", **changes)
    assert empty(tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte, or a skip where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("stage, every", [("base", {"save_steps": 2}), ("sft", {"save_steps": 2}), ("collect", {}),
                                          ("rm", {"save_steps": 1}), ("ppo", {"save_iterations": 1})])  # fmt: skip
def test_a_disk_that_fills_up_during_a_run(refused, small_disk, stage, every):
    (small_disk / "ballast").write_bytes(bytes(0 if stage == "base" else (1 << 20) - 40_000))
    refused(stage, str(small_disk / "out"), "disk full: free some space", output_dir=small_disk / "out", **every)
    torn = [path for path in small_disk.glob("out/checkpoint-*") if checkpoint_fault(path)]
    assert torn == [] and not (small_disk / "out" / "manifest.json").exists()


def test_a_disk_too_small_for_the_world(small_disk, capsys):
    with pytest.raises(UserError, match="disk full"):
        world_main(["--output_dir", str(small_disk / "data"), "--num_documents", "20000"])
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_that_a_library_reports_in_words_of_its_own(refused, mini, tmp_path, monkeypatch):
    """torch.save says "unexpected pos"; the free space tells what it means."""
    out, usage = tmp_path / "out", shutil.disk_usage
    monkeypatch.setattr(torch, "save", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("unexpected pos 64 vs 0")))
    with pytest.raises(RuntimeError, match="unexpected pos"):
        mini.stage("rm", mini.run, output_dir=tmp_path / "room_left", save_steps=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=100))
    refused("rm", str(out), "disk full", "free some space", output_dir=out, save_steps=1)
    assert not list(out.glob("checkpoint-*"))


def test_usage(capsys):
    assert main([]) == 2 and main(["--help"]) == 0 and main(["pretrain"]) == 2
    assert "unknown stage 'pretrain'" in capsys.readouterr().err


def test_the_random_state_of_torch_is_no_input(mini, tmp_path):
    """A stage seeds itself: what ran before in this process must not matter."""
    torch.manual_seed(12345)
    mini.stage("collect", mini.run, output_dir=tmp_path / "a")
    torch.manual_seed(54321)
    mini.stage("collect", mini.run, output_dir=tmp_path / "b")
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()


@pytest.mark.parametrize("stage", ["base", "sft", "rm"])
def test_one_process_that_sees_several_gpus_is_told_to_start_more(refused, mini, tmp_path, monkeypatch, stage):
    monkeypatch.setattr("align.trainer.on_cpu", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    message = refused(stage, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists(), "before anything is overwritten"
    assert "one process sees 8 GPUs; start one a GPU, `accelerate launch --num_processes 8" in message


@pytest.mark.parametrize(("stage", "train"), [("sft", "data/demonstrations.jsonl"), ("rm", "rankings/train.jsonl")])
def test_D1_held_out_rows_that_are_trained_on_stop_the_stage(refused, mini, tmp_path, stage, train):
    message = refused(stage, output_dir=tmp_path / "out", validation_file=mini.run / train)
    assert "also in another split" in message


@pytest.mark.parametrize(("stage", "train"), [("sft", "data/demonstrations.jsonl"), ("rm", "rankings/train.jsonl")])
def test_D1_or_are_left_out_of_training_and_counted(mini, tmp_path, stage, train):
    lines = (mini.run / train).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "held_out.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    changes = {"validation_file": tmp_path / "held_out.jsonl", "on_bad_rows": "drop"}
    mini.stage(stage, mini.run, output_dir=tmp_path / "out", **changes)
    report = json.loads((tmp_path / "out" / "manifest.json").read_text())["data"]["train_file"]
    assert sum(report["dropped"].values()) >= 3 and report["rows_used"] <= len(lines) - 3
