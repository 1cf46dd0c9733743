"""Sampling responses. A sampler turns queries into responses; every engine keeps the same promise:

a token is drawn by inverting the CDF of softmax(logits / temperature) at a uniform number that belongs to the episode
and the position (`uniform_numbers`), so neither batch size, order, engine nor process count changes what is drawn.
"""

from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from align.maths.logprobs import draw
from align.types import Episode


class Sampler(Protocol):
    def __call__(self, queries: list[list[int]], uniforms: Tensor, temperature: float) -> list[Episode]:
        """One episode a query, in order. uniforms: (N, max_new_tokens) in [0, 1)."""


def uniform_numbers(num: int, max_new_tokens: int, seed: int, *stream: int) -> Tensor:
    """(num, max_new_tokens) uniform numbers in [0, 1): a function of the seed and the stream's numbers alone."""
    mixed = seed
    for number in stream:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    return torch.rand((num, max_new_tokens), generator=torch.Generator().manual_seed(mixed))


class TorchSampler:
    """Batched sampling with a KV cache: queries sorted by length, finished rows leave the batch."""

    def __init__(self, model: PreTrainedModel, eos_id: int, pad_id: int, batch_size: int, progress: str | None = None):
        self.model, self.eos_id, self.pad_id = model, eos_id, pad_id
        self.batch_size, self.progress = batch_size, progress

    @torch.no_grad()
    def __call__(self, queries: list[list[int]], uniforms: Tensor, temperature: float = 1.0) -> list[Episode]:
        order = sorted(range(len(queries)), key=lambda i: (len(queries[i]), i))
        was_training = self.model.training
        self.model.eval()
        responses: dict[int, list[int]] = {}
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc=self.progress, disable=self.progress is None, leave=False):
            rows = order[start : start + self.batch_size]
            sampled = self._batch([queries[i] for i in rows], uniforms[rows], temperature)
            responses |= dict(zip(rows, sampled, strict=True))
        self.model.train(was_training)
        return [
            Episode(tuple(queries[i]), tuple(responses[i]), responses[i][-1] == self.eos_id)
            for i in range(len(queries))
        ]

    def _batch(self, queries: list[list[int]], uniforms: Tensor, temperature: float) -> list[list[int]]:
        device = self.model.device
        tokens, mask = left_pad(queries, self.pad_id)
        tokens, mask, uniforms = tokens.to(device), mask.to(device), uniforms.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (N, Q)
        cache = DynamicCache(config=self.model.config)
        alive = torch.arange(len(queries), device=device)  # rows of the batch still being written
        responses: list[list[int]] = [[] for _ in queries]
        for step in range(uniforms.shape[1]):
            logits = self.model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
            drawn = draw(logits, uniforms[alive, step], temperature)  # (N,)
            for row, token in zip(alive.tolist(), drawn.tolist(), strict=True):
                responses[row].append(token)
            going = drawn != self.eos_id
            if not going.all():
                keep = going.nonzero().squeeze(1)
                if len(keep) == 0:
                    break
                cache.batch_select_indices(keep)
                alive, drawn, mask, positions = alive[keep], drawn[keep], mask[keep], positions[keep]
            tokens, positions = drawn[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return responses


def left_pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ragged rows to left-padded (N, longest) ids and their mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids, mask
