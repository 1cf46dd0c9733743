"""The only importer of accelerate and torch.distributed: processes, devices, precision, collectives, shards.

With one process every collective is the identity, so no caller asks how many there are. Under FSDP2
(`ACCELERATE_USE_FSDP=true FSDP_VERSION=2`, which accelerate's launcher sets from configs/accelerate/fsdp2.yaml) PPO's
weights, gradients and optimiser states are split over the processes by torch's `fully_shard`, on a CPU (gloo) as on
GPUs. accelerate's own preparing refuses a CPU and wants one model, whose class names its layers, with one optimiser.
"""

import atexit
import contextlib
import copy
import ctypes
import functools
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather,
    gather_object,
    is_bf16_available,
    parse_flag_from_env,
    set_seed,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_map_only

from align.errors import UserError

Rows = TypeVar("Rows", list, Tensor)


class Runtime:
    """One run's processes. Rank r owns rows r, r + world, r + 2 * world, ... of any global batch."""

    def __init__(self, seed: int, bf16: bool = False):
        set_seed(seed)  # the same in every process: data order must agree
        self.seconds: dict[str, float] = {}  # spent in each phase
        self.told: dict[str, float] = {}  # of these by `lap`
        state()
        self.accelerator = Accelerator(
            mixed_precision="bf16" if bf16 else None,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # whatever the environment says
            # Buffers are constants here; a gradient lies in DDP's own buffer, not beside it.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        self.shards: dict[nn.Module, Shards] = {}  # of each sharded model that is trained

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def half(self) -> bool:
        """Forward passes run in bfloat16 or float16, by the config or by the launcher's file."""
        return self.accelerator.mixed_precision in ("bf16", "fp16")

    @property
    def scales_loss(self) -> bool:
        """Under float16: gradients may overflow, and their step is then skipped."""
        return self.accelerator.scaler is not None

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

    def mine(self, rows: Rows) -> Rows:
        """This process's share of a global list or tensor."""
        return rows[self.rank :: self.world]

    @property
    def sharded(self) -> bool:
        """Whether models lie in parts over the processes."""
        return sharding()

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A model to train and its optimiser, wrapped for the launch configuration: DDP, FSDP2 or nothing."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise UserError("launcher: DeepSpeed trains one model, PPO two; use configs/accelerate/fsdp2.yaml")
        if not self.sharded:
            return self.accelerator.prepare(model, make_optimizer(model))
        self.shards[model] = Shards(model, self.device, self.compute_dtype)
        return model, self.accelerator.prepare_optimizer(make_optimizer(model))

    def place(self, model: nn.Module) -> nn.Module:
        """A model that is not trained: on this process's device, or this process's part of it."""
        return shard(model, self.device, self.compute_dtype) if self.sharded else model.to(self.device)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model)

    def whole(self, model: nn.Module) -> nn.Module:
        """The module that `for_sampling`, `for_saving` and `for_loading` give for a trained model."""
        return self.shards[model].skeleton if model in self.shards else self.unwrap(model)

    def for_sampling(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """An ordinary model with all weights on each process: gathered once, in the type of the forward passes. LoRA's
        stay as they are, for they are merged first."""
        if model not in self.shards:
            return contextlib.nullcontext(self.unwrap(model))
        return self.shards[model].for_sampling(None if model.adapted else self.compute_dtype)

    def for_saving(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """An ordinary model with all weights on the main process's CPU, and none elsewhere. All processes call it."""
        return self.shards[model].for_saving() if model in self.shards else contextlib.nullcontext(self.unwrap(model))

    def for_loading(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """An ordinary model on each process; what is loaded into it is in `model` afterwards."""
        return self.shards[model].for_loading() if model in self.shards else contextlib.nullcontext(self.unwrap(model))

    def autocast(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()

    def accumulate(self, model: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Gradients cross processes in the last microbatch of a step only; sharded ones in each, so that no process
        keeps them whole."""
        return contextlib.nullcontext() if last or self.sharded else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Backward of this process's share of a global loss. Data-parallel wrappers average, so undo it."""
        self.accelerator.backward(loss * self.world)

    def clip_grad_norm(self, parameters: Any, max_norm: float) -> float:
        """The norm before clipping. A `max_norm` of 0 clips nothing, as in a Trainer."""
        max_norm = max_norm or math.inf
        if not self.sharded:
            return float(self.accelerator.clip_grad_norm_(parameters, max_norm))
        self.accelerator.unscale_gradients()
        return float(full(nn.utils.clip_grad_norm_(parameters, max_norm)))

    def sum(self, x: Tensor) -> Tensor:
        """Element-wise sum over processes."""
        return self.accelerator.reduce(x, reduction="sum") if self.world > 1 else x

    def max(self, x: Tensor) -> Tensor:
        """Element-wise maximum over processes. (N,) -> (N,)"""
        return self.accelerator.gather(x).view(self.world, -1).max(0).values if self.world > 1 else x

    def as_many(self, batches: list[list[int]]) -> list[list[int]]:
        """The same rows in as many batches as any process has, where a sharded model's forward passes must match. All
        processes hold equally many rows, so there is always one to split."""
        batches = list(batches)
        if not self.sharded:
            return batches
        wanted = int(self.max(torch.tensor([len(batches)], device=self.device)))
        while len(batches) < wanted:
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            rows = batches.pop(largest)
            batches[largest:largest] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
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

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds to `seconds[phase]`, by this process's clock (an accelerator may still be at work). A phase within
        another is a part of that one."""
        start, outer = time.perf_counter(), dict(self.seconds)
        yield
        self.seconds = outer | {phase: outer.get(phase, 0.0) + time.perf_counter() - start}

    def lap(self) -> dict[str, float]:
        """{"time/<phase>": seconds} since the last call, as this process's clock has them."""
        passed = {name: total - self.told.get(name, 0.0) for name, total in self.seconds.items()}
        self.told = dict(self.seconds)
        return {f"time/{name.replace(' ', '_')}": round(seconds, 3) for name, seconds in passed.items()}


def is_distributed() -> bool:
    """Whether this process is one of several, or the only one that a launcher of several started (torchrun)."""
    return state().num_processes > 1 or "LOCAL_RANK" in os.environ


def sharding() -> bool:
    """Whether the launcher asks for FSDP2, and there is something to shard over."""
    return asked_to_shard() and state().num_processes > 1


def refuse_sharding(key: str, instead: str) -> None:
    """Raise UserError where models would lie in parts, which what `key` asks for cannot do with."""
    if sharding():
        raise UserError(f"{key} needs a whole model, and FSDP cuts it up; use {instead}")


@functools.cache
def asked_to_shard() -> bool:
    """Read once, and taken out of the environment: accelerate and the Trainer would shard in ways of their own."""
    asked = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asked and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("launcher: FSDP 1 is not supported; set fsdp_version: 2 in its file (or FSDP_VERSION=2)")
    if asked and parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise UserError("launcher: fsdp_offload_params is not supported; set it to false")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    return asked


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Leave this process its part of the weights, on its device. A decoder layer's are gathered, in `dtype`, for its
    forward and its backward pass; those outside the layers for the model's."""
    half = dtype != torch.float32
    options = {
        "mesh": init_device_mesh(device.type, (state().num_processes,)),
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32) if half else MixedPrecisionPolicy(),
        "reshard_after_forward": True,  # of the root too: between calls no weight is whole
    }
    layers = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for layer in [part for part in model.modules() if type(part).__name__ in layers]:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model._get_fsdp_state()._lazy_init()  # else at the first call, which peft may make with an adapter's gradients off
    model.sharded = True
    return model


class Shards:
    """A trained model, cut up, and the modules to put its weights together in."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.skeleton = skeleton(model, device)
        self.model = shard(model, device, dtype)

    def for_sampling(self, dtype: torch.dtype | None = None) -> contextlib.AbstractContextManager[nn.Module]:
        return self._filled(lambda p: full(p if dtype is None else p.to(dtype)))

    def for_saving(self) -> contextlib.AbstractContextManager[nn.Module]:
        return self._filled(on_main)

    @contextlib.contextmanager
    def for_loading(self) -> Iterator[nn.Module]:
        with self._filled(lambda p: full(p).cpu()) as filled:
            yield filled
            loaded = dict(filled.named_parameters())
            for name, p in self.model.named_parameters():
                write(loaded[name], p)

    def put_together(self) -> nn.Module:
        """An ordinary model in every process, for good: the training is over."""
        weights: dict[Tensor, Tensor] = {}
        for p in self.model.parameters():
            weights[p] = full(p.detach())
        named = self.model.named_parameters(remove_duplicate=False)
        self.skeleton.load_state_dict({name: weights[p] for name, p in named}, strict=False, assign=True)
        return self.skeleton.eval()

    @contextlib.contextmanager
    def _filled(self, read: Callable[[Tensor], Tensor]) -> Iterator[nn.Module]:
        with torch.no_grad():
            weights = {name: read(p.detach()) for name, p in self.model.named_parameters()}
        with _reparametrize_module(self.skeleton, weights, tie_weights=True):
            yield self.skeleton


def skeleton(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the modules and buffers alone; parameters keep their shapes and ties."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return copied


def full(x: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part. All processes call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def part_like(x: Tensor, target: Tensor) -> Tensor:
    """This process's part of `x`, which every process has whole, cut as `target` is."""
    if not isinstance(target, DTensor):
        return x
    return distribute_tensor(x.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def write(x: Tensor, target: Tensor) -> None:
    """Copy `x`, which every process has whole, into `target`, of which each may hold a part."""
    target.copy_(part_like(x, target))


def on_main(x: Tensor) -> Tensor:
    """All of a tensor on the main process's CPU; elsewhere only its shape. All processes call it."""
    gathered = full(x)
    return gathered.cpu() if is_main_process() else gathered.to("meta")


def whole_state(state: Any) -> Any:
    """Dicts and lists with every sharded tensor whole on the main process. All processes call it."""
    return tree_map_only(DTensor, on_main, state)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put back a `whole_state`, whatever number of processes it came from."""
    optimizer.load_state_dict(split_like(optimizer, state))


def split_like(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's whole state, what has a parameter's shape cut as the parameter is."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if hasattr(optimizer, "parts"):
        return {"parts": [split_like(*pair) for pair in zip(optimizer.parts, state["parts"], strict=True)]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def cut(x: Any, p: Tensor) -> Any:
        return part_like(x, p) if isinstance(x, Tensor) and x.shape == p.shape else x

    split = {i: {name: cut(x, parameters[i]) for name, x in own.items()} for i, own in state["state"].items()}
    return state | {"state": split}


def state() -> PartialState:
    """The launcher's processes. Accelerator reads ACCELERATE_USE_CPU, a bare PartialState does not: so it is said here,
    or two processes on a CPU would each believe that they are alone."""
    asked_to_shard()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)


TIMEOUT = timedelta(hours=2)  # for the others, of which one may be evaluating or writing alone


def is_main_process() -> bool:
    """Also before or without a Runtime (a Trainer makes its own Accelerator)."""
    return state().is_main_process


def wait_for_everyone() -> None:
    state().wait_for_everyone()


def num_processes() -> int:
    return state().num_processes


def most(number: int) -> int:
    """The largest of all processes' numbers; they must all ask."""
    if state().num_processes == 1:
        return number
    return int(gather(torch.tensor([number], device=state().device)).max())


def broadcast(value: Any) -> Any:
    """The main process's value, everywhere."""
    return broadcast_object_list([value])[0] if state().num_processes > 1 else value


def my_share(count: int) -> range:
    """Which of `count` rows are this process's."""
    return range(state().process_index, count, state().num_processes)


def gather_list(rows: list) -> list:
    """Every process's Python objects in global order, each holding `my_share` of them (or `Runtime.mine`); shares may
    differ by one."""
    world = state().num_processes
    if world == 1:
        return rows
    shares = gather_object([rows])
    return [shares[i % world][i // world] for i in range(sum(len(share) for share in shares))]


def end_processes() -> None:
    """At a stage's end: wait for the others, then leave the process group, while the interpreter is whole.

    Left to the interpreter's end, the group goes with what holds it last, DDP's reducer: its destructor, under Python's
    lock, waits for gloo's thread, and that may be waiting for the lock to drop the last tensor (docs/reliability.md).
    """
    if torch.distributed.is_initialized():
        state().wait_for_everyone()
        while ends:
            ends.pop()()
        if torch.distributed.is_initialized():
            state().destroy_process_group()


ends: list[Callable[[], None]] = []  # of what uses the process group and would find it gone at the interpreter's end


def leave_processes(status: int, last_words: str = "") -> None:
    """At a stage's failure: end this process now, so that its launcher ends the others, who wait for it in vain.

    What was registered for the end still runs; what the interpreter would take down, the process group with its
    threads, is not waited for. Alone, nothing happens.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        sys.stderr.write(last_words)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


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


def available_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has not


def limit_threads() -> None:
    """Share the CPU's cores between this machine's processes, unless the user decided already."""
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, available_cpus() // local))
