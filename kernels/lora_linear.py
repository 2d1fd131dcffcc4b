"""`fastft::lora_linear`: sibling linears on one input, each with its low-rank adapters (LoRA, arXiv 2106.09685).

    y_i = x W_i^T + b_i + sum_j scaling_j * (dropout_j(x) A_j^T) B_j^T      for every adapter j that linear i owns

    forward     s  = x [scaling A_0; scaling A_1; ...]^T  one skinny GEMM for the group (dropout: low_rank_dropout.py)
                y_i = s_i B_i^T + b_i ; y_i += x W_i^T    (added inside the GEMM)
    backward    dS_i = dY_i B_i ; dB_i = dY_i^T s_i       (one read of dY_i where a kernel serves)
                dA = scaling dS^T x                       one GEMM for the group (dropout: likewise)
                dX = dS [scaling A_0; ...] ; dX += dY_i W_i                         (added inside the GEMMs)
    saves       x and s; with few rows the cast, scaled and stacked adapters too, where they are small beside x

The scaling is folded into A, which is stacked and cast anyway, and not into B: two launches fewer for every linear. Where the
kernels serve, one launch makes s_i B_i^T + b_i of the whole group and one its dS and dB, and what follows (sums of partial
results, casts) is written for the group too, so that Inductor makes one kernel of each. Elsewhere gradients of adapters leave
their GEMM scaled and in the adapters' dtype: with few rows a step is as long as its launches.

The op decomposes into ATen while AOTAutograd traces: the joint graph holds plain `mm`s (and `accumulate_mm`), so the
partitioner and Inductor see through it, and nothing is saved that the unrewritten model would not save.

Arithmetic runs in the dtype of the base linear (x's, or autocast's); adapters kept in float32 are cast to it once, and
their gradients come back in float32. float32 bases stay float32.
"""

import math

import torch
from torch import Tensor

from fastft.kernels import fp8_linear, lora_grads, low_rank, low_rank_dropout
from fastft.kernels.accumulate import LIBRARY, accumulate_mm
from fastft.kernels.lora_adapters import Spec, b_of, bias_of, columns, dropped, low_rank_input, mask_arguments, split, stack
from fastft.kernels.low_rank import low_rank_mm, low_rank_mm_dropout, low_rank_mms
from fastft.kernels.packed import PAD
from fastft.kernels.packed import op as packed_linears

# Rows of x from which the kernels are used (see `choose`).
MIN_ROWS = 4096
# Below that, cast and scaled adapters are saved for the backward where they take at most this part of x's memory.
SAVED_PART = 32

LIBRARY.define(
    "lora_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_a, Tensor[] lora_b, Tensor?[] lora_biases, "
    "int[] owner, float[] scaling, float[] dropout, Tensor? seeds, str forward, str backward) -> Tensor[]"
)


def lora_linear(x, weights, biases, lora_a, lora_b, lora_biases, owner, scaling, dropout, seeds, forward, backward) -> list[Tensor]:
    """See the module's docstring.

    Args:
        x: [..., K]. weights: [N_i, K]. biases: [N_i] or None.
        lora_a: [r_j, K]. lora_b: [N_owner(j), r_j]. lora_biases: [N_owner(j)] or None.
        owner, scaling, dropout: one entry an adapter; dropout is the probability of zeroing an element of x.
        seeds: int32 [ceil(adapters / 2), ...] where a dropout is not 0, else None.
        forward: "accumulate" (s B^T by cuBLAS, then the base GEMM adds into it), "outer" (s B^T by a kernel that streams),
            "k_extended" (packed weights) or "fp8" (base products in fp8, kernels/fp8_linear.py). backward: "one_read" (one
            kernel for dS and dB) or "mm". The providers.
    Returns:
        [..., N_i] for every linear, in x's dtype (autocast's dtype where that is on).
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast and x.is_floating_point() else x.dtype
    ranks = tuple(a.shape[0] for a in lora_a)
    saves = not any(dropout) and few_rows(x) and sum(ranks) * SAVED_PART <= math.prod(x.shape[:-1])
    spec = Spec(len(weights), ranks, tuple(owner), tuple(scaling), tuple(dropout), forward, backward, dtype, saves)
    if seeds is not None:
        seeds = seeds.reshape(seeds.shape[0], -1)
    with torch.autocast(device, enabled=False):
        outputs = _LoraLinear.apply(spec, seeds, x.reshape(-1, x.shape[-1]), *weights, *biases, *lora_a, *lora_b, *lora_biases)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


LIBRARY.impl("lora_linear", lora_linear, "CompositeImplicitAutograd")
op = torch.ops.fastft.lora_linear.default


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`: straight from the float32 accumulator where the device can."""
    if dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16) and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec: Spec, seeds, x, *tensors):
        weights, biases, lora_a, lora_b, lora_biases = split(spec, tensors)
        ctx.x_dtype, scales = x.dtype, []
        x = x.to(spec.dtype)
        if spec.forward == "k_extended":
            x, s, outputs = _k_extended(spec, seeds, x, weights, biases, lora_a, lora_b, lora_biases)
        else:
            s = low_rank_input(spec, seeds, x, lora_a)
            parts = [s[:, start:end] for start, end in columns(spec)]
            factors = [b_of(spec, lora_b, i).t() for i in range(spec.linears)]
            totals = [bias_of(spec, biases, lora_biases, i) for i in range(spec.linears)]
            if spec.forward == "fp8":
                bases, scales = fp8_linear.products(x, weights, totals)
                outputs = [accumulate_mm(*operands) for operands in zip(bases, parts, factors, strict=True)]
            else:
                summands = low_rank_mms(s, factors, totals) if spec.forward == "outer" else map(low_rank.reference, parts, factors, totals)
                outputs = [accumulate_mm(y, x, weight.to(spec.dtype).t()) for y, weight in zip(summands, weights, strict=True)]
        ctx.spec = spec
        ctx.save_for_backward(x, s, seeds, *tensors, *scales)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        spec = ctx.spec
        with torch.autocast(grads[0].device.type, enabled=False):
            dx, *rest = _backward(spec, ctx.needs_input_grad[2:], ctx.saved_tensors, grads)
        return (None, None, None if dx is None else dx.to(ctx.x_dtype), *rest)


def _k_extended(spec: Spec, seeds, x, weights, biases, lora_a, lora_b, lora_biases):
    """`(x, s, outputs)` by the K-extended GEMMs; x comes back as a view of its padded buffer."""
    k = x.shape[1]
    # Inductor writes x straight into the wider buffer, as long as nothing else reads it.
    extended = torch.cat([x, x.new_zeros((x.shape[0], PAD))], 1)
    x = extended[:, :k]
    if any(spec.dropout):
        s = low_rank_input(spec, seeds, x, lora_a)
        low_rank = torch.nn.functional.pad(s, (0, PAD - s.shape[1]))
    else:
        low_rank = stack(spec, lora_a, PAD)
    tails = [torch.nn.functional.pad(b_of(spec, lora_b, i), (start, PAD - end)) for i, (start, end) in enumerate(columns(spec))]
    total = [bias_of(spec, biases, lora_biases, i) for i in range(spec.linears)]
    s, *outputs = packed_linears(extended, low_rank, any(spec.dropout), list(weights), tails, total)
    return x, s[:, : sum(spec.ranks)], outputs


def _low_rank_grads(spec: Spec, s, dy, lora_b, needed: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """dS of the group, [M, sum r], and dB of each linear, [N, its r], or None where it is not needed."""
    factors = [b_of(spec, lora_b, i) for i in range(spec.linears)]
    if spec.backward == "one_read" and any(needed):
        ds, db = (parts.sum(0) for parts in lora_grads.lora_grads(dy, s, factors))
        db = _cast(db, lora_b).split([b.numel() for b in factors])
        return ds.to(spec.dtype), [part.view_as(b) for part, b in zip(db, factors, strict=True)]
    ds = [y @ b for y, b in zip(dy, factors, strict=True)]
    dtype = _grad_dtype(spec, lora_b)
    db = [_mm(dy[i].t(), s[:, start:end], dtype) if needed[i] else None for i, (start, end) in enumerate(columns(spec))]
    return torch.cat(ds, 1) if len(ds) > 1 else ds[0], db


def _grad_dtype(spec: Spec, adapters) -> torch.dtype:
    """What a GEMM writes for the gradients of adapters: their dtype, where a cast would be a launch of its own, else float32 or wider."""
    return spec.dtype if all(a.dtype == spec.dtype for a in adapters) else torch.promote_types(spec.dtype, torch.float32)


def _cast(total: Tensor, adapters) -> Tensor:
    """The gradients of all adapters in one tensor in their dtype, in one kernel; as they are where they have several."""
    dtypes = {adapter.dtype for adapter in adapters}
    return total.to(*dtypes) if len(dtypes) == 1 else total


def _scaled_mm(spec: Spec, ds: Tensor, x: Tensor, lora_a) -> tuple[Tensor, ...] | list[Tensor]:
    """scaling_j dA_j = scaling_j dS^T x of the group; scaled inside the GEMM where all have one scaling and x's dtype."""
    if {a.dtype for a in lora_a} == {spec.dtype} and len(set(spec.scaling)) == 1:
        # beta = 0: the summand is not read
        return torch.addmm(lora_a[0][:1], ds.t(), x, beta=0, alpha=spec.scaling[0]).split(spec.ranks)
    return _scaled(spec, _mm(ds.t(), x, _grad_dtype(spec, lora_a)), lora_a)


def _scaled(spec: Spec, total: Tensor, lora_a) -> tuple[Tensor, ...] | list[Tensor]:
    """scaling_j dA_j from dS^T x of the group; one kernel where all have one scaling."""
    if len(set(spec.scaling)) == 1:
        return _cast(total * spec.scaling[0], lora_a).split(spec.ranks)
    return [part * scaling for part, scaling in zip(total.split(spec.ranks), spec.scaling, strict=True)]


def _backward(spec: Spec, needs, saved, dy):
    x, s, seeds, *tensors = saved
    weights, biases, lora_a, lora_b, lora_biases = split(spec, tensors)
    needs_x, (need_w, need_bias, need_a, need_b, need_lora_bias) = needs[0], split(spec, needs[1:])
    d_weights, d_biases = [None] * spec.linears, [None] * spec.linears
    d_a, d_b, d_lora_biases = ([None] * len(spec.ranks) for _ in range(3))
    wide = torch.promote_types(spec.dtype, torch.float32)
    ds, db = _low_rank_grads(spec, s, dy, lora_b, [any(need_b[j] for j in spec.owned(i)) for i in range(spec.linears)])
    for i in range(spec.linears):
        owned = spec.owned(i)
        if db[i] is not None:
            for j, part in zip(owned, db[i].split([spec.ranks[j] for j in owned], 1), strict=True):
                d_b[j] = part.to(lora_b[j].dtype) if need_b[j] else None
        if need_w[i]:
            d_weights[i] = _mm(dy[i].t(), x, weights[i].dtype)
        if need_bias[i] or any(need_lora_bias[j] for j in owned):
            total = dy[i].sum(0, dtype=wide)
            d_biases[i] = total.to(biases[i].dtype) if need_bias[i] else None
            for j in owned:
                if need_lora_bias[j]:
                    d_lora_biases[j] = (total * spec.scaling[j]).to(lora_biases[j].dtype)
    if any(need_a):
        if not any(spec.dropout):
            parts = _scaled_mm(spec, ds, x, lora_a)
        elif arguments := mask_arguments(spec, seeds, x):
            parts = _scaled(spec, low_rank_dropout.dropped_grad(ds, x, *arguments).sum(0), lora_a)
        else:
            parts = ds.split(spec.ranks, 1)
            parts = [_mm(parts[j].t(), dropped(spec, seeds, x, j), wide) * spec.scaling[j] if need_a[j] else None for j in range(len(spec.ranks))]
        for j, part in enumerate(parts):
            d_a[j] = part.to(lora_a[j].dtype) if need_a[j] else None
    dx = None
    if needs_x and spec.forward == "fp8":
        dx, stacked = fp8_linear.gradient(dy, weights, saved[-spec.linears :]), stack(spec, lora_a)
        if any(spec.dropout):
            dx = dx + low_rank_mm_dropout(ds, stacked, seeds, spec.ranks, spec.dropout)
        else:
            dx = accumulate_mm(dx, ds, stacked)
    elif needs_x:
        stacked = stack(spec, lora_a)
        if any(spec.dropout):
            dx = low_rank_mm_dropout(ds, stacked, seeds, spec.ranks, spec.dropout)
        else:
            dx = low_rank_mm(ds, stacked, None) if spec.backward == "one_read" else ds @ stacked
        for i, w in enumerate(weights):
            dx = accumulate_mm(dx, dy[i], w.to(spec.dtype))
    return (dx, *d_weights, *d_biases, *d_a, *d_b, *d_lora_biases)


def few_rows(x: Tensor) -> bool:
    """True where a step is bound by launches, not by the GPU."""
    rows = math.prod(x.shape[:-1])
    return isinstance(rows, int) and rows < MIN_ROWS


def choose(x: Tensor, dtype: torch.dtype, ranks: list[int]) -> tuple[str, str]:
    """The providers `(forward, backward)` for a group.

    Args:
        x: the group's input, a fake tensor. dtype: of the arithmetic. ranks: of each linear, summed over its adapters.

    The kernels are custom ops, 40 us of the host a call, so they pay where a linear keeps the GPU busy for longer. Llama-1B on an H200,
    ms a step: 2 x 1024 tokens without them 29.1, Inductor 36.6 (with them 43 where Inductor took 30); 4 x 2048 with them 95, Inductor
    124. Where the number of rows is symbolic cuBLAS does all, in place.
    """
    rows = math.prod(x.shape[:-1])
    kernels = low_rank.runs(x, dtype) and isinstance(rows, int) and rows >= MIN_ROWS
    return (
        "outer" if kernels and max(ranks) <= low_rank.MAX_RANK else "accumulate",
        "one_read" if kernels and max(ranks) <= lora_grads.MAX_RANK else "mm",
    )
