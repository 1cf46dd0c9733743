"""align/prepack.py: a weight laid out for oneDNN multiplies as it did, in linear layers alone."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from align.generate import TorchSampler, uniform_numbers
from align.models import Policy
from align.prepack import Prepacked, prepack

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not BF16, reason="this CPU's oneDNN has no bfloat16 products")
TYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]


@pytest.fixture
def small_pays(monkeypatch):
    monkeypatch.setattr("align.prepack.LARGE", 1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_plain_weight(rows, bias, dtype, small_pays):
    torch.manual_seed(rows)
    weight, x = torch.randn(48, 33).to(dtype), torch.randn(rows, 33).to(dtype)
    bias = torch.randn(48).to(dtype) if bias else None
    exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    packed = prepack(weight)
    assert isinstance(packed, Prepacked)
    out = nn.functional.linear(x, packed, bias)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5  # bfloat16: rounded once
    assert out.dtype == dtype and (out - exact).abs().max() <= rounding * exact.abs().max()
    assert torch.equal(nn.functional.linear(x, packed, bias=bias), out)


def test_what_does_not_pay_stays_as_it_is(monkeypatch):
    for weight in (torch.randn(4, 4), torch.randn(4).bfloat16(), torch.randn(4, 4, device="meta").bfloat16()):
        assert prepack(weight) is weight
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
    weight = torch.randn(4, 4).bfloat16()
    assert prepack(weight) is weight


def test_a_laid_out_weight_serves_nothing_else(small_pays):
    with pytest.raises((NotImplementedError, TypeError, RuntimeError)):
        prepack(torch.randn(8, 8)) + 1


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes))


def gpt2() -> GPT2LMHeadModel:  # its layers are no nn.Linear, its head is
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_decoding_leaves_the_model_as_it_was_and_draws_what_plain_weights_draw(make, dtype, monkeypatch, small_pays):
    torch.manual_seed(0)
    policy = Policy(make().eval())
    before = {name: (id(p), p.detach().clone()) for name, p in policy.named_parameters(remove_duplicate=False)}
    queries, uniforms = [[5, 6, 7], [9], [10, 11]], uniform_numbers(3, 12, 0)

    def sampled() -> list:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return TorchSampler(policy, 63, 0, 2)(queries, uniforms, 1.0)

    ours = sampled()
    after = dict(policy.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(id(after[name]) == i and torch.equal(after[name], p) for name, (i, p) in before.items())
    monkeypatch.setattr("align.models.prepack", lambda weight: weight)
    plain = sampled()
    near = 0.05 if dtype == torch.bfloat16 else 1e-4
    for one, two in zip(ours, plain, strict=True):
        same = next((t for t, (a, b) in enumerate(zip(one.response, two.response, strict=False)) if a != b), 12)
        # A draw may tip over where the two round differently; up to there they are one.
        assert torch.tensor(one.logprobs[:same]) == pytest.approx(torch.tensor(two.logprobs[:same]), abs=near)
        assert same >= 6
