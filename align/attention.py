"""Attention by layout: what each layer computes when tokens lie as a pack or a sampler's cache says who sees whom.

The model is any transformers model whose attention goes through `AttentionInterface`. On a CPU short rows are faster by
plain matrix products than by torch's fused kernel, whose backward pass is slow there (docs/benchmarks.md). On a GPU, in
half precision, one kernel reads a whole pack.
"""

import functools
from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "align_packed"
QUERY_BLOCK = 256  # queries whose attention is computed at once, on a CPU


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor] | None, scaling: float
) -> Tensor:
    """Softmax attention of B rows over a shared prefix and themselves up to each token; J key heads serve H = G x J.

    (B, L, H, D), (B, L, J, D) x 2, prefix (P, J, D) x 2 -> (B, L, H, D)
    """
    if query.is_cuda or (not torch.is_grad_enabled() and query.shape[1] > QUERY_BLOCK):
        return fused_attention(query, key, value, prefix, scaling)
    heads = key.shape[2]
    query = (query * scaling).unflatten(2, (heads, -1)).permute(2, 0, 3, 1, 4)  # (J, B, G, L, D)
    key, value = (x.permute(2, 0, 1, 3) for x in (key, value))  # (J, B, L, D)
    if prefix is not None:
        prefix = tuple(x.transpose(0, 1) for x in prefix)  # (J, P, D)
    blocks = [
        block_attention(query[:, :, :, a:b], key[:, :, :b], value[:, :, :b], prefix)
        for a, b in spans(query.shape[3], QUERY_BLOCK)
    ]
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 3)  # (J, B, G, L, D)
    return out.permute(1, 3, 0, 2, 4).flatten(2, 3)


def block_attention(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
    """Scaled queries of the last S of L positions, by plain matrix products: on a CPU faster than the fused kernel,
    whose backward pass is slow, and a prefix is read without a copy a row.

    (J, B, G, S, D), (J, B, L, D) x 2, (J, P, D) x 2 -> (J, B, G, S, D)
    """
    j, b, g, s, d = query.shape
    length, size = key.shape[2], value.shape[-1]  # multi-head latent attention has values of a size of their own
    flat = query.reshape(j, b, g * s, d)
    scores = (flat @ key.transpose(-1, -2)).view(j, b, g, s, length)
    scores = scores.add_(scores.new_full((s, length), float("-inf")).triu(length - s + 1))  # masked_fill_ takes longer
    if prefix is None:
        weights = scores.softmax(-1).view(j, b, g * s, length)
        return (weights @ value).view(j, b, g, s, size)
    prefix_key, prefix_value = prefix
    seen = prefix_key.shape[1]
    before = (flat.reshape(j, b * g * s, d) @ prefix_key.transpose(-1, -2)).view(j, b, g, s, seen)
    weights = torch.cat([before, scores], -1).softmax(-1)
    own = weights[..., seen:].reshape(j, b, g * s, length) @ value
    shared = weights[..., :seen].reshape(j, b * g * s, seen) @ prefix_value
    return own.view(j, b, g, s, size) + shared.view(j, b, g, s, size)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor] | None, scaling: float
) -> Tensor:
    """The same by torch's fused kernels. Shapes as in `causal_attention`."""
    if prefix is not None:
        key, value = (
            torch.cat([shared.expand(len(own), *shared.shape), own], 1)
            for shared, own in zip(prefix, (key, value), strict=True)
        )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if prefix is None else causal_lower_right(query.shape[2], key.shape[2])
    if mask is not None and not query.is_cuda:
        mask = mask._materialize(query.device)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2)


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: tuple[Tensor, Tensor], longest: tuple[int, int], scaling: float
) -> Tensor:
    """S sequences of any lengths in one kernel: the queries of each are the last of its keys and see those up to
    themselves. `ends` of queries and keys: (S + 1,) int32 from 0 on. (N, H, D), (K, J, D) x 2 -> (N, H, D)"""
    return varlen_attn(
        query, key, value, *ends, *longest, scale=scaling, window_size=(-1, 0), enable_gqa=key.shape[1] < query.shape[1]
    )


def ragged_inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `ragged_attention` reads, in autocast's type where that is on; None where flash attention's hardware, type
    or sizes are not given."""
    if not query.is_cuda or not has_flash(query.device):
        return None
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    size = query.shape[-1]
    fits = size % 8 == 0 and size <= 256 and value.shape[-1] == size
    fits = fits and {x.dtype for x in (query, key, value)} <= {torch.bfloat16, torch.float16}
    return (query, key, value) if fits else None


def has_flash(device: torch.device) -> bool:
    built = torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()
    return built and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, unseen: Tensor, scaling: float) -> Tensor:
    """S tokens see each other except where `unseen` (S, S) is True. (S, H, D), (S, J, D) x 2 -> (S, H, D)"""
    heads, size = key.shape[1], len(unseen)
    q = (query * scaling).unflatten(1, (heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)  # (J, G x S, D)
    k, v = (x.transpose(0, 1) for x in (key, value))  # (J, S, D)
    scores = (q @ k.transpose(-1, -2)).view(heads, -1, size, size)
    scores = scores.add_(torch.zeros_like(unseen, dtype=scores.dtype).masked_fill_(unseen, float("-inf")))
    out = scores.softmax(-1).view(heads, -1, size) @ v  # (J, G x S, D)
    return out.unflatten(1, (-1, size)).permute(2, 0, 1, 3).flatten(1, 2)


def spans(total: int, size: int) -> Iterable[tuple[int, int]]:
    return ((a, min(a + size, total)) for a in range(0, total, size))


class Layout(Protocol):
    """Who sees whom: a `Pack`, or a sampler's cache."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(N, H, D), (N, J, D), (N, J, D) -> (N, H, D)"""


def layout_attention(module: nn.Module, query, key, value, attention_mask, layout: Layout | None = None, **options):
    """What transformers calls in each layer. (1, H, N, D), (1, J, N, D) x 2 -> (1, N, H, D); no layout: plain SDPA."""
    odd = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if odd:
        raise ValueError(f"attention with {', '.join(odd)} is not computed here")  # `reads_packs` hears it
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return layout.attend(module.layer_idx, query, key, value, scaling)[None].contiguous(), None


AttentionInterface.register(PACKED, layout_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


@functools.cache
def no_mask(device: torch.device) -> Tensor:
    """A mask of four dimensions, which keeps transformers from building one. Cached: a copy to a GPU waits for it."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def layout_inputs(input_ids: Tensor, position_ids: Tensor, layout: Layout) -> dict:
    """What a model is called with when tokens see each other as `layout` says. (N,), (N,)"""
    return {
        "input_ids": input_ids[None],
        "position_ids": position_ids[None],
        "attention_mask": no_mask(input_ids.device),
        "use_cache": False,
        "layout": layout,
    }
