"""`fastft::lora_linear`: sibling linears on one input, each with its low-rank adapters (LoRA, arXiv 2106.09685).

    y_i = x W_i^T + b_i + sum_j scaling_j * (dropout_j(x) A_j^T) B_j^T      for every adapter j that linear i owns

    forward     s  = x [scaling A_0; scaling A_1; ...]^T  one skinny GEMM for the group (dropout: low_rank_dropout.py)
                y_i = s_i B_i^T + b_i ; y_i += x W_i^T    (added inside the GEMM)
    backward    dS_i = dY_i B_i ; dB_i = dY_i^T s_i       (one read of dY_i where a kernel serves)
                dA = scaling dS^T x                       one GEMM for the group (dropout: likewise)
                dX = dS [scaling A_0; ...] ; dX += dY_i W_i                         (added inside the GEMMs)
    saves       x and s; the cast, scaled and stacked adapters too, where they are small beside x

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

from fastft.kernels import lora_grads, low_rank
from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.lora_adapters import Spec, low_rank_input, saves, split
from fastft.kernels.lora_products import added, input_grad, k_extended, low_rank_a_grads, low_rank_grads, parameter_grads
from fastft.kernels.packed import PAD

# Rows of x from which the kernels are used (see `choose`).
MIN_ROWS = 4096

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
    dtype = low_rank.arithmetic(x)
    ranks = tuple(a.shape[0] for a in lora_a)
    spec = Spec(len(weights), ranks, tuple(owner), tuple(scaling), tuple(dropout), forward, backward, dtype, saves(x, ranks, dropout))
    if seeds is not None:
        seeds = seeds.reshape(seeds.shape[0], -1)
    with torch.autocast(x.device.type, enabled=False):
        outputs = _LoraLinear.apply(spec, seeds, x.reshape(-1, x.shape[-1]), *weights, *biases, *lora_a, *lora_b, *lora_biases)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


LIBRARY.impl("lora_linear", lora_linear, "CompositeImplicitAutograd")
op = torch.ops.fastft.lora_linear.default


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec: Spec, seeds, x, *tensors):
        weights, biases, lora_a, lora_b, lora_biases = split(spec, tensors)
        ctx.x_dtype, scales = x.dtype, []
        x = x.to(spec.dtype)
        if spec.forward == "k_extended":
            # Inductor writes x straight into the wider buffer, as long as nothing else reads it.
            extended = torch.cat([x, x.new_zeros((x.shape[0], PAD))], 1)
            x = extended[:, : x.shape[1]]
            s, outputs = k_extended(spec, seeds, extended, weights, biases, lora_a, lora_b, lora_biases)
        else:
            s = low_rank_input(spec, seeds, x, lora_a)
            outputs, scales = added(spec, x, s, weights, biases, lora_b, lora_biases)
        ctx.spec = spec
        ctx.save_for_backward(x, s, seeds, *tensors, *scales)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        spec = ctx.spec
        x, s, seeds, *tensors = ctx.saved_tensors
        weights, _, lora_a, lora_b, _ = split(spec, tensors)
        needs_x, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        with torch.autocast(x.device.type, enabled=False):
            ds, db = low_rank_grads(spec, needs, s, grads, lora_b)
            da = low_rank_a_grads(spec, needs, seeds, ds, x, lora_a)
            rest = parameter_grads(spec, needs, tensors, x, grads, da, db)
            dx = input_grad(spec, seeds, ds, grads, weights, lora_a, tensors[-spec.linears :]) if needs_x else None
        return (None, None, None if dx is None else dx.to(ctx.x_dtype), *rest)


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
