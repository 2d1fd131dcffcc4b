"""The operations that masks are built from, one small function each: the meaning of a node from the meanings of its inputs.

arange, ones/zeros/full and their `new_`/`_like` forms, indexing (slices, None, and tensors for all dimensions), unsqueeze, squeeze, view and reshape
that only move ones, expand, transpose, casts, comparisons (also of abs), and/or/not, +, -, * and // with numbers, where, masked_fill, triu, tril.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from fastft.match import given, is_function, is_method, value
from fastft.passes import mask_meaning as m
from fastft.passes.mask_indexing import Unknown, getitem, moved, number, transpose
from fastft.passes.mask_meaning import Choice, Linear, Meaning, Quotient, Truth

if TYPE_CHECKING:
    from fastft.passes.mask_reader import Reader


def _truth(meaning: Meaning | None) -> Truth:
    """As `bool(x)`: not zero."""
    if isinstance(meaning, Linear):
        return m.negate(m.compare("eq", meaning))
    if isinstance(meaning, Choice):
        return _choose(meaning, lambda x: x != 0)
    if meaning is None:
        raise Unknown
    return meaning


def _choose(choice: Choice, test: Callable[[float], bool]) -> Truth:
    yes, no = test(choice.yes), test(choice.no)
    if choice.summed and no != test(float("-inf")):
        raise Unknown
    return yes if yes == no else (choice.truth if yes else m.negate(choice.truth))


def _constant(dtype: torch.dtype, fill: Any) -> Meaning:
    if dtype == torch.bool:
        return bool(fill)
    return Choice(True, float(fill), float(fill)) if dtype.is_floating_point else Linear(constant=int(fill))


def _filled(fill: Any) -> Callable[[Reader, Node], Meaning]:
    return lambda reader, node: _constant(value(node).dtype, fill)


def _full(*names: str) -> Callable[[Reader, Node], Meaning]:
    def read(reader: Reader, node: Node) -> Meaning:
        fill = given(node, *names).get(names[-1])
        if not isinstance(fill, int | float):
            raise Unknown
        return _constant(value(node).dtype, fill)

    return read


def _arange(reader: Reader, node: Node) -> Meaning:
    if value(node).is_floating_point() or given(node, "start", "end", "step").get("step", 1) != 1:
        raise Unknown
    start = number(node.args[0] if len(node.args) > 1 or node.args and "end" in node.kwargs else node.kwargs.get("start", 0))
    return Linear(constant=start).plus(m.index(0))


def _cast(reader: Reader, node: Node) -> Meaning:
    if not isinstance(node.args[0], Node):
        raise Unknown
    source, target = reader.read(node.args[0]), value(node).dtype
    if target == torch.bool:
        return _truth(source)
    if isinstance(source, Linear) and not target.is_floating_point and target.itemsize >= min(4, value(node.args[0]).dtype.itemsize):
        return source
    if isinstance(source, Choice):
        if not target.is_floating_point and not all(float(x).is_integer() for x in (source.yes, source.no)):
            raise Unknown
        return source
    if isinstance(source, Linear) or source is None:
        raise Unknown
    return Choice(source, 1.0, 0.0)


def _identity(reader: Reader, node: Node) -> Meaning:
    return reader.read(node.args[0])


def _comparison(op: str) -> Callable[[Reader, Node], Meaning]:
    python = {"le": operator.le, "lt": operator.lt, "ge": operator.ge, "gt": operator.gt, "eq": operator.eq, "ne": operator.ne}[op]

    def compared(a: Meaning, b: Meaning) -> Truth:
        if isinstance(a, Choice) and isinstance(b, Linear) and not b.terms:
            b = Choice(True, float(b.constant), float(b.constant))
        if isinstance(a, Choice) and isinstance(b, Choice) and b.yes == b.no:
            return _choose(a, lambda x: python(x, b.yes))
        if not (isinstance(a, Linear) and isinstance(b, Linear)):
            raise Unknown
        one = Linear(constant=1)
        if op in ("eq", "ne"):
            equal = m.compare("eq", a.plus(b, -1))
            return equal if op == "eq" else m.negate(equal)
        forms = {"le": a.plus(b, -1), "lt": a.plus(b, -1).plus(one), "ge": b.plus(a, -1), "gt": b.plus(a, -1).plus(one)}
        return m.compare("le", forms[op])

    def read(reader: Reader, node: Node) -> Meaning:
        a, b = node.args[:2]
        if not (is_function(a, abs, operator.abs, torch.abs) or is_method(a, "abs", "__abs__")) or op in ("eq", "ne"):
            return compared(reader.operand(a), reader.operand(b))
        inner, bound = reader.operand(a.args[0]), reader.operand(b)
        if not isinstance(inner, Linear):
            raise Unknown
        return m.join("and" if op in ("le", "lt") else "or", [compared(inner, bound), compared(Linear().plus(inner, -1), bound)])

    return read


def _logical(op: str) -> Callable[[Reader, Node], Meaning]:
    def read(reader: Reader, node: Node) -> Meaning:
        if value(node).dtype != torch.bool:
            raise Unknown
        return m.join(op, [_truth(reader.operand(x)) for x in node.args[:2]])

    return read


def _not(reader: Reader, node: Node) -> Meaning:
    if value(node).dtype != torch.bool:
        raise Unknown
    return m.negate(_truth(reader.operand(node.args[0])))


def additive(meaning: Meaning | None) -> Choice | None:
    """A choice between 0 (where the truth holds) and something else."""
    if not isinstance(meaning, Choice):
        return None
    if meaning.truth is True:
        return meaning if meaning.yes == 0 else None
    return meaning if meaning.yes == 0 else Choice(m.negate(meaning.truth), 0.0, meaning.yes, meaning.summed) if meaning.no == 0 else None


def _arithmetic(python: Callable) -> Callable[[Reader, Node], Meaning]:
    def read(reader: Reader, node: Node) -> Meaning:
        if node.kwargs or len(node.args) != 2 or value(node).dtype.itemsize < 4 and not value(node).is_floating_point():
            raise Unknown
        a, b = (reader.operand(x) for x in node.args[:2])
        if isinstance(a, Linear) and isinstance(b, Linear):
            if python in (operator.add, operator.sub):
                return a.plus(b, 1 if python is operator.add else -1)
            if a.terms and b.terms:
                raise Unknown
            form, factor = (a, b.constant) if a.terms else (b, a.constant)
            return Linear(frozenset((t, c * factor) for t, c in form.terms if factor), form.constant * factor)
        a, b = (Choice(True, x.constant, x.constant) if isinstance(x, Linear) and not x.terms else x for x in (a, b))
        if isinstance(a, Choice) and isinstance(b, Choice):
            one, two = additive(a), additive(b)
            if python is operator.add and one and two and one.no <= -1e4 and two.no <= -1e4:
                both = m.join("and", [one.truth, two.truth])
                return Choice(both, 0.0, max(one.no, two.no), one.summed or two.summed or min(one.no, two.no) > float("-inf"))
            if a.summed or b.summed:
                raise Unknown
            if b.truth is True:
                return Choice(a.truth, python(a.yes, b.yes), python(a.no, b.yes))
            if a.truth is True:
                return Choice(b.truth, python(a.yes, b.yes), python(a.yes, b.no))
        raise Unknown

    return read


def _floordiv(reader: Reader, node: Node) -> Meaning:
    form, divisor = reader.operand(node.args[0]), number(node.args[1])
    if not isinstance(form, Linear) or divisor <= 0:
        raise Unknown
    return Linear(frozenset({(Quotient(form, divisor), 1)})) if form.terms else Linear(constant=form.constant // divisor)


def choose(truth: Truth, yes: Meaning, no: Meaning) -> Meaning:
    """`torch.where`."""
    if isinstance(yes, Choice) and isinstance(no, Choice):
        if yes.truth is True and no.truth is True:
            return Choice(truth, yes.yes, no.yes)
        if yes.truth is True:  # the constant is one of the other's two values
            return choose(m.negate(truth), no, yes)
        if no.truth is True and no.yes == yes.no:
            return Choice(m.join("and", [truth, yes.truth]), yes.yes, yes.no, yes.summed)
        if no.truth is True and no.yes == yes.yes:
            return Choice(m.join("or", [m.negate(truth), yes.truth]), yes.yes, yes.no, yes.summed)
        raise Unknown
    if any(isinstance(x, Linear | Choice) or x is None for x in (yes, no)):
        raise Unknown
    return m.join("or", [m.join("and", [truth, yes]), m.join("and", [m.negate(truth), no])])


def _where(reader: Reader, node: Node) -> Meaning:
    if len(node.args) != 3:
        raise Unknown
    condition, yes, no = (reader.operand(x) for x in node.args)
    return choose(_truth(condition), _as(node, yes), _as(node, no))


def _as(node: Node, meaning: Meaning) -> Meaning:
    """A number as the constant of the node's dtype."""
    return _constant(value(node).dtype, meaning.constant) if isinstance(meaning, Linear) and not meaning.terms else meaning


def _masked_fill(reader: Reader, node: Node) -> Meaning:
    source, condition, fill = (reader.operand(x) for x in node.args[:3])
    return choose(_truth(condition), _as(node, fill), source)


def _triangle(upper: bool) -> Callable[[Reader, Node], Meaning]:
    def read(reader: Reader, node: Node) -> Meaning:
        diagonal = Linear(constant=number(given(node, "input", "diagonal").get("diagonal", 0)))
        offset = m.index(0).plus(m.index(1), -1)  # column - row
        kept = m.compare("le", diagonal.plus(offset, -1) if upper else offset.plus(diagonal, -1))
        return choose(kept, reader.read(node.args[0]), _constant(value(node).dtype, 0))

    return read


def _cumsum(reader: Reader, node: Node) -> Meaning:
    source = m.documents(node)
    positions = None if source is None else reader.read(source)
    if isinstance(positions, Linear) and positions.terms == m.index(0).terms:
        return Linear()  # 0, 1, 2, ...: one document
    raise Unknown


HANDLERS: dict[str, Callable[[Reader, Node], Meaning]] = {
    "arange": _arange,
    **{name: _filled(1) for name in ("ones", "new_ones", "ones_like")},
    **{name: _filled(0) for name in ("zeros", "new_zeros", "zeros_like")},
    **{name: _full("size", "fill_value") for name in ("full", "full_like")},
    "new_full": _full("self", "size", "fill_value"),
    "tensor": _full("data"),
    "scalar_tensor": _full("s"),
    **{name: _cast for name in ("to", "bool", "int", "long", "float", "half", "bfloat16", "double", "type", "type_as")},
    **{name: _identity for name in ("contiguous", "clone", "detach", "expand", "expand_as")},
    **{name: moved for name in ("view", "reshape", "squeeze", "unsqueeze")},
    **{name: transpose for name in ("transpose", "swapaxes")},
    "getitem": getitem,
    **{name: _comparison(op) for op in ("le", "lt", "ge", "gt", "eq", "ne") for name in (op, f"__{op}__")},
    **{name: _logical("and") for name in ("and_", "logical_and", "bitwise_and", "__and__")},
    **{name: _logical("or") for name in ("or_", "logical_or", "bitwise_or", "__or__")},
    **{name: _not for name in ("invert", "logical_not", "bitwise_not", "__invert__")},
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "rsub": _arithmetic(lambda a, b: b - a),
    "mul": _arithmetic(operator.mul),
    **{name: _floordiv for name in ("floordiv", "floor_divide")},
    "where": _where,
    "masked_fill": _masked_fill,
    "triu": _triangle(True),
    "tril": _triangle(False),
    "cumsum": _cumsum,
}
