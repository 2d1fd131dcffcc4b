"""The two products of LoRA that read x under dropout, each from one read of x for all adapters of a group.

    dropped_mm(x, a, seeds, ...)    s_j  = 1 / (1 - p_j) (mask_j x) A_j^T       [M, r_j], the forward
    dropped_grad(ds, x, seeds, ...) dA_j = 1 / (1 - p_j) dS_j^T (mask_j x)      [r_j, K], the backward

As plain ATen every adapter writes its masked x and reads it again: 3 times the traffic for one adapter, 7 times for q, k, v.
Here the masks are made in registers from the seeds (kernels/dropout.py), one hash for two adapters; x is zeroed in 16 bit
and the scale is put on the float32 sums. Both sums cross programs, so the ops return partial sums in float32, as
kernels/lora_grads.py does; the caller adds them up in ATen.

Costs on sm_90, by the compiled code: a hash is 2 multiplications, which have a pipe of their own, and 3 operations on the
integer pipe (64 a cycle and multiprocessor); a mask 3 more (compare, select, half an unpacking and half a packing), and a
multiplication for the lower half. With what surrounds them 6.4, 9.0 and 14.6 operations an element on that pipe for one, two
and three adapters, in the gradient 7.3, 9.9 and 15.4. Measured on an H200 at 8192 x 2048, rank 16: 13.5, 17.0 and 26.1 us, the gradient
14.1, 18.8 and 25.7, beside 9.5 us to read x (33.5 MB); plain ATen takes 26, 49 and 75, the gradient 30, 57 and 82. Three adapters are bound by
arithmetic.

Masked x is the left operand of `tl.dot`, so the gradient computes tiles of dA^T = (mask x)^T dS: the tensor cores take it from registers,
where the masked tile is. Triton loads x from shared memory in the operand's layout (`ldmatrix`, transposed for the gradient)
and masks it there, as long as all that the mask is made of are loads and constants. An `arange` in the loop makes it mask in the
layout of the load and pass every masked tile through shared memory, with two barriers for each adapter. So the columns' part of
the hash is an input, `dropout.columns(K)`: 4 bytes a column, one small kernel for all calls of a graph with that K.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import mm_flop, register_flop_formula

from fastft.kernels import dropout as masks
from fastft.kernels import warmup
from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.guard import guarded
from fastft.kernels.lora_grads import padded, row_blocks
from fastft.kernels.low_rank import runs, unit_columns

try:
    import triton
    import triton.language as tl

    from fastft.kernels.low_rank import mix
except ImportError:  # CPU builds of PyTorch come without Triton
    triton = None

MAX_RANK = 64  # of one adapter

# What one launch serves: so many columns of s (ranks rounded up to powers of two, 64 accumulators a thread) and so many
# adapters. More take another launch, which reads x again.
MAX_WIDTH, MAX_ADAPTERS = 128, 4

# (columns of s, (BLOCK_M, BLOCK_K, num_warps, num_stages)), the first that is wide enough. Nothing spills on any target
# (tests/ops). Two warps, each with rows of x of its own (columns in the gradient): 64 elements a thread up to 48 columns. With 32 LLVM
# turns the compares of a pair of adapters into one mask of 64 bits and takes it apart again, 20 operations instead of 14.6 for three adapters.
# sm_90: 179 and 198 registers, 29 KiB of shared memory, 5 programs a multiprocessor.
# Within 5 % of the best of 9 on an H200 at the six shapes measured, all at rank 16.
# Never four warps: then Triton takes `wgmma`, and in Triton 3.6 the gradient of an adapter without dropout beside a wider one was wrong there
# (ranks 64 and 3, H200: off by 24 %, and an illegal address where the first had dropout).
MM_CONFIGS = [(48, (64, 64, 2, 3)), (128, (32, 32, 2, 3))]
GRAD_CONFIGS = [(48, (64, 64, 2, 3)), (128, (64, 32, 2, 3))]

# `dropped_mm` cuts K into so many spans: with 8192 rows 512 programs, 3.9 for each of an H200's 132 multiprocessors. Partial
# sums, 4 * M * sum r * 4 bytes, written and read once: for three adapters of rank 16 19 % of x at K = 2048, 9 % at 4096.
SPANS = 4

# Columns that a span is a multiple of, whatever the configuration: twice the largest BLOCK_K.
SPAN_STEP = 128

LIBRARY.define("dropped_mm(Tensor x, Tensor a, Tensor seeds, Tensor columns, int[] ranks, float[] dropout) -> Tensor")
LIBRARY.define("dropped_grad(Tensor ds, Tensor x, Tensor seeds, Tensor columns, int[] ranks, float[] dropout) -> Tensor")


def column_spans(k: int, spans: int = SPANS) -> tuple[int, int]:
    """`(spans, columns in a span)` for K columns, at most `spans` of them; of K alone, so that lengths that change compile once."""
    span = -(-k // (spans * SPAN_STEP)) * SPAN_STEP
    return -(-k // span), span


def block_rows(k: int) -> int:
    """Rows that a program of `dropped_grad` adds up; a function of K alone.

    Programs at 8192 rows: 512 at K = 2048 and 4096, 1792 at 14336. Partial sums of three adapters of rank 16, written and read
    once: 19 % of x with 512 rows, 9 % with 1024.
    """
    return 512 if k <= 2048 else 1024


def _masked(x: Tensor, seeds: Tensor, adapter: int, p: float) -> Tensor:
    """x as the adapter sees it, not yet scaled, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if p == 0 else torch.where(masks.keep_mask(seeds, adapter, p, x.shape[1]), x, 0.0)


def reference_mm(x: Tensor, a: Tensor, seeds: Tensor, columns: Tensor, ranks: list[int], dropout: list[float]) -> Tensor:
    """x: [M, K], a: [sum r, K], seeds: int32 [n, M], columns: `dropout.columns(K)`; returns s [1, M, sum r] in float32. The specification."""
    parts = [
        _masked(x, seeds, j, p) @ rows.to(torch.promote_types(x.dtype, torch.float32)).t() * masks.scale(p)
        for j, (p, rows) in enumerate(zip(dropout, a.split(ranks), strict=True))
    ]
    return torch.cat(parts, 1)[None]


def reference_grad(ds: Tensor, x: Tensor, seeds: Tensor, columns: Tensor, ranks: list[int], dropout: list[float]) -> Tensor:
    """ds: [M, sum r], the others as above; returns dA [1, sum r, K] in float32. The specification."""
    parts = [
        part.to(torch.promote_types(x.dtype, torch.float32)).t() @ _masked(x, seeds, j, p) * masks.scale(p)
        for j, (p, part) in enumerate(zip(dropout, ds.split(ranks, 1), strict=True))
    ]
    return torch.cat(parts)[None]


if triton is not None:

    @triton.jit
    def dropped_mm_kernel(
        x_ptr, a_ptr, seeds_ptr, columns_ptr, out_ptr, M, K, R, stride_x, stride_a, span,
        STARTS: tl.constexpr, RANKS: tl.constexpr, WIDTHS: tl.constexpr, LIMITS: tl.constexpr, SCALES: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        piece = tl.program_id(1)
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = rows < M
        wide_rows = rows.to(tl.int64)
        seeds, totals = (), ()
        for pair in tl.static_range((len(RANKS) + 1) // 2):
            seeds = seeds + (tl.load(seeds_ptr + pair * M + rows, mask=in_m, other=0)[:, None],)
        for j in tl.static_range(len(RANKS)):
            totals = totals + (tl.full((BLOCK_M, WIDTHS[j]), 0.0, tl.float32),)
        for first in range(piece * span, tl.minimum(piece * span + span, K), BLOCK_K):  # span: a multiple of BLOCK_K
            cols = first + tl.arange(0, BLOCK_K)
            in_k = cols < K
            x = tl.load(x_ptr + wide_rows[:, None] * stride_x + cols[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0)
            columns = tl.load(columns_ptr + cols, mask=in_k, other=0)[None, :]
            sums = ()
            for j in tl.static_range(len(RANKS)):
                if j % 2 == 0:  # one hash serves both adapters of a pair
                    bits = mix(seeds[j // 2] ^ columns)
                ranks = tl.arange(0, WIDTHS[j])
                in_a = in_k[:, None] & (ranks < RANKS[j])[None, :]
                a = tl.load(a_ptr + (STARTS[j] + ranks)[None, :] * stride_a + cols[:, None], mask=in_a, other=0.0)
                kept = x
                if LIMITS[j] > -2147483648:  # the limit where dropout is 0
                    kept = tl.where((bits << (16 * (j % 2))) >= LIMITS[j], x, 0.0)
                sums = sums + (tl.dot(kept, a, totals[j]),)
            totals = sums
        for j in tl.static_range(len(RANKS)):
            ranks = tl.arange(0, WIDTHS[j])
            out = out_ptr + (piece.to(tl.int64) * M + wide_rows)[:, None] * R + (STARTS[j] + ranks)[None, :]
            tl.store(out, totals[j] * SCALES[j], mask=in_m[:, None] & (ranks < RANKS[j])[None, :])

    @triton.jit
    def dropped_grad_kernel(
        ds_ptr, x_ptr, seeds_ptr, columns_ptr, out_ptr, M, K, R, stride_ds, stride_x, span,
        STARTS: tl.constexpr, RANKS: tl.constexpr, WIDTHS: tl.constexpr, LIMITS: tl.constexpr, SCALES: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        piece = tl.program_id(1)
        cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = cols < K
        columns = tl.load(columns_ptr + cols, mask=in_k, other=0)[:, None]
        totals = ()
        for j in tl.static_range(len(RANKS)):
            totals = totals + (tl.full((BLOCK_K, WIDTHS[j]), 0.0, tl.float32),)
        for first in range(piece * span, tl.minimum(piece * span + span, M), BLOCK_M):  # span: a multiple of BLOCK_M
            rows = first + tl.arange(0, BLOCK_M)
            in_m = rows < M
            wide_rows = rows.to(tl.int64)
            x = tl.load(x_ptr + wide_rows[None, :] * stride_x + cols[:, None], mask=in_m[None, :] & in_k[:, None], other=0.0)
            sums = ()
            for j in tl.static_range(len(RANKS)):
                if j % 2 == 0:
                    bits = mix(tl.load(seeds_ptr + (j // 2) * M + rows, mask=in_m, other=0)[None, :] ^ columns)
                ranks = tl.arange(0, WIDTHS[j])
                in_ds = in_m[:, None] & (ranks < RANKS[j])[None, :]
                ds = tl.load(ds_ptr + wide_rows[:, None] * stride_ds + (STARTS[j] + ranks)[None, :], mask=in_ds, other=0.0)
                kept = x
                if LIMITS[j] > -2147483648:
                    kept = tl.where((bits << (16 * (j % 2))) >= LIMITS[j], x, 0.0)
                sums = sums + (tl.dot(kept, ds, totals[j]),)
            totals = sums
        for j in tl.static_range(len(RANKS)):
            ranks = tl.arange(0, WIDTHS[j])
            out = out_ptr + (piece * R + STARTS[j] + ranks).to(tl.int64)[None, :] * K + cols[:, None]
            tl.store(out, totals[j] * SCALES[j], mask=in_k[:, None] & (ranks < RANKS[j])[None, :])


def _launches(configs, ranks: tuple[int, ...], dropout: tuple[float, ...]):
    """For each launch the first of its adapters, its constants and its configuration: as many pairs of adapters as fit."""
    widths = [max(16, triton.next_power_of_2(r)) for r in ranks]
    first = 0
    while first < len(ranks):
        end = first + 2
        while end < len(ranks) and end + 2 - first <= MAX_ADAPTERS and sum(widths[first : end + 2]) <= MAX_WIDTH:
            end += 2
        taken = range(first, min(end, len(ranks)))
        constants = {
            "STARTS": tuple(sum(ranks[:j]) for j in taken),
            "RANKS": tuple(ranks[j] for j in taken),
            "WIDTHS": tuple(widths[j] for j in taken),
            "LIMITS": tuple(masks.limit(dropout[j]) for j in taken),
            "SCALES": tuple(masks.scale(dropout[j]) for j in taken),
        }
        yield first, constants, next(config for width, config in configs if sum(widths[first:end]) <= width)
        first = end


def launch_mm(x, a, seeds, columns, ranks: tuple[int, ...], dropout: tuple[float, ...], configs=MM_CONFIGS, spans: int = SPANS) -> Tensor:
    """`dropped_mm` by the kernel."""
    x, a = unit_columns(x), unit_columns(a)
    (m, k), r = x.shape, a.shape[0]
    spans, span = column_spans(k, spans)
    out = x.new_empty((spans, m, r), dtype=torch.float32)
    for first, constants, (block_m, block_k, warps, stages) in _launches(configs, ranks, dropout):
        warmup.launch(
            dropped_mm_kernel, (triton.cdiv(m, block_m), spans),
            x, a, seeds[first // 2 :], columns, out, m, k, r, x.stride(0), a.stride(0), span, **constants,
            BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def launch_grad(ds, x, seeds, columns, ranks: tuple[int, ...], dropout: tuple[float, ...], configs=GRAD_CONFIGS, rows: int | None = None) -> Tensor:
    """`dropped_grad` by the kernel; `rows` of a program, a multiple of every BLOCK_M."""
    ds, x = unit_columns(ds), unit_columns(x)
    (m, k), r = x.shape, ds.shape[1]
    rows = rows or block_rows(k)
    out = x.new_empty((row_blocks(m, rows), r, k), dtype=torch.float32)
    for first, constants, (block_m, block_k, warps, stages) in _launches(configs, ranks, dropout):
        warmup.launch(
            dropped_grad_kernel, (triton.cdiv(k, block_k), out.shape[0]),
            ds, x, seeds[first // 2 :], columns, out, m, k, r, ds.stride(0), x.stride(0), rows, **constants,
            BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def serves(x: Tensor, ranks: list[int]) -> bool:
    """True where the kernels run; everywhere else plain ATen is meant to be used, not the references."""
    return runs(x, x.dtype) and max(ranks) <= MAX_RANK


def _cuda_mm(x: Tensor, a: Tensor, seeds: Tensor, columns: Tensor, ranks: list[int], dropout: list[float]) -> Tensor:
    def fallback() -> Tensor:
        return padded(reference_mm(x, a, seeds, columns, ranks, dropout), column_spans(x.shape[1])[0])

    if not serves(x, ranks):
        return fallback()
    return guarded("dropped_mm", lambda: launch_mm(x, a, seeds, columns, tuple(ranks), tuple(dropout)), fallback)


def _cuda_grad(ds: Tensor, x: Tensor, seeds: Tensor, columns: Tensor, ranks: list[int], dropout: list[float]) -> Tensor:
    def fallback() -> Tensor:
        return padded(reference_grad(ds, x, seeds, columns, ranks, dropout), row_blocks(x.shape[0], block_rows(x.shape[1])))

    if not serves(x, ranks):
        return fallback()
    return guarded("dropped_grad", lambda: launch_grad(ds, x, seeds, columns, tuple(ranks), tuple(dropout)), fallback)


def _fake_mm(x: Tensor, a: Tensor, *rest) -> Tensor:
    spans = column_spans(x.shape[1])[0] if x.is_cuda else 1
    return x.new_empty((spans, x.shape[0], a.shape[0]), dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_grad(ds: Tensor, x: Tensor, *rest) -> Tensor:
    blocks = row_blocks(x.shape[0], block_rows(x.shape[1])) if x.is_cuda else 1
    return x.new_empty((blocks, ds.shape[1], x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))


dropped_mm = warmup.register("dropped_mm", reference_mm, _cuda_mm, _fake_mm)
dropped_grad = warmup.register("dropped_grad", reference_grad, _cuda_grad, _fake_grad)


@register_flop_formula(torch.ops.fastft.dropped_mm)
def _flops_mm(x_shape, a_shape, *rest, out_shape=None, **kwargs) -> int:
    return mm_flop(x_shape, (a_shape[1], a_shape[0]))


@register_flop_formula(torch.ops.fastft.dropped_grad)
def _flops_grad(ds_shape, x_shape, *rest, out_shape=None, **kwargs) -> int:
    return mm_flop((ds_shape[1], ds_shape[0]), x_shape)
