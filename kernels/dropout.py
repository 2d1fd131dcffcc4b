"""Dropout masks from seeds: recomputed wherever they are needed, never stored.

A 32-bit hash of (the row's seed, column) gives two 16-bit uniforms, so one hash serves two adapters of a group: the upper
half, and the lower half moved up. Each is compared as a signed number, one operation. The mixing is a multiplication, an
exclusive or with the shifted product, and another multiplication, with the constants of Chris Wellons' `lowbias32`
(public domain, https://nullprogram.com/blog/2018/07/31/); 7 integer operations an element, where all of lowbias32 takes 14
as Inductor writes it and Philox 4x32-10, which Inductor's `rand` runs for every element, about 100. With random seeds the
short form is as good: correlations between rows, columns and halves at 12 distances, and rates by row and column, stay below
2.6 standard deviations over 8 M elements, as with the long one (with one multiplication: 200). A seed a row, 4 bytes beside the
row's thousands, spares a second hash for every element: fused code cannot hoist one that depends on the row alone. Plain
ATen, so that Inductor fuses it into whatever reads the mask.

The probability is rounded to a multiple of 2^-16 and the kept values are scaled by the rounded one: unbiased.
"""

import torch
from torch import Tensor

_STEPS = 1 << 16

# Spreads the columns, so that rows whose seeds are close share no mask. Odd, and small enough that column * SPREAD stays
# below 2^31 up to 178,000 columns: Inductor computes it as an index, in int32, where an overflow is undefined.
SPREAD = 12043


def scale(p: float) -> float:
    """What kept values are multiplied by: 1 / (1 - p), p rounded as the mask rounds it."""
    return _STEPS / (_STEPS - threshold(p))


def threshold(p: float) -> int:
    """So many of the 65536 values of a half are dropped: p in 65536ths, at least one and never all; none where p is 0."""
    return min(max(round(p * _STEPS), 1), _STEPS - 1) if p > 0 else 0


def limit(p: float) -> int:
    """What a half, taken as the upper half of a signed number, must reach to be kept."""
    return (threshold(p) << 16) - (1 << 31)


def _mix(x: Tensor) -> Tensor:
    """int32 -> int32, as unsigned; the shift is made logical by masking the sign bits."""
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * (0x846CA68B - (1 << 32))


def columns(cols: int, device: torch.device) -> Tensor:
    """The columns' part of the hash: int32 [cols]."""
    return torch.arange(cols, dtype=torch.int32, device=device) * SPREAD


def keep_mask(seeds: Tensor, adapter: int, p: float, cols: int) -> Tensor:
    """Bool [rows, cols], True with probability 1 - p.

    Args:
        seeds: int32 [n, rows]; one row of it for every two adapters.
        adapter: index of the adapter in its group; it picks the seeds and the half of the hash.
    """
    bits = _mix(seeds[adapter // 2][:, None] ^ columns(cols, seeds.device)[None, :])
    return (bits << 16 if adapter % 2 else bits) >= limit(p)


def dropped(x: Tensor, seeds: Tensor, adapter: int, p: float) -> Tensor:
    """x [rows, cols] as the adapter sees it, in its dtype."""
    return x if p == 0 else torch.where(keep_mask(seeds, adapter, p, x.shape[1]), x * scale(p), 0.0).to(x.dtype)
