"""Rows without padding: one long sequence, attended part by part.

A `Pack` lays rows behind one another, so that every layer but attention sees N real tokens and no batch dimension.
Rows may continue a prefix, computed once and seen by all of them: the K completions of a prompt. Attention goes over
the parts of a pack, as views: a `Group` is rows of like length, padded to its longest by at most `MAX_PADDING`; a
`Block` is a few short rows and their prefixes under one dense mask, where many small groups would cost more than they
save.

    prompt of 5, completions of 2, 2 and 3 tokens; with a prompt too long for a block three groups, (start, rows x
    length): (0, 1 x 5)  (5, 1 x 3 after 0..5)  (8, 2 x 2 after 0..5)

    tokens      p p p p p | c c c | a a b b
    positions   0 1 2 3 4 | 5 6 7 | 5 6 5 6

`set_packed` lets a model read packs; `align.attention` is what its layers then compute.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from align.attention import (
    PACKED,
    Layout,
    causal_attention,
    layout_inputs,
    masked_attention,
    ragged_attention,
    ragged_inputs,
)
from align.track import announce

MAX_PADDING = 0.04  # of a group's tokens
LOOSE_PADDING = 0.08  # where rows are short and alike: a second group would cost more than the padding
BLOCK_TOKENS = 192  # prefixes with their rows share a dense mask up to this many tokens


class Row(NamedTuple):
    """Where a row lies in the pack: its prefix (length 0: none), then its own tokens."""

    prefix_start: int
    prefix_length: int
    start: int
    length: int


@dataclass(frozen=True)
class Group:
    """`rows` rows of `length` tokens, one behind the other from `start` on, that continue the same prefix or none."""

    start: int
    rows: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(N, H, D), (N, J, D) x 2 -> (rows x length, H, D)"""
        own = slice(self.start, self.start + self.rows * self.length)
        q, k, v = (x[own].unflatten(0, (self.rows, self.length)) for x in (query, key, value))
        before = slice(self.prefix_start, self.prefix_start + self.prefix_length)
        prefix = (key[before], value[before]) if self.prefix_length else None
        return causal_attention(q, k, v, prefix, scaling).flatten(0, 1)


@dataclass(frozen=True)
class Block:
    """S tokens from `start` on that see each other except where `unseen` (S, S) is True."""

    start: int
    unseen: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(N, H, D), (N, J, D) x 2 -> (S, H, D)"""
        own = slice(self.start, self.start + len(self.unseen))
        return masked_attention(query[own], key[own], value[own], self.unseen, scaling)


@dataclass(frozen=True)
class Sequences:
    """A pack as one kernel for rows of any lengths reads it (on a GPU): each prefix a sequence, and each row behind its
    prefix, whose keys are copied for it."""

    ends: tuple[Tensor, Tensor]  # of the queries and the keys of each, from 0 on: 2 x (S + 1,)
    longest: tuple[int, int]
    keys: Tensor | None  # (K,) where in the pack each key lies; None: the queries' places

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(N, H, D), (N, J, D) x 2 -> (N, H, D)"""
        if self.keys is not None:
            key, value = key.index_select(0, self.keys), value.index_select(0, self.keys)
        return ragged_attention(query, key, value, self.ends, self.longest, scaling)

    @staticmethod
    def of(rows: Sequence[Row], tokens: int, device: torch.device) -> "Sequences":
        """Padding inside a group counts as part of the row before it; that row's own tokens never attend to it."""
        prefixes = {row.prefix_start: Row(0, 0, row.prefix_start, row.prefix_length) for row in rows}
        parts = sorted([*rows, *(prefix for prefix in prefixes.values() if prefix.length)], key=lambda part: part.start)
        ends = [*(part.start for part in parts), tokens]
        queries = [end - part.start for part, end in zip(parts, ends[1:], strict=True)]
        keys = [part.prefix_length + length for part, length in zip(parts, queries, strict=True)]
        places = None
        if any(part.prefix_length for part in parts):
            spans = (
                (range(part.prefix_start, part.prefix_start + part.prefix_length), range(part.start, end))
                for part, end in zip(parts, ends[1:], strict=True)
            )
            places = torch.tensor([place for span in spans for own in span for place in own], device=device)
        key_ends = [0, *itertools.accumulate(keys)]
        both = torch.tensor([ends, key_ends], dtype=torch.int32, device=device)
        return Sequences((both[0], both[1]), (max(queries), max(keys)), places)


class Kept:
    """What is computed of a pack once. No dataclass: FSDP's hooks copy those, and with them the pack, at each layer."""

    sequences: Sequences | None = None


@dataclass(frozen=True)
class Pack:
    """Rows as one sequence of N tokens, in parts that follow one another."""

    input_ids: Tensor  # (N,)
    position_ids: Tensor  # (N,)
    starts: Tensor  # (B,) each row's first own token, in the caller's order
    rows: tuple[Row, ...]  # B
    parts: tuple[Group | Block, ...]
    kept: Kept = field(default_factory=Kept, compare=False, repr=False)

    def to(self, device: torch.device, **options) -> "Pack":
        moved = {name: getattr(self, name).to(device, **options) for name in ("input_ids", "position_ids", "starts")}
        parts = (replace(p, unseen=p.unseen.to(device, **options)) if isinstance(p, Block) else p for p in self.parts)
        return replace(self, **moved, parts=tuple(parts), kept=Kept())

    @property
    def sequences(self) -> Sequences:
        if self.kept.sequences is None:
            self.kept.sequences = Sequences.of(self.rows, len(self.input_ids), self.input_ids.device)
        return self.kept.sequences

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Each token sees its row's prefix and its row up to itself. (N, H, D), (N, J, D) x 2 -> (N, H, D)"""
        if (ragged := ragged_inputs(query, key, value)) is not None:
            return self.sequences.attend(*ragged, scaling)
        out = [part.attend(query, key, value, scaling) for part in self.parts]
        return out[0] if len(out) == 1 else torch.cat(out)


def pack_rows(rows: Sequence[Sequence[int]], pad_id: int = 0, max_padding: float | None = None) -> Pack:
    """Plain rows; what a group pads, by at most `max_padding` (MAX_PADDING) of its tokens, is `pad_id`."""
    return pack_continuations([()], [rows], pad_id, max_padding)


def pack_continuations(
    prefixes: Sequence[Sequence[int]], rows: Sequence[Sequence[Sequence[int]]], pad_id: int = 0,
    max_padding: float | None = None,
) -> Pack:  # fmt: skip
    """`rows[i]` continue `prefixes[i]`, which is computed once. Rows count over all prefixes in order."""
    assert all(own for own in rows), "a prefix without rows"
    packing = Packing(pad_id, max_padding)
    for prefix, own in zip(prefixes, rows, strict=True):
        if prefix and len(prefix) + sum(map(len, own)) <= BLOCK_TOKENS:
            packing.add_to_block(prefix, own)
        else:
            packing.add_groups(prefix, own)
    return packing.done()


class Packing:
    """A pack in the making."""

    def __init__(self, pad_id: int, max_padding: float | None = None):
        self.pad_id, self.max_padding = pad_id, MAX_PADDING if max_padding is None else max_padding
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.rows: list[Row] = []
        self.parts: list[Group | Block] = []
        self.open: list[tuple[Row, ...]] = []  # prefixes with their rows, not yet in a block

    def add_groups(self, prefix: Sequence[int], own: Sequence[Sequence[int]]) -> None:
        self.close_block()
        prefix_start = len(self.tokens)
        if prefix:
            self.parts.append(Group(prefix_start, 1, len(prefix)))
            self.append(prefix, 0)
        placed: dict[int, Row] = {}
        for members in like_lengths([len(row) for row in own], self.max_padding):
            length = max(len(own[i]) for i in members)
            self.parts.append(Group(len(self.tokens), len(members), length, prefix_start, len(prefix)))
            for i in members:
                placed[i] = Row(prefix_start, len(prefix), len(self.tokens), len(own[i]))
                self.append([*own[i], *[self.pad_id] * (length - len(own[i]))], len(prefix))
        self.rows += [placed[i] for i in range(len(own))]

    def add_to_block(self, prefix: Sequence[int], own: Sequence[Sequence[int]]) -> None:
        if (
            self.open
            and len(self.tokens) - self.open[0][0].prefix_start + len(prefix) + sum(map(len, own)) > BLOCK_TOKENS
        ):
            self.close_block()
        prefix_start, family = len(self.tokens), []
        self.append(prefix, 0)
        for row in own:
            family.append(Row(prefix_start, len(prefix), len(self.tokens), len(row)))
            self.append(row, len(prefix))
        self.open.append(tuple(family))
        self.rows += family

    def append(self, tokens: Sequence[int], position: int) -> None:
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))

    def close_block(self) -> None:
        """What has been added since the last part becomes a block."""
        if not self.open:
            return
        start = self.open[0][0].prefix_start
        unseen = torch.ones(len(self.tokens) - start, len(self.tokens) - start, dtype=torch.bool)
        for family in self.open:
            first, before = family[0].prefix_start - start, family[0].prefix_length
            unseen[first : first + before, first : first + before].triu_(1)
            for row in family:
                own = slice(row.start - start, row.start - start + row.length)
                unseen[own, first : first + before] = False
                unseen[own, own].triu_(1)
        self.parts.append(Block(start, unseen))
        self.open = []

    def done(self) -> Pack:
        self.close_block()
        starts = torch.tensor([row.start for row in self.rows])
        return Pack(
            torch.tensor(self.tokens), torch.tensor(self.positions), starts, tuple(self.rows), tuple(self.parts)
        )


def like_lengths(lengths: Sequence[int], max_padding: float = MAX_PADDING) -> Iterator[list[int]]:
    """Indices in groups, longest first, padded to their longest by at most `max_padding` of their tokens."""
    members: list[int] = []
    real = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if members and (len(members) + 1) * lengths[members[0]] * (1 - max_padding) > real + lengths[i]:
            yield members
            members, real = [], 0
        members.append(i)
        real += lengths[i]
    if members:
        yield members


SCORED_TOKENS = 65536  # of a forward pass without gradients, however many rows are allowed in it


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
    """Every row as tokens with its prefix, for models that cannot read a pack: ids (B, T) padded on the right with 0,
    and where each of its columns lies in the pack (B, T), -1 for prefix and padding."""
    ids, places = [], []
    for row in pack.rows:
        prefix = pack.input_ids[row.prefix_start : row.prefix_start + row.prefix_length]
        own = torch.arange(row.start, row.start + row.length, device=prefix.device)
        ids.append(torch.cat([prefix, pack.input_ids[own]]))
        places.append(torch.cat([torch.full_like(prefix, -1), own]))
    pad = nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(places, batch_first=True, padding_value=-1)


class PackCollator:
    """{"input_ids"[, "labels"]} rows -> one pack, as a language model that reads packs is called: (1, N)."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: list[dict]) -> dict[str, Pack | Tensor]:
        pack = pack_rows([row["input_ids"] for row in rows], self.pad_id, LOOSE_PADDING)
        labels = torch.full_like(pack.input_ids, -100)
        for row, place in zip(rows, pack.rows, strict=True):
            learned = row.get("labels", row["input_ids"])[1:]  # the token before a row's first is another row's
            labels[place.start + 1 : place.start + place.length] = torch.tensor(learned, dtype=torch.long)
        inputs = layout_inputs(pack.input_ids, pack.position_ids, pack)
        tokens = sum(place.length for row, place in zip(rows, pack.rows, strict=True) if "filler" not in row)
        # TRL counts the tokens it has seen by the sum of this mask, which nothing else reads.
        return inputs | {"attention_mask": torch.full((1, 1, 1, 1), tokens), "labels": labels[None]}


def set_packed(model: PreTrainedModel) -> bool:
    """Let `model` (a language model or classifier) read packs; False, and nothing changed, where it cannot.

    Sliding windows are refused by name; whatever else an architecture does to attention (soft caps, sinks, biases,
    positions of its own) shows when a small pack and its rows do not give the same.
    """
    if getattr(model, "_supports_attention_backend", False) and attends_fully(model.config.get_text_config()):
        before = model.config._attn_implementation
        model.set_attn_implementation(PACKED)
        settings = {k: v for k, v in model.base_model.config.to_dict().items() if k not in NOT_ATTENTION}
        kind = type(model.base_model), json.dumps(settings, sort_keys=True, default=str)
        if kind not in _reads_packs and model.device.type != "meta":
            _reads_packs[kind] = reads_packs(model.base_model)
        if _reads_packs.get(kind, True):
            return True
        model.set_attn_implementation(before)
    say_padded(type(model).__name__)
    return False


# Of a config, what says nothing of how its body attends: one body as policy, value and reward model is probed once.
NOT_ATTENTION = ("dtype", "_name_or_path", "architectures", "id2label", "label2id", "num_labels", "pad_token_id")
_reads_packs: dict[tuple[type, str], bool] = {}  # the probe takes a float32 copy of the weights


@functools.cache
def say_padded(name: str) -> None:
    announce(f"{name} cannot read packs here (a sliding window, or attention of its own): rows are padded")


def attends_fully(config: PreTrainedConfig) -> bool:
    """No layer has a window that a row could be longer than."""
    window, context = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    reached = window is None or context is None or window < context
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return set(kinds) <= {"full_attention"} | (set() if reached else {"sliding_attention"})


@torch.no_grad()
def reads_packs(backbone: PreTrainedModel) -> bool:
    """A pack with a prefix gives what its rows give, one by one: in float32, since what half precision rounds off in a
    deep model is as much as an attention that differs would change."""
    was_training = backbone.training
    backbone.eval()
    packing = Packing(0)
    vocabulary = backbone.get_input_embeddings().weight.shape[0]
    prefix, rows = (1, 2, 3), ((4, 5), (6, 7), (8,))
    packing.add_groups([t % vocabulary for t in prefix], [[t % vocabulary for t in row] for row in rows])
    pack = packing.done().to(backbone.device)
    weights = {name: p.float() for name, p in backbone.named_parameters(remove_duplicate=False)}

    def exact(**inputs: Tensor) -> object:
        return torch.func.functional_call(backbone, weights, kwargs=inputs)

    try:
        packed, padded = packed_states(exact, pack, Once(pack)), padded_states(exact, pack)
    except (TypeError, ValueError, RuntimeError, KeyError):
        return False
    finally:
        backbone.train(was_training)
    own = slice(3, None)  # a prefix has no row of its own
    return torch.allclose(packed[own], padded[own], rtol=0.05, atol=0.05 * float(padded.std()))


class Once:
    """A pack for a trial: raises where a layer attends twice in one forward pass (differential attention, layers that
    are run several times). A sampler's cache has one place a layer, where the second call would read the first's keys.
    """

    def __init__(self, pack: Pack):
        self.pack, self.asked = pack, set()

    def attend(self, layer: int, *inputs: Tensor | float) -> Tensor:
        if layer in self.asked:
            raise ValueError(f"layer {layer} attends twice in one pass")
        self.asked.add(layer)
        return self.pack.attend(layer, *inputs)


def packed_states(backbone: Callable, pack: Pack, layout: Layout | None = None) -> Tensor:
    """Last hidden states of a pack in one pass. (N, d)"""
    return backbone(**layout_inputs(pack.input_ids, pack.position_ids, layout or pack)).last_hidden_state[0]


def padded_states(backbone: Callable, pack: Pack) -> Tensor:
    """The same from padded rows, for a model that reads no packs; zeros where a prefix was. (N, d)"""
    ids, places = rows_of(pack)  # (B, T)
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, d)
    out = hidden.new_zeros(len(pack.input_ids), hidden.shape[-1])
    return out.index_copy(0, places[places >= 0], hidden[places >= 0])
