"""Finds attention in Dynamo's graph: `scaled_dot_product_attention`, or matmul, softmax, matmul spelled out.

    scores = matmul(q, k.transpose(2, 3)) * scale            or / scale, or with q scaled before
    scores = tanh(scores / cap) * cap                        Gemma 2's softcap
    scores = scores + mask                                   masked_fill and where are left: FORM
    scores = cat([scores, sinks], -1) - max                  gpt-oss
    weights = softmax(scores, -1, dtype).to(q.dtype)[..., :-1]
    out = matmul(dropout(weights), v)

transformers/integrations/sdpa_attention.py, and `eager_attention_forward` of its models.
"""

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.match import is_function, is_method, value
from fastft.passes.attention_repeat import unrepeated
from fastft.passes.mask_indexing import Unknown
from fastft.passes.mask_meaning import Choice, Linear
from fastft.passes.mask_reader import Reader
from fastft.result import Miss

BIAS = "a bias is added to the scores (ALiBi, relative positions)"
SHAPE = "not [batch, heads, length, head dimension]"
FORM = "softmax between two products in a form not known"
BETWEEN = "a write, or a change of grad mode or autocast, between the scores and the output"
READ_TWICE = "something else reads the scores or the weights"

SDPA = {torch._C._nn.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention}
_ADD, _MUL, _DIV = (operator.add, torch.add, operator.iadd), (operator.mul, torch.mul, operator.imul), (operator.truediv, torch.div, operator.itruediv)
_MATMUL = (torch.matmul, operator.matmul, torch.bmm)


@dataclasses.dataclass
class Attention:
    """One call. node: what it returns, [B, H, Q, E]. k and v: not repeated for grouped queries. mask: additive or bool, or None."""

    node: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    causal: bool
    scale: float
    dropout: float
    softcap: float = 0.0
    sinks: Node | None = None


class Refused(Exception):
    """Why a softmax between two products is not taken."""


def between(call: Attention) -> bool:
    """True where something is written, or grad mode or autocast change, between the first node that a call replaces and its output."""
    own, pending = {call.node}, [call.node]
    while pending:
        for item in pending.pop().all_input_nodes:
            if item not in own and item not in (call.q, call.k, call.v, call.mask, call.sinks) and item.op != "placeholder":
                own.add(item)
                pending.append(item)
    order = list(call.node.graph.nodes)
    first = next((i for i, node in enumerate(order) if node in own), 0)
    for node in order[first : order.index(call.node)]:
        if match.changes_state(node) or match.is_mutating(node) and node not in own:
            return True
    return False


def find(gm: GraphModule, reader: Reader) -> Iterator[Attention | Miss]:
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in SDPA:
            found = _sdpa(node)
            yield found if isinstance(found, Attention) else Miss(found, node)
        elif is_function(node, torch.nn.functional.softmax, torch.softmax) or is_method(node, "softmax"):
            out = _product_below(node)
            if out is not None:
                try:
                    yield _spelled_out(node, out, reader)
                except Refused as reason:
                    yield Miss(str(reason), node)


def _sdpa(node: Node) -> Attention | str:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = match.given(node, *names)
    q, k, v = (given[name] for name in names[:3])
    if any(value(x).dim() != 4 for x in (q, k, v)):
        return SHAPE
    k, v = unrepeated(q, k, v)
    scale = given.get("scale")
    dropout = given.get("dropout_p", 0.0)
    if isinstance(scale, Node) or isinstance(dropout, Node):
        return FORM
    scale = value(q).shape[-1] ** -0.5 if scale is None else scale
    return Attention(node, q, k, v, given.get("attn_mask"), bool(given.get("is_causal", False)), float(scale), float(dropout))


def _product_below(softmax: Node) -> Node | None:
    """The matmul that the weights go into as left operand, through casts, dropout and a slice; None where softmax is something else (routing, a loss)."""
    node = softmax
    for _ in range(6):
        for user in node.users:
            if is_function(user, *_MATMUL) or is_method(user, "matmul", "bmm"):
                return user if len(user.args) == 2 and user.args[0] is node and value(user).dim() >= 3 else None
        following = [
            u for u in node.users if match.is_cast(u) or is_function(u, torch.nn.functional.dropout, operator.getitem) or is_method(u, "contiguous", "view")
        ]
        if len(following) != 1:
            return None
        node = following[0]
    return None


class _Walk:
    """Down from the second product and up from the softmax, through nodes that nothing else reads."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def step(self, node: Node, index: int = 0) -> Node:
        if len(node.args) <= index:
            raise Refused(FORM)
        below = node.args[index]
        if not isinstance(below, Node) or len(below.users) != 1:
            raise Refused(READ_TWICE)
        return below

    def number(self, item: Any) -> float | None:
        """A number, given as such or as a constant tensor."""
        try:
            meaning = self.reader.operand(item)
        except Unknown:
            return float(item) if isinstance(item, float) else None
        if isinstance(meaning, Choice) and meaning.truth is True:
            return meaning.yes
        return float(meaning.constant) if isinstance(meaning, Linear) and not meaning.terms else None

    def factor(self, node: Node) -> float | None:
        """c where the node is `x * c` or `x / c`."""
        if not (is_function(node, *_MUL, *_DIV) or is_method(node, "mul", "div", "mul_", "div_")) or len(node.args) != 2 or node.kwargs:
            return None
        number = self.number(node.args[1])
        divides = node.target in _DIV or node.target in ("div", "div_")
        return None if number is None or number == 0 else (1 / number if divides else number)


def _spelled_out(softmax: Node, out: Node, reader: Reader) -> Attention:
    walk, dropout, sliced = _Walk(reader), 0.0, False
    args = match.given(softmax, "input", "dim")
    scores, sinks = args["input"], None
    if value(out).dim() != 4:
        raise Refused(BIAS if _biased(scores) else SHAPE)
    node = walk.step(out)
    while node is not softmax:
        if is_function(node, torch.nn.functional.dropout):
            if dropout:
                raise Refused(FORM)
            _, p, training = match.dropout_args(node)
            dropout = float(p) if training else 0.0
        elif is_function(node, operator.getitem):
            if node.args[1] != (Ellipsis, slice(None, -1, None)) or sliced:
                raise Refused(FORM)
            sliced = True
        elif not match.is_cast(node):
            raise Refused(FORM)
        node = walk.step(node)
    if args.get("dim") not in (-1, 3) or not sliced and len(softmax.users) != 1:
        raise Refused(FORM)
    if sliced:
        scores, sinks = _sinks(walk, scores)
    elif len(scores.users) != 1:
        raise Refused(READ_TWICE)
    scores, mask = _mask(walk, scores)
    softcap = _softcap(walk, scores)
    if softcap:
        scores = walk.step(walk.step(walk.step(scores)))
    scale = 1.0
    while (factor := walk.factor(scores)) is not None:
        scale, scores = scale * factor, walk.step(scores)
    if is_function(scores, *_ADD, torch.baddbmm) or is_method(scores, "baddbmm"):
        raise Refused(BIAS)
    if not (is_function(scores, *_MATMUL) or is_method(scores, "matmul")) or len(scores.args) != 2:
        raise Refused(FORM)
    q, transposed = scores.args
    if not (
        is_method(transposed, "transpose") and {d % 4 for d in transposed.args[1:]} == {2, 3} or is_function(transposed, getattr) and transposed.args[1] == "mT"
    ):
        raise Refused(FORM)
    k, v = unrepeated(q, transposed.args[0], out.args[1])
    if any(value(x).dim() != 4 for x in (q, k, v)):
        raise Refused(SHAPE)
    return Attention(out, q, k, v, mask, False, scale, dropout, softcap, sinks)


def _biased(scores: Node) -> bool:
    """True where they come from `baddbmm`, which adds to them (Bloom's ALiBi)."""
    pending, seen = [scores], 0
    while pending and seen < 12:
        node, seen = pending.pop(), seen + 1
        if is_method(node, "baddbmm") or is_function(node, torch.baddbmm):
            return True
        if is_method(node, "view", "reshape") or match.is_cast(node) or is_function(node, *_ADD):
            pending += [a for a in node.args if isinstance(a, Node)]
    return False


def _strip(walk: _Walk, node: Node) -> Node:
    while match.is_cast(node):
        node = walk.step(node)
    return node


def _mask(walk: _Walk, scores: Node) -> tuple[Node, Node | None]:
    """`(the scores before, the mask)`."""
    scores = _strip(walk, scores)
    if is_function(scores, *_ADD) and len(scores.args) == 2 and not scores.kwargs and all(isinstance(a, Node) for a in scores.args):
        given = scores.args
        own = next((i for i in (0, 1) if _is_scores(walk, given[i])), None)
        if own is None:
            raise Refused(BIAS)
        return _strip(walk, walk.step(scores, own)), given[1 - own]
    if is_method(scores, "masked_fill") or is_function(scores, torch.masked_fill, torch.where):
        raise Refused(FORM if any(_is_scores(walk, item) for item in scores.all_input_nodes) else BIAS)
    return scores, None


def _is_scores(walk: _Walk, node: Node) -> bool:
    """True where a product stands under casts, factors and a softcap."""
    for _ in range(8):
        if is_function(node, *_MATMUL) or is_method(node, "matmul"):
            return True
        passes_on = match.is_cast(node) or walk.factor(node) is not None or is_function(node, torch.tanh) or is_method(node, "tanh")
        if not passes_on or not node.args:
            return False
        node = node.args[0]
    return False


def _softcap(walk: _Walk, scores: Node) -> float:
    """c where the node is `tanh(x / c) * c`."""
    outer = walk.factor(scores)
    inner = scores.args[0] if scores.args else None
    if outer is None or not (is_function(inner, torch.tanh) or is_method(inner, "tanh")):
        return 0.0
    below = walk.factor(inner.args[0]) if inner.args else None
    if below is None or abs(outer * below - 1) > 1e-6:
        raise Refused(FORM)
    return outer


def _sinks(walk: _Walk, scores: Node) -> tuple[Node, Node]:
    """`(scores, sinks [H])` under `cat([scores, sinks.reshape(1, -1, 1, 1).expand(...)], -1) - max`."""
    if is_function(scores, operator.sub):
        combined, most = scores.args
        if not (isinstance(combined, Node) and isinstance(most, Node) and len(combined.users) == 2 and _is_maximum(most, combined)):
            raise Refused(FORM)
        scores = combined
    scores = _strip(walk, scores)
    if not is_function(scores, torch.cat):
        raise Refused(FORM)
    parts = match.given(scores, "tensors", "dim")["tensors"]
    if len(parts) != 2 or len(parts[0].users) != 1:
        raise Refused(FORM)
    column = parts[1]
    if is_method(column, "expand"):
        column = column.args[0]
    heads = tuple(value(column).shape)
    while is_method(column, "reshape", "view") or match.is_cast(column):
        column = column.args[0]
    size = tuple(value(column).shape)
    if len(size) != 1 or heads not in ((1, *size, 1, 1), (*size, 1, 1)) or size[0] != value(parts[0]).shape[1]:
        raise Refused(FORM)
    return parts[0], column


def _is_maximum(node: Node, of: Node) -> bool:
    """True for `of.max(-1, keepdim=True).values` and `of.amax(-1, keepdim=True)`."""
    if is_function(node, operator.getitem, getattr) and node.args[1] in (0, "values"):
        node = node.args[0]
        named = is_method(node, "max") or is_function(node, torch.max)
    else:
        named = is_method(node, "amax") or is_function(node, torch.amax)
    given = match.given(node, "input", "dim", "keepdim")
    return named and given.get("input") is of and given.get("dim") in (-1, 3) and given.get("keepdim") is True
