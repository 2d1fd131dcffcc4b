"""Dropout masks from a seed: recomputed wherever they are needed, never stored.

A 32-bit hash of (seed, row, column) gives two 16-bit uniforms, so one hash serves two adapters of a group. The mixing
function is Chris Wellons' `lowbias32` (public domain, https://nullprogram.com/blog/2018/07/31/, bias 0.17). It takes 8
integer operations an element where Philox 4x32-10, which Inductor's `rand` runs for every element, takes about 100: for
the seven linears of a Llama-8B layer at 8192 tokens (318 M mask elements, each made two or three times) that is
0.2 ms instead of 2.2 ms of arithmetic. Plain ATen, so that Inductor fuses it into whatever reads the mask.

The probability is rounded to a multiple of 2^-16 and the kept values are scaled by the rounded one: unbiased.
"""

import torch
from torch import Tensor

_STEPS = 1 << 16


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


def keep_mask(seed: Tensor, adapter: int, p: float, rows, cols, device: torch.device) -> Tensor:
    """Bool [rows, cols], True with probability 1 - p.

    Args:
        seed: int32 [n], one seed for every two adapters.
        adapter: index of the adapter in its group; it picks the seed and the half of the hash.
    """
    row = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
    col = torch.arange(cols, dtype=torch.int32, device=device)[None, :]
    bits = _lowbias32(_lowbias32(row + seed[adapter // 2]) ^ (col * (0x9E3779B1 - (1 << 32))))
    if adapter % 2:
        bits = bits >> 16
    return (bits & 0xFFFF) >= threshold(p)
