"""Masked sums, means and whitening. Masks are required, and junk under a False mask (even NaN) never leaks."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask; scalar. `where`, not a product: 0 * nan is nan."""
    assert x.shape == mask.shape
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_row_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over the columns of each row where mask. (B, R) -> (B,)"""
    assert x.shape == mask.shape
    return torch.where(mask, x, torch.zeros_like(x)).sum(1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask; 0 when nothing is."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance of x where mask."""
    return masked_sum((x - masked_mean(x, mask)) ** 2, mask) / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over mask, biased variance; the mean is put back when not `shift_mean`.

    Advantages are whitened with the mean removed, rewards keep theirs (Ziegler et al. 2019, code). Float64 inside.
    """
    wide = x.double()
    mean, var = masked_mean(wide, mask), masked_var(wide, mask)
    out = (wide - mean) * torch.rsqrt(var + 1e-8)
    if not shift_mean:
        out = out + mean
    return torch.where(mask, out, torch.zeros_like(out)).to(x.dtype)
