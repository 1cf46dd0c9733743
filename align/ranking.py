"""The reward model's batches: K completions of a prompt are K rows of one batch element, all pairs weigh together.

Splitting a prompt's pairs over optimiser steps would use each completion K - 1 times and overfit within one epoch
(paper section 3.5), so a prompt never leaves its element.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from align.maths.losses import ranking_loss
from align.maths.masks import length_mask
from align.models import ScalarModel
from align.text import Codec
from align.types import Demonstration, Ranking, pad_rows


@dataclass(frozen=True)
class RankedTokens:
    """A ranking as tokens: K rows (query + response with EOS) and their ranks."""

    rows: tuple[tuple[int, ...], ...]  # K
    ranks: tuple[float, ...]  # K


def encode_rankings(rankings: list[Ranking], codec: Codec) -> list[dict[str, RankedTokens]]:
    """One {"ranking": RankedTokens} a prompt, as a Trainer's data set."""
    queries = codec.prompts([ranking.prompt for ranking in rankings])
    responses = iter(codec.responses([c for ranking in rankings for c in ranking.completions]))
    return [
        {"ranking": RankedTokens(tuple((*query, *next(responses)) for _ in ranking.completions), ranking.ranks)}
        for query, ranking in zip(queries, rankings, strict=True)
    ]


class RankingCollator:
    """Rankings -> {"input_ids" (N, T), "last_index" (N,), "group" (N,), "ranks" (N,)}, N = sum of K over prompts."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, batch: list[dict]) -> dict[str, Tensor]:
        rankings: list[RankedTokens] = [element["ranking"] for element in batch]
        rows = [list(row) for ranking in rankings for row in ranking.rows]
        return {
            "input_ids": pad_rows(rows, self.pad_id),
            "last_index": torch.tensor([len(row) - 1 for row in rows]),
            "group": torch.tensor([g for g, ranking in enumerate(rankings) for _ in ranking.rows]),
            "ranks": torch.tensor([rank for ranking in rankings for rank in ranking.ranks], dtype=torch.float32),
        }


def last_scores(model: torch.nn.Module, input_ids: Tensor, last_index: Tensor) -> Tensor:
    """The score read at each row's last real token, EOS. (N, T), (N,) -> (N,)"""
    return model(input_ids).gather(1, last_index[:, None]).squeeze(1)


def batch_ranking_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over the batch's prompts of their ranking loss, and its statistics. One forward row a completion."""
    scores = last_scores(model, batch["input_ids"], batch["last_index"])
    return ranking_loss(*by_prompt(scores, batch["ranks"], batch["group"]))


def by_prompt(scores: Tensor, ranks: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat rows (N,) to prompts (B, K) padded to the largest K, and their mask."""
    sizes = torch.bincount(group)  # (B,)
    mask = length_mask(sizes, int(sizes.max()))
    padded_scores = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
    padded_ranks = ranks.new_zeros(mask.shape).masked_scatter(mask, ranks)
    return padded_scores, padded_ranks, mask


@torch.no_grad()
def score_rows(model: ScalarModel, rows: Iterable[list[int]], pad_id: int, batch_size: int) -> list[float]:
    """Scores of query + response rows, in order; batches are sorted by length to spare padding."""
    rows = list(rows)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        ids = pad_rows([list(rows[i]) for i in picked], pad_id).to(device)
        last = torch.tensor([len(rows[i]) - 1 for i in picked], device=device)
        for i, score in zip(picked, last_scores(model, ids, last).tolist(), strict=True):
            scores[i] = score
    return scores


def score_rankings(
    model: ScalarModel, rankings: list[Ranking], codec: Codec, batch_size: int
) -> list[tuple[Ranking, list[float]]]:
    """Each ranking with its completions' scores."""
    encoded = [element["ranking"].rows for element in encode_rankings(rankings, codec)]
    scores = iter(score_rows(model, [row for rows in encoded for row in rows], codec.pad_id, batch_size))
    return [(ranking, [next(scores) for _ in ranking.completions]) for ranking in rankings]


def score_demonstrations(
    model: ScalarModel, demonstrations: list[Demonstration], codec: Codec, batch_size: int
) -> list[float]:
    queries = codec.prompts([d.prompt for d in demonstrations])
    responses = codec.responses([d.completion for d in demonstrations])
    rows = [query + response for query, response in zip(queries, responses, strict=True)]
    return score_rows(model, rows, codec.pad_id, batch_size)


@torch.no_grad()
def normalise(model: ScalarModel, demonstration_scores: list[float]) -> float:
    """Shift the head's bias so that demonstrations score 0 on average (paper section 3.5). Returns the old mean."""
    mean = sum(demonstration_scores) / len(demonstration_scores)
    model.head.bias -= mean
    return mean
