"""`fastft::quantize_weight` and `quantize_weights_t`: a frozen weight in fp8 (e4m3), row by row, for kernels/fp8_linear.py.

    sw_n = max_k |W_nk| / 448        W8_nk = W_nk / sw_n           forward: W8 [N, K]
                                                                   backward: W8^T [K, sum N_i] of sibling weights, side by side

Tensor cores want both operands with the sum's dimension innermost (Hopper's take nothing else), hence the transpose. Both hold the same values.
Bound by memory: two bytes read and one written an element, 0.044 ms for 4096 x 14336 at 4 TB/s; the maximum's second read comes from the cache.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastft.kernels import warmup
from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.guard import guarded

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without Triton
    triton = None

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = 1e-12  # of a row of zeros

BLOCK_K, WARPS = 4096, 8
TILE_N, TILE_K, TILE_WARPS = 128, 64, 4

# `after`: its values are not read. Inductor knows no other order than what an operation reads, and would otherwise be free to make every W8 first.
LIBRARY.define("quantize_weight(Tensor weight, Tensor after) -> (Tensor, Tensor)", tags=(torch.Tag.flexible_layout,))
LIBRARY.define("quantize_weights_t(Tensor[] weights, Tensor[] scales, Tensor after) -> Tensor", tags=(torch.Tag.flexible_layout,))


def reference(weight: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [N, K]; returns e4m3 [N, K] and its scales, float32 [N]. The specification."""
    wide = weight.float()
    scale = (wide.abs().amax(1) * (1 / LARGEST)).clamp(min=SMALLEST_SCALE)
    return (wide * scale.reciprocal()[:, None]).to(E4M3), scale


def reference_t(weights: list[Tensor], scales: list[Tensor], after: Tensor) -> Tensor:
    """weights: [N_i, K], scales: float32 [N_i], from `reference`; returns e4m3 [K, sum N_i], the transposes side by side. The specification."""
    return torch.cat([(w.float() * scale.reciprocal()[:, None]).t() for w, scale in zip(weights, scales, strict=True)], 1).to(E4M3)


if triton is not None:

    @triton.jit
    def quantize_weight_kernel(w_ptr, out_ptr, scale_ptr, stride, K: tl.constexpr, BLOCK_K: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_K)
        largest = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, K, BLOCK_K):
            w = tl.load(w_ptr + row * stride + start + cols, mask=start + cols < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(w))
        scale = tl.maximum(tl.max(largest, 0) * (1 / 448), 1e-12)
        tl.store(scale_ptr + row, scale)
        inverse = tl.div_rn(1.0, scale)
        for start in range(0, K, BLOCK_K):  # from the cache
            w = tl.load(w_ptr + row * stride + start + cols, mask=start + cols < K, other=0.0).to(tl.float32)
            tl.store(out_ptr + row * K + start + cols, (w * inverse).to(tl.float8e4nv), mask=start + cols < K)

    @triton.jit
    def quantize_weight_t_kernel(w_ptr, scale_ptr, out_ptr, N, K, stride, stride_out, TILE_N: tl.constexpr, TILE_K: tl.constexpr):
        rows = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
        cols = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
        in_n, in_k = rows < N, cols < K
        w = tl.load(w_ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=in_n[:, None] & in_k[None, :], other=0.0).to(tl.float32)
        inverse = tl.div_rn(tl.full((TILE_N,), 1.0, tl.float32), tl.load(scale_ptr + rows, mask=in_n, other=1.0))
        made = tl.trans((w * inverse[:, None]).to(tl.float8e4nv))
        tl.store(out_ptr + cols.to(tl.int64)[:, None] * stride_out + rows[None, :], made, mask=in_k[:, None] & in_n[None, :])


def launch(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`reference` by the kernel. weight: unit stride along K."""
    n, k = weight.shape
    out, scale = weight.new_empty((n, k), dtype=E4M3), weight.new_empty((n,), dtype=torch.float32)
    with torch.cuda.device_of(weight):
        warmup.launch(quantize_weight_kernel, (n,), weight, out, scale, weight.stride(0), K=k, BLOCK_K=BLOCK_K, num_warps=WARPS)
    return out, scale


def launch_t(weights: list[Tensor], scales: list[Tensor]) -> Tensor:
    """`reference_t` by the kernel, one launch a weight. weights: unit stride along K."""
    k, total = weights[0].shape[1], sum(w.shape[0] for w in weights)
    out, start = weights[0].new_empty((k, total), dtype=E4M3), 0
    with torch.cuda.device_of(out):
        for w, scale in zip(weights, scales, strict=True):
            n = w.shape[0]
            grid = (triton.cdiv(n, TILE_N), triton.cdiv(k, TILE_K))
            warmup.launch(
                quantize_weight_t_kernel, grid, w, scale, out[:, start:], n, k, w.stride(0), total,
                TILE_N=TILE_N, TILE_K=TILE_K, num_warps=TILE_WARPS,
            )  # fmt: skip
            start += n
    return out


def _rows(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _cuda(weight: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    if triton is None:
        return reference(weight, after)
    return guarded("quantize_weight", lambda: launch(_rows(weight)), lambda: reference(weight, after))


def _cuda_t(weights: list[Tensor], scales: list[Tensor], after: Tensor) -> Tensor:
    if triton is None:
        return reference_t(weights, scales, after)
    return guarded("quantize_weights_t", lambda: launch_t([*map(_rows, weights)], scales), lambda: reference_t(weights, scales, after))


def _fake(weight: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=E4M3), weight.new_empty(weight.shape[:1], dtype=torch.float32)


def _fake_t(weights: list[Tensor], scales: list[Tensor], after: Tensor) -> Tensor:
    return weights[0].new_empty((weights[0].shape[1], sum(w.shape[0] for w in weights)), dtype=E4M3)


quantize_weight = warmup.register("quantize_weight", reference, _cuda, _fake)
quantize_weights_t = warmup.register("quantize_weights_t", reference_t, _cuda_t, _fake_t)


@register_flop_formula([torch.ops.fastft.quantize_weight, torch.ops.fastft.quantize_weights_t])
def _flops(*args, out_shape=None, **kwargs) -> int:
    return 0
