"""`fastft::lora_grads(dy, s, b)`: both low-rank gradients of a LoRA linear from one read of dy.

    dS = dy b        [M, R]      the gradient of s = x A^T, b being the scaled B matrix
    dB = dy^T s      [N, R]

dy is the large operand (8192 x 28672 for gate and up of an 8B model) and both products are bound by reading it. A program
owns BLOCK_M rows and a span of columns; dS of its rows stays in registers while it walks the columns, dB of each tile goes
out at once. Both sums cross programs, so the op returns partial sums, dS [spans, M, R] and dB [row blocks, N, R] in
float32; the caller adds them up in ATen, where Inductor fuses the sum with the scaling, cast and concatenation that follow.
Deterministic, unlike the atomics of LoRAFusion (arXiv 2510.00206), which has the same one-read idea.

Traffic beyond dy at M = 8192, R = 16: (8192 / BLOCK_M) * N * R * 4 bytes of dB partials, written and read once: 12 % of dy
with BLOCK_M = 512, 25 % with 256.
"""

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.guard import guarded

try:
    import triton
    import triton.language as tl
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


LIBRARY.define("lora_grads(Tensor dy, Tensor s, Tensor b) -> (Tensor, Tensor)")


def reference(dy: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """dy: [M, N], s: [M, R], b: [N, R]; returns dS [1, M, R] and dB [1, N, R] in float32. The specification."""
    dy = dy.float()
    return (dy @ b.float())[None], (dy.t() @ s.float())[None]


if triton is not None:

    @triton.jit
    def lora_grads_kernel(
        dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, M, N, R, stride_dy, stride_s, stride_b, span,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        block_m, block_n = tl.program_id(0), tl.program_id(1)
        rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        ranks = tl.arange(0, BLOCK_R)
        in_m, in_r = rows < M, ranks < R
        wide_rows = rows.to(tl.int64)
        s = tl.load(s_ptr + wide_rows[:, None] * stride_s + ranks[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
        ds = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        start = block_n * span
        for offset in range(0, span, BLOCK_N):
            cols = start + offset + tl.arange(0, BLOCK_N)
            in_n = (cols < N) & (offset + tl.arange(0, BLOCK_N) < span)
            dy = tl.load(dy_ptr + wide_rows[:, None] * stride_dy + cols[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0)
            b = tl.load(b_ptr + cols[:, None] * stride_b + ranks[None, :], mask=in_n[:, None] & in_r[None, :], other=0.0)
            ds = tl.dot(dy, b, ds)
            db = tl.dot(tl.trans(dy), s)
            out = db_ptr + (block_m * N + cols).to(tl.int64)[:, None] * R + ranks[None, :]
            tl.store(out, db, mask=in_n[:, None] & in_r[None, :])
        out = ds_ptr + (block_n.to(tl.int64) * M + wide_rows)[:, None] * R + ranks[None, :]
        tl.store(out, ds, mask=in_m[:, None] & in_r[None, :])


@functools.cache
def config_for(index: int | None, rank: int) -> tuple[int, int, int, int]:
    """The launch configuration on GPU `index` (None: the current one)."""
    return pick(torch.cuda.get_device_properties(index).shared_memory_per_block_optin, rank)


# Spans a matrix is cut into: with 16 row blocks (8192 tokens, BLOCK_M = 512) 128 programs for an H200's 132
# multiprocessors. A function of nothing else, so that changing sequence lengths compile once.
SPANS = 8


def column_spans(n: int, block_n: int = 64) -> tuple[int, int]:
    """`(spans, columns in a span)` for N columns."""
    span = -(-n // (SPANS * block_n)) * block_n
    return -(-n // span), span


def row_blocks(m, block_m: int):
    return (m + block_m - 1) // block_m


def launch(dy: Tensor, s: Tensor, b: Tensor, config: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Runs the kernel with a configuration that `pick` gives."""
    block_m, block_n, warps, stages = config
    dy, s, b = (t if t.stride(1) == 1 else t.contiguous() for t in (dy, s, b))
    (m, n), r = dy.shape, s.shape[1]
    spans, span = column_spans(n, block_n)
    ds = dy.new_empty((spans, m, r), dtype=torch.float32)
    db = dy.new_empty((row_blocks(m, block_m), n, r), dtype=torch.float32)
    lora_grads_kernel[(db.shape[0], spans)](
        dy, s, b, ds, db, m, n, r, dy.stride(0), s.stride(0), b.stride(0), span,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=max(16, triton.next_power_of_2(r)), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return ds, db


def _cuda(dy: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    config = config_for(dy.device.index, s.shape[1])

    def fallback() -> tuple[Tensor, Tensor]:
        ds, db = reference(dy, s, b)
        return padded(ds, column_spans(dy.shape[1])[0]), padded(db, row_blocks(dy.shape[0], config[0]))

    return guarded("lora_grads", lambda: launch(dy, s, b, config), fallback)


def padded(part: Tensor, count: int) -> Tensor:
    """The partial sums of the reference with zeros behind them, in the shape that the fake promised."""
    return torch.cat([part, part.new_zeros((count - 1, *part.shape[1:]))])


def _fake(dy: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    (m, n), r = dy.shape, s.shape[1]
    spans, blocks = 1, 1
    if dy.is_cuda:
        spans, blocks = column_spans(n)[0], row_blocks(m, config_for(dy.device.index, s.shape[1])[0])
    return dy.new_empty((spans, m, r), dtype=torch.float32), dy.new_empty((blocks, n, r), dtype=torch.float32)


LIBRARY.impl("lora_grads", reference, "CPU")
LIBRARY.impl("lora_grads", _cuda, "CUDA")
torch.library.register_fake("fastft::lora_grads", _fake, lib=LIBRARY)
lora_grads = torch.ops.fastft.lora_grads.default


@register_flop_formula(torch.ops.fastft.lora_grads)
def _flops(dy_shape, s_shape, b_shape, out_shape=None, **kwargs) -> int:
    return 4 * dy_shape[0] * dy_shape[1] * s_shape[1]
