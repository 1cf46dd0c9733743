"""Scores of rankings by any sequence classifier with one label, and whether batching moves them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from align.lengths import ranking_lengths
from align.models import ScalarModel, load_scalar_model
from align.packing import SCORED_TOKENS, pack_rows, token_batches
from align.ranking import score_rankings, score_rows
from align.reward_models import has_linear_score, load_classifier, reward_codec, reward_config
from align.rewards import score_pairs
from align.text import Codec
from align.types import Ranking, contents


class Scorer(Protocol):
    """A reward model that reads text."""

    context: int | None  # tokens that it can read

    def tokens(self, ranking: Ranking) -> int:
        """Of the prompt and its longest completion."""
        ...

    def score(self, rankings: list[Ranking], batch_size: int) -> list[list[float]]:
        """K scores a ranking; `batch_size` prompts a forward pass, those of like length together."""
        ...


@dataclass(frozen=True)
class ScalarScorer:
    """A decoder with the head `score`, read at the last token of prompt and completion (`align.text`): EOS in ours."""

    model: ScalarModel
    codec: Codec
    context: int | None = None

    def tokens(self, ranking: Ranking) -> int:
        return ranking_lengths([ranking], self.codec)[0]

    def score(self, rankings: list[Ranking], batch_size: int) -> list[list[float]]:
        return [scores for _, scores in score_rankings(self.model, rankings, self.codec, batch_size)]


@dataclass(frozen=True)
class ClassifierScorer:
    """Any other classifier, such as a BERT: its own forward on (prompt, completion) as its tokenizer joins the two."""

    model: nn.Module
    tokenizer: Any
    context: int | None = None

    def tokens(self, ranking: Ranking) -> int:
        return max(len(self.tokenizer(*pair)["input_ids"]) for pair in _texts(ranking))

    def score(self, rankings: list[Ranking], batch_size: int) -> list[list[float]]:
        scores: dict[int, list[float]] = {}
        sizes = [self.tokens(ranking) * len(ranking.completions) for ranking in rankings]
        for picked in token_batches(sizes, batch_size, SCORED_TOKENS):
            pairs = [pair for i in picked for pair in _texts(rankings[i])]
            flat = iter(score_pairs(self.model, self.tokenizer, pairs, self.context, len(pairs))[0])
            scores |= {i: [next(flat) for _ in rankings[i].completions] for i in picked}
        return [scores[i] for i in range(len(rankings))]


def _texts(ranking: Ranking) -> list[tuple[str, str]]:
    return [(contents(ranking.prompt), contents(completion)) for completion in ranking.completions]


def load_scorer(
    path: str,
    role: str,
    device: torch.device,
    attn_implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Scorer:
    """The reward model at a folder or hub id. Raises UserError, naming the config key `role`, when it is none."""
    config = reward_config(path, role)
    if not has_linear_score(config):
        model, tokenizer, context = load_classifier(path, role, dtype)
        return ClassifierScorer(model.to(device), tokenizer, context)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    model = load_scalar_model(path, attn_implementation, dtype=dtype).to(device).eval()
    return ScalarScorer(model, reward_codec(path), context)


def score_spread(scorer: Scorer, rankings: list[Ranking], batch_size: int, seed: int) -> dict[str, Any]:
    """How far scores move with the way they are computed: against each completion alone in its forward pass.

    Keys: max_difference (over all ways), score_std (of the completions, in the same unit), flipped_pairs (that any way
    orders otherwise, by way), rows, ways (largest difference by way).
    """
    lone = [replace(r, completions=(c,), ranks=(0.0,)) for r in rankings for c in r.completions]
    alone = _flat(scorer.score(lone, 1))  # (N,)
    order = np.random.default_rng(seed).permutation(len(rankings)).tolist()
    ways = {
        "a prompt at a time": _flat(scorer.score(rankings, 1)),
        "batches of like length": _flat(scorer.score(rankings, batch_size)),
        "other batch mates": _in_halves(scorer, rankings, order, batch_size),
    }
    if isinstance(scorer, ScalarScorer):
        ways |= _row_ways(scorer, rankings, batch_size, seed)
    gaps = {name: float(np.abs(scores - alone).max()) for name, scores in ways.items()}
    return {
        "max_difference": max(gaps.values()),
        "score_std": float(alone.std()),
        "flipped_pairs": {name: _flipped(alone, scores, rankings) for name, scores in ways.items()},
        "rows": len(alone),
        "ways": gaps,
    }


def _flat(scores: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.array([score for row in scores for score in row])


def _in_halves(scorer: Scorer, rankings: list[Ranking], order: list[int], batch_size: int) -> NDArray[np.float64]:
    """(N,) scores when half of the rankings, drawn at random, are no longer there to share a batch with."""
    scores: dict[int, list[float]] = {}
    for half in (order[::2], order[1::2]):
        scores |= zip(half, scorer.score([rankings[i] for i in half], batch_size), strict=True)
    return _flat([scores[i] for i in range(len(rankings))])


def _row_ways(
    scorer: ScalarScorer, rankings: list[Ranking], batch_size: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """(N,) scores of plain rows, which share no prompt: packed, and padded beside rows of any length."""
    model, codec = scorer.model, scorer.codec
    rows = [codec.prompt(r.prompt) + codec.response(c) for r in rankings for c in r.completions]
    packed = np.array(score_rows(model, rows, codec.pad_id, batch_size))
    padded, order = np.zeros(len(rows)), np.random.default_rng(seed + 1).permutation(len(rows)).tolist()
    was_packed, model.packed = model.packed, False
    try:
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            pack = pack_rows([rows[i] for i in picked], codec.pad_id).to(model.device)
            last = pack.starts + torch.tensor([len(rows[i]) - 1 for i in picked], device=model.device)
            with torch.no_grad():
                padded[picked] = model(pack, last).tolist()
    finally:
        model.packed = was_packed
    return {"plain rows": packed, "padded rows": padded}


def _flipped(one: NDArray[np.float64], other: NDArray[np.float64], rankings: list[Ranking]) -> int:
    """Pairs of one ranking that the two order in opposite ways."""
    ends = np.cumsum([len(r.completions) for r in rankings])
    flipped = 0
    for end, ranking in zip(ends, rankings, strict=True):
        pairs = combinations(range(end - len(ranking.completions), end), 2)
        flipped += sum((one[i] - one[j]) * (other[i] - other[j]) < 0 for i, j in pairs)
    return int(flipped)
