"""What only a GPU can show. `pytest -m gpu`; not yet run (docs/reliability.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align.attention import block_attention, fused_attention
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
