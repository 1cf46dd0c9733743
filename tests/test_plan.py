"""align/plan.py: what it counts without data is what the stage holds."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from align.config import ModelTerm, PPOConfig
from align.errors import UserError
from align.models import load_packed_policy, load_scalar_model
from align.packing import pack_rows
from align.plan import main, plan
from benchmarks.memory import EPISODES, LORA, QUERY, RESPONSE, make_models, measure

FLOAT32 = "bf16=false"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("plan"), hidden=64, layers=2)


def planned(models, *settings: str, **options):
    changes = {key: yaml.safe_load(value) for key, value in (setting.split("=", 1) for setting in settings)}
    values = {
        "model_name_or_path": models[0], "reward": (ModelTerm(models[1]),), "output_dir": "none", "ptx_coef": 0.0,
        "bf16": True, "total_episodes": EPISODES, "rollout_batch_size": EPISODES, "num_mini_batches": 1,
        "max_prompt_length": QUERY, "max_new_tokens": RESPONSE, "per_device_train_batch_size": EPISODES,
        "per_device_rollout_batch_size": EPISODES,
    }  # fmt: skip
    return plan(PPOConfig(**(values | changes)), *models, **options)


def total(parts, *names: str) -> float:
    return sum(part.size for part in parts if part.name.startswith(names))


@pytest.mark.parametrize(
    "settings",
    [(), ("optim=adafactor",), ("optim=muon",), ("frozen_quantization=int8",), ("ema_decay=null",), LORA],
    ids=lambda settings: " ".join(settings) or "none",
)
def test_weights_gradients_optimisers_and_average_are_those_of_a_run(models, settings):
    """Of an iteration that is run, tensor by tensor; an optimiser's counts of its steps, a float a tensor, aside."""
    check(planned(models, FLOAT32, *settings), measure(*models, FLOAT32, *settings))


def test_in_half_precision_too(models):
    """In a process of its own: another has its precision from its first test on."""
    command = [sys.executable, "-m", "benchmarks.memory", *models, "use_peft=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    check(planned(models, "use_peft=true"), json.loads(done.stdout.strip().splitlines()[-1]))


def check(parts, held: dict[str, int]) -> None:
    assert total(parts, "policy", "value model", "reference", "reward model") == held["weights"]
    assert max(part.size for part in parts if part.name.startswith("gradients")) == held["gradients"]
    assert total(parts, "average") == held["average"]
    assert total(parts, "optimiser") <= held["optimiser"] <= total(parts, "optimiser") + 4 * 100


def test_what_a_pass_keeps_is_what_the_models_keep(models):
    parts = planned(models, FLOAT32)
    pack, count = pack_rows([[3] * (QUERY + RESPONSE)] * EPISODES), EPISODES * RESPONSE
    policy, value_model = load_packed_policy(models[0]), load_scalar_model(models[1])
    at, tokens = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    for phase, model, inputs in (
        ("update policy", policy, (pack, at, tokens, 1.0)),
        ("update value", value_model, (pack, at)),
    ):
        kept = {}

        def hold(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x  # which holds it, so that no other gets its place
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            model(*inputs)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in weights)
        assert found == total([part for part in parts if part.phase == phase], "kept")


def test_shards_lie_in_parts_but_the_samplers_copy_is_whole(models):
    whole, part = planned(models), planned(models, processes=4, shard=True)
    for name in ("policy", "value model", "reference", "reward model", "optimiser", "average", "gradients"):
        assert total(part, name) == total(whole, name) / 4
    assert total(part, "weights as") == total(whole, "weights as") > 0
    kept = [total(parts, "kept") for parts in (whole, part)]
    assert kept[1] == pytest.approx(kept[0] / 4, rel=0.01), "4 rows a process instead of 16"


def test_checkpointed_layers_keep_less(models):
    def update(*settings):
        return total([part for part in planned(models, *settings) if part.phase == "update policy"], "kept", "a layer")

    assert update("gradient_checkpointing=true", FLOAT32) < update(FLOAT32)


def test_keys_and_values_by_hand(models):
    """2 x 2 layers x 1 head of 64 numbers x 2 bytes x 16 rows of 160 tokens."""
    assert total(planned(models), "keys and values") == 2 * 2 * 64 * 2 * 16 * 160


def test_vllm_keeps_its_weights_unless_it_sleeps(models):
    for settings, phase in (((), "sampling"), (("use_vllm=true",), "always"),
                            (("use_vllm=true", "vllm_enable_sleep_mode=true"), "sampling")):  # fmt: skip
        parts = planned(models, *settings)
        found = {part.phase for part in parts if part.name.startswith(("keys and values", "weights as"))}
        assert found == {phase}, settings
        assert total(parts, "weights gathered or merged") == 0
    parts = planned(models, "use_vllm=true", "use_peft=true")  # merged for it, and its own
    assert total(parts, "weights gathered or merged") == total(parts, "weights as") > 0


def test_the_reward_model_of_the_config_gives_its_own_shape(models, tmp_path, capsys):
    wide = make_models(tmp_path / "wide", hidden=128, layers=2)[1]
    flags = ["--config", "configs/smollm2/ppo.yaml", "--run", str(tmp_path), "--bf16", "false", "--model", models[0]]

    def printed(*more: str) -> str:
        assert main([*flags, *more]) == 0
        return capsys.readouterr().out.split("\n", 1)[1]  # the first line names the folders

    small, large = printed(), printed("--reward_model", wide)  # without a trained one it is as the policy
    assert printed("--reward", f"[{{model: {wide}}}]") == printed("--value_model_path", wide) == large != small
    assert printed("--reward", f"[{{model: {wide}}}]", "--reward_model", models[1]) == small


def test_a_plan_is_printed_before_any_stage_has_run(models, tmp_path, capsys):
    flags = ["--config", "configs/smollm2/ppo.yaml", "--run", str(tmp_path), "--bf16", "false"]
    with pytest.raises(UserError, match="--model: .*sft: no config.json"):
        main(flags)
    assert main([*flags, "--model", models[0]]) == 0
    said = capsys.readouterr().out
    assert "24 iterations x 64 episodes" in said and "in all, update policy" in said
