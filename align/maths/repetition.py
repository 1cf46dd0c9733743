"""How much a text repeats itself."""

import torch
from torch import Tensor

from align.maths.masks import length_mask


def repeated_ngrams(tokens: Tensor, lengths: Tensor, n: int = 3) -> Tensor:
    """Share of a row's n-grams that stood in it before: 1 - distinct / all (seq-rep-n of Welleck et al. 2019).

    0 for a row of fewer than n tokens. Tokens past a row's length count for nothing. (B, R), (B,) -> (B,)
    """
    width = tokens.shape[1] - n + 1
    if width < 1:
        return torch.zeros(len(tokens), device=tokens.device)
    counts = (lengths - n + 1).clamp(min=0)  # (B,)
    ngrams = tokens.unfold(1, n, 1)  # (B, width, n)
    numbers = torch.unique(ngrams.flatten(0, 1), dim=0, return_inverse=True)[1].view(len(tokens), width)
    numbers = torch.where(length_mask(counts, width), numbers, -1).sort(1).values
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    distinct = (first & (numbers >= 0)).sum(1)  # (B,)
    return (counts - distinct) / counts.clamp(min=1)
