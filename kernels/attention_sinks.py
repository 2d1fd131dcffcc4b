"""Attention with sinks (gpt-oss) on PyTorch's own causal kernels, which know nothing of sinks: exact, gradients too.

A sink is one more logit a head whose value is zero (transformers/models/gpt_oss/modeling_gpt_oss.py):

    p_ij = exp(s_ij - lse'_i)        lse'_i = log(exp(lse_i) + exp(sink))
    out' = out exp(lse - lse')       out, lse: what the kernel gives without the sink

The kernels' backward recomputes p from the log-sum-exp and takes `rowsum(dO * out)` for sum_j p_ij dP_ij. Given lse' and out' in place of its own, both are
what they should be with the sink, whose dP is zero: dq, dk and dv are exact. And dsink = -sum_i exp(sink - lse'_i) rowsum(dO_i * out'_i).

So every kernel that returns its log-sum-exp serves: cuDNN, flash, and flash on CPUs.
"""

import torch
from torch import Tensor

from fastft import _torch

aten = torch.ops.aten


def _cudnn(q, k, v, scale):
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    return out, lse, (seed, offset), (cum_q, cum_k, max_q, max_k)


def _cudnn_backward(dy, q, k, v, out, lse, random, lengths, scale):
    return aten._scaled_dot_product_cudnn_attention_backward(dy, q, k, v, out, lse, *random, None, *lengths, 0.0, True, scale=scale)


def _flash(q, k, v, scale):
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out, lse, (seed, offset), (cum_q, cum_k, max_q, max_k)


def _flash_backward(dy, q, k, v, out, lse, random, lengths, scale):
    return aten._scaled_dot_product_flash_attention_backward(dy, q, k, v, out, lse, *lengths, 0.0, True, *random, scale=scale)


def _cpu(q, k, v, scale):
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return out, lse, (), ()


def _cpu_backward(dy, q, k, v, out, lse, random, lengths, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dy, q, k, v, out, lse, 0.0, True, scale=scale)


KERNELS = {"cudnn": (_cudnn, _cudnn_backward), "flash": (_flash, _flash_backward), "flash_cpu": (_cpu, _cpu_backward)}


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, scale, kernel):
        out, lse, random, lengths = KERNELS[kernel][0](q, k, v, scale)
        total = torch.logaddexp(lse, _per_head(sinks, lse))
        out = (out * torch.exp(lse - total).view(out.shape[:-1]).unsqueeze(-1)).to(q.dtype)
        ctx.scale, ctx.kernel, ctx.lengths = scale, kernel, lengths
        ctx.save_for_backward(q, k, v, sinks, out, total, *random)
        return out

    @staticmethod
    def backward(ctx, dy):
        q, k, v, sinks, out, total, *random = ctx.saved_tensors
        dq, dk, dv = KERNELS[ctx.kernel][1](dy, q, k, v, out, total, random, ctx.lengths, ctx.scale)
        d_sinks = None
        if ctx.needs_input_grad[3]:
            weight = torch.exp(_per_head(sinks, total) - total).view(out.shape[:-1])
            d_sinks = -(weight * (dy.to(weight.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return dq, dk, dv, d_sinks, None, None


def _per_head(sinks: Tensor, like: Tensor) -> Tensor:
    """sinks [H] against a log-sum-exp [B, H, Q] or [B, H, Q, 1], in its dtype."""
    return sinks.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def choose(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """The kernel of `KERNELS` that PyTorch takes for these fake q, k and v, causal and without a mask; None where it takes another one."""
    if str(q.shape[2]) != str(k.shape[2]) or q.shape[3] != v.shape[3]:
        return None
    backend = _torch.sdpa_backend(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    name = backend if q.is_cuda else f"{backend}_{q.device.type}"
    return name if name in KERNELS else None


def causal(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float, kernel: str) -> Tensor:
    """Causal attention with sinks.

    Args:
        q: [B, H, S, D]. k, v: [B, H / groups, S, D], as many keys as queries. sinks: [H]. scale: of q k^T.
        kernel: which of `KERNELS` runs; `choose` says which can.
    Returns:
        [B, H, S, D] in q's dtype.
    """
    return _Causal.apply(q, k, v, sinks, scale, kernel)
