"""What a 4-D attention mask allows, as the text that kernels/mask.py evaluates, and its kind for the report.

causal                      kv <= q
window 1024                 q - kv < 1024                          as transformers counts it: a query and the 1023 keys before it
ahead 64                    kv - q <= 64                           with a window: ModernBERT's local attention
chunk 8192                  q // 8192 == kv // 8192
documents                   t0[b, q] == t0[b, kv]                  packed sequences
padding                     t0[b, kv]
other                       anything else whose reads depend on q or on kv, not on both
"""

import dataclasses

import torch
from torch.fx import Node

from fastft.match import value
from fastft.passes import mask_meaning as m
from fastft.passes.mask_meaning import Compare, Join, Linear, Not, Quotient, Read, Truth
from fastft.passes.mask_operations import additive
from fastft.passes.mask_reader import Reader, Written

# Why a mask stays what it is: a tensor of q x kv.
FROM_MEMORY = "the mask is read from a tensor of query x key"
HEADS = "the mask differs between heads"
WRITTEN = "the mask is written in place"
VALUES = "the mask adds numbers other than 0 and a very negative one"

# From here down a number added to the scores leaves nothing of them. float16's least number does for scores below 16, half its spacing there.
LEAST = {torch.float16: -65504.0}

NAMES = {0: "kv", 1: "q", 3: "b"}  # indices, from 0 on


@dataclasses.dataclass(frozen=True)
class Mask:
    """kind: as above, comma-separated ("full" without any). allowed: "" for all. reads: the tensors t0, t1, ..., nodes of the outermost graph that builds
    the mask. additive: it is added to the scores. may_be_empty: there may be queries without any key. per_row: it differs within the batch.
    rows_of: the number of a read whose first dimension is the batch, or -1. finite: what is added is no infinity. swallows: it leaves nothing of the scores,
    so that a query without keys has equal weights."""

    kind: str
    allowed: str
    reads: tuple[Node, ...]
    additive: bool = False
    may_be_empty: bool = False
    per_row: bool = False
    rows_of: int = -1
    finite: bool = False
    swallows: bool = False


FULL = Mask("full", "", ())
CAUSAL = Mask("causal", "kv <= q", ())


def understand(reader: Reader, node: Node, keys: int | None) -> Mask | str:
    """The Mask behind a node of shape [B or 1, heads or 1, q, kv], or why it stays what it is.

    keys: kv, which a window at least as long does not bound; None where the number of queries is another.
    """
    try:
        meaning = reader.read(node)
        choice = additive(meaning)
        if choice is not None and choice.no > -1e4:
            return VALUES
        if choice is None and not isinstance(meaning, bool | Compare | Read | Not | Join):
            return FROM_MEMORY
        truth = m.same_document(choice.truth if choice else meaning, reader.read)
    except Written:
        return WRITTEN
    reads, used = m.reads(truth), m.indices_of(truth)
    if any({0, 1} <= m.indices_of(read) for read in reads):
        return FROM_MEMORY
    if 2 in used:
        return HEADS
    parts = {part: kind for part in m.conjuncts(truth) if (kind := _kind(part, keys)) != ""}
    if "causal" in parts.values():  # and so nothing ahead
        parts = {part: kind for part, kind in parts.items() if not kind.startswith("ahead")}
    order = sorted(parts, key=lambda part: (_rank(parts[part]), parts[part], repr(part)))
    tensors: list[Node] = []
    text = " & ".join(f"({_text(part, tensors)})" if len(order) > 1 else _text(part, tensors) for part in order)
    kinds = ", ".join(dict.fromkeys(parts[part] for part in order))
    # A query sees at least itself, as long as nothing but causality, windows, chunks and documents forbids it.
    empty = any(parts[part] in ("padding", "other") for part in order)
    added = None if choice is None else choice.no
    by_row = [read.node for read in reads if read.indices[:1] == (m.index(3),) and str(value(read.node).shape[0]) == str(value(node).shape[0])]
    return Mask(
        kinds or "full",
        text,
        tuple(tensors),
        additive=added is not None,
        may_be_empty=empty,
        per_row=3 in used,
        rows_of=min(map(tensors.index, by_row), default=-1),
        finite=added is not None and added > float("-inf"),
        swallows=added is not None and added <= LEAST.get(value(node).dtype, -1e9) and not choice.summed,
    )


def _rank(kind: str) -> int:
    return [kind.startswith(name) for name in ("causal", "window", "ahead", "chunk", "documents", "padding", "other")].index(True)


def _kind(part: Truth, keys: int | None) -> str:
    """ "" for what always holds: a window at least as long as the sequence, 0 <= q (transformers' bidirectional masks)."""
    if isinstance(part, Compare):
        terms, constant = dict(part.form.terms), part.form.constant
        if part.op == "le" and constant <= 0 and all(term in NAMES and factor < 0 for term, factor in terms.items()):
            return ""
        if part.op == "le" and terms == {0: 1, 1: -1} and constant == 0:
            return "causal"
        if part.op == "le" and terms == {0: -1, 1: 1} and constant < 0:
            return f"window {1 - constant}" if not isinstance(keys, int) or 1 - constant < keys else ""
        if part.op == "le" and terms == {0: 1, 1: -1} and constant < 0:
            return f"ahead {-constant}" if not isinstance(keys, int) or 1 - constant < keys else ""
        if part.op == "eq" and constant == 0 and sorted(terms.values()) == [-1, 1]:
            one, two = terms
            if isinstance(one, Quotient) and isinstance(two, Quotient) and one.divisor == two.divisor and {one.value, two.value} == {m.index(0), m.index(1)}:
                return f"chunk {one.divisor}"
            if isinstance(one, Read) and isinstance(two, Read) and one.node is two.node and {one.indices[-1], two.indices[-1]} == {m.index(0), m.index(1)}:
                return "documents" if one.indices[:-1] == two.indices[:-1] else "other"
    return "padding" if m.reads(part) and m.indices_of(part) <= {0, 3} else "other"


def _text(meaning: Truth | Linear | Read, tensors: list[Node]) -> str:
    if isinstance(meaning, Read):
        if meaning.node not in tensors:
            tensors.append(meaning.node)
        # A bare number as an index becomes a constant tensor in FlexAttention's graphs, which AOTAutograd's cache refuses.
        places = [_text(i, tensors) if i.terms else f"{i.constant} + 0 * b" for i in meaning.indices]
        return f"t{tensors.index(meaning.node)}[{', '.join(places)}]" if places else f"t{tensors.index(meaning.node)}"
    if meaning is False:
        return "q <= -1"
    if isinstance(meaning, Not):
        return f"~({_text(meaning.truth, tensors)})"
    if isinstance(meaning, Join):
        sign = " & " if meaning.op == "and" else " | "
        return sign.join(f"({_text(part, tensors)})" for part in sorted(meaning.parts, key=repr))
    if isinstance(meaning, Compare):  # the negative terms go to the right
        left = Linear(frozenset((t, c) for t, c in meaning.form.terms if c > 0), max(meaning.form.constant, 0))
        right = Linear(frozenset((t, -c) for t, c in meaning.form.terms if c < 0), max(-meaning.form.constant, 0))
        return f"{_text(left, tensors)} {'<=' if meaning.op == 'le' else '=='} {_text(right, tensors)}"
    words = []
    for term, factor in sorted(meaning.terms, key=repr):
        word = NAMES[term] if isinstance(term, int) else _text(term, tensors) if isinstance(term, Read) else f"({_text(term.value, tensors)}) // {term.divisor}"
        words.append(word if factor == 1 else f"{factor} * ({word})")
    if meaning.constant or not words:
        words.append(str(meaning.constant))
    return " + ".join(words)
