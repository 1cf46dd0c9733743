"""Weights of linear layers laid out for oneDNN's kernels once, where a CPU multiplies few rows by them many times.

torch lays a bfloat16 weight out anew at each product, with 64 rows a third of its time, and gives a float32 product to
a library that lays it out too (docs/benchmarks.md).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 64  # that the layout is chosen for; any number may be multiplied
LARGE = 2**18  # numbers in a matrix


class Prepacked(Tensor):
    """A weight that `torch.nn.functional.linear` reads, and nothing else."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> "Prepacked":
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight: Tensor):
        self.laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            return torch.ops.mkldnn._linear_pointwise.default(x, weight.laid_out, bias, "none", [], "")
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise NotImplementedError(f"{function} of a weight that is laid out for linear layers")


def prepack(weight: Tensor) -> Tensor:
    """The weight laid out, where that is another layout and pays; else itself."""
    return Prepacked(weight.detach().contiguous()) if pays(weight) else weight


def pays(weight: Tensor) -> bool:
    """Matrices on a CPU with oneDNN: in bfloat16 where it has kernels for it (AVX-512 or newer), in float32 large ones,
    whose products take longer than the detour of calling them."""
    if weight.device.type != "cpu" or weight.dim() != 2 or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and weight.numel() >= LARGE
