"""The only importer of accelerate and torch.distributed: processes, devices, precision, collectives.

With one process every collective is the identity, so no caller asks how many there are.
"""

import contextlib
import ctypes
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, is_bf16_available, parse_flag_from_env
from torch import Tensor


class Runtime:
    """One run's processes. Rank r owns rows r, r + world, r + 2 * world, ... of any global batch."""

    def __init__(self, seed: int, bf16: bool = False):
        seed_everything(seed)
        self.seconds: dict[str, float] = {}  # spent in each phase
        self.accelerator = Accelerator(mixed_precision="bf16" if bf16 else None)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def half(self) -> bool:
        """Forward passes run in bfloat16 or float16, by the config or by the launcher's file."""
        return self.accelerator.mixed_precision in ("bf16", "fp16")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of forward passes, and so of the weights of models that are never trained."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def mine(self, rows: list) -> list:
        """This process's share of a global list."""
        return rows[self.rank :: self.world]

    def prepare(self, *parts: Any) -> Any:
        """Wrap models and optimisers for the launch configuration (DDP, FSDP, DeepSpeed, or nothing)."""
        return self.accelerator.prepare(*parts)

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        return self.accelerator.unwrap_model(model)

    def autocast(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()

    @contextlib.contextmanager
    def accumulate(self, *models: torch.nn.Module, last: bool) -> Iterator[None]:
        """Gradients cross processes in the last microbatch of a step only."""
        with contextlib.ExitStack() as stack:
            if not last:
                for model in models:
                    stack.enter_context(self.accelerator.no_sync(model))
            yield

    def backward(self, loss: Tensor) -> None:
        """Backward of this process's share of a global loss. Data-parallel wrappers average, so undo it."""
        self.accelerator.backward(loss * self.world)

    def clip_grad_norm(self, parameters: Any, max_norm: float) -> float:
        return float(self.accelerator.clip_grad_norm_(parameters, max_norm))

    def sum(self, x: Tensor) -> Tensor:
        """Element-wise sum over processes."""
        return self.accelerator.reduce(x, reduction="sum") if self.world > 1 else x

    def max(self, x: Tensor) -> Tensor:
        """Element-wise maximum over processes. (N,) -> (N,)"""
        return self.accelerator.gather(x).view(self.world, -1).max(0).values if self.world > 1 else x

    def as_many(self, batches: list[list[int]]) -> list[list[int]]:
        """The same rows in as many batches as any process has: a sharded model's forward passes must match. All
        processes hold equally many rows, so there is always one to split."""
        batches = list(batches)
        wanted = int(self.max(torch.tensor([len(batches)], device=self.device)))
        while len(batches) < wanted:
            most = max(range(len(batches)), key=lambda i: len(batches[i]))
            rows = batches.pop(most)
            batches[most:most] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        return batches

    def gather_rows(self, x: Tensor, pad: float = 0) -> Tensor:
        """Every process's rows in global order (inverse of `mine`); narrower ones padded on the right."""
        if self.world == 1:
            return x
        x = x.to(self.device)
        if x.dim() > 1:
            x = self.accelerator.pad_across_processes(x, dim=1, pad_index=pad)
        per_rank = self.accelerator.gather(x).view(self.world, x.shape[0], *x.shape[1:])
        return per_rank.transpose(0, 1).reshape(self.world * x.shape[0], *x.shape[1:])

    def gather_list(self, rows: list) -> list:
        """Every process's Python objects in global order (inverse of `mine`); shares may differ by one."""
        if self.world == 1:
            return rows
        shares = gather_object([rows])
        total = sum(len(share) for share in shares)
        return [shares[i % self.world][i // self.world] for i in range(total)]

    def broadcast(self, value: Any) -> Any:
        """The main process's value, everywhere."""
        return broadcast_object_list([value])[0] if self.world > 1 else value

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds to `seconds[phase]`, by this process's clock (an accelerator may still be at work)."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()


def state() -> PartialState:
    """The launcher's processes. Accelerator reads ACCELERATE_USE_CPU, a bare PartialState does not: so it is said here,
    or two processes on a CPU would each believe that they are alone."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def is_main_process() -> bool:
    """Also before or without a Runtime (a Trainer makes its own Accelerator)."""
    return state().is_main_process


def wait_for_everyone() -> None:
    state().wait_for_everyone()


def most(number: int) -> int:
    """The largest of all processes' numbers; they must all ask."""
    if state().num_processes == 1:
        return number
    return int(gather(torch.tensor([number], device=state().device)).max())


def on_cpu() -> bool:
    """No accelerator here, or the launcher says not to use it."""
    return state().device.type == "cpu"


def has_bf16() -> bool:
    """The hardware multiplies in bfloat16. Without, it computes the same, a hundred times slower than in float32 (a CPU
    with AVX2 alone: docs/LOG.md). May be asked before there is a process group."""
    if not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return any(torch.cpu.get_capabilities().get(name) for name in BF16_INSTRUCTIONS)
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_bf16_available()


BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86, x86, ARM, ARM


def seed_everything(seed: int) -> None:
    """One seed for Python, numpy and torch in every process: data order must agree across ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Of Python, numpy and torch on the CPU, for a checkpoint. Nothing here draws from them while PPO trains; a reward
    function of the user's may."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    numpy = [kind, torch.from_numpy(keys.astype(np.int64)), *rest]
    return {"python": [version, list(numbers), gauss], "numpy": numpy, "torch": torch.get_rng_state()}


def set_random_state(saved: dict[str, Any]) -> None:
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(saved["torch"])


def tune_cpu() -> None:
    """At a process's start: share the cores with this machine's other processes, and keep freed memory.

    glibc gives large blocks back to the system at once, and fresh pages cost a step more time than what is written to
    them: casting 30 million numbers takes 43 ms into a fresh block and 5 ms into a used one (docs/LOG.md). What the
    user has set stays.
    """
    limit_threads()
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        for option in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)) if mallopt else ():
            mallopt(*option)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def limit_threads() -> None:
    """Share the CPU's cores between this machine's processes, unless the user decided already."""
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
