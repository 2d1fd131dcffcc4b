"""`fastft::gated`: the gate of an MLP, h = act(gate) * up, which adds the low-rank terms of gate and up itself.

    forward     h = act(g + s_g B_g^T) * (u + s_u B_u^T)              g, u: what the base GEMMs give, [M, N]
    backward    dh' = dh + mask (dS A) / (1 - p)                      dh: down's base GEMM; dS, A: down's adapters
                d_gate = dh' up act'(gate) ; d_up = dh' act(gate)
                dA = dS^T (mask h) / (1 - p)                          h is made again and not written
                mask: of down's dropout, from its seeds (kernels/dropout.py); without it all ones and p = 0

A gate reads g, u and, in the backward, dh anyway, so these terms cost it a product of inner size R on each tile. As summands
that the base GEMMs add to (kernels/low_rank.py) they are written once and read once more, and for dA h is: seven times M N
elements a layer. H200, 8192 x 14336, rank 16, us: forward 171, backward with dA 332 (Inductor's kernels of the same gate
without adapters 162 and 273).

A program walks down BLOCK_M rows at a time and keeps the factors of its columns in registers; loads run STAGES tiles ahead.
Programs that run at once stand beside each other, so that they read whole rows (below each other: 177 and 346 us).
Sums stay in float32 until h, d_gate and d_up are rounded. dA comes as partial sums over the rows of a program, which the
caller adds up in ATen, where Inductor fuses that with the cast.

Tried, us: BLOCK_M = 64 and no loop, as in low_rank.py: 262 and 761, because the tiles wait for their loads. s of down made here
as well, 395 at best, which a GEMM has in 87. dB of gate and up as well 522, dS too 850 at best, which `lora_grads` has in 180.
exp and division without denormals 341 for 346, more programs by fewer registers 358 and more.
"""

import functools

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

# Largest rank of one adapter that has been compiled for every target without spills.
MAX_RANK = 32

# The best of 25 (16 to 128 rows, 32 to 256 columns, 1 to 8 warps, 1 to 4 stages). One stage, no loads ahead: 207 and 441 us.
BLOCK_M, BLOCK_N, WARPS, STAGES = 16, 128, 4, 3
# Tiles that a program walks down. The backward's decide how many partial sums of dA there are: 8 tiles 370 us, 16 365, 32 360, 64 393.
STEPS, STEPS_BACKWARD = 8, 32

LIBRARY.define("gated(Tensor g, Tensor u, Tensor s, Tensor b_g, Tensor b_u, str activation) -> Tensor")
LIBRARY.define(
    "gated_backward(Tensor dh, Tensor ds, Tensor a, Tensor g, Tensor u, Tensor s, Tensor b_g, Tensor b_u, str activation, "
    "Tensor? seeds=None, Tensor? columns=None, float dropout=0.0) -> (Tensor, Tensor, Tensor)"
)

aten = torch.ops.aten
# What `activation` may be: the function of x and its gradient, of the upstream gradient and x.
ACTIVATIONS = {
    "silu": (aten.silu, aten.silu_backward),
    "gelu": (aten.gelu, aten.gelu_backward),
    "gelu_tanh": (functools.partial(aten.gelu, approximate="tanh"), functools.partial(aten.gelu_backward, approximate="tanh")),
}


def _sum(base: Tensor, s: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    return torch.addmm(base.to(wide), s.to(wide), b.to(wide))


def parts(s: Tensor, b_g: Tensor, b_u: Tensor) -> tuple[Tensor, ...]:
    """s of gate and s of up, which stand side by side."""
    return s.split([b_g.shape[1], b_u.shape[1]], 1)


def reference(g, u, s, b_g, b_u, activation: str) -> Tensor:
    """g, u: [M, N], s: [M, R + Q], b_g: [N, R], b_u: [N, Q], one dtype; returns h [M, N]. The specification."""
    s_g, s_u = parts(s, b_g, b_u)
    return (ACTIVATIONS[activation][0](_sum(g, s_g, b_g.t())) * _sum(u, s_u, b_u.t())).to(g.dtype)


def reference_backward(dh, ds, a, g, u, s, b_g, b_u, activation: str, seeds=None, columns=None, dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """dh: [M, N], ds: [M, P], a: [P, N], seeds: int32 [1, M], columns: `dropout.columns(N)`, dropout: p; the rest as in `reference`. The specification.

    Returns d_gate and d_up [M, N] and the partial sums of dA, [1, P, N], in float32 or wider.
    """
    s_g, s_u = parts(s, b_g, b_u)
    gate, up = _sum(g, s_g, b_g.t()), _sum(u, s_u, b_u.t())
    function, gradient = ACTIVATIONS[activation]
    act = function(gate)
    ds, h = ds.to(act.dtype), (act * up).to(g.dtype).to(act.dtype)
    dh = dh + masks.dropped(ds @ a.to(act.dtype), seeds, 0, dropout)
    da = ds.t() @ masks.dropped(h, seeds, 0, dropout)
    return gradient(dh * up, gate).to(g.dtype), (dh * act).to(g.dtype), da[None]


if triton is not None:

    @triton.jit
    def factor(b_ptr, stride_r, stride_n, cols, in_n, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
        ranks = tl.arange(0, BLOCK_R)
        return tl.load(b_ptr + ranks[:, None] * stride_r + cols[None, :] * stride_n, mask=(ranks < RANK)[:, None] & in_n[None, :], other=0.0)

    @triton.jit
    def rows_of(s_ptr, stride, rows, in_m, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
        ranks = tl.arange(0, BLOCK_R)
        return tl.load(s_ptr + rows[:, None] * stride + ranks[None, :], mask=in_m[:, None] & (ranks < RANK)[None, :], other=0.0)

    @triton.jit
    def tile(ptr, stride, rows, cols, in_m, in_n):
        return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0).to(tl.float32)

    @triton.jit
    def activate(x, ACTIVATION: tl.constexpr):
        # act(x) and act'(x)
        if ACTIVATION == "silu":
            p = tl.sigmoid(x)
            return x * p, p * (1 + x * (1 - p))
        elif ACTIVATION == "gelu_tanh":
            # p = (1 + tanh(inner)) / 2 with inner = sqrt(2 / pi) (x + 0.044715 x^3)
            p = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            return x * p, p + x * p * (1 - p) * 1.5957691216057308 * (1 + 0.134145 * x * x)
        else:
            p = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
            return x * p, p + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)

    @triton.jit
    def gated_kernel(
        g_ptr, u_ptr, sg_ptr, su_ptr, bg_ptr, bu_ptr, h_ptr,
        M, N, stride_g, stride_u, stride_sg, stride_su, stride_bgr, stride_bgn, stride_bur, stride_bun,
        RANK_G: tl.constexpr, RANK_U: tl.constexpr, ACTIVATION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = cols < N
        b_g = factor(bg_ptr, stride_bgr, stride_bgn, cols, in_n, RANK_G, BLOCK_R)
        b_u = factor(bu_ptr, stride_bur, stride_bun, cols, in_n, RANK_U, BLOCK_R)
        for i in tl.range(STEPS, num_stages=STAGES):
            rows = (tl.program_id(1).to(tl.int64) * STEPS + i) * BLOCK_M + tl.arange(0, BLOCK_M)
            in_m = rows < M
            gate = tl.dot(rows_of(sg_ptr, stride_sg, rows, in_m, RANK_G, BLOCK_R), b_g) + tile(g_ptr, stride_g, rows, cols, in_m, in_n)
            up = tl.dot(rows_of(su_ptr, stride_su, rows, in_m, RANK_U, BLOCK_R), b_u) + tile(u_ptr, stride_u, rows, cols, in_m, in_n)
            act, _ = activate(gate, ACTIVATION)
            tl.store(h_ptr + rows[:, None] * N + cols[None, :], (act * up).to(h_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])

    @triton.jit
    def gated_backward_kernel(
        dh_ptr, ds_ptr, a_ptr, g_ptr, u_ptr, sg_ptr, su_ptr, bg_ptr, bu_ptr, seeds_ptr, columns_ptr, dg_ptr, du_ptr, da_ptr,
        M, N, stride_dh, stride_ds, stride_ar, stride_an,
        stride_g, stride_u, stride_sg, stride_su, stride_bgr, stride_bgn, stride_bur, stride_bun,
        RANK_D: tl.constexpr, RANK_G: tl.constexpr, RANK_U: tl.constexpr, LIMIT: tl.constexpr, SCALE: tl.constexpr, ACTIVATION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = cols < N
        b_g = factor(bg_ptr, stride_bgr, stride_bgn, cols, in_n, RANK_G, BLOCK_R)
        b_u = factor(bu_ptr, stride_bur, stride_bun, cols, in_n, RANK_U, BLOCK_R)
        a = factor(a_ptr, stride_ar, stride_an, cols, in_n, RANK_D, BLOCK_R)
        da = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        if LIMIT > -2147483648:  # the limit where dropout is 0
            columns = tl.load(columns_ptr + cols, mask=in_n, other=0)[None, :]
        for i in tl.range(STEPS, num_stages=STAGES):
            rows = (tl.program_id(1).to(tl.int64) * STEPS + i) * BLOCK_M + tl.arange(0, BLOCK_M)
            in_m = rows < M
            out, inside = rows[:, None] * N + cols[None, :], in_m[:, None] & in_n[None, :]
            gate = tl.dot(rows_of(sg_ptr, stride_sg, rows, in_m, RANK_G, BLOCK_R), b_g) + tile(g_ptr, stride_g, rows, cols, in_m, in_n)
            up = tl.dot(rows_of(su_ptr, stride_su, rows, in_m, RANK_U, BLOCK_R), b_u) + tile(u_ptr, stride_u, rows, cols, in_m, in_n)
            ds = rows_of(ds_ptr, stride_ds, rows, in_m, RANK_D, BLOCK_R)
            low_rank = tl.dot(ds, a)
            if LIMIT > -2147483648:
                kept = mix(tl.load(seeds_ptr + rows, mask=in_m, other=0)[:, None] ^ columns) >= LIMIT
                low_rank = tl.where(kept, low_rank * SCALE, 0.0)
            dh = low_rank + tile(dh_ptr, stride_dh, rows, cols, in_m, in_n)
            act, slope = activate(gate, ACTIVATION)
            h = (act * up).to(ds.dtype)
            if LIMIT > -2147483648:
                h = tl.where(kept, h, 0.0)
            da = tl.dot(tl.trans(ds), h, da)
            tl.store(du_ptr + out, (dh * act).to(du_ptr.dtype.element_ty), mask=inside)
            tl.store(dg_ptr + out, (dh * up * slope).to(dg_ptr.dtype.element_ty), mask=inside)
        ranks = tl.arange(0, BLOCK_R)
        da_ptr += tl.program_id(1).to(tl.int64) * RANK_D * N
        tl.store(da_ptr + ranks[:, None] * N + cols[None, :], da * SCALE, mask=(ranks < RANK_D)[:, None] & in_n[None, :])


def _constants(steps: int, activation: str, *ranks: int) -> dict:
    block_r = max(16, triton.next_power_of_2(max(ranks)))
    return dict(ACTIVATION=activation, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=block_r, STEPS=steps, STAGES=STAGES, num_warps=WARPS)


def launch(g, u, s, b_g, b_u, activation: str) -> Tensor:
    """`reference` by the kernel."""
    g, u, s = map(unit_columns, (g, u, s))
    s_g, s_u = parts(s, b_g, b_u)
    m, n = g.shape
    h = g.new_empty((m, n))
    warmup.launch(
        gated_kernel, (triton.cdiv(n, BLOCK_N), triton.cdiv(m, BLOCK_M * STEPS)),
        g, u, s_g, s_u, b_g, b_u, h, m, n, g.stride(0), u.stride(0), s_g.stride(0), s_u.stride(0), *b_g.stride()[::-1], *b_u.stride()[::-1],
        RANK_G=b_g.shape[1], RANK_U=b_u.shape[1], **_constants(STEPS, activation, b_g.shape[1], b_u.shape[1]),
    )  # fmt: skip
    return h


def launch_backward(dh, ds, a, g, u, s, b_g, b_u, activation: str, seeds=None, columns=None, dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_backward` by the kernel, dA in as many parts as there are programs below each other."""
    dh, ds, g, u, s = map(unit_columns, (dh, ds, g, u, s))
    s_g, s_u = parts(s, b_g, b_u)
    m, n = g.shape
    blocks = _blocks(m)
    dg, du, da = g.new_empty((m, n)), g.new_empty((m, n)), g.new_empty((blocks, ds.shape[1], n), dtype=torch.float32)
    warmup.launch(
        gated_backward_kernel, (triton.cdiv(n, BLOCK_N), blocks),
        dh, ds, a, g, u, s_g, s_u, b_g, b_u, seeds if dropout else ds, columns if dropout else ds, dg, du, da, m, n, dh.stride(0), ds.stride(0), *a.stride(),
        g.stride(0), u.stride(0), s_g.stride(0), s_u.stride(0), *b_g.stride()[::-1], *b_u.stride()[::-1],
        RANK_D=len(a), RANK_G=b_g.shape[1], RANK_U=b_u.shape[1], LIMIT=masks.limit(dropout), SCALE=masks.scale(dropout),
        **_constants(STEPS_BACKWARD, activation, len(a), b_g.shape[1], b_u.shape[1]),
    )  # fmt: skip
    return dg, du, da


def _blocks(rows: int) -> int:
    return row_blocks(rows, BLOCK_M * STEPS_BACKWARD)


def serves(g: Tensor, *ranks: int) -> bool:
    """True where the kernels run: CUDA, 16 bit, no rank above MAX_RANK."""
    return runs(g, g.dtype) and max(ranks) <= MAX_RANK


def _cuda(g, u, s, b_g, b_u, activation: str) -> Tensor:
    args = (g, u, s, b_g, b_u, activation)
    return guarded("gated", lambda: launch(*args), lambda: reference(*args)) if serves(g, b_g.shape[1], b_u.shape[1]) else reference(*args)


def _cuda_backward(dh, ds, a, g, u, s, b_g, b_u, *rest) -> tuple[Tensor, Tensor, Tensor]:
    args = (dh, ds, a, g, u, s, b_g, b_u, *rest)

    def fallback() -> tuple[Tensor, Tensor, Tensor]:
        dg, du, da = reference_backward(*args)
        return dg, du, padded(da, _blocks(g.shape[0]))

    return guarded("gated_backward", lambda: launch_backward(*args), fallback) if serves(g, len(a), b_g.shape[1], b_u.shape[1]) else fallback()


def _fake(g, *rest) -> Tensor:
    return g.new_empty(g.shape)


def _fake_backward(dh, ds, a, g, *rest) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _blocks(g.shape[0]) if g.is_cuda else 1
    return g.new_empty(g.shape), g.new_empty(g.shape), g.new_empty((blocks, *a.shape), dtype=torch.promote_types(g.dtype, torch.float32))


gated = warmup.register("gated", reference, _cuda, _fake)
gated_backward = warmup.register("gated_backward", reference_backward, _cuda_backward, _fake_backward)


@register_flop_formula(torch.ops.fastft.gated)
def _flops(g_shape, u_shape, s_shape, *b_shapes_and_name, out_shape=None, **kwargs) -> int:
    return sum(mm_flop((s_shape[0], b_shape[1]), b_shape[::-1]) for b_shape in b_shapes_and_name[:2])


@register_flop_formula(torch.ops.fastft.gated_backward)
def _flops_backward(dh_shape, ds_shape, a_shape, *rest, out_shape=None, **kwargs) -> int:
    return 2 * mm_flop(ds_shape, a_shape)  # dS A and dA; what the forward counted is not counted again
