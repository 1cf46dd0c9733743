"""The reward model's batches: a prompt and its K completions are one batch element, all pairs weigh together.

Splitting a prompt's pairs over optimiser steps would use each completion K - 1 times and overfit within one epoch
(paper section 3.5), so a prompt never leaves its element. Its tokens are computed once for all K completions.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from align.maths.losses import ranking_loss
from align.maths.masks import length_mask
from align.models import ScalarModel
from align.packing import SCORED_TOKENS, Pack, pack_continuations, pack_rows, token_batches
from align.runtime import gather_list, my_share
from align.text import Codec
from align.types import Demonstration, Ranking

SCORED_AGAIN = 1000  # demonstrations, by the normalised model
Even = Callable[[list[list[int]]], list[list[int]]]  # `Runtime.as_many`


@dataclass(frozen=True)
class RankedTokens:
    """A ranking as tokens: the query, K responses with EOS, and their ranks."""

    query: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]  # K
    ranks: tuple[float, ...]  # K
    filler: bool = False  # stands in a batch that would be too short for all processes, and counts for nothing

    @property
    def tokens(self) -> int:
        """What one forward pass computes."""
        return len(self.query) + sum(map(len, self.responses))


def encode_rankings(rankings: list[Ranking], codec: Codec) -> list[dict[str, RankedTokens]]:
    """One {"ranking": RankedTokens} a prompt, as a Trainer's data set."""
    queries = codec.prompts([ranking.prompt for ranking in rankings])
    responses = iter(codec.responses([c for ranking in rankings for c in ranking.completions]))
    return [
        {
            "ranking": RankedTokens(
                tuple(query), tuple(tuple(next(responses)) for _ in ranking.completions), places(ranking.ranks)
            )
        }
        for query, ranking in zip(queries, rankings, strict=True)
    ]


def places(ranks: tuple[float, ...]) -> tuple[float, ...]:
    """0 for the best rank, 1 for the next, and so on: ranks may be anything, time stamps too, and a batch holds them in
    float32."""
    order = {rank: float(place) for place, rank in enumerate(sorted(set(ranks)))}
    return tuple(order[rank] for rank in ranks)


def split_pairs(elements: list[dict[str, RankedTokens]]) -> list[dict[str, RankedTokens]]:
    """Every untied pair as an element of its own. A completion is then seen K - 1 times an epoch: overfitting."""
    return [
        {"ranking": RankedTokens(r.query, (r.responses[i], r.responses[j]), (r.ranks[i], r.ranks[j]))}
        for r in (element["ranking"] for element in elements)
        for i, j in combinations(range(len(r.ranks)), 2)
        if r.ranks[i] != r.ranks[j]
    ]


class RankingCollator:
    """Rankings -> {"pack", "last_index" (N,), "group" (N,), "ranks" (N,), "prompts" (,)}, N = sum of K over prompts."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, batch: list[dict]) -> dict[str, Pack | Tensor]:
        rankings: list[RankedTokens] = [element["ranking"] for element in batch]
        pack = pack_continuations([r.query for r in rankings], [r.responses for r in rankings], self.pad_id)
        lengths = [len(response) for ranking in rankings for response in ranking.responses]
        return {
            "pack": pack,
            "last_index": pack.starts + torch.tensor(lengths) - 1,
            "group": torch.tensor([g for g, ranking in enumerate(rankings) for _ in ranking.responses]),
            "ranks": torch.tensor([rank for ranking in rankings for rank in ranking.ranks], dtype=torch.float32),
            "prompts": torch.tensor(sum(not ranking.filler for ranking in rankings)),
        }


def ranking_batches(
    elements: list[dict[str, RankedTokens]], pad_id: int, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], dict[str, Pack | Tensor]]]:
    """Collated batches of rankings of like length, each with the numbers of its elements."""
    collate = RankingCollator(pad_id)
    for picked in token_batches([element["ranking"].tokens for element in elements], batch_size, SCORED_TOKENS):
        batch = collate([elements[i] for i in picked])
        yield picked, {name: value.to(device) for name, value in batch.items()}


def batch_ranking_loss(model: torch.nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over the batch's prompts of their ranking loss, and its statistics. A score is read at EOS."""
    scores = model(batch["pack"], batch["last_index"])
    return ranking_loss(*by_prompt(scores, batch["ranks"], batch["group"]))


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, elements: list[dict[str, RankedTokens]], pad_id: int, batch_size: int
) -> dict[str, float]:
    """loss (mean over prompts), accuracy and margin (over untied pairs), however the prompts are batched."""
    totals: dict[str, float] = {"loss": 0.0}
    for _, batch in ranking_batches(elements, pad_id, batch_size, next(model.parameters()).device):
        loss, stats = batch_ranking_loss(model, batch)
        for name, value in (stats | {"loss": loss}).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    pairs = max(1.0, totals["pairs"])
    means = {name: totals[name] / pairs for name in ("correct", "margin")}
    return {"loss": totals["loss"] / len(elements), "accuracy": means["correct"], "margin": means["margin"]}


def by_prompt(scores: Tensor, ranks: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat rows (N,) to prompts (B, K) padded to the largest K, and their mask."""
    sizes = torch.bincount(group)  # (B,)
    mask = length_mask(sizes, int(sizes.max()))
    padded_scores = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
    padded_ranks = ranks.new_zeros(mask.shape).masked_scatter(mask, ranks)
    return padded_scores, padded_ranks, mask


@torch.no_grad()
def score_rows(
    model: ScalarModel, rows: Iterable[list[int]], pad_id: int, batch_size: int, max_tokens: int | None = None,
    even: Even | None = None,
) -> list[float]:  # fmt: skip
    """Scores of query + response rows, read at their last token, in order. `even` gives every process as many batches,
    which a sharded model needs."""
    rows = list(rows)
    device = next(model.parameters()).device
    scores = [0.0] * len(rows)
    batches = token_batches([len(row) for row in rows], batch_size, max_tokens)
    for picked in batches if even is None else even(batches):
        pack = pack_rows([rows[i] for i in picked], pad_id).to(device)
        last = pack.starts + torch.tensor([len(rows[i]) - 1 for i in picked], device=device)
        for i, score in zip(picked, model(pack, last).tolist(), strict=True):
            scores[i] = score
    return scores


@torch.no_grad()
def score_rankings(
    model: ScalarModel, rankings: list[Ranking], codec: Codec, batch_size: int
) -> list[tuple[Ranking, list[float]]]:
    """Each ranking with its completions' scores; `batch_size` prompts a forward pass. All processes call
    this: each scores its share, and has all scores."""
    mine = [rankings[i] for i in my_share(len(rankings))]
    scores: list[list[float]] = [[] for _ in mine]
    device = next(model.parameters()).device
    for picked, batch in ranking_batches(encode_rankings(mine, codec), codec.pad_id, batch_size, device):
        flat = iter(model(batch["pack"], batch["last_index"]).tolist())
        for i in picked:
            scores[i] = [next(flat) for _ in mine[i].completions]
    return list(zip(rankings, gather_list(scores), strict=True))


def score_demonstrations(
    model: ScalarModel, demonstrations: list[Demonstration], codec: Codec, batch_size: int
) -> list[float]:
    """Each process scores its share; all have all scores."""
    mine = [demonstrations[i] for i in my_share(len(demonstrations))]
    queries = codec.prompts([d.prompt for d in mine])
    responses = codec.responses([d.completion for d in mine])
    rows = [query + response for query, response in zip(queries, responses, strict=True)]
    return gather_list(score_rows(model, rows, codec.pad_id, batch_size, SCORED_TOKENS))


def normalise_on(
    model: ScalarModel, demonstrations: list[Demonstration], codec: Codec, batch_size: int
) -> dict[str, float]:
    """Demonstrations score 0 on average from here on. Their mean before and after, nothing without demonstrations."""
    if not demonstrations:
        with torch.no_grad():
            model.head.bias.zero_()  # cancels in every pair: what it has is Adam's drift on rounding noise
        return {}
    before = score_demonstrations(model, demonstrations, codec, batch_size)
    mean = normalise(model, before)
    # Scored again: all of them would be a second pass for one constant.
    after = score_demonstrations(model, demonstrations[:SCORED_AGAIN], codec, batch_size)
    moved = (sum(after) - sum(before[: len(after)])) / len(after)
    return {"demonstration_mean_before": mean, "demonstration_mean": mean + moved}


@torch.no_grad()
def normalise(model: ScalarModel, demonstration_scores: list[float]) -> float:
    """Shift the head's bias so that demonstrations score 0 on average (paper section 3.5). Returns the old mean."""
    mean = sum(demonstration_scores) / len(demonstration_scores)
    model.head.bias -= mean
    return mean
