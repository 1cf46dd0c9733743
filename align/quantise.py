"""Frozen models at a byte a weight: int8 matrices, one float32 scale a row, products in the activations' type.

Weights alone are rounded, each by at most half a step of its row's largest weight / 127, as the weights of LLM.int8
are (Dettmers et al. 2022). Embeddings and heads stay as they are. torch alone does it, on any device.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.errors import UserError

LEVELS = 127


class Int8Linear(nn.Module):
    """A frozen nn.Linear. Buffers: weight (out, in) int8, and scale (out,), a row's largest weight / 127."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        # Over a power of two: exact in any type, and no sum overflows float16. The scale meets float32 outputs.
        out = nn.functional.linear(x, self.weight.to(x.dtype) / 128) * (128 * self.scale)
        return out.to(x.dtype) if self.bias is None else out.to(x.dtype) + self.bias


def quantise(model: PreTrainedModel) -> int:
    """Round every linear layer but the heads in place. Returns the number of weights that became bytes."""
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    layers = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and id(m) not in heads]
    if not layers:
        raise UserError(f"frozen_quantization: {type(model).__name__} has no linear layers to round; set it to null")
    for name, linear in layers:
        model.set_submodule(name, Int8Linear(linear))
    return sum(linear.weight.numel() for _, linear in layers)
