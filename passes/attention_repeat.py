"""Keys and values before they were repeated for grouped queries."""

import operator

import torch
from torch.fx import Node

from fastft.match import given, is_function, is_method, value

_ALL = slice(None, None, None)


def unrepeated(q: Node, k: Node, v: Node) -> tuple[Node, Node]:
    """k and v before they were repeated for grouped queries, where both were and q's heads are a multiple of theirs."""
    one, two = _before_repeat(k), _before_repeat(v)
    if one is None or two is None or value(one).shape[1] != value(two).shape[1] or value(q).shape[1] % value(one).shape[1]:
        return k, v
    return one, two


def _before_repeat(node: Node) -> Node | None:
    """x [B, h, S, D] under `x[:, :, None].expand(B, h, n, S, D).reshape(B, h * n, S, D)` or `repeat_interleave(x, n, 1)`."""
    if is_method(node, "contiguous"):
        node = node.args[0]
    if is_function(node, torch.repeat_interleave) or is_method(node, "repeat_interleave"):
        args = given(node, "input", "repeats", "dim")
        return args["input"] if isinstance(args.get("repeats"), int) and args.get("dim") in (1, -3) else None
    if not is_method(node, "reshape", "view") or not is_method(node.args[0], "expand"):
        return None
    wide = node.args[0]
    inner = wide.args[0]
    if not (is_function(inner, operator.getitem) or is_method(inner, "unsqueeze") or is_function(inner, torch.unsqueeze)):
        return None
    if is_function(inner, operator.getitem) and inner.args[1] not in ((_ALL, _ALL, None, _ALL, _ALL), (_ALL, _ALL, None)):
        return None
    source = inner.args[0]
    before, middle, after = value(source).shape, value(wide).shape, value(node).shape
    if len(before) != 4 or len(middle) != 5 or len(after) != 4 or tuple(value(inner).shape) != (*before[:2], 1, *before[2:]):
        return None
    repeated = tuple(middle[:2]) == tuple(before[:2]) and tuple(middle[3:]) == tuple(before[2:]) and tuple(after[2:]) == tuple(before[2:])
    return source if repeated and after[1] == before[1] * middle[2] else None
