"""Finds LoRA in Dynamo's graph, for passes/lora_linear.py: each low-rank chain and the linear it is added to.

    y + cast(scaling * linear(scaling' * linear(dropout(cast(x)), A), B))        y = view(linear(view(x), W, b))

A chain is anchored on its second linear. What it lacks to be taken is one of the reasons below.
"""

import dataclasses
import operator

import torch
from torch.fx import GraphModule, Node

from fastft import _torch, match
from fastft.match import dropout_args, is_function, is_linear, linear_args, strip_casts, strip_views, value
from fastft.result import Miss

TENSOR_SCALING = "scaled by a tensor (DoRA)"
NOT_ADDED = "low-rank product is not added to a linear of the same input"
BASE_NOT_LINEAR = "base is not a plain linear"
BASE_QUANTIZED = "base is a quantized tensor subclass"
FEW_ROWS = "base is bitsandbytes' kernel for few rows"
OTHER_INPUT = "base reads another input"
OTHER_DTYPE = "result stays in the adapter's dtype"
EMBEDDING = "adapter on an embedding"
DROPS_ALL = "dropout probability is 1"
INTERRUPTED = "a write, or a change of grad mode or autocast, between base, adapter and sum"


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
    """A base linear with its adapters; `result` is the node that the op's output replaces.

    cast: the dtype that the base's result was cast to before the sum (bitsandbytes' compute dtype is not x's); base's own elsewhere.
    """

    base: Node
    x: Node
    adapters: list[Adapter]
    result: Node
    cast: torch.dtype


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
    # A mask that somebody else sees too is not ours to draw: such an x is another input than the base's.
    if is_function(x, torch.nn.functional.dropout) and len(x.users) == 1:
        x, p, _ = dropout_args(x)
        x = strip_casts(x)
    if strip_views(x).op == "call_function" and strip_views(x).target is torch.eye:
        return None  # DoRA's weight norm multiplies the adapters with an identity matrix
    return Adapter(x, a, b, bias, scaling, p, node)


def find(gm: GraphModule) -> tuple[list[Linear], list[Miss]]:
    """Every base linear of the graph with its adapters, and the candidates that are none."""
    chains = {node: chain for node in gm.graph.nodes if (chain := _low_rank(node))}
    owner: dict[Node, Linear] = {}
    misses = []
    segment = match.segments(gm)
    for node, adapter in chains.items():
        joined = _join(node, adapter, owner, segment)
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
    return complete, misses + _embeddings(gm)


def _join(node: Node, adapter: Adapter, owner: dict[Node, Linear], segment: dict[Node, int]) -> Linear | Miss:
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
    if user.target is operator.iadd and (current is user.args[0] or len(other.users) > 1):
        return Miss(INTERRUPTED, node)  # somebody else reads the base's result after the sum was written into it
    adapter = dataclasses.replace(adapter, scaling=adapter.scaling * scaling)
    before = owner.get(other) or owner.get(strip_casts(other))
    steps = {segment[item] for item in (before.base if before else strip_views(other), _first(node), node, user)}
    if len(steps) > 1:
        return Miss(INTERRUPTED, node)
    if before is not None:
        before.adapters.append(adapter)
        before.result = user
        return before
    base = strip_views(other)
    if match.op_name(base) in ("bitsandbytes::gemm_4bit", "bitsandbytes::gemv_4bit"):
        return Miss(FEW_ROWS, node)
    if not is_linear(base):
        return Miss(BASE_NOT_LINEAR, node)
    x, weight, _ = linear_args(base)
    if _torch.is_quantized(value(weight)):
        return Miss(BASE_QUANTIZED, node)
    if strip_views(x) is not strip_views(adapter.x):
        return Miss(OTHER_INPUT, node)
    if value(weight).shape[0] != value(adapter.b).shape[0] or value(weight).dim() != 2:
        return Miss(BASE_NOT_LINEAR, node)
    while value(x).dim() != value(user).dim() and _is_reshape(x):
        x = x.args[0]
    return Linear(base, x, [adapter], user, match.dtype(other))


def _first(node: Node) -> Node:
    """The first linear of the chain that ends in `node`."""
    return _unscale(linear_args(node)[0])[0]


def _is_dead(node: Node) -> bool:
    return not node.users and node.op in ("call_function", "call_method") and not match.is_mutating(node)


def _is_reshape(node: Node) -> bool:
    return match.is_method(node, *match.VIEWS)


def _finish(linear: Linear) -> str | None:
    """Takes the cast back to the base's dtype into the result; a reason where there is none."""
    result, dtype = linear.result, match.dtype(linear.base)
    kept = match.dtype(result) == linear.cast and all(_precision(adapter.anchor) <= _precision(linear.base) for adapter in linear.adapters)
    if match.dtype(result) != dtype and not kept:
        users = list(result.users)
        if len(users) != 1 or not match.is_cast(users[0]) or match.dtype(users[0]) != dtype:
            return OTHER_DTYPE
        linear.result = users[0]
    if value(linear.result).shape[:-1] != value(linear.x).shape[:-1]:
        return OTHER_INPUT
    return None


def _precision(node: Node) -> float:
    return -torch.finfo(match.dtype(node)).eps


def _embeddings(gm: GraphModule) -> list[Miss]:
    """peft's `Embedding.forward`: embedding(ids, A.T) @ B.T, added to the base embedding. A table that is no transpose is the model's own."""
    misses = []
    for node in gm.graph.nodes:
        if is_linear(node) or is_function(node, operator.matmul):
            inner, _ = _unscale(node.args[0])
            if is_function(inner, torch.nn.functional.embedding) and strip_casts(inner.args[1]).op.startswith("call"):
                misses.append(Miss(EMBEDDING, inner))
    return misses
