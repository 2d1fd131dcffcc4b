"""From the scores that a loss reads back to the head that makes them, for passes/linear_cross_entropy.py.

    scores = views, slices and transposes of rows; casts; a number times; softcap * tanh(/ softcap)     of
    logits = linear(x, W, b), x @ W^T + b, or fastft::lora_linear of one linear                         b: [V], or [1, V] as BART adds it

All of them but the numbers act on rows alone: `Chain.rows_of` does the same to x, which is as long but not as wide.
"""

import dataclasses
import functools
import operator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from fastft import match
from fastft.kernels import lora_linear
from fastft.match import is_function, is_method, value

NOT_LINEAR = "logits do not come from a plain linear"
CUT = "part of the vocabulary is cut off"
INPUT = "logits are an input of the graph"
TENSOR_SCALE = "logits are scaled by a tensor or a symbolic number"
NOT_POSITIVE = "logits are scaled by a number that is not positive"
FLOAT64 = "logits are widened to float64"
INTERRUPTED = "a write, or a change of grad mode or autocast, between head and loss"
DROPOUT = "adapter of the head with dropout"
SIBLINGS = "adapters of the head in one op with another linear's"

# Logits of rows that may be whole examples, from which they are worth an op: 64 MiB in float32.
LARGE = 1 << 24

_RESHAPES = {torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.clone, "view", "reshape", "flatten", "squeeze", "unsqueeze"}
_SAME = {torch.clone, "contiguous", "clone"}
_TURNS = {torch.transpose, torch.swapaxes, torch.permute, torch.movedim, "transpose", "swapaxes", "permute", "movedim", "t"}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm"}


def emit(like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call of a function, or of a method where `target` is its name, at the graph's insertion point; `like` tells where it comes from."""
    method = isinstance(target, str)
    node = like.graph.create_node("call_method" if method else "call_function", target, args, kwargs)
    given, named = map_arg((args, kwargs), value)
    with value(like).fake_mode:
        result = getattr(given[0], target)(*given[1:], **named) if method else target(*given, **named)
    node.meta = {**like.meta, "example_value": result}
    return node


@dataclasses.dataclass
class Head:
    """logits = x weight^T + bias + sum scaling x a^T b^T; `node` holds them, `first` is its first node."""

    node: Node
    first: Node
    x: Node
    weight: Node
    bias: Node | None
    transposed: bool = False  # weight is [K, V]
    adapters: list[tuple[Node, Node, Node | None, float]] = dataclasses.field(default_factory=list)  # a, b, bias, scaling

    @property
    def vocabulary(self) -> int:
        return value(self.node).shape[-1]


@dataclasses.dataclass
class Chain:
    """scores = softcap * tanh(scale * logits / softcap), cast and moved by `steps` (kind, node), from the head down; `at`: the vocabulary's dimension."""

    head: Head
    steps: list[tuple[str, Node]]
    scale: float
    softcap: float
    at: int

    @property
    def nodes(self) -> list[Node]:
        return [self.head.node, *(node for _, node in self.steps)]

    def moves(self, since: int = 0) -> bool:
        """True where the rows of the scores are not those of the logits, or of what step `since` reads, in the same order: transposes and parts."""
        steps = self.steps[since:]
        return any(kind == "turn" or kind == "slice" and value(node).shape != value(node.args[0]).shape for kind, node in steps)

    def rows_of(self, hidden: Node) -> Node:
        """`hidden`, shaped as the head's x, at the rows of the scores, its entries last."""
        width = value(hidden).shape[-1]
        for kind, node in self.steps:
            if kind == "view" and node.target not in _SAME:
                hidden = _viewed(node, hidden, width)
            elif kind == "slice":  # `logits[..., :vocabulary]` too takes all: of the narrower hidden state, it is to say so
                hidden = emit(node, operator.getitem, hidden, tuple(_index(node)))
            elif kind == "turn":
                hidden = emit(node, node.target, hidden, *node.args[1:], **node.kwargs)
        return hidden if self.at == value(hidden).dim() - 1 else emit(self.head.node, "movedim", hidden, self.at, -1)


def _viewed(node: Node, hidden: Node, width: int) -> Node:
    if node.target not in ("view", "reshape", torch.reshape):
        return emit(node, node.target, hidden, *node.args[1:], **node.kwargs)
    return emit(node, "reshape", hidden, *_sizes(node)[:-1], width)


def _sizes(node: Node) -> tuple:
    """The sizes given to a view or reshape."""
    sizes = node.args[1:]
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else tuple(sizes)


def walk(node: Node, at: int, log_softmax: bool = False) -> Chain | tuple[str, Node]:
    """The chain from the head to `node`, whose dimension `at` is the vocabulary, or the reason and node where there is none.

    log_softmax: the scores go through one on their way to `node`.
    """
    steps: list[tuple[str, Node]] = []
    last_at, times, over, softcap = at, 1.0, 1.0, 0.0
    while not isinstance(head := _head(node), Head):
        if isinstance(head, str):
            return head, node
        kind, at_above, (up, down) = _step(node, at)
        if kind is None:
            return _why(node), node
        if kind == "tanh" and not (log_softmax or softcap):
            softcap, times, over = times / over, 1.0, 1.0
            if softcap <= 0:
                return NOT_POSITIVE, node
        elif kind == "log_softmax" and log_softmax:
            log_softmax = False
        elif kind in ("tanh", "log_softmax") or kind == "number" and log_softmax:
            return NOT_LINEAR, node
        times, over = times * up, over * down
        steps.insert(0, (kind, node))
        node, at = tensor_of(node), at_above
    if log_softmax or at != value(node).dim() - 1:
        return NOT_LINEAR, node
    scale = times * (softcap or 1.0) / over
    if scale <= 0:
        return NOT_POSITIVE, node
    if match.dtype(node) != torch.float64 and any(match.dtype(step) == torch.float64 for _, step in steps):
        return FLOAT64, node
    return Chain(head, steps, scale, softcap, last_at)


def _why(node: Node) -> str:
    if node.op == "placeholder":
        return INPUT
    if match.is_mutating(node):
        return INTERRUPTED
    if is_function(node, operator.getitem) and _dims(node.args[0]) == _dims(node) is not None and value(node).shape[-1] != value(node.args[0]).shape[-1]:
        return CUT
    return TENSOR_SCALE if is_function(node, operator.mul, operator.truediv) else NOT_LINEAR


def _dims(node: object) -> int | None:
    return value(node).dim() if isinstance(node, Node) and isinstance(value(node), torch.Tensor) else None


def tensor_of(node: Node) -> Node:
    """The tensor that a step changes."""
    return next(arg for arg in node.args if isinstance(arg, Node))


def _step(node: Node, at: int) -> tuple[str | None, int, tuple[float, float]]:
    """What a node does to the scores: its kind, where the vocabulary is in its input, and a factor as numerator and denominator."""
    one = (1.0, 1.0)
    if node.op not in ("call_function", "call_method") or not isinstance(value(node), torch.Tensor) or not value(node).is_floating_point():
        return None, at, one
    if match.is_cast(node):
        return "cast", at, one
    if is_function(node, operator.mul, operator.truediv) and sum(isinstance(arg, Node) for arg in node.args) == 1:
        number = next(arg for arg in node.args if not isinstance(arg, Node))
        if is_function(node, operator.mul):
            return "number", at, (float(number), 1.0)
        return ("number", at, (1.0, float(number))) if number is node.args[1] and number else (None, at, one)
    if not node.args or not isinstance(node.args[0], Node) or not isinstance(value(node.args[0]), torch.Tensor):
        return None, at, one
    if is_function(node, torch.tanh, torch.nn.functional.tanh) or is_method(node, "tanh"):
        return "tanh", at, one
    if is_function(node, torch.nn.functional.log_softmax, torch.log_softmax) or is_method(node, "log_softmax"):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return ("log_softmax" if dim in (at, at - value(node).dim()) else None), at, one
    return *_move(node, at), one


def _move(node: Node, at: int) -> tuple[str | None, int]:
    source, result = value(node.args[0]), value(node)
    if node.target in _RESHAPES | _SAME:
        kept = at == result.dim() - 1 and result.shape[-1:] == source.shape[-1:] and result.dtype == source.dtype
        plain = not node.kwargs or node.target not in ("view", "reshape", torch.reshape)
        return ("view", source.dim() - 1) if kept and plain else (None, at)
    turned = node.target in _TURNS and len(node.all_input_nodes) == 1  # by numbers
    if turned or is_function(node, getattr) and node.args[1] in ("mT", "T"):
        # Which dimension goes where, seen on a tensor whose sizes are all different.
        probe = torch.empty(tuple(range(2, 2 + source.dim())), device="meta")
        turn = getattr(type(probe), node.target) if node.op == "call_method" else node.target
        return "turn", turn(probe, *node.args[1:], **node.kwargs).shape[at] - 2
    if is_function(node, operator.getitem):
        return _slice(node, at)
    return None, at


def _index(node: Node) -> list | None:
    """The index of a getitem, its ellipsis written out and what takes a whole dimension as `:`; None where it holds tensors."""
    source = value(node.args[0])
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(item is None or item is Ellipsis or isinstance(item, slice) or type(item) is int for item in index):
        return None
    missing = source.dim() - sum(isinstance(item, slice | int) for item in index)
    index = index if Ellipsis in index else (*index, Ellipsis)
    place = index.index(Ellipsis)
    index = [*index[:place], *([slice(None)] * missing), *index[place + 1 :]]
    sizes = iter(source.shape)
    for i, item in enumerate(index):
        size = None if item is None else next(sizes)
        if isinstance(item, slice) and item.start in (None, 0) and item.step in (None, 1) and (item.stop is None or item.stop == size):
            index[i] = slice(None)
    return index


def _slice(node: Node, at: int) -> tuple[str | None, int]:
    """Slices and single indices of other dimensions than the vocabulary."""
    if (index := _index(node)) is None:
        return None, at
    kept = [i for i, item in enumerate(index) if item is None or isinstance(item, slice)]  # the dimensions of the result
    dim = sum(item is not None for item in index[: kept[at]])
    return ("slice", dim) if index[kept[at]] == slice(None) else (None, at)


def _head(node: Node) -> Head | str | None:
    """The head whose logits `node` holds; a reason where it is one that is not taken."""
    if is_function(node, operator.add):
        for inner, bias in (node.args, node.args[::-1]):
            if _dims(inner) is None or not _dims(bias) or tuple(value(bias).shape) != (*[1] * (_dims(bias) - 1), value(node).shape[-1]):
                continue
            head = _head(inner)
            if isinstance(head, Head) and head.bias is None and not head.adapters and value(inner).shape == value(node).shape and len(inner.users) == 1:
                return dataclasses.replace(head, node=node, bias=bias) if match.dtype(node) == match.dtype(inner) else NOT_LINEAR
        return None
    found = None
    if match.is_linear(node):
        found = Head(node, node, *match.linear_args(node))
    elif node.op.startswith("call") and node.target in _MATMUL and len(node.args) == 2 and [_dims(item) for item in node.args][1:] == [2]:
        found = Head(node, node, *node.args, None, transposed=True)
    elif is_function(node, operator.getitem) and is_function(node.args[0], lora_linear.op):
        found = _with_adapters(node)
    if not isinstance(found, Head):
        return found
    tensors = [value(item) for item in (found.x, found.weight)]
    # A weight that is a wrapper (quantized, distributed) is no plain matrix.
    plain = all(type(tensor) is type(tensors[0]) and not hasattr(tensor, "__tensor_flatten__") for tensor in tensors)
    return found if plain and tensors[1].dim() == 2 and tensors[1].is_floating_point() else NOT_LINEAR


def _with_adapters(node: Node) -> Head | str:
    call = node.args[0]
    given = match.given(call, *(argument.name for argument in lora_linear.op._schema.arguments))
    if len(given["weights"]) != 1:
        return SIBLINGS
    if any(given["dropout"]):
        return DROPOUT
    adapters = list(zip(given["lora_a"], given["lora_b"], given["lora_biases"], given["scaling"], strict=True))
    return Head(node, call, given["x"], given["weights"][0], given["biases"][0], adapters=adapters)


def low_rank(head: Head, x: Node) -> tuple[Node, Node, Node | None]:
    """`(low_rank, lora_b, bias)` of a head with adapters, x at the rows wanted: as kernels/lora_linear.py computes them."""
    like, dtype = head.node, match.dtype(head.node)

    def scaled(node: Node, scaling: float) -> Node:
        return cast(like, node if scaling == 1 else emit(like, operator.mul, node, scaling), dtype)

    stacked = [scaled(a, scaling) for a, _, _, scaling in head.adapters]
    columns = [cast(like, b, dtype) for _, b, _, _ in head.adapters]
    biases = [] if head.bias is None else [cast(like, head.bias, dtype)]
    biases += [scaled(bias, scaling) for _, _, bias, scaling in head.adapters if bias is not None]
    a = stacked[0] if len(stacked) == 1 else emit(like, torch.cat, stacked)
    b = columns[0] if len(columns) == 1 else emit(like, torch.cat, columns, 1)
    bias = functools.reduce(lambda one, other: emit(like, operator.add, one, other), biases) if biases else None
    return emit(like, torch._C._nn.linear, x, a, None), b, bias


def cast(like: Node, node: Node, dtype: torch.dtype) -> Node:
    return node if match.dtype(node) == dtype else emit(like, "to", node, dtype)


def is_language(head: Head) -> bool:
    """True where the rows are tokens rather than whole examples, and the logits of one are more than the hidden state that the op keeps for it.

    Other heads are cheap: classes of a sequence, labels of a token. Rows that were never anything but rows count by the size of their logits.
    """
    vocabulary, width, rows = head.vocabulary, value(head.x).shape[-1], value(head.node).shape[0]
    if not (isinstance(vocabulary, int) and isinstance(width, int)) or vocabulary <= width:
        return False
    if value(head.node).dim() > 2 or value(match.strip_views(head.x)).dim() > 2:
        return True
    return not isinstance(rows, int) or rows * vocabulary >= LARGE
