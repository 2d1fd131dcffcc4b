"""`fastft::lora_mlp`: a gated MLP whose three linears have low-rank adapters (SwiGLU and its kin, arXiv 2002.05202).

    y = down(h),  h = act(gate(x)) * up(x);  every linear as in kernels/lora_linear.py

    forward     s = x [A_gate; A_up]^T ; g = x W_gate^T ; u = x W_up^T        no low-rank term is added to g and u
                h = gated(g, u, s, B_gate, B_up)                               kernels/gated.py adds them where it reads g and u
                s_d = h A_down^T ; y = s_d B_down^T ; y += h W_down^T
    backward    dS_d, dB_down as in lora_linear ; dh = dY W_down
                dg, du, dA_down = gated_backward(dh, dS_d, A_down, g, u, ...)  adds dS_d A_down to dh where it reads it
                gate and up as in lora_linear, from dg and du
    saves       x, g, u, s and s_d (and adapters, see `saves`): as much as without the rewrite; h is made again inside gated_backward and never written

Against two `lora_linear`s with Inductor's kernels between them a layer reads and writes seven times M N elements less, N the
width of the MLP. H200, 8 layers of Llama-8B, 8192 tokens, rank 16: 135.3 ms a step instead of 137.5, 12.33 GiB either way.

As `lora_linear` the op decomposes while AOTAutograd traces.
"""

import dataclasses

import torch
from torch import Tensor

from fastft.kernels import dropout as masks
from fastft.kernels import gated, low_rank
from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.lora_adapters import Spec, b_of, bias_of, low_rank_input, recomputed, saves, split, stack
from fastft.kernels.lora_products import added, input_grad, low_rank_a_grads, low_rank_grads, parameter_grads, scaled

LIBRARY.define(
    "lora_mlp(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_a, Tensor[] lora_b, Tensor?[] lora_biases, "
    "int[] owner, float[] scaling, str activation, str forward, str backward, float[] dropout=[], Tensor? seeds=None, Tensor? down_seeds=None) -> Tensor"
)


def lora_mlp(x, weights, biases, lora_a, lora_b, lora_biases, owner, scaling, activation, forward, backward, dropout=(), seeds=None, down_seeds=None) -> Tensor:
    """See the module's docstring.

    Args:
        x: [..., K]. weights: of gate [N, K], up [N, K] and down [L, N]. biases: [N], [N], [L], each or None.
        lora_a, lora_b, lora_biases: as in `lora_linear`, those of gate first, of down last; every linear has one or more.
        owner, scaling: one entry an adapter; owner 0 is gate, 1 up, 2 down.
        activation: a key of `gated.ACTIVATIONS`. forward, backward: as in `lora_linear`; forward is that of down, "accumulate" or "outer".
        dropout: one entry an adapter, or none; down has one adapter where its is not 0. seeds, down_seeds: as in `lora_linear`, of gate and up, and of down.
    Returns:
        y [..., L], in x's dtype (autocast's dtype where that is on).
    Raises:
        ValueError: where down's weight needs a gradient, which takes h, or down has dropout and several adapters.
    """
    if weights[2].requires_grad and torch.is_grad_enabled():
        raise ValueError("fastft::lora_mlp: down's base weight must be frozen; use two fastft::lora_linear")
    first = sum(linear < 2 for linear in owner)
    dtype, ranks = low_rank.arithmetic(x), tuple(a.shape[0] for a in lora_a)
    dropout = tuple(dropout) or (0.0,) * len(ranks)
    if any(dropout[first:]) and len(ranks) > first + 1:
        raise ValueError("fastft::lora_mlp: dropout in one of several adapters of down; use two fastft::lora_linear")
    specs = (
        Spec(2, ranks[:first], tuple(owner[:first]), tuple(scaling[:first]), dropout[:first], "accumulate", backward, dtype),
        Spec(1, ranks[first:], tuple(linear - 2 for linear in owner[first:]), tuple(scaling[first:]), dropout[first:], forward, backward, dtype),
    )
    specs = tuple(dataclasses.replace(spec, saves_adapters=saves(x, spec.ranks, spec.dropout)) for spec in specs)
    seeds = [None if of is None else of.reshape(of.shape[0], -1) for of in (seeds, down_seeds)]
    tensors = [*weights[:2], *biases[:2], *lora_a[:first], *lora_b[:first], *lora_biases[:first]]
    tensors += [weights[2], biases[2], *lora_a[first:], *lora_b[first:], *lora_biases[first:]]
    with torch.autocast(x.device.type, enabled=False):
        y = _LoraMlp.apply(specs, activation, *seeds, x.reshape(-1, x.shape[-1]), *tensors)
    return y.view(*x.shape[:-1], y.shape[-1])


LIBRARY.impl("lora_mlp", lora_mlp, "CompositeImplicitAutograd")
op = torch.ops.fastft.lora_mlp.default


def _halves(specs: tuple[Spec, Spec], values) -> tuple[list, list]:
    """What belongs to gate and up, and what to down."""
    end = 2 * specs[0].linears + 3 * len(specs[0].ranks)
    return list(values[:end]), list(values[end:])


def _factors(spec: Spec, lora_b) -> list[Tensor]:
    """B of gate and of up, [N, r], as `gated` takes them."""
    return [b_of(spec, lora_b, i) for i in range(2)]


def _mask(spec: Spec, seeds, n: int) -> tuple:
    """What `gated_backward` takes of down's dropout."""
    if not any(spec.dropout):
        return ()
    with recomputed():
        return seeds, masks.columns(n, seeds.device), *spec.dropout


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, specs, activation, seeds, down_seeds, x, *tensors):
        first, second = specs
        ctx.specs, ctx.activation, ctx.x_dtype = specs, activation, x.dtype
        x = x.to(first.dtype)
        of_first, of_second = _halves(specs, tensors)
        weights, biases, lora_a, lora_b, lora_biases = split(first, of_first)
        s = low_rank_input(first, seeds, x, lora_a)
        g, u = (low_rank.reference(x, weight.to(first.dtype).t(), bias_of(first, biases, lora_biases, i)) for i, weight in enumerate(weights))
        h = gated.gated(g, u, s, *_factors(first, lora_b), activation)
        weights, biases, lora_a, lora_b, lora_biases = split(second, of_second)
        s_d = low_rank_input(second, down_seeds, h, lora_a)
        ((y,), _) = added(second, h, s_d, weights, biases, lora_b, lora_biases)
        ctx.save_for_backward(x, s, g, u, s_d, seeds, down_seeds, *tensors)
        return y

    @staticmethod
    def backward(ctx, dy):
        first, second = ctx.specs
        x, s, g, u, s_d, seeds, down_seeds, *tensors = ctx.saved_tensors
        of_first, of_second = _halves(ctx.specs, tensors)
        need_first, need_second = _halves(ctx.specs, ctx.needs_input_grad[5:])
        with torch.autocast(x.device.type, enabled=False):
            weights, _, lora_a, lora_b, _ = split(second, of_second)
            ds, db = low_rank_grads(second, need_second, s_d, [dy], lora_b)
            dh = dy @ weights[0].to(second.dtype)
            factors = _factors(first, split(first, of_first)[3])
            *dgu, da = gated.gated_backward(dh, ds, stack(second, lora_a), g, u, s, *factors, ctx.activation, *_mask(second, down_seeds, g.shape[1]))
            da = scaled(second, da.sum(0), lora_a)
            grads_second = parameter_grads(second, need_second, of_second, None, [dy], da, db)  # only a trained base weight asks for h

            weights, _, lora_a, lora_b, _ = split(first, of_first)
            ds, db = low_rank_grads(first, need_first, s, dgu, lora_b)
            da = low_rank_a_grads(first, need_first, seeds, ds, x, lora_a)
            grads_first = parameter_grads(first, need_first, of_first, x, dgu, da, db)
            dx = input_grad(first, seeds, ds, dgu, weights, lora_a).to(ctx.x_dtype) if ctx.needs_input_grad[4] else None
        return (None, None, None, None, dx, *grads_first, *grads_second)
