"""quant_linear: bitsandbytes' 4-bit linears become plain ones on a weight that is dequantized right before it is used.

    before   y = autograd_function_apply(forward, backward, packed, x, absmax, ...)      bitsandbytes 0.50, and older ones
             y = bitsandbytes::gemm_4bit(x, packed, shape, absmax, 64, 'nf4', ...)       0.50, where x needs no gradient
             y = linear(x, bitsandbytes::dequantize_4bit(packed, ...).to(...).t(), bias) older, where x needs no gradient
    after    W = fastft::dequantize_4bit(packed, absmax, absmax_8bit, absmax_code, absmax_offset, 64, 'nf4', shape, dtype)
             y = linear(x, W, bias)

fastft's partitioner never saves W, only what it is made from. lora_linear, which runs later, takes these linears as any other.

Taken: NF4 and FP4, nested statistics or not, any block size, compute dtype and storage dtype, bias; dequantize_4bit wherever else it stands.
Casts that change nothing are left out, and so is peft's copy of a result that nobody else reads.
Left: gemm_4bit for few rows where the graph needs no gradient, and gemv_4bit (providers of these names);
with a Miss what the reasons here and in passes/quant_pattern.py say.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from fastft import _torch, match
from fastft.kernels.dequantize import dequantize_4bit
from fastft.match import op_name, value
from fastft.passes.quant_pattern import EIGHT_BITS, OTHER, Linear, Reader, Weight, in_function, is_eight_bits, is_sum, unchanged
from fastft.result import Match, Miss

SUBCLASS = "weight is a quantized tensor subclass"
NO_BACKWARD = "gemv_4bit in training has no backward"  # a weight that an evaluation has put into the CPU's layout

# On an H100, gemm_4bit has a kernel of its own for up to so many rows (bitsandbytes' `_gemm_4bit_use_custom_cuda`; fewer for some shapes).
MAX_ROWS = 64

_LEFT = {"bitsandbytes::gemm_4bit": "gemm_4bit", "bitsandbytes::gemv_4bit": "gemv_4bit"}
_REASONS = {"bitsandbytes::gemv_4bit": NO_BACKWARD, "bitsandbytes::int8_scaled_mm": EIGHT_BITS, "bitsandbytes::int8_mixed_scaled_mm": EIGHT_BITS}


def quant_linear(gm: GraphModule) -> list[Match | Miss]:
    for node in gm.graph.nodes:
        if is_sum(node) and len(node.args[0].users) == 1:
            node.target = operator.add  # nothing else reads what it writes
    results = [*_linears(gm), *_weights(gm)]
    read = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    for attribute, child in list(gm.named_children()):
        if isinstance(child, GraphModule) and attribute not in read:
            delattr(gm, attribute)  # bodies that nothing calls any more: they would keep AOTAutograd's cache from hitting
    return results


def _linears(gm: GraphModule) -> Iterator[Match | Miss]:
    autocast = functools.cache(lambda device: match.autocast_dtypes(gm, device))
    training = any(node.op.startswith("call") and getattr(value(node), "requires_grad", False) for node in gm.graph.nodes)
    reader = Reader()
    for node in list(gm.graph.nodes):
        if node._erased:
            continue
        found = in_function(gm, node) or reader.linear(node)
        if isinstance(found, Linear) and (training or op_name(node) not in _LEFT or not _has_few_rows(found.x)):
            new = _replace(found, autocast(value(found.x).device.type)[node])
            yield Match("fastft::dequantize_4bit", "dequantize", [new])
        elif op_name(node) in _LEFT and not (training and found is None):
            _leave_out_copies(node)
            yield Match(op_name(node), _LEFT[op_name(node)], [node])
        elif reason := found or _reason(node):
            yield Miss(reason, node)


def _weights(gm: GraphModule) -> Iterator[Match | Miss]:
    """What is dequantized for something else than a linear."""
    for node in list(gm.graph.nodes):
        if op_name(node) != "bitsandbytes::dequantize_4bit":
            continue
        weight = Reader().weight(node)
        if weight is None:
            yield Miss(OTHER, node)
        else:
            new = _dequantize(weight, node)
            _put(node, new)
            yield Match("fastft::dequantize_4bit", "dequantize", [new])


def _has_few_rows(x: Node) -> bool:
    rows = math.prod(value(x).shape[:-1])
    return isinstance(rows, int) and rows <= MAX_ROWS


def _reason(node: Node) -> str | None:
    """Why a linear that is quantized in another way is left."""
    if not match.is_linear(node):
        return _REASONS.get(op_name(node))
    weight = match.linear_args(node)[1]
    if _torch.is_quantized(value(weight)):
        return SUBCLASS
    while weight.target is not dequantize_4bit and weight.op.startswith("call") and weight.args and isinstance(weight.args[0], Node):
        weight = weight.args[0]
    return EIGHT_BITS if is_eight_bits(weight) else None


def _dequantize(weight: Weight, before: Node) -> Node:
    """The weight, made right before `before`, which tells where it comes from."""
    packed, graph = weight.packed, before.graph
    statistics = (packed.absmax, packed.absmax_8bit, packed.absmax_code, packed.absmax_offset)
    with graph.inserting_before(before):
        node = graph.call_function(dequantize_4bit, (packed.packed, *statistics, packed.blocksize, packed.quant_type, list(packed.shape), weight.made))
        example = value(packed.absmax).new_empty(packed.shape, dtype=weight.made)
        node.meta = {**before.meta, "example_value": example}
        if weight.dtype != weight.made:
            node = graph.call_method("to", (node, weight.dtype))
            example = example.to(weight.dtype)
            node.meta = {**before.meta, "example_value": example}
        if weight.transposed:
            node = graph.call_method("t", (node,))
            node.meta = {**before.meta, "example_value": example.t()}
    return node


def _put(old: Node, new: Node) -> None:
    """`new` in the place of `old`, which is erased with what it alone reads."""
    old.replace_all_uses_with(new)
    match.erase_dead(old)


def _replace(found: Linear, autocast: torch.dtype | None) -> Node:
    """The plain linear in the place of `found.node`; returns its node. Under autocast it multiplies in that dtype, as bitsandbytes does in eager."""
    node, graph, weight = found.node, found.node.graph, found.weight
    dtype = autocast or weight.dtype
    if dtype != weight.dtype:
        weight = dataclasses.replace(weight, dtype=dtype, made=dtype if weight.made == torch.float32 else weight.made)
    weight = _dequantize(weight, node)
    results = [node] if isinstance(value(node), torch.Tensor) else sorted(node.users, key=lambda user: user.args[1])  # of a function, the first is read
    with graph.inserting_before(node):
        linear = graph.call_function(torch._C._nn.linear, (unchanged(found.x), weight, found.bias))
    linear.meta = {**node.meta, "example_value": value(results[0]).to(dtype)}
    for result in results:
        _put(result, linear)
    _leave_out_copies(linear)
    return linear


def _leave_out_copies(node: Node) -> None:
    """Casts of a linear's result that change nothing, and peft's copy of it."""
    while len(node.users) == 1:
        (user,) = node.users
        if match.is_method(user, "clone") and not user.kwargs or unchanged(user) is node:
            _put(user, node)
        elif match.is_cast(user):
            node = user
        else:
            break
