"""Dropout masks from seeds: recomputed wherever they are needed, never stored.

A 32-bit hash of (the row's seed, column) gives two 16-bit uniforms, so one hash serves two adapters of a group. The mixing
function is Chris Wellons' `lowbias32` (public domain, https://nullprogram.com/blog/2018/07/31/, bias 0.17). It takes 8
integer operations an element where Philox 4x32-10, which Inductor's `rand` runs for every element, takes about 100: for
the seven linears of a Llama-8B layer at 8192 tokens (318 M mask elements, each made two or three times) that is
0.2 ms instead of 2.2 ms of arithmetic. A seed a row, 4 bytes beside the row's thousands, spares a second hash for every
element: fused code cannot hoist one that depends on the row alone. Plain ATen, so that Inductor fuses it into whatever
reads the mask.

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
    """The 16-bit values below it are dropped: p in 65536ths, at least one and never all."""
    return min(max(round(p * _STEPS), 1), _STEPS - 1)


def _lowbias32(x: Tensor) -> Tensor:
    """Bijective mixing of int32 values (as unsigned); shifts are made logical by masking the sign bits."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def keep_mask(seeds: Tensor, adapter: int, p: float, cols: int) -> Tensor:
    """Bool [rows, cols], True with probability 1 - p.

    Args:
        seeds: int32 [n, rows]; one row of it for every two adapters.
        adapter: index of the adapter in its group; it picks the seeds and the half of the hash.
    """
    col = torch.arange(cols, dtype=torch.int32, device=seeds.device)[None, :]
    bits = _lowbias32(seeds[adapter // 2][:, None] ^ (col * SPREAD))
    if adapter % 2:
        bits = bits >> 16
    return (bits & 0xFFFF) >= threshold(p)
