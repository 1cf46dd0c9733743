"""A device of one's own for tests: tensors that say they are on `meta`, hold real numbers, and meet no CPU tensor.

Like a GPU's they raise when a tensor of the CPU is computed with, which a run on a CPU alone cannot notice; unlike
real meta tensors they can be read back, so that code which looks at its numbers runs to the end.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
COPIES = ("aten::copy_", "aten::_to_copy")  # what may read one device and write another
INDEXING = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")  # what takes indices that lie on the CPU


class Elsewhere(Tensor):
    """`inner`, a CPU tensor, as a tensor of the other device."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(function, args, kwargs or {})


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(function, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What does not come by the dispatcher: reading numbers back, and tensors made of lists."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].inner.tolist()
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return torch.tensor(*args, **(kwargs | {"device": "cpu"})).to(DEVICE)
        if function is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(DEVICE)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Elsewhere):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            parts = tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
            args = (args[0], parts, *args[2:])
        return function(*args, **kwargs)


@contextmanager
def other_device() -> Iterator[None]:
    """Meanwhile what is asked for on `meta` is made there, with numbers in it; autocast is the CPU's."""

    def of_cpu(function: Callable) -> Callable:
        def called(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map_only(str, lambda x: "cpu" if x == DEVICE.type else x, (args, kwargs))
            return function(*args, **kwargs)

        return called

    patched = {name: of_cpu(getattr(torch, name)) for name in ("is_autocast_enabled", "get_autocast_dtype", "autocast")}
    with mock.patch.multiple(torch, **patched), Functions(), Dispatch():
        yield


def compute(function: Callable, args: tuple, kwargs: dict) -> Any:
    name, asked = function._schema.name, kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, Elsewhere) for x in tensors)
    met = tree_leaves((args[0], args[2:])) if name in INDEXING else tensors
    strays = [x for x in met if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.dim() > 0]
    empty = [x for x in tensors if not isinstance(x, Elsewhere) and x.device == DEVICE]
    assert not empty, f"{name}: a tensor of the real meta device, made by a way that this module does not know"
    if there and strays and name not in COPIES:
        raise AssertionError(f"{name}: a CPU tensor {tuple(strays[0].shape)} among tensors of the other device")
    plain_args, plain_kwargs = tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs))
    if asked is not None:
        plain_kwargs["device"] = torch.device("cpu")
    out = function(*plain_args, **plain_kwargs)
    if name == "aten::copy_":
        return args[0]
    if asked is not None:
        there = torch.device(asked) == DEVICE
    if not there:
        return out
    out = tree_map_only(Tensor, lambda x: x if isinstance(x, Elsewhere) else Elsewhere(x), out)
    return return_and_correct_aliasing(function, args, kwargs, out)


def move(module: nn.Module) -> nn.Module:
    """All parameters and buffers of a module to the other device, ties kept."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                if id(p) not in moved:
                    moved[id(p)] = nn.Parameter(Elsewhere(p.detach().clone()), p.requires_grad)
                part._parameters[name] = moved[id(p)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Elsewhere(buffer)
    return module
