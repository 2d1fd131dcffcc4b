"""`fastft::low_rank_mm(s, b) = s @ b` for a few columns of s: the outer product that starts an accumulation.

    forward     y_i = s_i (scaling B_i)^T, into which the base GEMM then adds         [M, r] x [r, N]
    backward    dX  = dS [A_0; A_1; ...],  into which the base GEMMs then add         [M, R] x [R, K]

Bound by writing the result. cuBLAS writes at 55 to 70 % of the H200's bandwidth at these shapes (8192 x 4096: 0.028 ms
against 0.0164 to write it, 8192 x 14336: 0.081 against 0.057; docs/notes.md): a Triton kernel that only streams tiles out.

With dropout the result is a sum over adapters, each term under its adapter's mask, which the kernel makes from the seeds
(kernels/dropout.py) instead of writing the terms out and reading them back:

    low_rank_mm_dropout(s, b, seeds, ranks, dropout) = sum_j mask_j / (1 - p_j) * (s_j @ b_j)
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import mm_flop, register_flop_formula

from fastft.kernels import dropout as masks
from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.guard import guarded

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without Triton
    triton = None

# Above this many columns cuBLAS is as fast: the product is no longer bound by the write.
MAX_RANK = 64
BLOCK_M, BLOCK_N, WARPS = 128, 128, 4

LIBRARY.define("low_rank_mm(Tensor s, Tensor b, Tensor? bias) -> Tensor")
LIBRARY.define("low_rank_mm_dropout(Tensor s, Tensor b, Tensor seeds, int[] ranks, float[] dropout) -> Tensor")


def reference(s: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """s: [M, R], b: [R, N], bias: [N] or None; returns [M, N]. The specification."""
    return torch.mm(s, b) if bias is None else torch.addmm(bias, s, b)


def reference_dropout(s: Tensor, b: Tensor, seeds: Tensor, ranks: list[int], dropout: list[float]) -> Tensor:
    """s: [M, R], b: [R, N], seeds: int32; ranks and dropout: one entry an adapter; returns [M, N]. The specification."""
    total = None
    for j, (part, rows) in enumerate(zip(s.split(ranks, 1), b.split(ranks), strict=True)):
        term = torch.mm(part, rows)
        if dropout[j] > 0:
            keep = masks.keep_mask(seeds, j, dropout[j], term.shape[0], term.shape[1], term.device)
            term = torch.where(keep, term * masks.scale(dropout[j]), 0.0).to(term.dtype)
        total = term if total is None else total + term
    return total


if triton is not None:

    @triton.jit
    def _lowbias32(x):
        x = x ^ ((x >> 16) & 0xFFFF)
        x = x * 0x7FEB352D
        x = x ^ ((x >> 15) & 0x1FFFF)
        x = x * -2073254261  # 0x846CA68B as int32
        return x ^ ((x >> 16) & 0xFFFF)

    @triton.jit
    def low_rank_kernel(
        s_ptr, b_ptr, bias_ptr, seeds_ptr, out_ptr, M, N, stride_s, stride_br, stride_bn,
        STARTS: tl.constexpr, RANKS: tl.constexpr, THRESHOLDS: tl.constexpr, SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, BLOCK_R)
        in_m, in_n = rows < M, cols < N
        wide_rows = rows.to(tl.int64)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for j in tl.static_range(len(RANKS)):
            in_r = ranks < RANKS[j]
            column = STARTS[j] + ranks
            s = tl.load(
                s_ptr + wide_rows[:, None] * stride_s + column[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0
            )
            b = tl.load(
                b_ptr + column[:, None] * stride_br + cols[None, :] * stride_bn, mask=in_r[:, None] & in_n[None, :], other=0.0
            )
            if THRESHOLDS[j] == 0:
                total = tl.dot(s, b, total)
            else:
                seed = tl.load(seeds_ptr + j // 2)
                bits = _lowbias32(_lowbias32(rows + seed)[:, None] ^ (cols * -1640531535)[None, :])  # 0x9E3779B1 as int32
                if j % 2 == 1:
                    bits = bits >> 16
                keep = (bits & 0xFFFF) >= THRESHOLDS[j]
                total += tl.where(keep, tl.dot(s, b) * SCALES[j], 0.0)
        if HAS_BIAS:
            total += tl.load(bias_ptr + cols, mask=in_n, other=0.0).to(tl.float32)[None, :]
        out = out_ptr + wide_rows[:, None] * N + cols[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def launch(
    s: Tensor, b: Tensor, bias: Tensor | None, seeds: Tensor | None, ranks: tuple[int, ...], dropout: tuple[float, ...]
) -> Tensor:
    """Runs the kernel: one term for every entry of `ranks`."""
    s = s if s.stride(1) == 1 else s.contiguous()
    (m, _), n = s.shape, b.shape[1]
    out = s.new_empty((m, n))
    starts = tuple(sum(ranks[:j]) for j in range(len(ranks)))
    thresholds = tuple(masks.threshold(p) if p > 0 else 0 for p in dropout)
    scales = tuple(masks.scale(p) if p > 0 else 1.0 for p in dropout)
    grid = (triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N))
    low_rank_kernel[grid](
        s, b, bias, seeds, out, m, n, s.stride(0), b.stride(0), b.stride(1),
        STARTS=starts, RANKS=ranks, THRESHOLDS=thresholds, SCALES=scales, HAS_BIAS=bias is not None,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=max(16, triton.next_power_of_2(max(ranks))), num_warps=WARPS,
    )  # fmt: skip
    return out


def _serves(s: Tensor, rank: int) -> bool:
    return triton is not None and s.dtype in (torch.bfloat16, torch.float16) and rank <= MAX_RANK


def _cuda(s: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    def fallback() -> Tensor:
        return reference(s, b, bias)

    rank = s.shape[1]
    if not _serves(s, rank):
        return fallback()
    return guarded("low_rank_mm", lambda: launch(s, b, bias, None, (rank,), (0.0,)), fallback)


def _cuda_dropout(s: Tensor, b: Tensor, seeds: Tensor, ranks: list[int], dropout: list[float]) -> Tensor:
    def fallback() -> Tensor:
        return reference_dropout(s, b, seeds, ranks, dropout)

    if not _serves(s, max(ranks)):
        return fallback()
    return guarded("low_rank_mm", lambda: launch(s, b, None, seeds, tuple(ranks), tuple(dropout)), fallback)


def _fake(s: Tensor, b: Tensor, *rest) -> Tensor:
    return s.new_empty((s.shape[0], b.shape[1]))


for _name, _cpu, _gpu in (
    ("low_rank_mm", reference, _cuda),
    ("low_rank_mm_dropout", reference_dropout, _cuda_dropout),
):
    LIBRARY.impl(_name, _cpu, "CPU")
    LIBRARY.impl(_name, _gpu, "CUDA")
    torch.library.register_fake(f"fastft::{_name}", _fake, lib=LIBRARY)

low_rank_mm = torch.ops.fastft.low_rank_mm.default
low_rank_mm_dropout = torch.ops.fastft.low_rank_mm_dropout.default


@register_flop_formula([torch.ops.fastft.low_rank_mm, torch.ops.fastft.low_rank_mm_dropout])
def _flops(s_shape, b_shape, *rest, out_shape=None, **kwargs) -> int:
    return mm_flop(s_shape, b_shape)
