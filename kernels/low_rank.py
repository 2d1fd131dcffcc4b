"""`fastft::low_rank_mm(s, b) = s @ b` for a few columns of s: the outer product that starts an accumulation.

    forward     y_i = s_i B_i^T + b_i,     into which the base GEMM then adds         [M, r_i] x [r_i, N_i], `low_rank_mms`
    backward    dX  = dS [A_0; A_1; ...],  into which the base GEMMs then add         [M, R] x [R, K], `low_rank_mm`

Bound by writing the result. cuBLAS writes at 55 to 70 % of the H200's bandwidth at these shapes (8192 x 4096: 0.028 ms
against 0.0164 to write it, 8192 x 14336: 0.081 against 0.057; docs/notes.md): a Triton kernel that only streams tiles out.

`low_rank_mms` makes the summands of all siblings on one input in one launch, each in a buffer of its own, which its GEMM can
write. The kernel is one and the same: a program finds its sibling by its column block and picks that one's pointers, sizes
and strides: for three siblings 400 to 600 bytes of code more. A branch for each is 2.6 times that code and, on sm_100, 19
registers more.

With dropout the result is a sum over adapters, each term under its adapter's mask, which the kernel makes from the seeds
(kernels/dropout.py) instead of writing the terms out and reading them back:

    low_rank_mm_dropout(s, b, seeds, ranks, dropout) = sum_j mask_j / (1 - p_j) * (s_j @ b_j)
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import mm_flop, register_flop_formula

from fastft.kernels import dropout as masks
from fastft.kernels import warmup
from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.guard import guarded

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without Triton
    triton = None

# Up to this rank the kernel beats cuBLAS (H200, 8192 rows, ms against cuBLAS): N = 2048 0.0105/0.0139, 4096 0.0192/0.0253,
# 14336 0.0586/0.0750 at rank 16; at rank 48 (padded to 64) 0.0258/0.0251.
MAX_RANK = 32
MAX_RANK_DROPOUT = 64  # of one adapter; the masks would otherwise cost y-sized tensors

# The best of seven (64 to 128 rows, 64 to 256 columns, 4 or 8 warps) at every N measured.
BLOCK_M, BLOCK_N, WARPS = 64, 128, 4

LIBRARY.define("low_rank_mm(Tensor s, Tensor b, Tensor? bias) -> Tensor")
LIBRARY.define("low_rank_mms(Tensor s, Tensor[] b, Tensor?[] biases) -> Tensor[]")
LIBRARY.define("low_rank_mm_dropout(Tensor s, Tensor b, Tensor seeds, int[] ranks, float[] dropout) -> Tensor")


def reference(s: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """s: [M, R], b: [R, N], bias: [N] or None; returns [M, N]. The specification."""
    return torch.mm(s, b) if bias is None else torch.addmm(bias, s, b)


def reference_group(s: Tensor, b: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """s: [M, sum R_i], b: [R_i, N_i], biases: [N_i] or None; returns [M, N_i] for each, its own buffer. The specification."""
    parts = s.split([matrix.shape[0] for matrix in b], 1)
    return [reference(*operands) for operands in zip(parts, b, biases, strict=True)]


def reference_dropout(s: Tensor, b: Tensor, seeds: Tensor, ranks: list[int], dropout: list[float]) -> Tensor:
    """s: [M, R], b: [R, N], seeds: int32 [n, M]; ranks and dropout: one entry an adapter; returns [M, N]. The specification."""
    total = None
    for j, (part, rows) in enumerate(zip(s.split(ranks, 1), b.split(ranks), strict=True)):
        term = torch.mm(part, rows)
        if dropout[j] > 0:
            keep = masks.keep_mask(seeds, j, dropout[j], term.shape[1])
            term = torch.where(keep, term * masks.scale(dropout[j]), 0.0).to(term.dtype)
        total = term if total is None else total + term
    return total


if triton is not None:

    @triton.jit
    def mix(x):
        # As in kernels/dropout.py; unsigned, so that the shift is logical without masking.
        x = x.to(tl.uint32, bitcast=True) * 0x7FEB352D
        x = x ^ (x >> 15)
        return (x * 0x846CA68B).to(tl.int32, bitcast=True)

    @triton.jit
    def select(values, index):
        # values[index], where only the running kernel knows the index.
        found = values[0]
        for i in tl.static_range(1, len(values)):
            found = tl.where(index >= i, values[i], found)
        return found

    @triton.jit
    def low_rank_kernel(
        s_ptr, b_ptrs, bias_ptrs, out_ptrs, M, Ns, stride_s, strides_br, strides_bn,
        STARTS: tl.constexpr, RANKS: tl.constexpr, BIASED: tl.constexpr, HAS_BIAS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(1)
        linear, first, end = 0, 0, tl.cdiv(Ns[0], BLOCK_N)
        for i in tl.static_range(1, len(RANKS)):
            linear = tl.where(block >= end, i, linear)
            first = tl.where(block >= end, end, first)
            end += tl.cdiv(Ns[i], BLOCK_N)
        N, R = select(Ns, linear), select(RANKS, linear)
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = (block - first) * BLOCK_N + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, BLOCK_R)
        in_m, in_n, in_r = rows < M, cols < N, ranks < R
        wide_rows = rows.to(tl.int64)
        s_ptr += select(STARTS, linear)
        s = tl.load(s_ptr + wide_rows[:, None] * stride_s + ranks[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
        b = select(b_ptrs, linear) + ranks[:, None] * select(strides_br, linear) + cols[None, :] * select(strides_bn, linear)
        total = tl.dot(s, tl.load(b, mask=in_r[:, None] & in_n[None, :], other=0.0))
        if HAS_BIAS:
            bias = tl.load(select(bias_ptrs, linear) + cols, mask=in_n & select(BIASED, linear), other=0.0)
            total += bias.to(tl.float32)[None, :]
        out_ptr = select(out_ptrs, linear)
        out = out_ptr + wide_rows[:, None] * N + cols[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])

    @triton.jit
    def low_rank_dropout_kernel(
        s_ptr, b_ptr, seeds_ptr, out_ptr, M, N, stride_s, stride_br, stride_bn,
        STARTS: tl.constexpr, RANKS: tl.constexpr, LIMITS: tl.constexpr, SCALES: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, BLOCK_R)
        in_m, in_n = rows < M, cols < N
        wide_rows = rows.to(tl.int64)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for pair in tl.static_range((len(RANKS) + 1) // 2):
            # One hash serves both adapters of a pair.
            seed = tl.load(seeds_ptr + pair * M + rows, mask=in_m, other=0)
            bits = mix(seed[:, None] ^ (cols * 12043)[None, :])  # dropout.SPREAD
            for half in tl.static_range(2):
                if 2 * pair + half < len(RANKS):
                    in_r = ranks < RANKS[2 * pair + half]
                    column = STARTS[2 * pair + half] + ranks
                    s = tl.load(s_ptr + wide_rows[:, None] * stride_s + column[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
                    b = tl.load(
                        b_ptr + column[:, None] * stride_br + cols[None, :] * stride_bn,
                        mask=in_r[:, None] & in_n[None, :],
                        other=0.0,
                    )
                    keep = (bits << (16 * half)) >= LIMITS[2 * pair + half]
                    total += tl.where(keep, tl.dot(s, b) * SCALES[2 * pair + half], 0.0)
        out = out_ptr + wide_rows[:, None] * N + cols[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def unit_columns(s: Tensor) -> Tensor:
    """As the kernels want it: neighbours in a row side by side."""
    return s if s.stride(1) == 1 else s.contiguous()


def before(sizes: Sequence[int]) -> tuple[int, ...]:
    """For each the sum of those before it."""
    return tuple(itertools.accumulate(sizes[:-1], initial=0))


def launch(s: Tensor, b: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """s_i @ b_i + bias_i by the kernel, s_i the columns of s that follow those of the sibling before."""
    s = unit_columns(s)
    m, ranks, widths = s.shape[0], tuple(t.shape[0] for t in b), tuple(t.shape[1] for t in b)
    biased = tuple(bias is not None for bias in biases)
    outs = tuple(s.new_empty((m, n)) for n in widths)
    warmup.launch(
        low_rank_kernel, (triton.cdiv(m, BLOCK_M), sum(triton.cdiv(n, BLOCK_N) for n in widths)),
        s, tuple(b), tuple(s if bias is None else bias for bias in biases), outs, m, widths,
        s.stride(0), tuple(t.stride(0) for t in b), tuple(t.stride(1) for t in b),
        STARTS=before(ranks), RANKS=ranks, BIASED=biased, HAS_BIAS=any(biased),
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=max(16, triton.next_power_of_2(max(ranks))), num_warps=WARPS,
    )  # fmt: skip
    return list(outs)


def launch_dropout(s: Tensor, b: Tensor, seeds: Tensor, ranks: tuple[int, ...], dropout: tuple[float, ...]) -> Tensor:
    """The sum of the terms of `ranks`, each under its mask, by the kernel."""
    s = unit_columns(s)
    (m, _), n = s.shape, b.shape[1]
    out = s.new_empty((m, n))
    warmup.launch(
        low_rank_dropout_kernel, (triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N)),
        s, b, seeds, out, m, n, s.stride(0), b.stride(0), b.stride(1),
        STARTS=before(ranks), RANKS=ranks,
        LIMITS=tuple(map(masks.limit, dropout)), SCALES=tuple(map(masks.scale, dropout)),
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=max(16, triton.next_power_of_2(max(ranks))), num_warps=WARPS,
    )  # fmt: skip
    return out


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype that a product of x computes in: autocast's where that is on, which leaves float64 alone, else x's."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype


def runs(x: Tensor, dtype: torch.dtype) -> bool:
    """True where Triton kernels can do arithmetic in `dtype` on x, which may be fake: CUDA, 16 bit."""
    return triton is not None and x.is_cuda and dtype in (torch.bfloat16, torch.float16)


def serves(s: Tensor, largest_rank: int, limit: int = MAX_RANK) -> bool:
    """True where the kernel is faster than the reference: few columns (see MAX_RANK)."""
    return runs(s, s.dtype) and largest_rank <= limit


def _cuda(s: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if not serves(s, s.shape[1]):
        return reference(s, b, bias)
    return guarded("low_rank_mm", lambda: launch(s, [b], [bias])[0], lambda: reference(s, b, bias))


def _cuda_group(s: Tensor, b: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    if not serves(s, max(matrix.shape[0] for matrix in b)):
        return reference_group(s, b, biases)
    return guarded("low_rank_mms", lambda: launch(s, b, biases), lambda: reference_group(s, b, biases))


def _cuda_dropout(s: Tensor, b: Tensor, seeds: Tensor, ranks: list[int], dropout: list[float]) -> Tensor:
    def fallback() -> Tensor:
        return reference_dropout(s, b, seeds, ranks, dropout)

    if not serves(s, max(ranks), MAX_RANK_DROPOUT):
        return fallback()
    return guarded("low_rank_mm_dropout", lambda: launch_dropout(s, b, seeds, tuple(ranks), tuple(dropout)), fallback)


def _fake(s: Tensor, b: Tensor, *rest) -> Tensor:
    return s.new_empty((s.shape[0], b.shape[1]))


def _fake_group(s: Tensor, b: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [_fake(s, matrix) for matrix in b]


low_rank_mm = warmup.register("low_rank_mm", reference, _cuda, _fake)
low_rank_mms = warmup.register("low_rank_mms", reference_group, _cuda_group, _fake_group)
low_rank_mm_dropout = warmup.register("low_rank_mm_dropout", reference_dropout, _cuda_dropout, _fake)


@register_flop_formula([torch.ops.fastft.low_rank_mm, torch.ops.fastft.low_rank_mm_dropout])
def _flops(s_shape, b_shape, *rest, out_shape=None, **kwargs) -> int:
    return mm_flop(s_shape, b_shape)


@register_flop_formula(torch.ops.fastft.low_rank_mms)
def _flops_group(s_shape, b_shapes, *rest, out_shape=None, **kwargs) -> int:
    return sum(mm_flop((s_shape[0], r), (r, n)) for r, n in b_shapes)
