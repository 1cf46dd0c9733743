"""What only a GPU can show. `pytest -m gpu`; what was run, and where: docs/reliability.md."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align import generate
from align.attention import block_attention, fused_attention, ragged_inputs
from align.cuda_graph import CudaGraphStep
from align.generate import TorchSampler, uniform_numbers
from align.models import Policy
from align.packing import pack_continuations, packed_states
from align.runtime import Runtime
from tests.test_elsewhere import config_of, folder, iteration

__all__ = ["folder"]  # a fixture
pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_fused_attention_is_the_plain_one(prefix, dtype, close):
    """Three rows of 37 tokens, 8 query heads on 2 key heads, against plain products in float64 on the CPU."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 37, heads, 16, dtype=torch.float64) for heads in (8, 2, 2))
    shared = tuple(torch.randn(prefix, 2, 16, dtype=torch.float64) for _ in range(2)) if prefix else None
    grouped = (query * 0.25).unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4)  # (J, B, G, L, D)
    flat = None if shared is None else tuple(x.transpose(0, 1) for x in shared)
    plain = block_attention(grouped, key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3), flat)
    wanted = plain.permute(1, 3, 0, 2, 4).flatten(2, 3)
    on_gpu = [x.to("cuda", dtype) for x in (query, key, value)]
    before = None if shared is None else tuple(x.to("cuda", dtype) for x in shared)
    found = fused_attention(*on_gpu, before, 0.25)
    assert torch.allclose(found.double().cpu(), wanted, rtol=close, atol=close)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_a_pack_in_one_kernel_is_the_plain_one(dtype, close, prefix, heads):
    """Rows of many lengths behind a prefix: values and gradients against groups by plain products in float64."""
    torch.manual_seed(0)
    rows = [[5] * length for length in (37, 36, 3, 21, 1, 64)]
    pack = pack_continuations([[5] * prefix], [rows])
    exact = [torch.randn(len(pack.input_ids), count, 16, dtype=torch.float64) for count in (heads[0], *heads[1:] * 2)]
    half = [x.to("cuda", dtype) for x in exact]
    for x in (*exact, *half):
        x.requires_grad_()
    assert ragged_inputs(*half) and not ragged_inputs(*exact)
    wanted, found = pack.attend(0, *exact, 0.25), pack.to(torch.device("cuda")).attend(0, *half, 0.25)
    real = torch.cat([start + torch.arange(len(row)) for start, row in zip(pack.starts, rows, strict=True)])
    assert torch.allclose(found.double().cpu()[real], wanted[real], rtol=close, atol=close)
    for output in (wanted, found):
        output[real].sum().backward()
    for a, b in zip(exact, half, strict=True):
        assert torch.allclose(b.grad.double().cpu(), a.grad, rtol=4 * close, atol=4 * close)


QUERIES = [[5], [6, 7, 8], [9, 10, 11, 12, 13, 14], [20, 21], [33, 3, 44, 45], [60, 61, 62, 63, 50, 51, 52], [5, 6]] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [5, 28])
def test_sampling_by_a_recording_draws_what_the_cpu_draws(tiny_llama, monkeypatch, slots, temperature):
    """Slots are filled anew, dropped, and the cache grows under it: each time it is recorded anew."""
    monkeypatch.setattr(generate, "GPU_WIDTH_STEP", 8)
    recorded = []
    record = CudaGraphStep._recorded
    monkeypatch.setattr(CudaGraphStep, "_recorded", lambda self, step: (recorded.append(self), record(self, step))[1])
    with torch.no_grad():
        tiny_llama.get_output_embeddings().weight.mul_(15)
    uniforms = uniform_numbers(28, 24, 5) ** 3  # small numbers draw EOS, token 1, more often
    here, there = Policy(copy.deepcopy(tiny_llama)), Policy(tiny_llama).to("cuda")
    wanted = TorchSampler(here, 1, 0, slots)(QUERIES, uniforms, temperature)
    found = TorchSampler(there, 1, 0, slots)(QUERIES, uniforms, temperature)
    assert len(recorded) > 1 and all(step.records for step in recorded)
    assert [e.response for e in found] == [e.response for e in wanted]
    assert len({len(e.response) for e in wanted}) > (1 if temperature == 0 else 5)
    for a, b in zip(found, wanted, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3) and a.finished == b.finished


def test_a_model_that_waits_for_the_gpu_is_sampled_all_the_same(tiny_llama):
    here, there = Policy(copy.deepcopy(tiny_llama)), Policy(tiny_llama).to("cuda")
    waited = []
    there.inner.lm_head.register_forward_hook(lambda *call: waited.append(call[2].sum().item()))
    there.plain_head = False  # the hook is heard
    wanted, found = (TorchSampler(p, 1, 0, 5)(QUERIES, uniform_numbers(28, 9, 5), 1.0) for p in (here, there))
    assert waited and [e.response for e in found] == [e.response for e in wanted]


def test_a_pack_under_autocast_is_read_by_one_kernel(tiny_llama):
    """There rotary embeddings are float32, and so are the queries that they turn."""
    model = Policy(tiny_llama).to("cuda").inner.base_model
    pack = pack_continuations([()], [[[5] * 9, [6] * 4]]).to(torch.device("cuda"))
    exact = packed_states(model, pack)
    with torch.autocast("cuda", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pack.parts[0]), "attend", None)
        found = packed_states(model, pack)
    assert torch.allclose(found.float(), exact, rtol=0.05, atol=0.05)


def test_a_step_that_waits_for_the_gpu_is_not_recorded():
    total = torch.zeros(3, device="cuda")

    def step() -> None:
        total.add_(float((total + 1)[0]))  # the host reads what it adds

    replay = CudaGraphStep(total.device)
    for _ in range(3):
        replay(step)
    assert not replay.records and total.tolist() == [7.0] * 3  # 1, then 1 + 2, then 3 + 4


def test_what_is_recorded_is_replayed_on_what_the_tensors_hold():
    total, added = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    replay = CudaGraphStep(total.device)
    for _ in range(4):
        replay(lambda: total.add_(added))
    added.fill_(10.0)
    replay(lambda: total.add_(added))
    assert replay.records and replay.graph is not None and total.tolist() == [14.0] * 3


def test_an_iteration_of_ppo_on_the_gpu(folder, monkeypatch):  # noqa: F811
    config = config_of()
    gpu = Runtime(0)
    assert gpu.device.type == "cuda"

    class OnCPU(Runtime):
        device = torch.device("cpu")

    here = iteration(folder, OnCPU(0), lambda model: model, config)
    there = iteration(folder, gpu, lambda model: model.to("cuda"), config)
    for name, x in there[0].items():
        assert x.is_cuda and torch.allclose(x.cpu().double(), here[0][name].double(), atol=1e-3), name
    assert torch.allclose(there[2].cpu(), here[2], atol=1e-4)


WORK = """
import json, sys, torch
from benchmarks.communication import work
found = work()
if found["main"]:
    print(json.dumps({name: found[name] for name in ("held", "weights", "gradient")}))
"""


def step(processes: int, sharded: bool, script: Path) -> dict:
    """A PPO step on so many GPUs: the bytes a process holds behind it, the policy's weights, its gradient's norm."""
    script.write_text(WORK, encoding="utf-8")
    env = os.environ | {"ACCELERATE_USE_FSDP": str(sharded).lower(), "FSDP_VERSION": "2", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun, str(script)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


@TWO
@pytest.mark.parametrize("sharded", [False, True])
def test_two_gpus_give_the_numbers_of_one(tmp_path, sharded):
    one, two = step(1, False, tmp_path / "work.py"), step(2, sharded, tmp_path / "work.py")
    assert two["gradient"] == pytest.approx(one["gradient"], rel=1e-4)
    assert two["weights"] == pytest.approx(one["weights"], abs=1e-5)


@TWO
def test_sharding_halves_the_memory(tmp_path):
    whole, parts = step(2, False, tmp_path / "work.py"), step(2, True, tmp_path / "work.py")
    assert parts["held"] < 0.7 * whole["held"]
