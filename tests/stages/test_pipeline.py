"""The stages end to end at mini size: files, manifests, loading without our code, reproducibility, resume."""

import filecmp
import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import stages.sft
from align.data import load_rankings
from align.evaluate.reward_report import untied_pairs
from align.evaluate.schema import check_summary
from align.models import load_scalar_model
from align.ranking import score_rankings
from align.text import Codec
from stages.__main__ import main, seconds_so_far, was_finished

pytestmark = pytest.mark.xdist_group("stages")


def manifest(mini: SimpleNamespace, name: str) -> dict:
    return json.loads((mini.run / name / "manifest.json").read_text())


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_stage_leaves_its_files(mini):
    for name in ("base", "sft", "rm", "ppo"):
        names = {path.name for path in (mini.run / name).iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "manifest.json", "metrics.jsonl"} <= names, name
    for name in ("train.jsonl", "validation.jsonl", "held_out.jsonl"):
        assert rows(mini.run / "rankings" / name), name
    assert (mini.run / "rm" / "report.json").is_file()
    assert rows(mini.run / "ppo" / "transcripts.jsonl")
    assert (mini.run / "ppo" / "value_model" / "model.safetensors").is_file()
    assert not list(mini.run.rglob("*partial*")), "nothing half-written"


def test_a_fitted_head_alone_is_a_reward_model(mini, tmp_path):
    """No step is taken: SFT's body, and a head whose loss on what it was fitted on is less than that of no opinion."""
    mini.stage("rm", mini.run, output_dir=tmp_path / "rm", head_init="fitted", num_train_epochs=0)
    ours, body = (load_file(folder / "model.safetensors") for folder in (tmp_path / "rm", mini.run / "sft"))
    shared = set(ours) & set(body)
    assert set(ours) - shared == {"score.weight", "score.bias"} and len(shared) > 10
    assert all(torch.equal(ours[name], body[name]) for name in shared) and float(ours["score.weight"].norm()) > 0
    model, codec = load_scalar_model(str(tmp_path / "rm")).eval(), Codec.load(str(tmp_path / "rm"))
    rankings = load_rankings(str(mini.run / "rankings" / "train.jsonl"))[0]
    losses = []
    for ranking, scores in score_rankings(model, rankings, codec, 16):
        gaps = [pair.gap for pair in untied_pairs([(ranking, scores)])]
        losses += [sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps)] if gaps else []
    assert sum(losses) / len(losses) < math.log(2) - 0.01


def test_manifests_chain(mini):
    for child, parents in {"sft": ["base"], "rankings": ["sft"], "rm": ["sft"], "ppo": ["sft", "rm"]}.items():
        stated = manifest(mini, child)["parents"]
        assert [entry["stage"] for entry in stated] == parents
        for entry, parent in zip(stated, parents, strict=True):
            digest = hashlib.sha256((mini.run / parent / "model.safetensors").read_bytes()).hexdigest()
            assert entry["weights_sha256"] == digest == manifest(mini, parent)["weights_sha256"]
            assert entry["tokenizer_sha256"] == manifest(mini, "base")["tokenizer_sha256"]


def test_data_files_are_in_the_manifest_with_their_hashes(mini):
    for name, report in manifest(mini, "sft")["data"].items():
        assert report["rows_used"] + sum(report["dropped"].values()) == report["rows_read"] > 0, name
        for path, digest in report["sha256"].items():
            with open(path, "rb") as file:
                assert hashlib.sha256(file.read()).hexdigest() == digest


def test_folders_load_with_transformers_alone(mini):
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    tokenizer = AutoTokenizer.from_pretrained(mini.run / "ppo")
    ids = tokenizer("hello there", return_tensors="pt")["input_ids"]
    for name in ("base", "sft", "ppo"):
        policy, info = AutoModelForCausalLM.from_pretrained(mini.run / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        out = policy.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert out.shape[1] > ids.shape[1]
    for folder in (mini.run / "rm", mini.run / "ppo" / "value_model"):
        assert AutoModelForSequenceClassification.from_pretrained(folder)(ids).logits.shape == (1, 1)
        assert AutoModelForTokenClassification.from_pretrained(folder)(ids).logits.shape == (1, ids.shape[1], 1)


def moved(before, after) -> set[str]:
    a, b = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    return {name for name in a if name in b and not torch.equal(a[name].float(), b[name].float())}


def test_every_trained_parameter_moved(mini):
    names = set(load_file(mini.run / "base" / "model.safetensors"))
    assert moved(mini.run / "base", mini.run / "sft") == names
    assert moved(mini.run / "sft", mini.run / "ppo") == names
    rm = set(load_file(mini.run / "rm" / "model.safetensors"))
    assert moved(mini.run / "sft", mini.run / "rm") == names & rm and {"score.weight", "score.bias"} <= rm
    assert moved(mini.run / "rm", mini.run / "ppo" / "value_model") == rm


def test_R9_demonstrations_score_0_on_average(mini):
    """By transformers and a loop of single rows; and as the manifest says."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    assert abs(manifest(mini, "rm")["metrics"]["demonstration_mean"]) < 1e-4
    model = AutoModelForTokenClassification.from_pretrained(mini.run / "rm")
    tokenizer = AutoTokenizer.from_pretrained(mini.run / "rm")
    total, demonstrations = 0.0, rows(mini.run / "data" / "demonstrations.jsonl")
    for row in demonstrations:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            total += float(model(ids).logits[0, -1, 0])
    assert abs(total / len(demonstrations)) < 1e-4


def test_summary_follows_its_schema(evaluated):
    summary = json.loads((evaluated / "summary.json").read_text())
    check_summary(summary)
    assert list((evaluated / "report" / "plots").glob("*.png")) and (evaluated / "report" / "index.html").is_file()
    assert summary["policies"]["ppo_ptx"] and summary["policies"]["sft"] and summary["policies"]["prompted"]


def test_evaluating_hopeless_policies_is_no_crash(mini, tmp_path):
    """No pair of completions differs in gold value; there is still a report to write."""
    lines = (mini.run / "rankings" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    ranking = json.loads(lines[0])
    for item, text in zip(ranking["completions"], "abcdefghi", strict=False):
        item["completion"] = text * 3
    (tmp_path / "same.jsonl").write_text(json.dumps(ranking, ensure_ascii=False) + "\n", encoding="utf-8")
    mini.stage("evaluate", mini.run, rankings_file=tmp_path / "same.jsonl", output_dir=tmp_path / "report")
    assert (tmp_path / "report" / "index.html").is_file()


def test_step_zero_numbers_are_kept(mini):
    numbers = manifest(mini, "ppo")["metrics"]["step_zero"]
    assert set(numbers) == {"ratio_max_deviation", "kl", "value_minus_score"}
    assert all(abs(value) < 1e-3 for value in numbers.values())


def test_engine_and_trainer_agree_in_every_iteration(mini):
    for row in rows(mini.run / "ppo" / "metrics.jsonl"):
        assert 0 < row["sampling/sampling_logp_difference/mean"] <= row["sampling/sampling_logp_difference/max"] < 1e-3
        assert abs(row["sampling/kl"]) < 1e-6


def test_seconds_of_each_phase_lie_beside_the_metrics(mini):
    timing, metrics = (rows(mini.run / "ppo" / name) for name in ("timing.jsonl", "metrics.jsonl"))
    phases = {"sample", "logprobs", "reference", "value", "reward", "update_policy", "update_value"}
    assert len(timing) == len(metrics) > 1
    before = 0.0
    for row in timing:
        spent = [row[f"time/{phase}"] for phase in phases - {"logprobs"}]
        assert min(spent) >= 0 and 0 < sum(spent) <= row["seconds"] - before + 0.02
        before = row["seconds"]
    assert not any(key.startswith("time/") for row in metrics for key in row)


def test_losses_fall(mini):
    losses = [row["loss"] for row in rows(mini.run / "base" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]


def test_rankings_hold_4_to_k_samples_and_distinct_labelers(mini):
    train = rows(mini.run / "rankings" / "train.jsonl")
    held_out = rows(mini.run / "rankings" / "held_out.jsonl")
    assert all(2 <= len(row["completions"]) <= 5 for row in train)
    assert not {row["labeler"] for row in train} & {row["labeler"] for row in held_out}
    for row in train:
        texts = [item["completion"] for item in row["completions"]]
        assert len(set(texts)) == len(texts) == len(row["finished"])


def test_same_seed_twice_gives_the_same_metrics_and_weights(mini, tmp_path):
    mini.stage("ppo", mini.run, output_dir=tmp_path / "again")
    first, again = mini.run / "ppo", tmp_path / "again"
    assert filecmp.cmp(first / "metrics.jsonl", again / "metrics.jsonl", shallow=False)
    assert len(rows(again / "metrics.jsonl")) == 2
    assert filecmp.cmp(first / "model.safetensors", again / "model.safetensors", shallow=False)
    assert filecmp.cmp(first / "transcripts.jsonl", again / "transcripts.jsonl", shallow=False)
    mini.stage("ppo", mini.run, output_dir=tmp_path / "other", seed=1)
    assert not filecmp.cmp(first / "metrics.jsonl", tmp_path / "other" / "metrics.jsonl", shallow=False)


def test_same_seed_twice_in_sft_and_rm(mini, tmp_path):
    for stage in ("sft", "rm"):
        mini.stage(stage, mini.run, output_dir=tmp_path / stage)
        for name in ("metrics.jsonl", "model.safetensors"):
            assert filecmp.cmp(mini.run / stage / name, tmp_path / stage / name, shallow=False), (stage, name)


def test_ppo_resume_equals_the_uninterrupted_run(mini, tmp_path, monkeypatch):
    """Three iterations in one go, against a run that dies in its third and goes on from its checkpoint."""
    import stages.ppo

    changes = {"total_episodes": 48, "save_iterations": 1, "kl_target": 0.01, "kl_horizon": 100, "seed": 3}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    mini.stage("ppo", mini.run, output_dir=whole, **changes)

    real = stages.ppo.collect_rollout

    def dies(queries, actors, config, runtime, kl_coef, iteration):
        if iteration == 2:
            raise KeyboardInterrupt
        return real(queries, actors, config, runtime, kl_coef, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(stages.ppo, "collect_rollout", dies)
        with pytest.raises(KeyboardInterrupt):
            mini.stage("ppo", mini.run, output_dir=cut, **changes)
    assert not (cut / "manifest.json").exists()
    mini.stage("ppo", mini.run, output_dir=cut, resume_from_checkpoint="latest", **changes)
    names = ["metrics.jsonl", "model.safetensors", "value_model/model.safetensors", "transcripts.jsonl"]
    different = [name for name in names if not filecmp.cmp(whole / name, cut / name, shallow=False)]
    assert different == []


def test_ppo_resume_from_an_earlier_checkpoint_cuts_what_came_after(mini, tmp_path):
    changes = {"total_episodes": 48, "save_iterations": 1, "seed": 3}
    mini.stage("ppo", mini.run, output_dir=tmp_path, **changes)
    before = {
        name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors", "transcripts.jsonl")
    }
    mini.stage("ppo", mini.run, output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2", **changes)
    assert [name for name, content in before.items() if (tmp_path / name).read_bytes() != content] == []


@pytest.mark.parametrize(
    "stage, changes",
    [("base", {"save_steps": 15}), ("sft", {"save_steps": 3, "save_total_limit": 9}), ("rm", {"save_steps": 2})],
)
def test_a_trainers_resume_equals_the_uninterrupted_run(mini, tmp_path, stage, changes):
    mini.stage(stage, mini.run, output_dir=tmp_path, **changes)
    names = ("metrics.jsonl", "model.safetensors")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    first = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    mini.stage(stage, mini.run, output_dir=tmp_path, resume_from_checkpoint=first, **changes)
    assert [name for name in names if (tmp_path / name).read_bytes() != before[name]] == []


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_wandb_offline_writes_into_the_stages_folder(mini, tmp_path, monkeypatch, stage):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    mini.stage(stage, mini.run, output_dir=tmp_path / "out", report_to="wandb")
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*")) and not (tmp_path / "wandb").exists()
    assert rows(tmp_path / "out" / "metrics.jsonl")


@pytest.mark.parametrize("size", [1, 7])
def test_validation_loss_is_a_mean_over_tokens_however_they_are_batched(mini, tmp_path, monkeypatch, size):
    import stages.sft

    def losses(folder):
        return [row["eval_loss"] for row in rows(folder / "metrics.jsonl") if "eval_loss" in row]

    arguments = stages.sft.training_arguments
    monkeypatch.setattr(
        stages.sft, "training_arguments", lambda *given: replace(arguments(*given), per_device_eval_batch_size=size)
    )
    mini.stage("sft", mini.run, output_dir=tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(mini.run / "sft"), rel=1e-5) and len(losses(tmp_path)) == 3


def test_the_reward_models_report_covers_held_out_labelers(mini):
    report = json.loads((mini.run / "rm" / "report.json").read_text())
    accuracy = report["held_out_labelers"]["accuracy"]
    assert 0 <= accuracy["low"] <= accuracy["mean"] <= accuracy["high"] <= 1
    judged = {row["labeler"] for row in rows(mini.run / "rankings" / "held_out.jsonl")}
    assert judged and not judged & {row["labeler"] for row in rows(mini.run / "rankings" / "train.jsonl")}


def test_a_torn_seconds_file_costs_no_run(mini, tmp_path):
    (tmp_path / "seconds.json").write_text("")
    assert seconds_so_far(str(tmp_path), "sft").keys() == {"sft"}


def test_a_finished_stage_that_is_asked_for_again_adds_no_seconds(tmp_path):
    output = tmp_path / "sft"
    output.mkdir()
    assert not was_finished(output)
    (output / "manifest.json").write_text("{}")
    assert not was_finished(output), "written by this process"
    os.utime(output / "manifest.json", (1e9, 1e9))
    assert was_finished(output)


def test_a_resumed_stage_adds_to_the_seconds_it_took_before(tmp_path):
    (tmp_path / "seconds.json").write_text('{"sft": 1e6, "rm": 7.0}')
    resumed, anew = seconds_so_far(str(tmp_path), "sft", resumed=True), seconds_so_far(str(tmp_path), "sft")
    assert anew["rm"] == resumed["rm"] == 7.0
    assert 0 < anew["sft"] < 1e6 < resumed["sft"] < anew["sft"] + 1e6 + 5


def test_transcripts_show_queries_without_bos(mini):
    for row in rows(mini.run / "ppo" / "transcripts.jsonl"):
        assert "<bos>" not in row["query"] and row["query"].strip()


def test_plain_ppo_reads_no_text(mini, tmp_path):
    mini.stage("ppo", mini.run, output_dir=tmp_path / "plain", ptx_coef=0, pretraining_file="null")
    assert [row["loss/ptx"] for row in rows(tmp_path / "plain" / "metrics.jsonl")] == [0.0, 0.0]


def test_S5_sft_chooses_by_reward_when_a_reward_model_is_given(mini, tmp_path):
    mini.stage("sft", mini.run, output_dir=tmp_path / "sft", reward_model_path=mini.run / "rm", max_new_tokens=6)
    choice = json.loads((tmp_path / "sft" / "manifest.json").read_text())["metrics"]["selection"]
    best = max(choice["table"], key=lambda row: row["reward"])
    assert choice["criterion"] == "highest mean reward" and choice["checkpoint"] == best["checkpoint"]
    weights = "model.safetensors"
    assert filecmp.cmp(tmp_path / "sft" / weights, tmp_path / "sft" / best["checkpoint"] / weights, shallow=False)


def test_lora_sft_hands_on_a_merged_model(mini, tmp_path):
    """The adapter lies beside a model that the next stage reads like any other, and differs from its base."""
    changes = {"use_peft": "true", "num_train_epochs": 1}
    mini.stage("sft", mini.run, output_dir=tmp_path / "sft", **changes)
    assert (tmp_path / "sft" / "adapter" / "adapter_model.safetensors").is_file()
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "sft", mini.run / "base"))
    assert merged.keys() == base.keys() and any(not torch.equal(merged[name], base[name]) for name in base)
    mini.stage("rm", mini.run, model_name_or_path=tmp_path / "sft", output_dir=tmp_path / "rm")
    assert (tmp_path / "rm" / "manifest.json").is_file()


def test_lora_ppo_hands_on_a_merged_model_and_resumes_to_the_byte(mini, tmp_path):
    """Policy and value model as adapters, checkpointed layers, Muon; resumed from the first iteration's checkpoint."""
    changes = {"use_peft": "true", "value_use_peft": "true", "lora_r": 4, "lora_alpha": 8, "seed": 3}
    changes |= {"gradient_checkpointing": "true", "optim": "muon", "ema_decay": 0.9, "save_iterations": 1}
    mini.stage("ppo", mini.run, output_dir=tmp_path, **changes)
    names = ["metrics.jsonl", "model.safetensors", "adapter/adapter_model.safetensors", "transcripts.jsonl"]
    before = {name: (tmp_path / name).read_bytes() for name in [*names, "value_model/model.safetensors"]}
    first = tmp_path / "checkpoint-1"
    assert not list(first.rglob("model.safetensors")), "a checkpoint holds adapters alone"
    mini.stage("ppo", mini.run, output_dir=tmp_path, resume_from_checkpoint=first, **changes)
    assert [name for name, content in before.items() if (tmp_path / name).read_bytes() != content] == []
    assert all(abs(value) < 1e-3 for value in manifest(mini, tmp_path)["metrics"]["step_zero"].values())
    digest = hashlib.sha256(before["adapter/adapter_model.safetensors"]).hexdigest()
    assert manifest(mini, tmp_path)["metrics"]["adapter_sha256"] == digest
    tensors, start = load_file(tmp_path / "model.safetensors"), load_file(mini.run / "sft" / "model.safetensors")
    linear = {name for name in start if name.endswith("_proj.weight")}
    assert tensors.keys() == start.keys() and moved(mini.run / "sft", tmp_path) == linear
    assert moved(mini.run / "rm", tmp_path / "value_model") == linear | {"score.weight", "score.bias"}
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in linear:  # merged by hand: W + alpha / r * B A
        a, b = (adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"].double() for x in "AB")
        assert torch.allclose(tensors[name].double(), start[name].double() + 8 / 4 * b @ a, atol=1e-6)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_checkpointed_layers_change_no_weight(mini, tmp_path, monkeypatch, stage):
    """A run that computes its layers twice ends with the weights of one that keeps their activations."""
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return checkpoint(*args, **options)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    mini.stage(stage, mini.run, output_dir=tmp_path, gradient_checkpointing="true")
    assert calls
    expected, got = (load_file(folder / "model.safetensors") for folder in (mini.run / stage, tmp_path))
    assert max(float((expected[name] - got[name]).abs().max()) for name in expected) < 1e-5


def test_a_ppo_run_with_8_bit_reference_and_reward(mini, tmp_path):
    mini.stage("ppo", mini.run, output_dir=tmp_path, frozen_quantization="int8")
    numbers = manifest(mini, tmp_path)["metrics"]["step_zero"]
    assert 0 < numbers["kl"] < 0.5 and 0 < numbers["value_minus_score"] < 0.5 and numbers["ratio_max_deviation"] < 1e-3


def test_fine_tuning_on_padded_rows_where_another_attention_is_named(mini, tmp_path):
    """As for a model that cannot read packs, with a sliding window say: TRL asks for the rows' mask."""
    mini.stage("sft", mini.run, output_dir=tmp_path / "packed")
    mini.stage("sft", mini.run, output_dir=tmp_path / "padded", attn_implementation="eager")
    packed, padded = (rows(tmp_path / name / "metrics.jsonl") for name in ("packed", "padded"))
    losses = [[row["eval_loss"] for row in log if "eval_loss" in row] for log in (packed, padded)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3) and len(losses[0]) == 3


def test_a_reward_model_without_demonstrations_has_no_bias(mini, tmp_path):
    mini.stage("rm", mini.run, output_dir=tmp_path / "rm", demonstrations_file="null")
    assert float(load_file(tmp_path / "rm" / "model.safetensors")["score.bias"]) == 0.0
    written = json.loads((tmp_path / "rm" / "manifest.json").read_text())
    assert not any("demonstration" in name for name in written["metrics"])
    assert "demonstrations score 0" not in (tmp_path / "rm" / "README.md").read_text()
    assert "demonstrations score 0" in (mini.run / "rm" / "README.md").read_text()


def test_a_second_round_starts_from_what_the_first_left(mini, tmp_path):
    """Fine-tuning goes on from a policy, and rankings of a PPO policy's answers train the next reward model."""
    mini.stage("sft", mini.run, output_dir=tmp_path / "sft", model_name_or_path=mini.run / "sft")
    mini.stage("rm", mini.run, output_dir=tmp_path / "rm", model_name_or_path=mini.run / "ppo")
    reward = f"[{{model: {tmp_path / 'rm'}}}]"
    mini.stage("ppo", mini.run, output_dir=tmp_path / "ppo", model_name_or_path=mini.run / "ppo", reward=reward)
    assert [p["stage"] for p in json.loads((tmp_path / "ppo" / "manifest.json").read_text())["parents"]] == [
        "ppo",
        "rm",
    ]


def test_bare_flags_and_help_from_the_command_line(mini, tmp_path, capsys):
    """Once the stage is done its seconds are written, which reads the flags again."""
    words = mini.arguments("rm", mini.run, output_dir=tmp_path / "rm", head_init="fitted", num_train_epochs=0)
    at = words.index("--run")
    elsewhere = [*words[:at], "--run", str(tmp_path / "run"), *words[at + 2 :]]
    shutil.copytree(mini.run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert main(["rm", *elsewhere, "--use_peft"]) == 0
    assert "rm" in json.loads((tmp_path / "run" / "seconds.json").read_text())
    with pytest.raises(SystemExit):
        main(["rm", "--help"])


def test_a_fitted_value_head_is_fitted_by_the_stage(mini, tmp_path):
    mini.stage("ppo", mini.run, output_dir=tmp_path / "ppo", value_head_init="fitted")
    zero = json.loads((tmp_path / "ppo" / "manifest.json").read_text())["metrics"]["step_zero"]
    assert {"value_head/before", "value_head/fitted"} <= set(zero)


def test_S4_the_stage_drops_from_the_residual_stream(mini, tmp_path, monkeypatch):
    """After LoRA, so that a layer's adapter is dropped with it."""
    seen = []
    dropout = stages.sft.add_residual_dropout
    monkeypatch.setattr(
        "stages.sft.add_residual_dropout", lambda model, p: seen.append((model, p)) or dropout(model, p)
    )
    mini.stage("sft", mini.run, output_dir=tmp_path / "sft", residual_dropout=0.2, use_peft=True, num_train_epochs=1)
    ((model, p),) = seen
    assert p == 0.2 and any("lora_A" in name for name, _ in model.named_parameters())
