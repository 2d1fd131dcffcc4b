"""What an attention mask means, read from the graph that builds it.

    graph     q_idx = arange(S)[:, None]; kv_idx = arange(S)[None, :]        transformers/masking_utils.py, torch.triu, ...
              mask = where((kv_idx <= q_idx) & padding[b, kv_idx], 0.0, -3.4e38)
    meaning   "kv <= q and padding[b, kv]", additive

Every node is read as a function of the indices of its own dimensions, counted from the right: in a mask [batch, head, q, kv] index 0 is kv, 1 is q.
Numbers are linear forms over indices and over values read from tensors; truths are conjunctions of comparisons. What is not understood stays a read of
the node itself, so the result is always exact; it is of use as long as no read depends on q and kv at once.

Where documents are told apart by `cumsum(diff(position_ids) != 1)` (packed sequences), positions within one document differ as the indices do:
`position_ids[b, kv] <= position_ids[b, q]` beside "same document" is `kv <= q`. Positions made by `arange` are all one document.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fastft.match import given, is_function, is_method, value


@dataclasses.dataclass(frozen=True)
class Read:
    """The value of tensor `node` at `indices` (one Linear a dimension)."""

    node: Node
    indices: tuple["Linear", ...]


@dataclasses.dataclass(frozen=True)
class Quotient:
    """`value // divisor`, rounded down."""

    value: "Linear"
    divisor: int


Term = int | Read | Quotient  # an int is the index of that dimension, from the right


@dataclasses.dataclass(frozen=True)
class Linear:
    """constant + sum of coefficient * term, integers."""

    terms: frozenset[tuple[Term, int]] = frozenset()
    constant: int = 0

    def plus(self, other: "Linear", sign: int = 1) -> "Linear":
        terms = dict(self.terms)
        for term, factor in other.terms:
            terms[term] = terms.get(term, 0) + sign * factor
        return Linear(frozenset((t, c) for t, c in terms.items() if c), self.constant + sign * other.constant)


@dataclasses.dataclass(frozen=True)
class Compare:
    """`form <= 0` or `form == 0`."""

    op: str
    form: Linear


@dataclasses.dataclass(frozen=True)
class Not:
    truth: "Truth"


@dataclasses.dataclass(frozen=True)
class Join:
    """A conjunction ("and") or disjunction ("or") of two or more."""

    op: str
    parts: frozenset["Truth"]


Truth = bool | Compare | Read | Not | Join


@dataclasses.dataclass(frozen=True)
class Choice:
    """A float tensor: `yes` where the truth holds, else `no`."""

    truth: Truth
    yes: float
    no: float
    summed: bool = False  # `no` stands for that and anything below


Meaning = Linear | Truth | Choice


def index(dimension: int) -> Linear:
    return Linear(frozenset({(dimension, 1)}))


def join(op: str, parts: list[Truth]) -> Truth:
    neutral, flat = op == "and", set()
    for part in parts:
        if isinstance(part, bool):
            if part is not neutral:
                return part
        elif isinstance(part, Join) and part.op == op:
            flat |= part.parts
        else:
            flat.add(part)
    if not flat:
        return neutral
    return next(iter(flat)) if len(flat) == 1 else Join(op, frozenset(flat))


def negate(truth: Truth) -> Truth:
    if isinstance(truth, bool):
        return not truth
    if isinstance(truth, Not):
        return truth.truth
    if isinstance(truth, Compare) and truth.op == "le":  # not (f <= 0)  is  1 - f <= 0
        return compare("le", Linear(constant=1).plus(truth.form, -1))
    if isinstance(truth, Join):
        return join("or" if truth.op == "and" else "and", [negate(part) for part in truth.parts])
    return Not(truth)


def compare(op: str, form: Linear) -> Truth:
    if not form.terms:
        return form.constant <= 0 if op == "le" else form.constant == 0
    if op == "eq" and min(form.terms, key=repr)[1] < 0:
        form = Linear().plus(form, -1)
    return Compare(op, form)


def conjuncts(truth: Truth) -> frozenset[Truth]:
    if truth is True:
        return frozenset()
    return truth.parts if isinstance(truth, Join) and truth.op == "and" else frozenset({truth})


def rewrite(meaning: Any, term: Callable[[Term], Linear]) -> Any:
    """The same with `term(t)` in place of every index and read, innermost first."""
    if isinstance(meaning, Linear):
        result = Linear(constant=meaning.constant)
        for item, factor in meaning.terms:
            if isinstance(item, Read):
                item = Read(item.node, tuple(rewrite(i, term) for i in item.indices))
            elif isinstance(item, Quotient):
                inner = rewrite(item.value, term)
                new = Linear(constant=inner.constant // item.divisor) if not inner.terms else Linear(frozenset({(Quotient(inner, item.divisor), 1)}))
                result = result.plus(_times(new, factor))
                continue
            result = result.plus(_times(term(item), factor))
        return result
    if isinstance(meaning, Compare):
        return compare(meaning.op, rewrite(meaning.form, term))
    if isinstance(meaning, Read):
        return Read(meaning.node, tuple(rewrite(i, term) for i in meaning.indices))
    if isinstance(meaning, Not):
        return negate(rewrite(meaning.truth, term))
    if isinstance(meaning, Join):
        return join(meaning.op, [rewrite(part, term) for part in meaning.parts])
    if isinstance(meaning, Choice):
        return Choice(rewrite(meaning.truth, term), meaning.yes, meaning.no, meaning.summed)
    return meaning


def _times(form: Linear, factor: int) -> Linear:
    return Linear(frozenset((t, c * factor) for t, c in form.terms if c * factor), form.constant * factor)


def at(meaning: Meaning, indices: dict[int, Linear]) -> Meaning:
    """The same function with other expressions for its indices."""
    return rewrite(meaning, lambda t: indices.get(t, index(t)) if isinstance(t, int) else Linear(frozenset({(t, 1)})))


def reads(meaning: Any) -> set[Read]:
    """Every read in it."""
    if isinstance(meaning, Read):
        return {meaning}.union(*(reads(i) for i in meaning.indices))
    if isinstance(meaning, Quotient):
        return reads(meaning.value)
    if isinstance(meaning, Linear):
        return set().union(*(reads(term) for term, _ in meaning.terms))
    if isinstance(meaning, Compare):
        return reads(meaning.form)
    if isinstance(meaning, Not | Choice):
        return reads(meaning.truth)
    if isinstance(meaning, Join):
        return set().union(*(reads(part) for part in meaning.parts))
    return set()


def indices_of(meaning: Any) -> set[int]:
    """The indices it depends on."""
    found: set[int] = set()

    def note(term: Term) -> Linear:
        if isinstance(term, int):
            found.add(term)
        return Linear(frozenset({(term, 1)}))

    rewrite(meaning, note)
    return found


def documents(node: Node) -> Node | None:
    """P where a node is `cumsum(diff(P, prepend=P[:, :1] - 1) != 1)`: the number of the document that each position is in."""
    if not (is_method(node, "cumsum") or is_function(node, torch.cumsum)) or given(node, "input", "dim").get("dim") not in (-1, value(node).dim() - 1):
        return None
    changed = node.args[0]
    if not (is_function(changed, operator.ne, torch.ne) or is_method(changed, "ne")) or changed.args[1:] != (1,):
        return None
    steps = changed.args[0]
    if not is_function(steps, torch.diff) or len(steps.args) != 1 or not set(steps.kwargs) <= {"dim", "prepend"} or steps.kwargs.get("dim", -1) != -1:
        return None
    first, source = steps.kwargs.get("prepend"), steps.args[0]
    if not (is_function(first, operator.sub, torch.sub) and first.args[1:] == (1,) and not first.kwargs and is_function(first.args[0], operator.getitem)):
        return None
    return source if first.args[0].args[0] is source and _takes_first(first.args[0].args[1]) else None


def _takes_first(key: Any) -> bool:
    key = key if isinstance(key, tuple) else (key,)
    return bool(key) and key[-1] == slice(None, 1, None) and all(k in (slice(None, None, None), Ellipsis) for k in key[:-1])


def same_document(truth: Truth, evaluate: Callable[[Node], Meaning]) -> Truth:
    """Positions by indices where "same document" stands beside them (see the module's docstring)."""
    for part in conjuncts(truth):
        if not (isinstance(part, Compare) and part.op == "eq" and len(part.form.terms) == 2 and not part.form.constant):
            continue
        (one, c1), (two, c2) = part.form.terms
        if not (isinstance(one, Read) and isinstance(two, Read) and one.node is two.node and {c1, c2} == {1, -1}):
            continue
        source = documents(one.node)
        if source is None:
            continue
        positions = evaluate(source)
        if not isinstance(positions, Linear) or len(positions.terms) != 1:
            continue
        if one.indices[:-1] != two.indices[:-1]:
            continue
        first, second = (at(positions, dict(enumerate(reversed(read.indices)))) for read in (one, two))
        (p1, f1), (p2, f2) = next(iter(first.terms)), next(iter(second.terms))
        if f1 == f2 == 1 and not first.constant and p1 != p2:
            apart = one.indices[-1].plus(two.indices[-1], -1)
            truth = join("and", [part] + [_by_indices(p, p1, p2, apart) for p in conjuncts(truth) if p is not part])
    return truth


def _by_indices(truth: Truth, one: Term, two: Term, apart: Linear) -> Truth:
    """The same with c * `apart` in place of c * (one - two) in every comparison."""
    if isinstance(truth, Join):
        return join(truth.op, [_by_indices(part, one, two, apart) for part in truth.parts])
    if isinstance(truth, Not):
        return negate(_by_indices(truth.truth, one, two, apart))
    if isinstance(truth, Compare):
        terms = dict(truth.form.terms)
        factor = terms.get(one, 0)
        if factor and terms.get(two) == -factor:
            rest = Linear(frozenset((t, c) for t, c in truth.form.terms if t not in (one, two)), truth.form.constant)
            return compare(truth.op, rest.plus(_times(apart, factor)))
    return truth
