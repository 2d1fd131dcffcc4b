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
Siblings are grouped where they read one x, nothing between them changes grad mode, autocast or x, and every other input is
there before the first of them.
Left, each with a Miss: the reasons below.
"""

import dataclasses
import operator

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.kernels import lora_linear as kernel
from fastft.match import is_function, is_linear, linear_args, strip_casts, strip_views, value
from fastft.passes.normalize import dropout_args
from fastft.result import Match, Miss

NAME = "lora_linear"

TENSOR_SCALING = "scaled by a tensor (DoRA)"
NOT_ADDED = "low-rank product is not added to a linear of the same input"
BASE_NOT_LINEAR = "base is not a plain linear"
OTHER_INPUT = "base reads another input"
OTHER_DTYPE = "result stays in the adapter's dtype"
EMBEDDING = "adapter on an embedding"
DROPS_ALL = "dropout probability is 1"


@dataclasses.dataclass
class Adapter:
    """One parsed `scaling * B(A(dropout(x)))`."""

    x: Node
    a: Node
    b: Node
    bias: Node | None
    scaling: float
    dropout: float
    anchor: Node


@dataclasses.dataclass
class Linear:
    """A base linear with its adapters; `result` is the node that the op's output replaces."""

    base: Node
    x: Node
    adapters: list[Adapter]
    result: Node


def lora_linear(gm: GraphModule) -> list[Match | Miss]:
    chains = {node: chain for node in gm.graph.nodes if (chain := _low_rank(node))}
    linears, misses = _collect(gm, chains)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    groups = _groups(gm, linears, position)
    matches = [_replace(gm, group, position) for group in groups]
    misses += _embeddings(gm)
    return matches + misses


def _scalar(node: Node) -> tuple[Node, float] | None:
    """`(inner, factor)` where node multiplies or divides a tensor by a number."""
    if is_function(node, operator.mul):
        for inner, factor in (node.args, node.args[::-1]):
            if isinstance(inner, Node) and isinstance(factor, int | float):
                return inner, float(factor)
    if is_function(node, operator.truediv) and isinstance(node.args[1], int | float):
        return node.args[0], 1.0 / node.args[1]
    return None


def _unscale(node: Node) -> tuple[Node, float]:
    """Strips casts and multiplications by numbers."""
    scaling = 1.0
    while True:
        node = strip_casts(node)
        scaled = _scalar(node)
        if scaled is None:
            return node, scaling
        node, scaling = scaled[0], scaling * scaled[1]


def _low_rank(node: Node) -> Adapter | None:
    """Parses `linear(s * linear(dropout(x), A), B)`, of any rank."""
    if not is_linear(node):
        return None
    inner, b, bias = linear_args(node)
    inner, scaling = _unscale(inner)
    if not is_linear(inner):
        return None
    x, a, a_bias = linear_args(inner)
    if a_bias is not None or value(a).dim() != 2 or value(b).dim() != 2:
        return None
    if bias is not None and scaling != 1.0:
        return None
    x, p = strip_casts(x), 0.0
    if is_function(x, torch.nn.functional.dropout):
        x, p, _ = dropout_args(x)
        x = strip_casts(x)
    if strip_views(x).op == "call_function" and strip_views(x).target is torch.eye:
        return None  # DoRA's weight norm multiplies the adapters with an identity matrix
    return Adapter(x, a, b, bias, scaling, p, node)


def _collect(gm: GraphModule, chains: dict[Node, Adapter]) -> tuple[list[Linear], list[Miss]]:
    """Joins each low-rank chain with the base linear it is added to."""
    owner: dict[Node, Linear] = {}
    misses = []
    for node, adapter in chains.items():
        joined = _join(node, adapter, owner)
        if isinstance(joined, Miss):
            # Two linears in a row are a candidate only where the one between is narrow; joined ones are right at any rank.
            rank, width = value(adapter.a).shape
            if rank < min(width, value(adapter.b).shape[0]):
                misses.append(joined)
        else:
            owner[joined.result] = joined
    complete = []
    for linear in {id(linear): linear for linear in owner.values()}.values():
        reason = _finish(linear)
        if reason is None:
            complete.append(linear)
        else:
            misses += [Miss(reason, adapter.anchor) for adapter in linear.adapters]
    return complete, misses


def _join(node: Node, adapter: Adapter, owner: dict[Node, Linear]) -> Linear | Miss:
    """Follows a chain's single user through scalings and casts to the addition, and reads the other operand."""
    scaling = 1.0
    current = node
    while True:
        users = [user for user in current.users if not _is_dead(user)]
        if len(users) != 1:
            return Miss(NOT_ADDED, node)
        (user,) = users
        scaled = _scalar(user)
        if scaled is not None:
            scaling *= scaled[1]
        elif is_function(user, operator.mul):
            return Miss(TENSOR_SCALING, node)
        elif not (match.is_cast(user) or _is_reshape(user)):
            break
        current = user
    if not is_function(user, operator.add, operator.iadd) or not all(isinstance(arg, Node) for arg in user.args):
        return Miss(NOT_ADDED, node)
    if adapter.dropout >= 1:
        return Miss(DROPS_ALL, node)
    other = user.args[0] if user.args[1] is current else user.args[1]
    adapter = dataclasses.replace(adapter, scaling=adapter.scaling * scaling)
    before = owner.get(other) or owner.get(strip_casts(other))
    if before is not None:
        before.adapters.append(adapter)
        before.result = user
        return before
    base = strip_views(other)
    if not is_linear(base):
        return Miss(BASE_NOT_LINEAR, node)
    x, weight, _ = linear_args(base)
    if strip_views(x) is not strip_views(adapter.x):
        return Miss(OTHER_INPUT, node)
    if value(weight).shape[0] != value(adapter.b).shape[0] or value(weight).dim() != 2:
        return Miss(BASE_NOT_LINEAR, node)
    while value(x).dim() != value(user).dim() and _is_reshape(x):
        x = x.args[0]
    return Linear(base, x, [adapter], user)


def _is_dead(node: Node) -> bool:
    return not node.users and node.op in ("call_function", "call_method") and not match.is_mutating(node)


def _is_reshape(node: Node) -> bool:
    return match.is_method(node, *match.VIEWS)


def _finish(linear: Linear) -> str | None:
    """Takes the cast back to the base's dtype into the result; a reason where there is none."""
    result, dtype = linear.result, match.dtype(linear.base)
    if match.dtype(result) != dtype:
        users = list(result.users)
        if len(users) != 1 or not match.is_cast(users[0]) or match.dtype(users[0]) != dtype:
            return OTHER_DTYPE
        linear.result = users[0]
    if value(linear.result).shape[:-1] != value(linear.x).shape[:-1]:
        return OTHER_INPUT
    return None


def _inputs(linear: Linear) -> list[Node]:
    _, weight, bias = linear_args(linear.base)
    found = [weight, bias]
    for adapter in linear.adapters:
        found += [adapter.a, adapter.b, adapter.bias]
    return [node for node in found if node is not None]


def _groups(gm: GraphModule, linears: list[Linear], position: dict[Node, int]) -> list[list[Linear]]:
    """Siblings: one x, one dtype, no change of state or of x between them, all inputs ready before the first."""
    segment, current, writes = {}, 0, {}
    for node in gm.graph.nodes:
        current += match.changes_state(node)
        segment[node] = current
        if match.is_mutating(node) and node.args and isinstance(node.args[0], Node):
            writes.setdefault(strip_views(node.args[0]), []).append(position[node])
    groups: list[list[Linear]] = []
    for linear in sorted(linears, key=lambda item: position[item.base]):
        for group in groups:
            first = group[0]
            start, end = position[first.base], position[linear.base]
            if (
                first.x is linear.x
                and segment[first.base] == segment[linear.base]
                and match.dtype(first.base) == match.dtype(linear.base)
                and all(position[node] < start for node in _inputs(linear) if node.op not in ("placeholder", "get_attr"))
                and not any(start < at < end for at in writes.get(strip_views(linear.x), ()))
            ):
                group.append(linear)
                break
        else:
            groups.append([linear])
    return groups


def _ready(gm: GraphModule, node: Node, position: dict[Node, int], before: Node) -> Node:
    """The input itself, or for a graph attribute read later on, the same attribute read before `before`."""
    if node.op == "get_attr" and position[node] > position[before]:
        copy = gm.graph.get_attr(node.target)
        copy.meta = dict(node.meta)
        return copy
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
            item.meta = {**linear.base.meta, "example_value": value(linear.result)}
            linear.result.replace_all_uses_with(item)
    for linear in group:
        match.erase_dead(linear.result)
    return Match("fastft::lora_linear", "+".join(provider), [linear.base for linear in group])


def _embeddings(gm: GraphModule) -> list[Miss]:
    """peft's `Embedding.forward`: embedding(ids, A.T) @ B.T, added to the base embedding."""
    misses = []
    for node in gm.graph.nodes:
        if is_linear(node) or (node.op == "call_function" and node.target is operator.matmul):
            inner, _ = _unscale(node.args[0])
            if is_function(inner, torch.nn.functional.embedding) and any(
                is_function(user, operator.mul, operator.add) for user in node.users
            ):
                misses.append(Miss(EMBEDDING, inner))
    return misses
