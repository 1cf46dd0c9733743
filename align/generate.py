"""Sampling responses. A sampler turns queries into responses; every engine keeps the same promise:

a token is drawn by inverting the CDF of softmax(logits / temperature) at a uniform number that belongs to the episode
and the position (`uniform_numbers`), so neither batch size, order, engine nor process count changes what is drawn.

`TorchSampler` is the fast engine: a row that ends leaves its slot to the next query, keys and values are written in
place, prompts are read without padding, logits exist only where a token is drawn. `GenerateSampler` is transformers'
`generate`: the reference, and the engine of models that read no packs.
"""

import functools
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from align.cuda_graph import CudaGraphStep
from align.maths.logprobs import draw
from align.models import Decoder, Policy, eval_mode
from align.packing import Pack, pack_rows, token_batches
from align.track import announce
from align.types import Episode

PREFILL_TOKENS = 8192  # of queries read in one forward pass
WIDTH_STEP = 32  # positions that the cache grows by
GPU_WIDTH_STEP = 256  # there each growth means another recording
IDLE_SLOTS = 1 / 8  # of all slots: so many wait to be filled or dropped, so that several queries are read in one pass
GPU_IDLE_SLOTS = 1 / 2  # of all slots may idle at the end where steps are replayed: few rows take a step as long


class Sampler(Protocol):
    def __call__(self, queries: list[list[int]], uniforms: Tensor, temperature: float) -> list[Episode]:
        """One episode a query, in order. uniforms: (N, max_new_tokens) in [0, 1)."""


def uniform_numbers(num: int, max_new_tokens: int, seed: int, *stream: int) -> Tensor:
    """(num, max_new_tokens) uniform numbers in [0, 1): a function of the seed and the stream's numbers alone."""
    mixed = seed
    for number in stream:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    return torch.rand((num, max_new_tokens), generator=torch.Generator().manual_seed(mixed))


def make_sampler(
    policy: Policy, eos_id: int, pad_id: int, batch_size: int, progress: str | None = None
) -> "TorchSampler | GenerateSampler":
    """The fast engine where the model can be read by it, else the reference, which is said."""
    if not policy.packed:
        say_reference_engine()
    return (TorchSampler if policy.packed else GenerateSampler)(policy, eos_id, pad_id, batch_size, progress)


@functools.cache
def say_reference_engine() -> None:
    announce("sampling by transformers' generate, the slower engine: the model reads padded rows (attn_implementation)")


@dataclass(frozen=True)
class Engine(ABC):
    """What every engine is made of."""

    policy: Policy
    eos_id: int
    pad_id: int
    batch_size: int
    progress: str | None = None  # the progress bar's name; None: no bar

    @torch.no_grad()
    def __call__(self, queries: list[list[int]], uniforms: Tensor, temperature: float = 1.0) -> list[Episode]:
        """In eval mode, with LoRA merged once instead of computed at each token."""
        if not queries:
            return []
        with eval_mode(self.policy), self.policy.merged():
            return self.sample(queries, uniforms, temperature)

    @abstractmethod
    def sample(self, queries: list[list[int]], uniforms: Tensor, temperature: float) -> list[Episode]:
        """As `Sampler`, of at least one query."""


class TorchSampler(Engine):
    """Continuous batching over `batch_size` slots, longest queries first."""

    def sample(self, queries: list[list[int]], uniforms: Tensor, temperature: float) -> list[Episode]:
        bar = tqdm(total=len(queries), desc=self.progress, disable=self.progress is None)
        with bar, self.policy.decoding() as decode:
            state = Slots(queries, uniforms.to(self.policy.device), temperature, self, decode)
            while state.running:
                state.refill()
                state.step()
                bar.update(state.done - bar.n)
        return state.episodes()


class Slots:
    """The rows being written: one query each, with its keys and values. S slots; a free one holds the query -1.

    What `advance` reads and writes keeps its place, so that it can be replayed; every slot then computes, and a free
    one's query points to a last row of `tokens`, `logprobs` and `counts` that nobody reads.
    """

    def __init__(
        self, queries: list[list[int]], uniforms: Tensor, temperature: float, sampler: TorchSampler, decode: Decoder
    ):
        self.queries, self.uniforms, self.temperature = queries, uniforms, temperature
        self.sampler, self.decode = sampler, decode
        device, size = uniforms.device, min(sampler.batch_size, len(queries))
        self.waiting = deque(sorted(range(len(queries)), key=lambda i: -len(queries[i])))
        step = GPU_WIDTH_STEP if device.type == "cuda" else WIDTH_STEP
        self.cache = KeyValues(size, len(queries[self.waiting[0]]) + uniforms.shape[1], step)
        self.query = torch.full((size,), -1, device=device)
        self.length = torch.zeros(size, dtype=torch.long, device=device)  # tokens in the cache
        self.count = torch.zeros(size, dtype=torch.long, device=device)  # tokens drawn
        self.last = torch.zeros(size, dtype=torch.long, device=device)  # the token drawn last
        rows, width = len(queries) + 1, uniforms.shape[1]
        self.tokens = torch.zeros(rows, width, dtype=torch.long, device=device)  # (N + 1, R)
        self.logprobs = torch.zeros(rows, width, device=device)  # (N + 1, R)
        self.counts = torch.zeros(rows, dtype=torch.long, device=device)  # (N + 1,) response lengths
        self.num_free, self.longest = size, 0  # slots; the greatest length of one
        self.replay = CudaGraphStep(device)

    @property
    def running(self) -> bool:
        return self.done < len(self.queries)

    @property
    def done(self) -> int:
        """Responses that have ended."""
        return len(self.queries) - len(self.waiting) - (len(self.query) - self.num_free)

    def refill(self) -> None:
        """Give free slots to waiting queries; when none waits, drop them."""
        share = GPU_IDLE_SLOTS if self.replay.records and not self.waiting else IDLE_SLOTS
        if self.num_free < max(1, share * len(self.query)):
            return
        free = (self.query < 0).nonzero().squeeze(1)
        if not self.waiting:
            self.keep((self.query >= 0).nonzero().squeeze(1))
            return
        picked = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        for batch in token_batches([len(self.queries[i]) for i in picked], len(picked), PREFILL_TOKENS):
            self.read([picked[i] for i in batch], free[: len(batch)])
            free = free[len(batch) :]
        self.look()

    def look(self) -> None:
        """What the host must know of the slots, in one exchange."""
        self.num_free, self.longest = torch.stack([(self.query < 0).sum(), self.length.max()]).tolist()

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.query, self.length = self.query[rows], self.length[rows]
        self.count, self.last = self.count[rows], self.last[rows]
        self.look()
        self.replay.forget()

    def read(self, picked: list[int], slots: Tensor) -> None:
        """Queries into slots: one forward pass over all their tokens, those of equal queries once, then the first token
        of each response."""
        place = {query: i for i, query in enumerate(dict.fromkeys(tuple(self.queries[i]) for i in picked))}
        which = torch.tensor([place[tuple(self.queries[i])] for i in picked], device=slots.device)
        pack = pack_rows(list(place), self.sampler.pad_id).to(slots.device)
        lengths = torch.tensor([len(query) for query in place], device=slots.device)
        layout = Reading(self.cache, pack, *holders(pack, which, slots))
        self.widen(max(map(len, place)))
        self.query[slots] = torch.tensor(picked, device=slots.device)
        self.length[slots], self.count[slots] = lengths[which], 0
        logits = self.decode(pack.input_ids, pack.position_ids, layout, pack.starts + lengths - 1)
        self.append(slots, logits if len(place) == len(picked) else logits[which])

    def step(self) -> None:
        """One token more in every slot."""
        if self.num_free == len(self.query):
            return
        self.widen(self.longest + 1)
        self.replay(self.advance)
        self.look()

    def advance(self) -> None:
        """The step's work on the device: read each slot's last token, draw the next. Where it is not replayed, free
        slots draw nothing."""
        everyone = torch.arange(len(self.query), device=self.query.device)
        slots = everyone if self.replay.records else everyone[self.query >= 0]
        logits = self.decode(self.last, self.length, Writing(self.cache, self.length), slots)
        self.length[slots] += 1
        self.append(slots, logits)

    def widen(self, width: int) -> None:
        if self.cache.widen(width):
            self.replay.forget()

    def append(self, slots: Tensor, logits: Tensor) -> None:
        """A token for each of `slots`; those whose response ends are free. (S,), (S, V)"""
        query, count = self.query[slots], self.count[slots]
        drawn, logprobs = draw(logits, self.uniforms[query, count], self.temperature)  # (S,), (S,)
        self.tokens[query, count], self.logprobs[query, count] = drawn, logprobs
        self.counts[query] = count + 1
        ended = (drawn == self.sampler.eos_id) | (count + 1 == self.uniforms.shape[1])
        self.last[slots] = drawn
        self.count[slots] = (count + 1).masked_fill(ended, 0)
        self.query[slots] = query.masked_fill(ended, -1)
        self.length[slots] = self.length[slots].masked_fill(ended, 0)  # let a free slot compute little

    def episodes(self) -> list[Episode]:
        rows = zip(self.tokens.tolist(), self.logprobs.tolist(), self.counts.tolist(), strict=True)
        return [
            Episode(tuple(query), tuple(tokens[:n]), tokens[n - 1] == self.sampler.eos_id, tuple(logprobs[:n]))
            for query, (tokens, logprobs, n) in zip(self.queries, rows, strict=False)  # without the row nobody reads
        ]


class KeyValues:
    """Keys and values of every layer: S slots, J heads, W positions. Made at first use.

    Keys lie as (S, J, D, W), values as (S, J, W, D), so that both products of a decoding step read along memory. They
    are read whole, for a product over a part of their positions would copy it first; so W grows with the rows.
    """

    def __init__(self, slots: int, limit: int, step: int):
        self.slots, self.limit, self.step, self.width = slots, limit, step, 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def widen(self, width: int) -> bool:
        """Make room for `width` positions, of at most `limit`; whether the buffers have moved."""
        if width <= self.width:
            return False
        more = min(self.limit, -(-width // self.step) * self.step) - self.width
        pad = torch.nn.functional.pad
        for layer in list(self.layers):  # one at a time, so that old and new buffers exist together of one alone
            keys, values = self.layers.pop(layer)
            self.layers[layer] = pad(keys, (0, more)), pad(values, (0, 0, 0, more))
        self.width += more
        return True

    def write(self, layer: int, slots: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (N, J, D) of tokens at (slots (N,), positions (N,)). Returns the layer's buffers."""
        if layer not in self.layers:
            heads = self.slots, key.shape[1]
            keys = key.new_zeros(*heads, key.shape[2], self.width)
            self.layers[layer] = keys, value.new_zeros(*heads, self.width, value.shape[2])
        keys, values = self.layers[layer]
        keys[slots, :, :, positions], values[slots, :, positions] = key, value
        return keys, values

    def keep(self, rows: Tensor) -> None:
        self.slots = len(rows)
        for layer in list(self.layers):
            keys, values = self.layers.pop(layer)
            self.layers[layer] = keys[rows], values[rows]


def token_rows(pack: Pack) -> Tensor:
    """Which of the caller's plain rows each token belongs to; a group's padding belongs to the row before it. (N,)"""
    order = pack.starts.argsort()
    sizes = torch.diff(pack.starts[order], append=pack.starts.new_tensor([len(pack.input_ids)]))
    return order.repeat_interleave(sizes)


def holders(pack: Pack, which: Tensor, slots: Tensor) -> tuple[Tensor, Tensor | None]:
    """Slot p holds the pack's row `which[p]`: the slots that keep a token, and which token that is, (M,) each; None
    where it is each token once, in order."""
    rows = token_rows(pack)
    if len(pack.starts) == len(which):
        return slots[rows], None
    tokens = [(rows == row).nonzero().squeeze(1) for row in range(len(pack.starts))]
    kept = [tokens[row] for row in which.tolist()]
    return slots.repeat_interleave(torch.tensor([len(part) for part in kept], device=slots.device)), torch.cat(kept)


@dataclass(frozen=True)
class Reading:
    """Queries: tokens attend as their pack says, and are kept."""

    cache: KeyValues
    pack: Pack
    slots: Tensor  # (M,)
    tokens: Tensor | None  # (M,) kept there; None: all, in order

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        kept = slice(None) if self.tokens is None else self.tokens
        self.cache.write(layer, self.slots, self.pack.position_ids[kept], key[kept], value[kept])
        return self.pack.attend(layer, query, key, value, scaling)


class Writing:
    """One token a slot: it attends to all that its slot keeps, itself included."""

    def __init__(self, cache: KeyValues, positions: Tensor):
        self.cache, self.positions = cache, positions
        self.slots = torch.arange(len(positions), device=positions.device)
        columns = torch.arange(cache.width, device=positions.device)
        self.ahead = (columns > positions[:, None])[:, None, None]  # (S, 1, 1, W)
        self.hidden: Tensor | None = None  # -inf there: adding it is faster than masked_fill_

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(S, H, D), (S, J, D) x 2 -> (S, H, D). Query heads that share a key head are its queries: no copy of keys."""
        keys, values = self.cache.write(layer, self.slots, self.positions, key, value)
        rows = len(query) * key.shape[1]  # S x J
        grouped = (query * scaling).reshape(rows, -1, query.shape[-1])  # (S x J, G, D)
        scores = torch.bmm(grouped, keys.flatten(0, 1))  # (S x J, G, W)
        if self.hidden is None:
            self.hidden = scores.new_zeros(self.ahead.shape).masked_fill_(self.ahead, float("-inf"))
        weights = scores.view(len(query), -1, *scores.shape[1:]).add_(self.hidden).softmax(-1)
        out = torch.bmm(weights.flatten(0, 1), values.flatten(0, 1))  # (S x J, G, D)
        return out.view(*query.shape[:2], -1)


class GenerateSampler(Engine):
    """transformers' `generate`, told what to draw; left-padded batches of queries of like length."""

    def sample(self, queries: list[list[int]], uniforms: Tensor, temperature: float) -> list[Episode]:
        episodes: dict[int, Episode] = {}
        batches = token_batches([len(query) for query in queries], self.batch_size)
        for rows in tqdm(batches, desc=self.progress, disable=self.progress is None, leave=False):
            drawn = Drawn(uniforms[rows].to(self.policy.device), temperature)
            picked = [torch.tensor(queries[i], device=self.policy.device) for i in rows]
            ids = pad_sequence(picked, batch_first=True, padding_value=self.pad_id, padding_side="left")  # (B, T)
            mask = pad_sequence([torch.ones_like(row) for row in picked], batch_first=True, padding_side="left")
            out = self._generate(
                ids, attention_mask=mask, do_sample=False,
                max_new_tokens=uniforms.shape[1], eos_token_id=self.eos_id, pad_token_id=self.pad_id,
                logits_processor=LogitsProcessorList([drawn]),
            )[:, ids.shape[1] :].tolist()  # fmt: skip
            logprobs = torch.stack(drawn.logprobs, 1).tolist()
            for row, tokens, probs in zip(rows, out, logprobs, strict=True):
                n = tokens.index(self.eos_id) + 1 if self.eos_id in tokens else len(tokens)
                finished = tokens[n - 1] == self.eos_id
                episodes[row] = Episode(tuple(queries[row]), tuple(tokens[:n]), finished, tuple(probs[:n]))
        return [episodes[i] for i in range(len(queries))]

    def _generate(self, *args, **options) -> Tensor:
        """`generate` without the checkpoint's own habits (penalties, banned tokens): the softmax alone is sampled."""
        model = self.policy.inner
        habits, model.generation_config = model.generation_config, GenerationConfig()
        try:
            return model.generate(*args, **options)
        finally:
            model.generation_config = habits


class Drawn(LogitsProcessor):
    """Leaves `generate` the one token that our uniform numbers draw."""

    def __init__(self, uniforms: Tensor, temperature: float):
        self.uniforms, self.temperature = uniforms, temperature
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn, logprobs = draw(scores, self.uniforms[:, len(self.logprobs)], self.temperature)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn[:, None], 0.0)
