"""`fastft::attention`: softmax(q k^T scale [softcapped] + mask [, sinks]) v, with a mask whose meaning is known.

| provider | what runs | for |
|---|---|---|
| sdpa | `scaled_dot_product_attention` without a mask: PyTorch takes cuDNN on Hopper and Blackwell, flash elsewhere | all or causal |
| flex | FlexAttention's kernels, tiles from `fastft::block_mask` | every other mask that no tensor of q x kv is behind, softcap, sinks; 16 bits, CUDA |
| mask | `scaled_dot_product_attention` with the model's own mask | the rest |
| cudnn, flash, flash_cpu | the same kernels as sdpa's, with sinks (kernels/attention_sinks.py) | causal with sinks |
| math | matmul, softmax, matmul | softcap and sinks where none of these run |

k and v are never repeated for grouped queries (`enable_gqa`; FlexAttention reads them as they are).
The op decomposes while AOTAutograd traces: the joint graph holds PyTorch's own attention ops, which save q, k, v, the output and the log-sum-exp.

Sinks (gpt-oss, transformers/models/gpt_oss/modeling_gpt_oss.py) are one more logit a head whose value is zero; with FlexAttention:
    out = out_without * exp(lse - logaddexp(lse, sink)) = out_without * sigmoid(lse - sink)
exact in the gradients too, because FlexAttention differentiates its log-sum-exp.

One layer at Llama-8B's shape, forward + backward on an H200, torch 2.11, ms (tools/results/2026-11-23-op-attention*.json): causal 4 x 2048 cuDNN 1.13, flash
1.94, the model's own mask 3.36; 30 % padding of 4 x 2048, its queries left out, flex 1.21, flash (varlen) 1.57, own mask 3.44; window 1024 of 8192 flex 1.52,
varlen 1.98, own mask 12.3; documents in 8192 flex 0.85, varlen 0.99, own mask 12.3.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fastft import _torch
from fastft.kernels import attention_sinks
from fastft.kernels import mask as masks
from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.low_rank import arithmetic, triton

# Head dimensions that FlexAttention's kernels take.
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256

LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor[] reads, Tensor[] blocks, Tensor? empty, Tensor[] empty_blocks, Tensor? sinks, "
    "str allowed, float scale, float softcap, float dropout, str provider) -> Tensor"
)


def attention(q, k, v, mask, reads, blocks, empty, empty_blocks, sinks, allowed, scale, softcap, dropout, provider) -> Tensor:
    """See the module's docstring.

    Args:
        q: [B, H, Q, D]. k: [B, H / groups, KV, D]. v: [B, H / groups, KV, E]. mask: the model's own, bool or additive, where the provider reads it.
        reads, blocks: see fastft::block_mask; only for "flex". empty: bool [B, Q], the queries without any key, and empty_blocks: their tiles; given where
            the model adds the least number to forbidden scores, which leaves such a query with equal weights for all keys. Else it gets zeros.
        sinks: [H] or None.
        allowed: "" (all), "kv <= q", or with "flex" any text over `reads` (kernels/mask.py).
        scale: of q k^T. softcap: c in c tanh(x / c), 0 for none. dropout: probability, of the weights.
    Returns:
        [B, H, Q, E] in q's dtype (autocast's where that is on).
    """
    q, k, v = (x.to(arithmetic(x)) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        if provider == "flex":
            return _flex(q, k, v, reads, blocks, empty, empty_blocks, sinks, allowed, scale, softcap)
        if provider in attention_sinks.KERNELS:
            return attention_sinks.causal(q, k, v, sinks, scale, provider)
        if provider == "math":
            return _math(q, k, v, mask, sinks, allowed, scale, softcap, dropout)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        causal = provider == "sdpa" and allowed != ""
        return sdpa(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


LIBRARY.impl("attention", attention, "CompositeImplicitAutograd")
op = torch.ops.fastft.attention.default
_PLACES = {argument.name: place for place, argument in enumerate(op._schema.arguments)}


def get(node: Node, name: str) -> Any:
    """The argument `name` of a call of the op in a graph."""
    return node.args[_PLACES[name]]


def change(node: Node, **arguments: Any) -> None:
    """Gives a call of the op in a graph other arguments."""
    for name, item in arguments.items():
        node.update_arg(_PLACES[name], item)


def _flex(q, k, v, reads, blocks, empty, empty_blocks, sinks, allowed, scale, softcap) -> Tensor:
    def capped(score, b, h, i, j):
        return softcap * torch.tanh(score / softcap) if softcap else score + 0.0

    def equal(score, b, h, i, j):  # all the same, with the gradient of the scores
        score = capped(score, b, h, i, j)
        return score - score.detach()

    def mask_mod(b, h, i, j, *tensors):
        return masks.evaluate(allowed or "q >= 0", tensors, b, i, j)

    out, lse = _torch.flex_attention(q, k, v, capped, mask_mod, blocks, masks.BLOCK, scale, tuple(reads))
    if sinks is not None:
        out = (out * torch.sigmoid(lse.unsqueeze(-1) - sinks.to(lse.dtype).view(1, -1, 1, 1))).to(out.dtype)
    if empty is not None:
        empty = empty.expand(q.shape[0], -1)  # no tiles, no work where every query has a key
        even, _ = _torch.flex_attention(q, k, v, equal, lambda b, h, i, j, rows: rows[b, i], empty_blocks, masks.BLOCK, scale, (empty,))
        out = torch.where(empty[:, None, :, None], even, out)
    return out


def _math(q, k, v, mask, sinks, allowed, scale, softcap, dropout) -> Tensor:
    """As transformers' eager attention computes it: scores in q's dtype, softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.matmul(q, k.mT) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and allowed:
        mask = masks.dense(allowed, (), 1, q.shape[2], k.shape[2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)[..., : k.shape[2]]
    return torch.matmul(torch.dropout(weights, dropout, dropout > 0), v)


def choose(q: Tensor, v: Tensor, plain: bool, readable: bool, special: bool, dropout: float, even_if_empty: bool) -> str:
    """The provider for a call.

    Args:
        q, v: fake tensors. plain: everything or causal is allowed. readable: no tensor of q x kv is behind the mask. special: softcap or sinks.
        even_if_empty: equal weights for a query without keys. PyTorch's CPU kernel is wrong there: its log-sum-exp swallows the count of the keys, and the
            gradients are 30 times too large.
    """
    if plain and not special:
        return "sdpa"
    small = max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM and min(q.shape[-1], v.shape[-1]) >= MIN_HEAD_DIM
    if readable and not dropout and triton is not None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and small:
        return "flex"
    return "math" if special or even_if_empty else "mask"
