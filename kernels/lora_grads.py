"""`fastft::lora_grads(dy, s, b)`: the low-rank gradients of sibling LoRA linears, from one read of each dy and in one launch.

    dS_i = dy_i b_i      [M, R_i]      the gradient of s_i, the linear's columns of s = x [A_0; A_1; ...]^T
    dB_i = dy_i^T s_i    [N_i, R_i]

dy is the large operand (8192 x 28672 for gate and up of an 8B model) and both products are bound by reading it. A program
owns BLOCK_M rows and a span of one linear's columns; dS of its rows stays in registers while it walks the columns, dB of each
tile goes out at once. Both sums cross programs, so the op returns partial sums in float32; the caller adds them up in ATen,
where Inductor fuses the sum with the cast that follows. Deterministic, unlike the atomics of LoRAFusion (arXiv 2510.00206),
which has the same one-read idea.

    dS   [spans, M, sum R_i]               side by side, as dA and dX read it: no concatenation
    dB   [row blocks, sum N_i R_i]         one after another, row-major

so that either takes one kernel for all siblings. A linear with fewer spans than another has zeros in the rest of them.

Traffic beyond dy at M = 8192, R = 16: (8192 / BLOCK_M) * N * R * 4 bytes of dB partials, written and read once: 12 % of dy
with BLOCK_M = 512, 25 % with 256.
"""

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastft.kernels import warmup
from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.guard import guarded
from fastft.kernels.low_rank import before, unit_columns

try:
    import triton
    import triton.language as tl

    from fastft.kernels.low_rank import select
except ImportError:  # CPU builds of PyTorch come without Triton: the reference below serves there
    triton = None

# Largest rank whose accumulator fits the registers beside a tile; above it two GEMMs are used.
MAX_RANK = 64

# (shared memory a block may use, largest rank, BLOCK_M, BLOCK_N, num_warps, num_stages), the first that fits: sm_90 and
# sm_100 have 227 KiB, sm_80 163 KiB, sm_86, sm_89 and sm_120 99 KiB. None spills on any of them (tests/ops).
CONFIGS = [
    (220 << 10, 16, 512, 64, 8, 3),
    (220 << 10, 64, 256, 64, 8, 3),
    (0, 16, 256, 64, 8, 3),
    (0, 64, 128, 64, 8, 3),
]


def pick(memory: int, rank: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages for a GPU with this much shared memory a block (bytes)."""
    return next(config[2:] for config in CONFIGS if memory >= config[0] and rank <= config[1])


LIBRARY.define("lora_grads(Tensor[] dy, Tensor s, Tensor[] b) -> (Tensor, Tensor)")


def reference(dy: list[Tensor], s: Tensor, b: list[Tensor]) -> tuple[Tensor, Tensor]:
    """dy: [M, N_i], s: [M, sum R_i], b: [N_i, R_i]; returns dS [1, M, sum R_i] and dB [1, sum N_i R_i] in float32. The specification."""
    dy, parts = [y.float() for y in dy], s.float().split([matrix.shape[1] for matrix in b], 1)
    ds = [y @ matrix.float() for y, matrix in zip(dy, b, strict=True)]
    db = [(y.t() @ part).flatten() for y, part in zip(dy, parts, strict=True)]
    return torch.cat(ds, 1)[None], torch.cat(db)[None]


if triton is not None:

    @triton.jit
    def lora_grads_kernel(
        dy_ptrs, s_ptr, b_ptrs, ds_ptr, db_ptr, M, Ns, R, size, strides_dy, stride_s, strides_b, spans, offsets,
        STARTS: tl.constexpr, RANKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        block_m, block_n, linear = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        dy_ptr, b_ptr, stride_dy, stride_b = select(dy_ptrs, linear), select(b_ptrs, linear), select(strides_dy, linear), select(strides_b, linear)
        N, r, span, column = select(Ns, linear), select(RANKS, linear), select(spans, linear), select(STARTS, linear)
        rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        ranks = tl.arange(0, BLOCK_R)
        in_m, in_r = rows < M, ranks < r
        wide_rows = rows.to(tl.int64)
        s = tl.load(s_ptr + column + wide_rows[:, None] * stride_s + ranks[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
        ds = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        db_ptr += block_m.to(tl.int64) * size + select(offsets, linear)
        end = tl.minimum(block_n * span + span, N)
        for first in range(block_n * span, end, BLOCK_N):  # span: a multiple of BLOCK_N
            cols = first + tl.arange(0, BLOCK_N)
            in_n = cols < end
            dy = tl.load(dy_ptr + wide_rows[:, None] * stride_dy + cols[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0)
            b = tl.load(b_ptr + cols[:, None] * stride_b + ranks[None, :], mask=in_n[:, None] & in_r[None, :], other=0.0)
            ds = tl.dot(dy, b, ds)
            db = tl.dot(tl.trans(dy), s)
            tl.store(db_ptr + cols.to(tl.int64)[:, None] * r + ranks[None, :], db, mask=in_n[:, None] & in_r[None, :])
        out = ds_ptr + (block_n.to(tl.int64) * M + wide_rows)[:, None] * R + (column + ranks)[None, :]
        tl.store(out, ds, mask=in_m[:, None] & in_r[None, :])


@functools.cache
def config_for(index: int | None, rank: int) -> tuple[int, int, int, int]:
    """The launch configuration on GPU `index` (None: the current one)."""
    return pick(torch.cuda.get_device_properties(index).shared_memory_per_block_optin, rank)


def _config(dy: list[Tensor], b: list[Tensor]) -> tuple[int, int, int, int]:
    """That of the largest rank, for all siblings."""
    return config_for(dy[0].device.index, max(matrix.shape[1] for matrix in b))


# Spans a matrix is cut into: with 16 row blocks (8192 tokens, BLOCK_M = 512) 128 programs for an H200's 132
# multiprocessors. A function of nothing else, so that changing sequence lengths compile once.
SPANS = 8


def column_spans(n: int, block_n: int = 64) -> tuple[int, int]:
    """`(spans, columns in a span)` for N columns."""
    span = -(-n // (SPANS * block_n)) * block_n
    return -(-n // span), span


def row_blocks(m, block_m: int):
    return (m + block_m - 1) // block_m


def _parts(dy: list[Tensor], config: tuple[int, int, int, int]) -> tuple:
    """How many partial sums `(dS, dB)` have."""
    return max(column_spans(y.shape[1], config[1])[0] for y in dy), row_blocks(dy[0].shape[0], config[0])


def _empty(dy: list[Tensor], s: Tensor, b: list[Tensor], spans, blocks) -> tuple[Tensor, Tensor]:
    ds = s.new_empty((spans, *s.shape), dtype=torch.float32)
    return ds, s.new_empty((blocks, sum(matrix.numel() for matrix in b)), dtype=torch.float32)


def launch(dy: list[Tensor], s: Tensor, b: list[Tensor], config: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Runs the kernel with a configuration that `pick` gives."""
    block_m, block_n, warps, stages = config
    dy, s, b = tuple(map(unit_columns, dy)), unit_columns(s), tuple(map(unit_columns, b))
    widths, ranks = tuple(y.shape[1] for y in dy), tuple(matrix.shape[1] for matrix in b)
    spans, blocks = _parts(dy, config)
    ds, db = _empty(dy, s, b, spans, blocks)
    warmup.launch(
        lora_grads_kernel, (blocks, spans, len(dy)),
        dy, s, b, ds, db, s.shape[0], widths, s.shape[1], db.shape[1], tuple(y.stride(0) for y in dy), s.stride(0),
        tuple(matrix.stride(0) for matrix in b), tuple(column_spans(n, block_n)[1] for n in widths), before([matrix.numel() for matrix in b]),
        STARTS=before(ranks), RANKS=ranks, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=max(16, triton.next_power_of_2(max(ranks))),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return ds, db


def _cuda(dy: list[Tensor], s: Tensor, b: list[Tensor]) -> tuple[Tensor, Tensor]:
    config = _config(dy, b)

    def fallback() -> tuple[Tensor, Tensor]:
        return tuple(padded(part, count) for part, count in zip(reference(dy, s, b), _parts(dy, config), strict=True))

    return guarded("lora_grads", lambda: launch(dy, s, b, config), fallback)


def padded(part: Tensor, count: int) -> Tensor:
    """The partial sums of the reference with zeros behind them, in the shape that the fake promised."""
    return torch.cat([part, part.new_zeros((count - 1, *part.shape[1:]))])


def _fake(dy: list[Tensor], s: Tensor, b: list[Tensor]) -> tuple[Tensor, Tensor]:
    return _empty(dy, s, b, *(_parts(dy, _config(dy, b)) if s.is_cuda else (1, 1)))


lora_grads = warmup.register("lora_grads", reference, _cuda, _fake)


@register_flop_formula(torch.ops.fastft.lora_grads)
def _flops(dy_shapes, s_shape, b_shapes, out_shape=None, **kwargs) -> int:
    return sum(4 * m * n * r for (m, n), (_, r) in zip(dy_shapes, b_shapes, strict=True))
