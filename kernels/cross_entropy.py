"""One chunk of logits to its losses and, in place, to its gradient: `softmax_step`, the middle of fastft::linear_cross_entropy.

    y     = logits * scale, then softcap * tanh(y / softcap) where there is a softcap          float32 from here on
    lse   = log sum_v exp(y_v)
    loss  = (1 - e) (lse - y_label) + e (lse - mean_v y_v) + z lse^2                            e: label smoothing, z: z-loss
    dy_v  = (1 + 2 z lse) exp(y_v - lse) - (1 - e) [v = label] - e / V                          times the row's scale
    d logits_v = dy_v * scale * (1 - tanh^2)

The kernel reads a row twice and writes it once. A program owns one row at a time, and only as many rows are in work as fit the L2
cache, so that the second read does not go to memory (H200: 132 rows of 128k in 16 bits are 34 of 50 MB); it starts where the first
ended. Maxima and sums are kept a thread (online softmax, arXiv 1805.02867) and meet once a row: no barrier inside the loops.
Arithmetic is bounded by exp2 and a few operations an element; the label's own gradient is therefore written after the row's.

Rows of the buffer are padded (`buffer`), so that odd vocabularies keep 16-byte loads and aligned GEMM operands.
One read and one write in place of the logits is Liger's scheme (arXiv 2410.10989).
"""

import functools
import math

import torch
from torch import Tensor

from fastft.kernels import warmup
from fastft.kernels.guard import guarded

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without Triton: the reference serves there
    triton = None

# Rows of the buffer start at multiples of this many elements: 128 bytes in 16 bits, a cache line and what cuBLAS's best kernels ask for.
PAD = 64

# (UNROLL, num_warps, num_stages), the best of ten on an H200: 4096 x 128256 in bf16 0.731 ms, (4, 32, 1) 0.764, (4, 16, 1) 0.992, copying it 0.539; 8192 x 32000
# 0.326 with two programs a multiprocessor, 0.433 with one. At most 64 registers and no spills on any target (tests/ops).
CONFIG = (2, 32, 1)

# Part of the L2 cache that rows in work may take: the rest holds what is being written back.
L2_PART = 0.7


def buffer(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """An empty [rows, vocabulary] with padded rows, in the dtype and on the device of `like`."""
    return like.new_empty((rows, padded(vocabulary)))[:, :vocabulary]


def padded(vocabulary: int) -> int:
    return -(-vocabulary // PAD) * PAD


def reference(
    logits: Tensor, labels: Tensor, row_scale: Tensor | None, scale: float, softcap: float, label_smoothing: float, z_loss: float, grad: bool
) -> Tensor:
    """The specification; arguments and result as of `softmax_step`."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    y = logits.to(wide) * scale
    if softcap:
        tanh = torch.tanh(y / softcap)
        y = softcap * tanh
    logp, lse = torch.log_softmax(y, 1), torch.logsumexp(y, 1)
    at = labels.unsqueeze(1)
    losses = -(1 - label_smoothing) * logp.gather(1, at).squeeze(1)
    if label_smoothing:
        losses = losses - label_smoothing * logp.mean(1)
    if z_loss:
        losses = losses + z_loss * lse.square()
    if grad:
        d = logp.exp_()
        if z_loss:
            d *= 1 + 2 * z_loss * lse.unsqueeze(1)
        d.scatter_add_(1, at, d.new_full((), label_smoothing - 1).expand_as(at))
        if label_smoothing:
            d -= label_smoothing / d.shape[1]
        if softcap:
            d *= 1 - tanh.square()
        d *= scale if row_scale is None else row_scale.to(wide).unsqueeze(1) * scale
        logits.copy_(d)
    return losses


if triton is not None:
    LOG2_E = tl.constexpr(1 / math.log(2))

    @triton.jit
    def _tanh(x):
        # Near 0 the quotient cancels; the series is exact to 6e-8 below 0.3.
        e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
        far = (1 - e) / (1 + e)
        q = x * x
        near = x + x * q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835))))
        return tl.where(q < 0.09, near, tl.where(x < 0, -far, far))

    @triton.jit
    def _columns(start, UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
        # [UNROLL, LANES, VEC]: a thread holds 16 neighbouring bytes of every one of UNROLL stretches.
        stretch = tl.arange(0, UNROLL)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
        return start + stretch * VEC + tl.arange(0, VEC)[None, None, :]

    @triton.jit
    def _load(row_ptr, cols, stride, inner, SOFTCAP: tl.constexpr, TAIL: tl.constexpr):
        # The padding behind the vocabulary is read too: the mask stays constant over 16 bytes.
        x = tl.load(row_ptr + cols, mask=cols < stride, other=0.0) if TAIL else tl.load(row_ptr + cols)
        x = x.to(tl.float32)
        return _tanh(x * inner) if SOFTCAP else x

    @triton.jit
    def _gather(x, top, total, mean, cols, V, factor, SMOOTH: tl.constexpr, TAIL: tl.constexpr):
        # Running maximum and sum of exp2(factor (x - top)) of every lane; lanes that saw nothing but -inf have the sum 0.
        if SMOOTH:
            mean += tl.sum(tl.sum(tl.where(cols < V, x, 0.0) if TAIL else x, 2), 0)
        if TAIL:
            x = tl.where(cols < V, x, -float("inf"))
        new = tl.maximum(top, tl.max(tl.max(x, 2), 0))
        base = tl.where(new == -float("inf"), 0.0, new)
        terms = tl.exp2(x * factor - (base * factor)[None, :, None])
        return new, total * tl.exp2((top - base) * factor) + tl.sum(tl.sum(terms, 2), 0), mean

    @triton.jit
    def _gradient(x, base, factor, gain, shift, SOFTCAP: tl.constexpr):
        d = tl.exp2(x * factor - base) * gain - shift
        return d * (1 - x * x) if SOFTCAP else d

    @triton.jit(do_not_specialize=["rows"])
    def softmax_kernel(
        logits_ptr, labels_ptr, row_scale_ptr, losses_ptr, rows, V, stride, scale, softcap, label_smoothing, z_loss,
        GRAD: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, ROW_SCALE: tl.constexpr,
        UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        BLOCK: tl.constexpr = UNROLL * LANES * VEC
        # x is the logit, or tanh of it; y = outer x, and exp(y) = exp2(factor x).
        inner = scale / softcap if SOFTCAP else scale
        outer = softcap if SOFTCAP else scale
        factor = outer * LOG2_E
        full = V // BLOCK
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            row_ptr = logits_ptr + tl.cast(row, tl.int64) * stride
            label = tl.load(labels_ptr + row)
            known = (label >= 0) & (label < V)
            x_label = _load_label(row_ptr + label, known, inner, SOFTCAP)
            top = tl.full((LANES,), -float("inf"), tl.float32)
            total = tl.zeros((LANES,), tl.float32)
            mean = tl.zeros((LANES,), tl.float32)
            for i in tl.range(0, full, num_stages=STAGES):
                cols = _columns(i * BLOCK, UNROLL, LANES, VEC)
                x = _load(row_ptr, cols, stride, inner, SOFTCAP, False)
                top, total, mean = _gather(x, top, total, mean, cols, V, factor, SMOOTH, False)
            for start in range(full * BLOCK, V, LANES * VEC):
                cols = _columns(start, 1, LANES, VEC)
                x = _load(row_ptr, cols, stride, inner, SOFTCAP, True)
                top, total, mean = _gather(x, top, total, mean, cols, V, factor, SMOOTH, True)
            highest = tl.max(top)
            base = tl.where(highest == -float("inf"), 0.0, highest)
            total = tl.sum(total * tl.exp2((top - base) * factor))
            log_total = tl.log(total)
            lse = highest * outer + log_total
            loss = (1 - label_smoothing) * ((highest - x_label) * outer + log_total) + z_loss * lse * lse
            if SMOOTH:
                loss += label_smoothing * ((highest - tl.sum(mean) / V) * outer + log_total)
            tl.store(losses_ptr + row, loss)
            if GRAD:
                weight = scale * tl.load(row_scale_ptr + row) if ROW_SCALE else scale
                gain = (1 + 2 * z_loss * lse) * weight / total
                shift = label_smoothing * weight / V
                base = base * factor
                for start in range(full * BLOCK, V, LANES * VEC):
                    cols = _columns(start, 1, LANES, VEC)
                    x = _load(row_ptr, cols, stride, inner, SOFTCAP, True)
                    d = _gradient(x, base, factor, gain, shift, SOFTCAP)
                    tl.store(row_ptr + cols, d.to(logits_ptr.dtype.element_ty), mask=cols < stride)
                for i in tl.range(0, full, num_stages=STAGES):
                    cols = _columns((full - 1 - i) * BLOCK, UNROLL, LANES, VEC)
                    x = _load(row_ptr, cols, stride, inner, SOFTCAP, False)
                    d = _gradient(x, base, factor, gain, shift, SOFTCAP)
                    tl.store(row_ptr + cols, d.to(logits_ptr.dtype.element_ty))
                d = _gradient(x_label, base, factor, gain, shift + (1 - label_smoothing) * weight, SOFTCAP)
                tl.debug_barrier()  # another thread wrote the label's column without its own term
                tl.store(row_ptr + label, d.to(logits_ptr.dtype.element_ty), mask=known)

    @triton.jit
    def _load_label(ptr, known, inner, SOFTCAP: tl.constexpr):
        x = tl.load(ptr, mask=known, other=0.0).to(tl.float32)
        return _tanh(x * inner) if SOFTCAP else x


@functools.cache
def programs(index: int | None, row_bytes: int, warps: int) -> int:
    """Rows in work at once on GPU `index` (None: the current one): one a multiprocessor, more where the L2 cache and its threads have room."""
    gpu = torch.cuda.get_device_properties(index)
    room = int(L2_PART * gpu.L2_cache_size) // (gpu.multi_processor_count * row_bytes)
    threads = gpu.max_threads_per_multi_processor // (32 * warps)
    return gpu.multi_processor_count * max(1, min(room, threads))


def launch(
    logits: Tensor, labels: Tensor, row_scale: Tensor | None, scale: float, softcap: float, label_smoothing: float, z_loss: float, grad: bool,
    config: tuple[int, int, int], grid: int,
) -> Tensor:  # fmt: skip
    """`softmax_step` by the kernel. `config`: UNROLL, num_warps, num_stages. `grid`: programs, see `programs`."""
    unroll, warps, stages = config
    labels, row_scale = labels.contiguous(), None if row_scale is None else row_scale.contiguous()  # the gradient of a sum has stride 0
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        warmup.launch(
            softmax_kernel, (min(rows, grid),),
            logits, labels, losses if row_scale is None else row_scale, losses, rows, vocabulary, logits.stride(0),
            float(scale), float(softcap), float(label_smoothing), float(z_loss),
            GRAD=grad, SOFTCAP=softcap != 0, SMOOTH=label_smoothing != 0, ROW_SCALE=row_scale is not None,
            UNROLL=unroll, LANES=32 * warps, VEC=16 // logits.element_size(), STAGES=stages, num_warps=warps,
        )  # fmt: skip
    return losses


def softmax_step(
    logits: Tensor, labels: Tensor, row_scale: Tensor | None, scale: float, softcap: float, label_smoothing: float, z_loss: float, grad: bool
) -> Tensor:
    """See the module's docstring.

    Args:
        logits: [rows, V] from `buffer`; with `grad` its gradient afterwards. labels: int64 [rows], none of them ignored.
        row_scale: float [rows], the upstream gradient of every loss; None for 1.
        scale: > 0. softcap: 0 for none.
    Returns:
        losses [rows] in float32 (float64 for float64).
    """
    rest = (scale, softcap, label_smoothing, z_loss, grad)
    if triton is None or not logits.is_cuda or logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return reference(logits, labels, row_scale, *rest)
    grid = programs(logits.device.index, logits.stride(0) * logits.element_size(), CONFIG[1])
    return guarded("cross_entropy", lambda: launch(logits, labels, row_scale, *rest, CONFIG, grid), lambda: reference(logits, labels, row_scale, *rest))
