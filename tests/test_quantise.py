"""align/quantise.py: int8 linear layers by hand, and as frozen models of stage 3."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from align.config import ModelTerm, PPOConfig
from align.errors import UserError
from align.learn import build_learner, build_rollout_models
from align.models import load_packed_policy, load_scalar_model, response_logprobs, save_scalar_model
from align.quantise import Int8Linear, quantise
from align.reward_models import value_start
from align.rollout import Query, collect_rollout
from align.runtime import Runtime
from align.step_zero import check_step_zero
from align.types import Prompt


def test_a_row_by_hand():
    """Row 1: scale 2.54 / 127 = 0.02, so -1.015 is -50.75 steps, rounded to -51; row 2 is all zeros."""
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[2.54, -1.015, 0.0], [0.0, 0.0, 0.0]]))
        linear.bias.copy_(torch.tensor([0.5, -1.0]))
    rounded = Int8Linear(linear)
    assert rounded.weight.tolist() == [[127, -51, 0], [0, 0, 0]] and rounded.weight.dtype == torch.int8
    assert rounded.scale.tolist() == pytest.approx([0.02, 0.0], abs=1e-7)
    out = rounded(torch.tensor([[1.0, 2.0, 3.0]]))
    assert out.tolist() == [pytest.approx([2.54 - 2 * 1.02 + 0.5, -1.0], abs=1e-5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_within_half_a_step_a_weight(dtype):
    linear = nn.Linear(256, 64)
    x = torch.randn(8, 256)
    with torch.no_grad():
        out = Int8Linear(linear).to(dtype)(x.to(dtype))
        steps = linear.weight.abs().amax(1).double() / 127
        bound = x.abs().sum(1, dtype=torch.float64)[:, None] * steps / 2  # (8, 64)
        expected = x.double() @ linear.weight.double().T + linear.bias.double()
    assert out.dtype == dtype
    rounding = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.06}[dtype]
    assert bool(((out.double() - expected).abs() <= bound + rounding).all())


def test_float16_does_not_overflow():
    """Sums of 127 times an activation would: 4096 x 127 x 1 is over 65504."""
    linear = nn.Linear(4096, 1, bias=False)
    nn.init.constant_(linear.weight, 0.01)
    out = Int8Linear(linear).to(torch.float16)(torch.ones(1, 4096, dtype=torch.float16))
    assert float(out) == pytest.approx(40.96, rel=0.01)


def test_every_linear_layer_but_the_heads_is_a_byte_a_weight(tiny_llama, tmp_path):
    count = quantise(tiny_llama)
    stored = sum(b.numel() for b in tiny_llama.buffers() if b.dtype == torch.int8)
    assert count == stored == 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert {p.shape for p in tiny_llama.parameters()} == {(64, 32), (32,)}, "embeddings, head, norms"
    scalar = load_scalar_model(saved(tmp_path), fresh_head=True)
    quantise(scalar.inner)
    assert type(scalar.head) is nn.Linear


def saved(tmp_path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


def test_a_model_without_linear_layers_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2))  # Conv1D
    with pytest.raises(UserError, match="frozen_quantization: GPT2LMHeadModel has no linear layers"):
        quantise(model)


def test_a_rounded_policy_reads_packs_in_half_precision(tmp_path):
    """Its log-probabilities differ from float32's by about what bfloat16 alone does."""
    ids = torch.randint(2, 64, (4, 9), generator=torch.Generator().manual_seed(0))
    rows = ids, torch.tensor([2, 3, 1, 4]), torch.tensor([7, 6, 8, 2])
    path = saved(tmp_path)

    def logprobs(model, half):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return response_logprobs(model, *rows, 1.0)[0]

    full = logprobs(load_packed_policy(path), False)
    rounded = load_packed_policy(path, dtype=torch.bfloat16)
    quantise(rounded.inner)
    assert rounded.packed and 0 < float((logprobs(rounded, True) - full).abs().max()) < 0.02
    assert float(full.min()) < -4


def test_stage_3_scores_with_rounded_models_and_trains_the_others(tmp_path):
    """KL and value - score at the start are what the rounding leaves: not 0, and small."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    policy = saved(tmp_path)
    save_scalar_model(load_scalar_model(policy, fresh_head=True), tmp_path / "reward", 0)
    config = PPOConfig(
        output_dir="out", model_name_or_path=policy, reward=(ModelTerm(str(tmp_path / "reward")),), ptx_coef=0.0,
        rollout_batch_size=8, total_episodes=8, num_mini_batches=1, max_new_tokens=6, frozen_quantization="int8",
    )  # fmt: skip
    runtime = Runtime(seed=0)
    codec = SimpleNamespace(eos_id=1, pad_id=0)
    learner = build_learner(config, value_start(config, codec), runtime)
    actors = build_rollout_models(config, codec, value_start(config, codec), learner, runtime)
    for model in (actors.ref_policy, actors.reward.terms[0].members[0].model):
        assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 14
    assert not any(isinstance(m, Int8Linear) for m in [*learner.policy.modules(), *learner.value_model.modules()])
    queries = [Query(Prompt("p"), (5 + i, 9, 3)) for i in range(8)]
    rollout = collect_rollout(queries, actors, config, runtime, 0.1, 0)
    numbers = check_step_zero(rollout, actors, config, runtime, 1, value_term="reward")
    assert 0 < numbers["kl"] < 0.2 and 0 < numbers["value_minus_score"] < 0.2
