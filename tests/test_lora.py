"""align/lora.py and LoRA in stage 3: one trunk for two models, dense arithmetic, merging, saving."""

import copy
import dataclasses
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, TrainingArguments

from align.config import FunctionTerm, ModelTerm, PPOConfig
from align.errors import UserError
from align.generate import GenerateSampler, TorchSampler, make_sampler, uniform_numbers
from align.learn import build_learner, build_rollout_models
from align.lora import (
    WithoutAdapter,
    add_adapter,
    load_trained,
    save_policy_folder,
    save_trained,
    save_value_folder,
    with_lora,
)
from align.models import (
    EMA,
    Policy,
    ScalarModel,
    load_packed_policy,
    load_scalar_model,
    response_logprobs,
    save_scalar_model,
)
from align.optimise import MuonAdamW
from align.packing import pack_rows
from align.reward_models import value_start
from align.rewards import RewardSum, Term
from align.rollout import Query, RolloutModels, collect_rollout
from align.runtime import Runtime
from align.step_zero import check_step_zero
from align.trainer import RankingTrainer
from align.types import Prompt
from align.update import Learner, optimiser_step, update

EOS, PAD = 1, 0
CODEC = SimpleNamespace(eos_id=EOS, pad_id=PAD)
ROWS = [[5, 6, 7, 1], [9, 1], [30, 31, 32, 33, 34, 35, 36, 1], [8, 60, 1], [44, 45, 46, 47, 48, 1]]


@pytest.fixture(scope="module")
def runtime():
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return Runtime(seed=0)


@pytest.fixture
def folder(tiny_llama, tmp_path):
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(20)
    tiny_llama.save_pretrained(tmp_path / "policy")
    scalar = load_scalar_model(str(tmp_path / "policy"), fresh_head=True)
    with torch.no_grad():
        scalar.head.bias.fill_(0.7)
    save_scalar_model(scalar, tmp_path / "reward", PAD)
    return tmp_path


def config_of(folder, **changes) -> PPOConfig:
    values = {
        "total_episodes": 12, "rollout_batch_size": 12, "num_mini_batches": 2, "ptx_coef": 0.0, "max_new_tokens": 5,
        "per_device_train_batch_size": 4, "per_device_rollout_batch_size": 16, "use_peft": True, "lora_r": 4,
        "lora_alpha": 8, "learning_rate": 1e-2, "value_learning_rate": 1e-2,
    }  # fmt: skip
    paths = {"model_name_or_path": str(folder / "policy"), "reward": (ModelTerm(str(folder / "reward")),)}
    return PPOConfig(output_dir="out", pretraining_file="t", **(paths | values | changes))


def make_queries(count: int) -> list[Query]:
    generator = torch.Generator().manual_seed(1)
    rows = [tuple(torch.randint(2, 64, (1 + i % 5,), generator=generator).tolist()) for i in range(count)]
    return [Query(Prompt("p", {"id": str(i)}), row) for i, row in enumerate(rows)]


@torch.no_grad()
def shake(model, seed: int = 3) -> None:
    """An adapter that has learned something: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.15
        if parameter.requires_grad:
            parameter.copy_(noise if "lora_" in name else parameter + noise)


def adapted_policy(folder, attn=None, **changes) -> Policy:
    policy = load_packed_policy(str(folder / "policy"), attn)
    add_adapter(policy, config_of(folder, **changes))
    shake(policy)
    return policy


@torch.no_grad()
def dense_copy(adapted, fresh):
    """`fresh` with W + alpha / r * B A in each adapted layer, by hand in float64; and what lies where."""
    layers = {n: m for n, m in adapted.inner.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        a, b = (getattr(layer, key)["default"].weight.double() for key in ("lora_A", "lora_B"))
        weight = fresh.inner.get_submodule(name).weight
        weight.copy_(weight.double() + 8 / 4 * b @ a)
    if isinstance(adapted, ScalarModel):
        fresh.head.load_state_dict(adapted.head.state_dict())
    return fresh, layers


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients of one step, by parameter, and changes nothing."""

    def __init__(self, model):
        self.named = dict(model.named_parameters())
        super().__init__([p for p in self.named.values() if p.requires_grad], {})

    def step(self):
        self.grads = {name: p.grad.clone() for name, p in self.named.items() if p.grad is not None}


def logprobs_of(policy) -> torch.Tensor:
    width = max(map(len, ROWS))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in ROWS])
    ones = torch.ones(len(ROWS), dtype=torch.long)
    with torch.no_grad():
        return response_logprobs(policy, ids, ones, torch.tensor([len(row) - 1 for row in ROWS]), 1.0)[0]


def scores_of(scalar) -> torch.Tensor:
    pack = pack_rows(ROWS)
    with torch.no_grad():
        return scalar(pack, pack.starts + torch.tensor([len(row) - 1 for row in ROWS]))


@pytest.mark.parametrize("attn", [None, "eager"], ids=["packed", "padded"])
@pytest.mark.parametrize("half", [False, True])
def test_with_its_adapter_off_the_policy_is_the_reference_to_the_bit(folder, attn, half):
    reference = load_packed_policy(str(folder / "policy"), attn, torch.bfloat16 if half else torch.float32)
    policy = load_packed_policy(str(folder / "policy"), attn, torch.bfloat16 if half else torch.float32)
    add_adapter(policy, config_of(folder))
    untouched = WithoutAdapter(policy)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected = logprobs_of(reference)
        assert torch.equal(logprobs_of(policy), expected), "a fresh adapter changes nothing"
        shake(policy)
        assert not torch.equal(logprobs_of(policy), expected)
        assert torch.equal(logprobs_of(untouched), expected)
        with untouched.cached_casts():
            assert torch.equal(logprobs_of(untouched), expected)
        assert not torch.equal(logprobs_of(policy), expected), "the adapter is on again"
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize("half", [False, True])
def test_the_reward_under_the_value_models_adapter_is_the_reward_model_to_the_bit(folder, half):
    dtype = torch.bfloat16 if half else torch.float32
    reward = load_scalar_model(str(folder / "reward"), dtype=dtype)
    value_model = load_scalar_model(str(folder / "reward"), dtype=dtype)
    add_adapter(value_model, config_of(folder))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected = scores_of(reward)
        assert torch.equal(scores_of(value_model), expected)
        shake(value_model)
        assert not torch.equal(scores_of(value_model), expected)
        assert torch.equal(scores_of(WithoutAdapter(value_model)), expected)
    assert float(value_model.inner.score.original_module.bias) == pytest.approx(0.7)
    trained = {name for name, p in value_model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in trained if "score" in name} == {"weight", "bias"}
    assert all("lora_" in name or "score.modules_to_save" in name for name in trained)


def bytes_stored(*models) -> int:
    tensors = {p.data_ptr(): p.numel() * p.element_size() for m in models for p in m.parameters()}
    return sum(tensors.values())


def test_two_trunks_serve_four_models(folder, runtime):
    """Parameters counted by their memory: a trunk, its adapter, once for each pair."""

    def counted(**changes) -> tuple[int, Learner]:
        config = config_of(folder, **changes)
        learner = build_learner(config, value_start(config, CODEC), runtime)
        actors = build_rollout_models(config, CODEC, value_start(config, CODEC), learner, runtime)
        models = learner.policy, actors.ref_policy, learner.value_model, actors.reward.terms[0].members[0].model
        return bytes_stored(*models), learner

    policy, reward = (bytes_stored(load(str(folder / name))) for load, name in (
        (load_packed_policy, "policy"), (load_scalar_model, "reward")
    ))  # fmt: skip
    full, _ = counted(use_peft=False)
    assert full == 2 * policy + 2 * reward
    one, learner = counted()
    adapter = sum(p.numel() * 4 for p in learner.policy.parameters() if p.requires_grad)
    # r (in + out) of q, k, v, o (32 x 32), gate, up (32 x 64) and down (64 x 32), in two layers
    assert adapter == 4 * 2 * 4 * (4 * 64 + 3 * 96)
    assert one == policy + adapter + 2 * reward
    both, learner = counted(value_use_peft=True)
    assert both == policy + adapter + reward + adapter + 4 * 33
    assert len(learner.policy_optimizer.param_groups[0]["params"]) == 2 * 2 * 7
    assert len(learner.value_optimizer.param_groups[0]["params"]) == 2 * 2 * 7 + 2
    assert sum(x.numel() * 4 for x in learner.ema.shadow.values()) == adapter


@pytest.mark.parametrize("attn", [None, "eager"], ids=["packed", "padded"])
def test_ppo_losses_and_gradients_are_those_of_a_dense_model(folder, runtime, attn):
    """d loss / d A = s B^T G and d loss / d B = s G A^T, with G the gradient of the dense weight; no other gradient."""
    config = config_of(folder, num_mini_batches=1, max_grad_norm=1e9, ptx_coef=2.0, attn_implementation=attn)
    policy = adapted_policy(folder, attn)
    value_model = load_scalar_model(str(folder / "reward"), attn)
    add_adapter(value_model, config)
    shake(value_model)
    dense, layers = dense_copy(policy, load_packed_policy(str(folder / "policy"), attn))
    dense_value, value_layers = dense_copy(value_model, load_scalar_model(str(folder / "reward"), attn))

    def stepped(policy, value_model, rollout):
        learner = Learner(policy, value_model, Recorder(policy), Recorder(value_model), None)
        stats = optimiser_step(rollout, [[5, 9, 33, 2, 1], [40, 41, 1]], learner, config, runtime)
        return learner.policy_optimizer.grads, learner.value_optimizer.grads, stats

    reward = RewardSum([Term("reward", 1.0, [lambda prompts, episodes: [float(i % 3) for i in range(12)]])])
    actors = RolloutModels(dense, copy.deepcopy(dense), dense_value, reward, make_sampler(dense, EOS, PAD, 16), PAD)
    rollout = collect_rollout(make_queries(12), actors, config, runtime, 0.1, 0)
    ours, theirs = stepped(policy, value_model, rollout), stepped(dense, dense_value, rollout)
    for name, value in theirs[2].sums.items():
        if "grad_norm" not in name:
            assert ours[2].sums[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for grads, dense_grads, lora_layers in ((ours[0], theirs[0], layers), (ours[1], theirs[1], value_layers)):
        seen = {name for name in grads if "score" in name}
        for name, layer in lora_layers.items():
            g = dense_grads[f"model.{name}.weight"].double()
            a, b = (getattr(layer, key)["default"].weight.detach().double() for key in ("lora_A", "lora_B"))
            for key, expected in (("lora_A", 2 * b.T @ g), ("lora_B", 2 * g @ a.T)):
                got = grads[f"model.base_model.model.{name}.{key}.default.weight"].double()
                assert float(expected.abs().max()) > 1e-4
                assert float((got - expected).abs().max()) < 1e-5 * max(1, float(expected.abs().max()))
                seen.add(f"model.base_model.model.{name}.{key}.default.weight")
        assert set(grads) == seen, "gradients in adapters and the scalar head alone"
    for name in ("weight", "bias"):
        got = ours[1][f"model.base_model.model.score.modules_to_save.default.{name}"]
        assert torch.allclose(got, theirs[1][f"model.score.{name}"], atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("attn", [None, "eager"], ids=["packed", "padded"])
def test_checkpointed_layers_give_adapters_the_same_gradients(folder, attn, half):
    """And in half precision gradients near the full ones, in float32, on a trunk of bfloat16."""
    ids = torch.tensor([row + [PAD] * (8 - len(row)) for row in ROWS])
    lengths = torch.tensor([len(row) - 1 for row in ROWS])

    def gradient(dtype, checkpointing=False) -> torch.Tensor:
        policy = load_packed_policy(str(folder / "policy"), attn, dtype)
        add_adapter(policy, config_of(folder))
        shake(policy)
        if checkpointing:
            policy.checkpoint_activations()
        trained = [p for p in policy.parameters() if p.requires_grad]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = response_logprobs(policy, ids, torch.ones_like(lengths), lengths, 1.0)[0].sum()
        grads = torch.autograd.grad(loss, trained)
        assert all(g.dtype == torch.float32 for g in grads)
        return torch.cat([g.flatten() for g in grads])

    full = gradient(torch.float32)
    assert float(full.abs().max()) > 0.1
    if half:
        for near in (gradient(torch.bfloat16), gradient(torch.bfloat16, checkpointing=True)):
            assert float(torch.nn.functional.cosine_similarity(near, full, 0)) > 0.99
    else:
        assert torch.allclose(gradient(torch.float32, checkpointing=True), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attn", [None, "eager"], ids=["packed", "padded"])
def test_samplers_draw_from_the_merged_weights_and_put_the_frozen_ones_back(folder, attn):
    policy = adapted_policy(folder, attn)
    dense, layers = dense_copy(policy, load_packed_policy(str(folder / "policy"), attn))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    queries, uniforms = [[5, 6], [9], [30, 31, 32], [8, 60, 2, 4]], uniform_numbers(4, 6, 0, 0)
    kind = TorchSampler if attn is None else GenerateSampler
    assert type(make_sampler(policy, EOS, PAD, 2)) is kind
    calls = []
    for layer in layers.values():
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    ours, theirs = (kind(p, EOS, PAD, 2)(queries, uniforms, 1.0) for p in (policy, dense))
    assert not calls, "no adapter is computed while tokens are drawn"
    assert [e.response for e in ours] == [e.response for e in theirs] and len({e.response for e in ours}) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == {n for n in before if "lora_" in n}
    with pytest.raises(ZeroDivisionError), policy.merged():
        assert sum(not torch.equal(p, before[name]) for name, p in policy.named_parameters()) == 2 * 7
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_twenty_merges_leave_no_trace(folder):
    """Subtracting what was added would: x + d - d is not x in bfloat16."""
    policy = load_packed_policy(str(folder / "policy"), dtype=torch.bfloat16)
    add_adapter(policy, config_of(folder))
    shake(policy)
    weight = policy.inner.model.layers[0].mlp.up_proj.get_base_layer().weight
    before = weight.detach().clone()
    for _ in range(20):
        with policy.merged():
            assert weight.dtype == torch.bfloat16 and not torch.equal(weight, before)
    assert torch.equal(weight, before)


def test_optim_and_gradient_checkpointing_reach_both_models(folder, runtime):
    config = config_of(folder, optim="muon", gradient_checkpointing=True)
    start = value_start(config, CODEC)
    learner = build_learner(config, start, runtime)
    for model, optimizer in (
        (learner.policy, learner.policy_optimizer),
        (learner.value_model, learner.value_optimizer),
    ):
        assert model.inner.is_activation_checkpointing and model.training
        assert isinstance(optimizer.optimizer, MuonAdamW)
    assert not build_learner(config_of(folder), start, runtime).policy.inner.is_activation_checkpointing


class Half(Runtime):
    """A process whose forward passes are said to run in half precision."""

    half = True
    compute_dtype = torch.bfloat16


@pytest.mark.parametrize(("use_peft", "value_use_peft"), [(True, False), (False, True)])
def test_only_weights_frozen_under_an_adapter_are_half_precision(folder, use_peft, value_use_peft):
    config = config_of(folder, use_peft=use_peft, value_use_peft=value_use_peft)
    learner = build_learner(config, value_start(config, CODEC), Half(seed=0))
    for model, adapted in ((learner.policy, use_peft), (learner.value_model, value_use_peft)):
        trained = {p.dtype for p in model.parameters() if p.requires_grad}
        frozen = {p.dtype for p in model.inner.base_model.parameters() if not p.requires_grad}
        assert (trained, frozen) == ({torch.float32}, {torch.bfloat16} if adapted else set())


def test_int8_needs_a_model_that_only_scores(folder, runtime):
    """The reference has its own weights without LoRA; the reward has, unless the value model lies on them."""
    both = {"use_peft": True, "value_use_peft": True, "frozen_quantization": "int8"}
    apart = str(folder / "other")
    save_scalar_model(load_scalar_model(str(folder / "reward")), apart, PAD)
    for changes, left in (({}, False), ({"value_use_peft": False}, True), ({"value_model_path": apart}, True)):
        config = config_of(folder, **(both | changes))
        learner = build_learner(config, value_start(config, CODEC), runtime)
        with nullcontext() if left else pytest.raises(UserError, match="frozen_quantization: .*no model is left"):
            build_rollout_models(config, CODEC, value_start(config, CODEC), learner, runtime)


def test_a_value_adapter_on_the_policy_with_a_fresh_head(folder, runtime, tmp_path):
    """Where a function alone is the reward: trained, saved, merged and read again."""
    config = config_of(folder, value_use_peft=True, reward=(FunctionTerm("math:sqrt"),))
    start = value_start(config, CODEC)
    assert (start.path, start.fresh_head) == (str(folder / "policy"), True)
    value_model = build_learner(config, start, runtime).value_model
    shake(value_model)
    save_value_folder(value_model, start.path, start.fresh_head, config, tmp_path / "out", PAD)
    again = load_scalar_model(str(tmp_path / "out"))
    assert float((scores_of(again) - scores_of(value_model)).abs().max()) < 1e-5


@pytest.mark.parametrize("value_use_peft", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_P2_P3_P4_step_zero_and_training_under_lora(folder, runtime, value_use_peft, checkpointing):
    """Ratio 1, KL 0 and value = score at the start; then adapters and head move, and no frozen weight does."""
    config = config_of(folder, value_use_peft=value_use_peft, gradient_checkpointing=checkpointing)
    learner = build_learner(config, value_start(config, CODEC), runtime)
    actors = build_rollout_models(config, CODEC, value_start(config, CODEC), learner, runtime)
    before = {name: p.detach().clone() for name, p in learner.policy.named_parameters()}
    value_before = {name: p.detach().clone() for name, p in learner.value_model.named_parameters()}
    rollout = collect_rollout(make_queries(12), actors, config, runtime, 0.1, 0)
    numbers = check_step_zero(rollout, actors, config, runtime, EOS, value_term="reward")
    assert numbers["kl"] == 0 and max(numbers.values()) < 1e-5
    again = rollout
    for iteration in range(2):
        update(again, learner, lambda count: [], config, runtime, iteration)
        again = collect_rollout(make_queries(12), actors, config, runtime, 0.1, 0)
    changed = {name for name, p in learner.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name} == set(learner.ema.shadow)
    changed = {name for name, p in learner.value_model.named_parameters() if not torch.equal(p, value_before[name])}
    trained = {name for name in value_before if "lora_" in name or "modules_to_save" in name}
    assert changed == (trained if value_use_peft else set(value_before))
    assert again.ref_logprobs.shape == again.logprobs.shape and not torch.equal(again.logprobs, again.ref_logprobs)
    fresh = load_packed_policy(str(folder / "policy"))
    reward = load_scalar_model(str(folder / "reward"))
    assert torch.equal(logprobs_of(actors.ref_policy), logprobs_of(fresh))
    assert torch.equal(scores_of(actors.reward.terms[0].members[0].model), scores_of(reward))


def test_P17_toy_bandit_with_adapters(tiny_llama, folder, runtime):
    """'Write tokens below 32' is learned by adapters alone, policy and value model."""
    tiny_llama.lm_head.weight.data.div_(4)  # wide, and within reach of layers that are trained below a frozen head
    tiny_llama.save_pretrained(folder / "policy")
    config = config_of(
        folder, value_use_peft=True, rollout_batch_size=64, total_episodes=64, num_mini_batches=4,
        per_device_train_batch_size=64, missing_eos_penalty=None, lora_r=8, lora_alpha=32,
    )  # fmt: skip
    learner = build_learner(config, value_start(config, CODEC), runtime)
    reward = RewardSum([Term("low", 1.0, [share_of_low_tokens])])
    actors = dataclasses.replace(
        build_rollout_models(config, CODEC, value_start(config, CODEC), learner, runtime), reward=reward
    )
    shares, kls = [], []
    for iteration in range(12):
        rollout = collect_rollout(make_queries(64), actors, config, runtime, 0.0, iteration)
        shares.append(float(rollout.raw_scores.mean()))
        kls.append(float((rollout.logprobs - rollout.ref_logprobs)[rollout.response_mask].mean()))
        update(rollout, learner, lambda count: [], config, runtime, iteration)
    assert abs(shares[0] - 0.5) < 0.1 and shares[-1] > shares[0] + 0.15
    assert kls[0] == 0 and kls[-1] > 0.02


def share_of_low_tokens(prompts, episodes) -> list[float]:
    return [sum(token < 32 for token in e.response) / len(e.response) for e in episodes]


def test_a_finished_policy_is_merged_and_its_adapter_lies_beside_it(folder, tmp_path):
    """In float32, although the trunk was bfloat16 in training; read back by transformers and by peft alone."""
    policy = load_packed_policy(str(folder / "policy"), dtype=torch.bfloat16)
    add_adapter(policy, config_of(folder))
    shake(policy)
    save_policy_folder(policy, tmp_path / "out", PAD)
    full = adapted_policy(folder)
    expected = logprobs_of(full)
    for auto, path in ((AutoModelForCausalLM, "out"), (AutoPeftModelForCausalLM, "out/adapter")):
        again = Policy(auto.from_pretrained(tmp_path / path).eval(), packed=False)
        assert float((logprobs_of(again) - expected).abs().max()) < 1e-4, path
    assert float((expected - logprobs_of(load_packed_policy(str(folder / "policy")))).abs().max()) > 0.1


def test_a_finished_value_model_is_merged(folder, tmp_path):
    config = config_of(folder, value_use_peft=True)
    value_model = load_scalar_model(str(folder / "reward"))
    add_adapter(value_model, config)
    shake(value_model)
    expected = scores_of(value_model)
    save_value_folder(value_model, str(folder / "reward"), False, config, tmp_path / "out", PAD)
    assert torch.equal(scores_of(value_model), expected), "saving changes nothing"
    again = scores_of(load_scalar_model(str(tmp_path / "out")))
    assert float((again - expected).abs().max()) < 1e-5
    assert float((scores_of(WithoutAdapter(value_model)) - expected).abs().max()) > 0.1
    stock = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert float(stock(torch.tensor([ROWS[0]])).logits[0, -1, 0]) == pytest.approx(float(expected[0]), abs=1e-4)


@pytest.mark.parametrize("name, load", [("policy", load_packed_policy), ("reward", load_scalar_model)])
def test_a_checkpoint_holds_the_adapter_and_gives_it_back_to_the_bit(folder, tmp_path, name, load):
    model = load(str(folder / name), dtype=torch.bfloat16)
    add_adapter(model, config_of(folder))
    shake(model)
    save_trained(model, tmp_path / "out", PAD)
    again = load(str(folder / name), dtype=torch.bfloat16)
    add_adapter(again, config_of(folder))
    load_trained(again, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    pairs = zip(model.named_parameters(), again.named_parameters(), strict=True)
    assert all(torch.equal(p, q) and p.dtype == q.dtype and n == m for (n, p), (m, q) in pairs)


def test_the_average_is_of_what_is_trained(folder):
    policy = adapted_policy(folder)
    ema = EMA(policy, 0.9)
    start = {name: value.clone() for name, value in ema.shadow.items()}
    shake(policy, seed=4)
    ema.update(policy)
    for name, value in ema.shadow.items():
        assert torch.allclose(value, 0.9 * start[name] + 0.1 * policy.get_parameter(name).detach(), atol=1e-6)
    assert set(start) == {name for name, p in policy.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("name, load, key", [
    ("policy", load_packed_policy, "use_peft"), ("reward", load_scalar_model, "value_use_peft")
])  # fmt: skip
@pytest.mark.parametrize("adapted", [False, True])
def test_a_checkpoint_of_the_other_kind_is_refused(folder, tmp_path, name, load, key, adapted):
    models = [load(str(folder / name)) for _ in range(2)]
    add_adapter(models[adapted], config_of(folder))
    save_trained(models[0], tmp_path / "out", PAD)
    with pytest.raises(UserError, match=f"another {key}; set {key} to {not adapted}"):
        load_trained(models[1], tmp_path / "out")


OTHERS = {
    "lora_r": (2, "its lora_r is 4, not 2"),
    "lora_alpha": (16, "its lora_alpha is 8, not 16"),
    "lora_target_modules": (("o_proj",), r"its lora_target_modules is \['q_proj'\], not \['o_proj'\]"),
}


@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.parametrize("load, of", [(load_packed_policy, "policy"), (load_scalar_model, "reward")])
def test_a_checkpoint_of_another_adapter_is_refused(folder, tmp_path, key, load, of):
    """q_proj and o_proj have the same shapes, and a scale is no weight."""

    def adapted(**changes):
        model = load(str(folder / of))
        add_adapter(model, config_of(folder, **({"lora_target_modules": ("q_proj",)} | changes)))
        shake(model)
        return model

    save_trained(adapted(), tmp_path / "out", PAD)
    other, message = adapted(**{key: OTHERS[key][0]}), OTHERS[key][1]
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises(UserError, match=f"out: {message}; set it as it was"):
        load_trained(other, tmp_path / "out")
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


@pytest.mark.parametrize("key", OTHERS)
def test_a_trainer_refuses_it_too(folder, tmp_path, key):
    def trainer(**changes) -> RankingTrainer:
        model = load_scalar_model(str(folder / "policy"), fresh_head=True)
        model.model = with_lora(model.model, config_of(folder, **({"lora_target_modules": ("q_proj",)} | changes)))
        shake(model)
        return RankingTrainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))

    first, again = trainer(), trainer()
    first._save(str(tmp_path / "out"))
    with torch.no_grad():
        next(p for p in again.model.parameters() if p.requires_grad).zero_()
    again._load_from_checkpoint(str(tmp_path / "out"))
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    with pytest.raises(UserError, match=OTHERS[key][1]):
        trainer(**{key: OTHERS[key][0]})._load_from_checkpoint(str(tmp_path / "out"))


def test_adapters_lie_on_the_layers_that_are_named(folder, tmp_path):
    """And nowhere else: sampled from, saved and read back like those on all layers."""
    named = {"lora_target_modules": ("v_proj", "down_proj")}
    policy = adapted_policy(folder, **named)
    dense, layers = dense_copy(policy, load_packed_policy(str(folder / "policy")))
    assert {name.rsplit(".", 1)[-1] for name in layers} == {"v_proj", "down_proj"} and len(layers) == 2 * 2
    assert float((logprobs_of(policy) - logprobs_of(dense)).abs().max()) < 1e-5
    assert float((logprobs_of(policy) - logprobs_of(WithoutAdapter(policy))).abs().max()) > 0.1
    queries, uniforms = [[5, 6], [9], [30, 31, 32]], uniform_numbers(3, 6, 0, 0)
    drawn = [[e.response for e in TorchSampler(p, EOS, PAD, 2)(queries, uniforms, 1.0)] for p in (policy, dense)]
    assert drawn[0] == drawn[1]
    save_policy_folder(policy, tmp_path / "out", PAD)
    again = load_packed_policy(str(tmp_path / "out"))
    assert float((logprobs_of(again) - logprobs_of(dense)).abs().max()) < 1e-5

    scalar = load_scalar_model(str(folder / "reward"))
    add_adapter(scalar, config_of(folder, **named))
    trained = {name for name, p in scalar.named_parameters() if p.requires_grad}
    kinds = {part for name in trained for part in ("v_proj", "down_proj", "score") if part in name}
    assert kinds == {"v_proj", "down_proj", "score"} and len(trained) == 2 * 2 * 2 + 2


@pytest.mark.parametrize("name", ["q_prj", "lm_head", "score", "embed_tokens", "self_attn"])
@pytest.mark.parametrize("load, of", [(load_packed_policy, "policy"), (load_scalar_model, "reward")])
def test_a_name_that_no_layer_has_is_told_with_those_that_are_there(folder, name, load, of):
    """peft would pass over it in silence where another name fits."""
    config = config_of(folder, lora_target_modules=("q_proj", name))
    model = load(str(folder / of))
    with pytest.raises(UserError) as failure:
        add_adapter(model, config)
    kind = type(model.model).__name__
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert str(failure.value) == f"lora_target_modules: {name!r} is no linear layer in the body of {kind}; {known} are"
