"""Positions and masks: the only place that knows where a response starts and ends.

Sequences are laid out query, response, pad (right padding), so that a causal model needs no mask at all:
what comes after a token cannot change it. Worked example with Q = 2 and EOS = 9::

    input_ids      query_lengths  response_lengths  response_mask
    5 6 7 8 9 0    2              3                 1 1 1 0        ends with EOS
    5 6 9 0 0 0    2              1                 1 0 0 0        only EOS
    5 6 7 8 7 8    2              4                 1 1 1 1        never ends
"""

import torch
from torch import Tensor


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """True on the first `lengths[b]` of `width` columns. (B,) -> (B, width)"""
    assert lengths.dim() == 1
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]  # (B, width)


def last_index(query_lengths: Tensor, response_lengths: Tensor) -> Tensor:
    """Index (not a length) of the last real token of each row, where a score is read. (B,)"""
    return query_lengths + response_lengths - 1


def action_positions(query_lengths: Tensor, width: int) -> Tensor:
    """Index of the state from which response token r is drawn: query_length - 1 + r. (B,) -> (B, R = width)

    Positions past a row's end are not clamped here; mask them or clamp before a gather.
    """
    return query_lengths[:, None] - 1 + torch.arange(width, device=query_lengths.device)[None, :]


def response_tokens(input_ids: Tensor, query_lengths: Tensor, width: int) -> Tensor:
    """The response part of each row; columns past the row's end hold arbitrary tokens. (B, T) -> (B, R)"""
    positions = (action_positions(query_lengths, width) + 1).clamp(max=input_ids.shape[1] - 1)
    return input_ids.gather(1, positions)
