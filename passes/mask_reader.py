"""Reads nodes of Dynamo's graph as meanings (passes/mask_meaning.py).

What passes/mask_operations.py does not know is a read of the node itself. A tensor that is written in place has no meaning.
"""

from typing import Any

import torch
from torch.fx import Graph, Node

from fastft import match
from fastft.match import value
from fastft.passes import mask_meaning as m
from fastft.passes.mask_indexing import Unknown, itself, ones
from fastft.passes.mask_meaning import Choice, Linear, Meaning
from fastft.passes.mask_operations import HANDLERS

# What the handlers expect in their place.
_TENSORS = {"input", "self", "other", "condition", "mask", "value"}


class Written(Exception):
    """A tensor that the mask depends on is written in place."""


class Reader:
    """Reads nodes of a graph and of the bodies in it, each once."""

    def __init__(self) -> None:
        self._known: dict[Node, Meaning | None] = {}
        self._written: dict[Graph, set[int]] = {}

    def read(self, node: Node) -> Meaning | None:
        """What a tensor holds as a function of its indices; None for floating-point values that are not a choice of two.

        Raises:
            Written: something it is made from is written in place.
        """
        if node not in self._known:
            if self._is_written(node):
                raise Written(node.name)
            outside = match.outside(node) if node.op == "placeholder" else None
            if outside is not None:
                self._known[node] = self.read(outside)
            else:
                try:
                    self._known[node] = m.at(self._operation(node), ones(node))
                except Unknown:
                    self._known[node] = itself(node)
        return self._known[node]

    def _is_written(self, node: Node) -> bool:
        """True where the node's memory, whatever other node names it, is the target of a write in its graph."""
        if not isinstance(value(node), torch.Tensor):
            return False
        if node.graph not in self._written:
            self._written[node.graph] = _written(node.graph)
        return _storage(node) in self._written[node.graph]

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


def _storage(node: Node) -> int:
    return value(node).untyped_storage()._cdata


def _written(graph: Graph) -> set[int]:
    """The storages that are the target of a write."""
    targets = [x for node in graph.nodes if match.is_mutating(node) for x in (*node.args[:1], node.kwargs.get("out"))]
    return {_storage(x) for x in targets if isinstance(x, Node) and isinstance(value(x), torch.Tensor)}
