"""Rows without padding: one long sequence of groups, attended group by group.

A `Pack` lays rows of like length behind one another, so that every layer but attention sees N real tokens and no batch
dimension. A group's rows may continue a prefix, computed once and seen by all of them: the K completions of a prompt.
Attention reads the groups as views; rows of one group are padded to its longest, which costs at most `MAX_PADDING`.

    prompt of 5, completions of 2, 2 and 3 tokens:   groups (0, 1 x 5)  (5, 2 x 2 after 0..5)  (9, 1 x 3 after 0..5)
    tokens      p p p p p | a a b b | c c c
    positions   0 1 2 3 4 | 5 6 5 6 | 5 6 7

The model is any transformers model whose attention goes through `AttentionInterface`; `set_packed` turns it on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "align_packed"
MAX_PADDING = 0.04  # of a group's tokens
QUERY_BLOCK = 256  # queries whose attention is computed at once, on a CPU


@dataclass(frozen=True)
class Group:
    """`rows` rows of `length` tokens from `start` on, each continuing the prefix (its start and length; length 0: none)."""

    start: int
    rows: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0

    @property
    def end(self) -> int:
        return self.start + self.rows * self.length


@dataclass(frozen=True)
class Pack:
    """Rows as one sequence of N tokens. Row b's own tokens are `starts[b], starts[b] + 1, ...`, in the caller's order."""

    input_ids: Tensor  # (N,)
    position_ids: Tensor  # (N,)
    starts: Tensor  # (B,) the row's first token after its prefix
    groups: tuple[Group, ...]

    def to(self, device: torch.device, **options) -> "Pack":
        moved = {name: getattr(self, name).to(device, **options) for name in ("input_ids", "position_ids", "starts")}
        return replace(self, **moved)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Each token sees its row's prefix and its row up to itself. (N, H, D), (N, J, D) x 2 -> (N, H, D)"""
        out = [self._group(group, query, key, value, scaling) for group in self.groups]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _group(self, group: Group, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        q, k, v = (x[group.start : group.end].unflatten(0, (group.rows, group.length)) for x in (query, key, value))
        before = slice(group.prefix_start, group.prefix_start + group.prefix_length)
        prefix = (key[before], value[before]) if group.prefix_length else None
        return causal_attention(q, k, v, prefix, scaling).flatten(0, 1)


def pack_rows(rows: Sequence[Sequence[int]], pad_id: int = 0) -> Pack:
    """Plain rows; what a group pads is `pad_id`."""
    return pack_continuations([()], [rows], pad_id)


def pack_continuations(
    prefixes: Sequence[Sequence[int]], rows: Sequence[Sequence[Sequence[int]]], pad_id: int = 0
) -> Pack:
    """`rows[i]` continue `prefixes[i]`, which is computed once. `starts` counts the rows of all prefixes in order."""
    tokens: list[int] = []
    positions: list[int] = []
    groups: list[Group] = []
    starts: list[int] = []
    for prefix, own in zip(prefixes, rows, strict=True):
        prefix_start = len(tokens)
        if prefix:
            groups.append(Group(prefix_start, 1, len(prefix)))
            tokens += prefix
            positions += range(len(prefix))
        placed = [0] * len(own)
        for members in like_lengths([len(row) for row in own]):
            length = max(len(own[i]) for i in members)
            groups.append(Group(len(tokens), len(members), length, prefix_start, len(prefix)))
            for i in members:
                placed[i] = len(tokens)
                tokens += own[i]
                tokens += [pad_id] * (length - len(own[i]))
                positions += range(len(prefix), len(prefix) + length)
        starts += placed
    return Pack(torch.tensor(tokens), torch.tensor(positions), torch.tensor(starts), tuple(groups))


def like_lengths(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in groups, longest first, padded to their longest by at most `MAX_PADDING` of their tokens."""
    members: list[int] = []
    real = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if members and (len(members) + 1) * lengths[members[0]] * (1 - MAX_PADDING) > real + lengths[i]:
            yield members
            members, real = [], 0
        members.append(i)
        real += lengths[i]
    if members:
        yield members


def token_batches(lengths: Sequence[int], max_rows: int, max_tokens: int | None = None) -> list[list[int]]:
    """Indices by length, at most `max_rows` and `max_tokens` a batch; a row longer than that is a batch of its own."""
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = not batches or len(batches[-1]) == max_rows
        if full or (max_tokens is not None and tokens + lengths[i] > max_tokens):
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


def rows_of(pack: Pack) -> tuple[Tensor, Tensor]:
    """Every row as tokens with its prefix, for models that cannot read a pack: ids (B, T) padded on the right with 0, and
    where each of its columns lies in the pack (B, T), -1 for prefix and padding."""
    prefixes = {group.prefix_start for group in pack.groups if group.prefix_length}
    ids, places = [], []
    for group in pack.groups:
        if group.start in prefixes and not group.prefix_length:
            continue
        prefix = pack.input_ids[group.prefix_start : group.prefix_start + group.prefix_length]
        for start in range(group.start, group.end, group.length):
            own = torch.arange(start, start + group.length, device=prefix.device)
            ids.append(torch.cat([prefix, pack.input_ids[own]]))
            places.append(torch.cat([torch.full_like(prefix, -1), own]))
    pad = nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(places, batch_first=True, padding_value=-1)


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
    length = key.shape[2]
    flat = query.reshape(j, b, g * s, d)
    scores = (flat @ key.transpose(-1, -2)).view(j, b, g, s, length)
    ahead = torch.ones(s, length, dtype=torch.bool, device=query.device).triu(length - s + 1)
    scores = scores.masked_fill_(ahead, float("-inf"))
    if prefix is None:
        weights = scores.softmax(-1).view(j, b, g * s, length)
        return (weights @ value).view(j, b, g, s, d)
    prefix_key, prefix_value = prefix
    seen = prefix_key.shape[1]
    before = (flat.view(j, b * g * s, d) @ prefix_key.transpose(-1, -2)).view(j, b, g, s, seen)
    weights = torch.cat([before, scores], -1).softmax(-1)
    own = weights[..., seen:].reshape(j, b, g * s, length) @ value
    shared = weights[..., :seen].reshape(j, b * g * s, seen) @ prefix_value
    return own.view(j, b, g, s, d) + shared.view(j, b, g, s, d)


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


def spans(total: int, size: int) -> Iterable[tuple[int, int]]:
    return ((a, min(a + size, total)) for a in range(0, total, size))


class Layout(Protocol):
    """Who sees whom: a `Pack`, or a sampler's cache."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(N, H, D), (N, J, D), (N, J, D) -> (N, H, D)"""


def layout_attention(module: nn.Module, query, key, value, attention_mask, layout: Layout | None = None, **options):
    """What transformers calls in each layer. (1, H, N, D), (1, J, N, D) x 2 -> (1, N, H, D); no layout: plain SDPA."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return layout.attend(module.layer_idx, query, key, value, scaling)[None], None


AttentionInterface.register(PACKED, layout_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
NO_MASK = torch.zeros(1, 1, 1, 1, dtype=torch.bool)  # four dimensions: transformers builds none of its own


def set_packed(model: PreTrainedModel) -> bool:
    """Let `model` (a language model or classifier) read packs; False, and nothing changed, where it cannot.

    Sliding windows are refused by name; whatever else an architecture does to attention (soft caps, sinks, biases,
    positions of its own) shows when a small pack and its rows do not give the same.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [getattr(config, "sliding_window", None) or "full_attention"]
    if not getattr(model, "_supports_attention_backend", False) or set(kinds) != {"full_attention"}:
        return False
    before = model.config._attn_implementation
    model.set_attn_implementation(PACKED)
    if reads_packs(model.base_model):
        return True
    model.set_attn_implementation(before)
    return False


@torch.no_grad()
def reads_packs(backbone: PreTrainedModel) -> bool:
    """A pack with a prefix gives what its rows give, one by one."""
    if backbone.device.type == "meta":
        return True
    was_training = backbone.training
    backbone.eval()
    pack = pack_continuations([(1, 2, 3)], [[(4, 5), (6, 7), (8,)]]).to(backbone.device)
    try:
        packed, padded = packed_states(backbone, pack), padded_states(backbone, pack)
    except (TypeError, ValueError, RuntimeError, KeyError):
        return False
    finally:
        backbone.train(was_training)
    own = slice(3, None)  # a prefix has no row of its own
    return torch.allclose(packed[own].float(), padded[own].float(), rtol=0.05, atol=0.05 * float(padded.float().std()))


def packed_states(backbone: Callable, pack: Pack) -> Tensor:
    """Last hidden states of a pack in one pass. (N, d)"""
    return read_layout(backbone, pack.input_ids, pack.position_ids, pack)


def read_layout(backbone: Callable, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """Last hidden states of tokens that see each other as `layout` says. (N,), (N,) -> (N, d)"""
    return backbone(
        input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, layout=layout,
        attention_mask=NO_MASK.to(input_ids.device),
    ).last_hidden_state[0]  # fmt: skip


def padded_states(backbone: Callable, pack: Pack) -> Tensor:
    """The same from padded rows, for a model that reads no packs; zeros where a prefix was. (N, d)"""
    ids, places = rows_of(pack)  # (B, T)
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, d)
    out = hidden.new_zeros(len(pack.input_ids), hidden.shape[-1])
    return out.index_copy(0, places[places >= 0], hidden[places >= 0])
