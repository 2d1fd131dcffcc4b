"""Reads nodes of Dynamo's graph as meanings (passes/mask_meaning.py).

What passes/mask_operations.py does not know is a read of the node itself. A tensor that is written in place has no meaning.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fastft import match
from fastft.match import value
from fastft.passes import mask_meaning as m
from fastft.passes.mask_indexing import Unknown
from fastft.passes.mask_meaning import Choice, Linear, Meaning, Read
from fastft.passes.mask_operations import HANDLERS


class Written(Exception):
    """A tensor that the mask depends on is written in place."""


class Reader:
    """Reads nodes of one graph; `outer(placeholder)` is the node of the enclosing graph that it stands for, or None."""

    def __init__(self, outer: Callable[[Node], Node | None] = lambda node: None) -> None:
        self.outer = outer
        self._known: dict[Node, Meaning] = {}

    def read(self, node: Node) -> Meaning | None:
        """What a tensor holds as a function of its indices; None for floating-point values that are not a choice of two.

        Raises:
            Written: something it is made from is written in place.
        """
        if node not in self._known:
            if _written(node):
                raise Written(node.name)
            outside = self.outer(node) if node.op == "placeholder" else None
            if outside is not None:
                self._known[node] = self.read(outside)
            else:
                try:
                    meaning = self._operation(node)
                except Unknown:
                    meaning = _itself(node)
                self._known[node] = m.at(meaning, self.ones(node))
        return self._known[node]

    def ones(self, node: Node) -> dict[int, Linear]:
        return {d: Linear() for d, size in enumerate(reversed(value(node).shape)) if isinstance(size, int) and size == 1}

    def itself(self, node: Node) -> Meaning | None:
        return _itself(node)

    def _operation(self, node: Node) -> Meaning:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        handler = HANDLERS.get(name)
        if handler is None or not isinstance(value(node), torch.Tensor) or node.kwargs.keys() & _TENSORS:
            raise Unknown
        meaning = handler(self, node)
        if meaning is None:
            raise Unknown
        return meaning

    def operand(self, item: Any) -> Meaning:
        """The meaning of an argument: a tensor, a number or a truth."""
        if isinstance(item, Node):
            example = value(item)
            if isinstance(example, torch.Tensor):
                return self.read(item)
            item = example
        if isinstance(item, bool):
            return item
        if isinstance(item, int):
            return Linear(constant=item)
        if isinstance(item, float):
            return Choice(True, item, item)
        raise Unknown


# What the handlers expect in their place.
_TENSORS = {"input", "self", "other", "condition", "mask", "value"}


def _written(node: Node) -> bool:
    """True where the node's memory, whatever other node names it, is the target of a write in its graph."""
    if not isinstance(value(node), torch.Tensor):
        return False
    storage = value(node).untyped_storage()._cdata
    for item in node.graph.nodes:
        if match.is_mutating(item):
            targets = [*item.args[:1], item.kwargs.get("out")]
            if any(isinstance(value(x), torch.Tensor) and value(x).untyped_storage()._cdata == storage for x in targets if isinstance(x, Node)):
                return True
    return False


def _itself(node: Node) -> Meaning | None:
    example = value(node)
    if not isinstance(example, torch.Tensor) or example.is_floating_point() or example.is_complex():
        return None
    read = Read(node, tuple(m.index(d) for d in reversed(range(example.dim()))))
    return read if example.dtype == torch.bool else Linear(frozenset({(read, 1)}))
