"""How a node's indices follow from those of what it is taken from: slices, tensors as indices, views that only move ones, transposition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from fastft.match import given, value
from fastft.passes import mask_meaning as m
from fastft.passes.mask_meaning import Linear, Meaning, Quotient, Read

if TYPE_CHECKING:
    from fastft.passes.mask_reader import Reader


class Unknown(Exception):
    """The operation is not one of those above."""


def number(item: Any) -> int:
    item = value(item) if isinstance(item, Node) else item
    if isinstance(item, bool) or not isinstance(item, int):
        raise Unknown
    return item


def itself(node: Node) -> Meaning | None:
    """A read of the node; None where it holds floating-point or complex values."""
    example = value(node)
    if not isinstance(example, torch.Tensor) or example.is_floating_point() or example.is_complex():
        return None
    read = Read(node, tuple(m.index(d) for d in reversed(range(example.dim()))))
    return m.at(read if example.dtype == torch.bool else Linear(frozenset({(read, 1)})), ones(node))


def ones(node: Node) -> dict[int, Linear]:
    """0 for the index of every dimension of size 1."""
    return {d: Linear() for d, size in enumerate(reversed(value(node).shape)) if isinstance(size, int) and size == 1}


def moved(reader: Reader, node: Node) -> Meaning:
    """view, reshape, squeeze, unsqueeze: only dimensions of size 1 come and go."""
    if value(node).dtype != value(node.args[0]).dtype:
        raise Unknown
    source, target = value(node.args[0]).shape, value(node).shape
    old, new = ([d for d, size in enumerate(reversed(shape)) if str(size) != "1"] for shape in (source, target))
    if [str(source[-1 - d]) for d in old] != [str(target[-1 - d]) for d in new]:
        raise Unknown
    return m.at(reader.read(node.args[0]), {a: m.index(b) for a, b in zip(old, new, strict=True)})


def transpose(reader: Reader, node: Node) -> Meaning:
    dims, args = value(node).dim(), given(node, "input", "dim0", "dim1")
    one, two = (dims - 1 - number(args.get(name)) % dims for name in ("dim0", "dim1"))
    return m.at(reader.read(node.args[0]), {one: m.index(two), two: m.index(one)})


def _natural(form: Linear) -> bool:
    """True where it cannot be negative."""
    return form.constant >= 0 and all(c > 0 and (isinstance(t, int) or isinstance(t, Quotient) and _natural(t.value)) for t, c in form.terms)


def getitem(reader: Reader, node: Node) -> Meaning:
    source, key = node.args
    key = list(key) if isinstance(key, tuple) else [key]
    dims, out = value(source).dim(), value(node).dim()
    if any(isinstance(k, Node) for k in key):  # x[i, j]: every dimension by a tensor
        indices = [reader.operand(k) for k in key]
        if len(key) != dims or not all(isinstance(i, Linear) for i in indices):
            raise Unknown
        meaning = reader.read(source)
        if not all(_natural(i) for i in indices) and meaning != itself(source):
            raise Unknown  # counted from the end where negative
        return m.at(meaning, {dims - 1 - k: i for k, i in enumerate(indices)})
    taken = sum(k is not None and k is not Ellipsis for k in key)
    if Ellipsis in key:
        place = key.index(Ellipsis)
        key[place : place + 1] = [slice(None)] * (dims - taken)
    else:
        key += [slice(None)] * (dims - taken)
    table, source_dim, out_dim = {}, dims - 1, out - 1
    for k in key:
        if k is None:
            out_dim -= 1
        elif isinstance(k, slice):
            start = 0 if k.start is None else number(k.start)
            if start < 0 or k.step not in (None, 1):
                raise Unknown
            table[source_dim] = m.index(out_dim).plus(Linear(constant=start))
            source_dim, out_dim = source_dim - 1, out_dim - 1
        else:
            place = number(k)
            if place < 0:
                raise Unknown
            table[source_dim] = Linear(constant=place)
            source_dim -= 1
    return m.at(reader.read(source), table)
