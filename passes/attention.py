"""attention: SDPA calls and spelled-out attention become one canonical op that knows what the mask means.

    before   mask = (arange(S)[None, :] <= arange(S)[:, None]) & padding[b, kv]                 once a step, [B, 1, S, S]
             k = k[:, :, None].expand(B, h, n, S, D).reshape(B, h * n, S, D)                    v likewise
             y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False)
    after    tiles = fastft::block_mask([padding], "(kv <= q) & (t0[b, kv])", ...)              once a step, only where FlexAttention runs
             y = fastft::attention(q, k, v, None, [padding], tiles, ..., "(kv <= q) & (t0[b, kv])", ..., "flex")

A plain causal mask becomes `is_causal=True`, and repeated k and v become `enable_gqa=True`: the masked form made cuDNN compute the full square,
3.0 times slower (1.131 against 3.357 ms at 4 x 2048, tools/results/2026-11-23-op-attention.json).

Taken: the spellings in passes/attention_pattern.py with the masks of passes/attention_mask.py; inside checkpointed bodies too, with the tiles made outside.
The row's provider names the kernel and the mask: "cudnn: causal", "flex: causal, window 1024, padding".
Under autocast q and k may be float32 beside v in 16 bits (rotated by float32 tables, in a model kept in float32): the op casts them, as SDPA and matmul do.
Left, each with a Miss: the reasons in those two files, and below.
"""

import functools
from collections.abc import Callable

from torch import Tensor, float64
from torch.fx import GraphModule, Node

from fastft import _torch, match
from fastft.kernels import attention as kernel
from fastft.kernels import attention_sinks
from fastft.kernels import mask as masks
from fastft.match import value
from fastft.passes.attention_mask import CAUSAL, FULL, VALUES, Mask, understand
from fastft.passes.attention_pattern import BETWEEN, Attention, between, find
from fastft.passes.attention_tiles import once, tiles
from fastft.passes.mask_reader import Reader
from fastft.result import Match, Miss

LENGTHS = "queries and keys differ in number"
DTYPES = "q, k and v differ in dtype"
BROADCAST = "q, k and v differ in batch, heads or head dimension"

# Methods that ask for the memory layout which a product has and attention's kernels do not.
LAYOUT = ("view", "view_as", "as_strided")


def attention(gm: GraphModule) -> list[Match | Miss]:
    if match.calls(gm):  # bodies are handled with the graph around them: what makes their masks is read once
        return []
    reader, autocast = Reader(), functools.cache(match.autocast_dtypes)
    found = ((body, call) for body in match.graph_modules(gm) for call in find(body, reader))
    return [call if isinstance(call, Miss) else _replace(body, call, reader, autocast) for body, call in found]


def _mask(call: Attention, reader: Reader) -> Mask | str:
    if call.mask is None:
        return CAUSAL if call.causal else FULL
    queries, keys = value(call.q).shape[2], value(call.k).shape[2]
    return understand(reader, call.mask, keys if str(queries) == str(keys) else None)


def _replace(gm: GraphModule, call: Attention, reader: Reader, autocast: Callable) -> Match | Miss:
    mask = _mask(call, reader)
    if isinstance(mask, str):
        return Miss(mask, call.node)
    q, k, v = value(call.q), value(call.k), value(call.v)
    if mask.allowed and str(q.shape[2]) != str(k.shape[2]):
        return Miss(LENGTHS, call.node)
    dtype = autocast(gm, q.device.type)[call.node]
    if dtype and q.dtype != float64:
        q, k, v = (x.to(dtype) for x in (q, k, v))  # as the op does
    if not q.dtype == k.dtype == v.dtype:
        return Miss(DTYPES, call.node)
    if (
        len({str(x.shape[0]) for x in (q, k, v)}) > 1
        or k.shape[1] != v.shape[1]
        or str(k.shape[2]) != str(v.shape[2])
        or q.shape[1] % k.shape[1]
        or q.shape[3] != k.shape[3]
    ):
        return Miss(BROADCAST, call.node)
    if between(call):
        return Miss(BETWEEN, call.node)
    plain = mask.allowed in (FULL.allowed, CAUSAL.allowed)
    lengths = _lengths(gm, q.shape[2], k.shape[2])
    readable = lengths is not None and (mask.rows_of >= 0 or not mask.per_row)  # the tiles know the batch from that read
    special = bool(call.softcap) or call.sinks is not None
    # Queries without keys: adding a number that swallows the scores leaves equal weights, a boolean mask or -inf zeros; with sinks the sink takes all.
    even_if_empty = mask.additive and mask.may_be_empty and mask.finite and call.sinks is None
    if even_if_empty and not mask.swallows:
        return Miss(VALUES, call.node)
    provider = kernel.choose(q, v, plain, readable, special, call.dropout, even_if_empty)
    if call.sinks is not None and mask.allowed == CAUSAL.allowed and not (call.softcap or call.dropout):
        provider = attention_sinks.choose(q, k, v) or provider
    given = call.mask if provider in ("mask", "math") else None
    tensors = _tensors(gm, mask, lengths, q, even_if_empty) if provider == "flex" else ([], [], None, [])
    with gm.graph.inserting_before(call.node):
        new = gm.graph.call_function(
            kernel.op, (call.q, call.k, call.v, given, *tensors, call.sinks, mask.allowed, call.scale, call.softcap, call.dropout, provider)
        )
    new.meta = dict(call.node.meta)
    result = new
    if value(call.node).is_contiguous() and any(match.is_method(user, *LAYOUT) for user in call.node.users):
        with gm.graph.inserting_after(new):
            result = gm.graph.call_method("contiguous", (new,))
        result.meta = dict(call.node.meta)
    call.node.replace_all_uses_with(result)
    match.erase_dead(call.node)
    name = provider
    if provider == "sdpa":
        name = _torch.sdpa_backend(q, k, v, is_causal=plain and bool(mask.allowed), enable_gqa=q.shape[1] != k.shape[1], dropout_p=call.dropout)
    extras = [word for word, there in (("softcap", call.softcap), ("sinks", call.sinks is not None), ("dropout", call.dropout)) if there]
    return Match(str(kernel.op.name()), f"{name}: {', '.join([mask.kind, *extras])}", [new])


def _tensors(gm: GraphModule, mask: Mask, lengths: tuple, q: Tensor, even_if_empty: bool) -> tuple[list[Node], list[Node], Node | None, list[Node]]:
    """`reads`, `blocks`, `empty` and `empty_blocks` of a call in `gm`. q: its fake tensor."""
    sources, reads = list(mask.reads), [match.bring_in(gm, node) for node in mask.reads]
    if len({node.graph for node in (*sources, *lengths) if isinstance(node, Node)}) > 1:  # some made in the body: so are the tiles
        sources, lengths = reads, tuple(match.bring_in(gm, item) if isinstance(item, Node) else item for item in lengths)
    args = (sources, mask.allowed or "q >= 0", mask.rows_of, *lengths, q.device)
    blocks = tiles(gm, args, q.fake_mode)
    if not even_if_empty:
        return reads, blocks, None, []
    rows = once(gm, masks.empty_op, args, q.fake_mode)
    return reads, blocks, match.bring_in(gm, rows), tiles(gm, ([rows], "t0[b, q]", 0, *lengths, q.device), q.fake_mode)


def _lengths(gm: GraphModule, queries, keys) -> tuple | None:
    """Both as numbers, or as the inputs of the outermost graph that hold them; None where there are none such."""
    found = []
    for length in (queries, keys):
        if isinstance(length, int):
            found.append(length)
            continue
        inputs = [node for node in match.outermost(gm).graph.nodes if node.op == "placeholder" and str(value(node)) == str(length)]
        if not inputs:
            return None
        found.append(inputs[0])
    return tuple(found)
