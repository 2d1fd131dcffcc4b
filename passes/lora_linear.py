"""lora_linear: sibling linears with low-rank adapters become one canonical op.

    before   y0 = linear(x, W0, b0)                                        q_proj.base_layer
             h0 = dropout(x.to(A0.dtype))
             z0 = linear(linear(h0, A0), B0) * scaling                     lora_B(lora_A(...)) * scaling
             r0 = (y0 + z0).to(y0.dtype)
             ... r1 for k_proj, r2 for v_proj on the same x ...
    after    r0, r1, r2 = fastft::lora_linear(x, [W0, W1, W2], ..., [A0, A1, A2], [B0, B1, B2], ...)

Taken (peft/tuners/lora/layer.py, `Linear.forward`, and hand-written forms of it): adapters in any floating dtype, with or
without autocast; base bias and lora_bias; any ranks, unequal in a group; dropout; several active adapters, added one after
the other; base as `linear`, `addmm` (Conv1D) or `x @ W.t()`, reshaped or not; frozen or trained base.
Siblings are grouped where they read one x, nothing between them writes or changes grad mode or autocast, and every other
input is there before the first of them, or can be: a dequantized weight (quant_linear), casts and transposes.
Left, each with a Miss: the reasons in passes/lora_pattern.py.
"""

import operator

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.kernels import lora_linear as kernel
from fastft.kernels.dequantize import dequantize_4bit
from fastft.match import linear_args, value
from fastft.passes.lora_pattern import Linear, find
from fastft.result import Match, Miss


def lora_linear(gm: GraphModule) -> list[Match | Miss]:
    linears, misses = find(gm)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    groups = _groups(gm, linears, position)
    return [_replace(gm, group, position) for group in groups] + misses


def _inputs(linear: Linear) -> list[Node]:
    _, weight, bias = linear_args(linear.base)
    found = [weight, bias]
    for adapter in linear.adapters:
        found += [adapter.a, adapter.b, adapter.bias]
    return [node for node in found if node is not None]


def _groups(gm: GraphModule, linears: list[Linear], position: dict[Node, int]) -> list[list[Linear]]:
    """Siblings: one x, one dtype, no write or change of state between them, all inputs ready before the first."""
    segment = match.segments(gm)
    groups: list[list[Linear]] = []
    for linear in sorted(linears, key=lambda item: position[item.base]):
        for group in groups:
            first = group[0]
            start = position[first.base]
            if (
                _is_same(first.x, linear.x, segment)
                and segment[first.base] == segment[linear.base]
                and match.dtype(first.base) == match.dtype(linear.base)
                and all(_is_there(node, position, start) for node in _inputs(linear))
            ):
                group.append(linear)
                break
        else:
            groups.append([linear])
    return groups


def _is_same(x: Node, other: Node, segment: dict[Node, int]) -> bool:
    """One node, or casts of one node to one dtype with no write between them."""
    if x is other:
        return True
    return match.is_cast(x) and match.is_cast(other) and x.args[0] is other.args[0] and match.dtype(x) == match.dtype(other) and segment[x] == segment[other]


def _is_there(node: Node, position: dict[Node, int], start: int) -> bool:
    """True for what is there at `start`, or can be: it only gives another form to what is there."""
    if node.op in ("placeholder", "get_attr") or position[node] < start:
        return True
    moves = node.target is dequantize_4bit or match.is_cast(node) or match.is_method(node, "t")
    return moves and all(_is_there(item, position, start) for item in node.all_input_nodes)


def _ready(gm: GraphModule, node: Node, position: dict[Node, int], before: Node) -> Node:
    """The input itself, moved before `before` where it stands behind it; for a graph attribute, the same attribute read there."""
    if position[node] < position[before]:
        return node
    if node.op == "get_attr":
        copy = gm.graph.get_attr(node.target)
        copy.meta = dict(node.meta)
        return copy
    node.args = torch.fx.map_arg(node.args, lambda item: _ready(gm, item, position, before))
    before.prepend(node)
    return node


def _leading_sizes(gm: GraphModule, x: Node) -> list[int | Node]:
    """Every size of x but the last: numbers, or nodes where Dynamo made them symbolic."""
    sizes = []
    for dim, size in enumerate(value(x).shape[:-1]):
        if not isinstance(size, int):
            node = gm.graph.call_method("size", (x, dim))
            node.meta = {**x.meta, "example_value": size}
            size = node
        sizes.append(size)
    return sizes


def _replace(gm: GraphModule, group: list[Linear], position: dict[Node, int]) -> Match:
    # A group stands where its first base linear stood; a single one where its sum stood, when all inputs are there.
    anchor = group[0].base if len(group) > 1 else group[0].result
    owner, adapters = [], []
    for i, linear in enumerate(group):
        owner += [i] * len(linear.adapters)
        adapters += linear.adapters
    dropout = [adapter.dropout for adapter in adapters]
    ranks = [sum(value(adapter.a).shape[0] for adapter in linear.adapters) for linear in group]
    provider = kernel.choose(value(group[0].x), match.dtype(group[0].base), ranks)
    with gm.graph.inserting_before(anchor):
        seeds = None
        if any(dropout):
            # Drawn from the device's default generator, so that torch.manual_seed and checkpointing govern it.
            size = [(len(adapters) + 1) // 2, *_leading_sizes(gm, group[0].x)]
            seeds = gm.graph.call_function(
                torch.randint,
                (-(1 << 31), (1 << 31) - 1, size),
                {"dtype": torch.int32, "device": value(group[0].x).device},
            )
            seeds.meta = {**group[0].base.meta, "example_value": None}
        weights, biases = zip(*(linear_args(linear.base)[1:] for linear in group), strict=True)

        def ready(nodes):
            return [None if node is None else _ready(gm, node, position, anchor) for node in nodes]

        call = gm.graph.call_function(
            kernel.op,
            (
                group[0].x,
                ready(weights),
                ready(biases),
                ready(adapter.a for adapter in adapters),
                ready(adapter.b for adapter in adapters),
                ready(adapter.bias for adapter in adapters),
                owner,
                [adapter.scaling for adapter in adapters],
                dropout,
                seeds,
                *provider,
            ),
        )
        call.meta = {**group[0].base.meta, "example_value": [value(linear.result) for linear in group]}
        for i, linear in enumerate(group):
            item = gm.graph.call_function(operator.getitem, (call, i))
            dtype = match.dtype(linear.result)
            item.meta = {**linear.base.meta, "example_value": value(linear.result).to(match.dtype(linear.base))}
            if dtype != match.dtype(linear.base):
                item = gm.graph.call_method("to", (item, dtype))
                item.meta = {**linear.base.meta, "example_value": value(linear.result)}
            linear.result.replace_all_uses_with(item)
    for linear in group:
        if linear.result.target is operator.iadd:
            linear.result.target = operator.add  # its result has been replaced: what is left writes for nobody
        match.erase_dead(linear.result)
    return Match("fastft::lora_linear", "+".join(provider), [linear.base for linear in group])
