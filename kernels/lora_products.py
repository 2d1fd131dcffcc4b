"""The products of `fastft::lora_linear` and `fastft::lora_mlp`, forward and backward, for a group of linears on one x.

Notation and formulas: kernels/lora_linear.py. dy: one gradient a linear. `needs`: for each tensor of the group, in the order of
`lora_adapters.split`, whether its gradient is wanted; what is not comes as None.
"""

import torch
from torch import Tensor

from fastft.kernels import fp8_linear, lora_grads, low_rank, low_rank_dropout
from fastft.kernels.accumulate import accumulate_mm
from fastft.kernels.lora_adapters import Spec, b_of, bias_of, columns, dropped, low_rank_input, mask_arguments, split, stack
from fastft.kernels.low_rank import low_rank_mm, low_rank_mm_dropout, low_rank_mms
from fastft.kernels.packed import PAD
from fastft.kernels.packed import op as packed_linears


def added(spec: Spec, x: Tensor, s: Tensor, weights, biases, lora_b, lora_biases) -> tuple[list[Tensor], list[Tensor]]:
    """y_i = x W_i^T + s_i B_i^T + b_i, one product added to the other inside a GEMM; and the scales of weights taken to fp8."""
    parts = [s[:, start:end] for start, end in columns(spec)]
    factors = [b_of(spec, lora_b, i).t() for i in range(spec.linears)]
    totals = [bias_of(spec, biases, lora_biases, i) for i in range(spec.linears)]
    if spec.forward == "fp8":
        bases, scales = fp8_linear.products(x, weights, totals)
        return [accumulate_mm(*operands) for operands in zip(bases, parts, factors, strict=True)], scales
    summands = low_rank_mms(s, factors, totals) if spec.forward == "outer" else map(low_rank.reference, parts, factors, totals)
    return [accumulate_mm(y, x, weight.to(spec.dtype).t()) for y, weight in zip(summands, weights, strict=True)], []


def k_extended(spec: Spec, seeds, extended: Tensor, weights, biases, lora_a, lora_b, lora_biases) -> tuple[Tensor, list[Tensor]]:
    """s and y_i by K-extended GEMMs; `extended` holds x and behind it PAD columns to write s into."""
    if any(spec.dropout):
        s = low_rank_input(spec, seeds, extended[:, :-PAD], lora_a)
        low_rank = torch.nn.functional.pad(s, (0, PAD - s.shape[1]))
    else:
        low_rank = stack(spec, lora_a, PAD)
    tails = [torch.nn.functional.pad(b_of(spec, lora_b, i), (start, PAD - end)) for i, (start, end) in enumerate(columns(spec))]
    total = [bias_of(spec, biases, lora_biases, i) for i in range(spec.linears)]
    s, *outputs = packed_linears(extended, low_rank, any(spec.dropout), list(weights), tails, total)
    return s[:, : sum(spec.ranks)], outputs


def low_rank_grads(spec: Spec, needs, s: Tensor, dy, lora_b) -> tuple[Tensor, list[Tensor | None]]:
    """dS of the group, [M, sum r], and dB of each linear, [N, its r]."""
    need_b = split(spec, needs)[3]
    needed = [any(need_b[j] for j in spec.owned(i)) for i in range(spec.linears)]
    factors = [b_of(spec, lora_b, i) for i in range(spec.linears)]
    if spec.backward == "one_read" and any(needed):
        ds, db = (parts.sum(0) for parts in lora_grads.lora_grads(list(dy), s, factors))
        db = _cast(db, lora_b).split([b.numel() for b in factors])
        return ds.to(spec.dtype), [part.view_as(b) for part, b in zip(db, factors, strict=True)]
    ds = [y @ b for y, b in zip(dy, factors, strict=True)]
    dtype = _grad_dtype(spec, lora_b)
    db = [_mm(dy[i].t(), s[:, start:end], dtype) if needed[i] else None for i, (start, end) in enumerate(columns(spec))]
    return torch.cat(ds, 1) if len(ds) > 1 else ds[0], db


def low_rank_a_grads(spec: Spec, needs, seeds, ds: Tensor, x: Tensor, lora_a) -> list[Tensor | None]:
    """scaling_j dA_j = scaling_j dS_j^T x of every adapter; with dropout each on its own x."""
    need_a = split(spec, needs)[2]
    if not any(need_a):
        return [None] * len(need_a)
    if not any(spec.dropout):
        return list(_scaled_mm(spec, ds, x, lora_a))
    if arguments := mask_arguments(spec, seeds, x):
        return list(scaled(spec, low_rank_dropout.dropped_grad(ds, x, *arguments).sum(0), lora_a))
    wide = torch.promote_types(spec.dtype, torch.float32)
    parts = ds.split(spec.ranks, 1)
    return [_mm(parts[j].t(), dropped(spec, seeds, x, j), wide) * spec.scaling[j] if need_a[j] else None for j in range(len(spec.ranks))]


def parameter_grads(spec: Spec, needs, tensors, x: Tensor, dy, da, db) -> list[Tensor | None]:
    """The gradients of all tensors of the group in their order and dtypes; da, db: what the functions above return."""
    weights, biases, lora_a, lora_b, lora_biases = split(spec, tensors)
    need_w, need_bias, need_a, need_b, need_lora_bias = split(spec, needs)
    d_weights, d_biases = [None] * spec.linears, [None] * spec.linears
    d_b, d_lora_biases = [None] * len(spec.ranks), [None] * len(spec.ranks)
    for i in range(spec.linears):
        owned = spec.owned(i)
        if db[i] is not None:
            for j, part in zip(owned, db[i].split([spec.ranks[j] for j in owned], 1), strict=True):
                d_b[j] = part.to(lora_b[j].dtype) if need_b[j] else None
        if need_w[i]:
            d_weights[i] = _mm(dy[i].t(), x, weights[i].dtype)
        if need_bias[i] or any(need_lora_bias[j] for j in owned):
            total = dy[i].sum(0, dtype=torch.promote_types(spec.dtype, torch.float32))
            d_biases[i] = total.to(biases[i].dtype) if need_bias[i] else None
            for j in owned:
                if need_lora_bias[j]:
                    d_lora_biases[j] = (total * spec.scaling[j]).to(lora_biases[j].dtype)
    d_a = [part.to(lora_a[j].dtype) if need_a[j] else None for j, part in enumerate(da)]
    return [*d_weights, *d_biases, *d_a, *d_b, *d_lora_biases]


def input_grad(spec: Spec, seeds, ds: Tensor, dy, weights, lora_a, scales=()) -> Tensor:
    """dX = dS [scaling A_0; ...] + dY_i W_i, [M, K] in the dtype of the arithmetic. scales: of weights in fp8."""
    stacked = stack(spec, lora_a)
    if spec.forward == "fp8":
        dx = fp8_linear.gradient(dy, weights, scales)
        if any(spec.dropout):
            return dx + low_rank_mm_dropout(ds, stacked, seeds, spec.ranks, spec.dropout)
        return accumulate_mm(dx, ds, stacked)
    if any(spec.dropout):
        dx = low_rank_mm_dropout(ds, stacked, seeds, spec.ranks, spec.dropout)
    else:
        dx = low_rank_mm(ds, stacked, None) if spec.backward == "one_read" else ds @ stacked
    for y, weight in zip(dy, weights, strict=True):
        dx = accumulate_mm(dx, y, weight.to(spec.dtype))
    return dx


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`: straight from the float32 accumulator where the device can."""
    if dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16) and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _grad_dtype(spec: Spec, adapters) -> torch.dtype:
    """What a GEMM writes for the gradients of adapters: their dtype, where a cast would be a launch of its own, else float32 or wider."""
    return spec.dtype if all(a.dtype == spec.dtype for a in adapters) else torch.promote_types(spec.dtype, torch.float32)


def _cast(total: Tensor, adapters) -> Tensor:
    """The gradients of all adapters in one tensor in their dtype, in one kernel; as they are where they have several."""
    dtypes = {adapter.dtype for adapter in adapters}
    return total.to(*dtypes) if len(dtypes) == 1 else total


def _scaled_mm(spec: Spec, ds: Tensor, x: Tensor, lora_a) -> tuple[Tensor, ...] | list[Tensor]:
    """scaling_j dA_j of the group; scaled inside the GEMM where all have one scaling and x's dtype."""
    if {a.dtype for a in lora_a} == {spec.dtype} and len(set(spec.scaling)) == 1:
        # beta = 0: the summand is not read
        return torch.addmm(lora_a[0][:1], ds.t(), x, beta=0, alpha=spec.scaling[0]).split(spec.ranks)
    return scaled(spec, _mm(ds.t(), x, _grad_dtype(spec, lora_a)), lora_a)


def scaled(spec: Spec, total: Tensor, lora_a) -> tuple[Tensor, ...] | list[Tensor]:
    """scaling_j dA_j from dS^T x of the group; one kernel where all have one scaling."""
    if len(set(spec.scaling)) == 1:
        return _cast(total * spec.scaling[0], lora_a).split(spec.ranks)
    return [part * scaling for part, scaling in zip(total.split(spec.ranks), spec.scaling, strict=True)]
