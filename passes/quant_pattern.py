"""Reads quantized linears in Dynamo's graph, for passes/quant_linear.py.

    weight    bitsandbytes::dequantize_4bit(packed, absmax, 64, 'nf4', shape, dtype), cast or transposed afterwards; where nested
              absmax = bitsandbytes::dequantize_blockwise(absmax_8bit, absmax', code, 256, float32) + offset
    linear    bitsandbytes::gemm_4bit(x, packed, shape, absmax, ...), or linear(x, weight, bias)
    function  autograd_function_apply(forward, backward, ...): such a linear, and in the backward grad @ weight

Operations are known by name: bitsandbytes need not be installed.
"""

import dataclasses
import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.kernels.dequantize import NESTED_BLOCK
from fastft.match import is_function, is_method, op_name, value

BACKWARD = "backward is not that of a linear"
EIGHT_BITS = "weight in 8 bits (LLM.int8, fp8)"
OTHER = "4-bit weight in a form that is not known"

_GEMM = ("x", "packed", "shape", "absmax", "blocksize", "quant_type", "bias", "absmax_8bit", "absmax_code", "absmax_offset")
_DEQUANTIZE = ("packed", "absmax", "blocksize", "quant_type", "shape", "dtype")
_BLOCKWISE = ("values", "absmax", "code", "blocksize", "dtype")


@dataclasses.dataclass(frozen=True)
class Packed:
    """The operands of `fastft::dequantize_4bit`, but for the dtype."""

    packed: Node
    absmax: Node
    absmax_8bit: Node | None
    absmax_code: Node | None
    absmax_offset: Node | None
    blocksize: int
    quant_type: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight dequantized to `made`, then cast to `dtype`, and transposed or not."""

    packed: Packed
    made: torch.dtype
    dtype: torch.dtype
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Linear:
    """x weight^T + bias; `node` has the result."""

    node: Node
    x: Node
    weight: Weight
    bias: Node | None


def is_sum(node: object) -> bool:
    """True for `dequantize_blockwise(...) + offset`, also written in place, where nothing else reads what is written (torch 2.11 returns it from bodies)."""
    if not is_function(node, operator.iadd, operator.add) or op_name(node.args[0]) != "bitsandbytes::dequantize_blockwise":
        return False
    return node.target is operator.add or all(user is node or user.op == "output" for user in node.args[0].users)


def is_eight_bits(node: Node) -> bool:
    """True for a matrix of int8 or of an fp8."""
    example = value(node)
    if not isinstance(example, torch.Tensor) or example.dim() != 2:
        return False
    return example.dtype == torch.int8 or example.is_floating_point() and example.itemsize == 1


def unchanged(node: Node) -> Node:
    """The node under casts that change nothing."""
    while match.is_cast(node) and match.dtype(node) == match.dtype(node.args[0]):
        node = node.args[0]
    return node


def _flat(node: Node) -> Node:
    """The node under what keeps its elements in order: reshapes, transposes of a single row or column."""
    while True:
        node = unchanged(node)
        kept = is_method(node, *match.VIEWS) and match.dtype(node) == match.dtype(node.args[0]) or is_method(node, "t") and 1 in value(node).shape
        if not kept:
            return node
        node = node.args[0]


class Reader:
    """Parses the nodes of one graph; `outer` says what a node is in the graph that is rewritten, None for what a body computes."""

    def __init__(self, outer: Callable[[Node], Node | None] = lambda node: node) -> None:
        self.outer = outer

    def input(self, node: Node) -> Node | None:
        found = self.outer(_flat(node))
        return None if found is None else _flat(found)

    def packed(self, node: Node) -> Packed | None:
        """The operands of `bitsandbytes::dequantize_4bit` or `gemm_4bit`."""
        names = {"bitsandbytes::dequantize_4bit": _DEQUANTIZE, "bitsandbytes::gemm_4bit": _GEMM}.get(op_name(node))
        if names is None:
            return None
        given = match.given(node, *names)
        if not isinstance(given["shape"], list | tuple) or not all(isinstance(size, int) for size in given["shape"]):
            return None
        if is_sum(given["absmax"]):
            nested, offset = given["absmax"].args
            inner = match.given(nested, *_BLOCKWISE)
            if inner["blocksize"] != NESTED_BLOCK or inner["dtype"] != torch.float32:
                return None
            given |= {"absmax": inner["absmax"], "absmax_8bit": inner["values"], "absmax_code": inner["code"], "absmax_offset": offset}
        tensors = [given.get(key) for key in ("packed", "absmax", "absmax_8bit", "absmax_code", "absmax_offset")]
        found = [None if item is None else self.input(item) for item in tensors]
        if [item is None for item in found] != [item is None for item in tensors] or match.dtype(found[1]) != torch.float32:
            return None
        return Packed(*found, given["blocksize"], given["quant_type"], tuple(given["shape"]))

    def weight(self, node: Node) -> Weight | None:
        """Parses casts and transposes of a dequantized weight. float32 is rounded once when it is cast: it is made in the other dtype at once."""
        transposed, dtype, dtypes = False, match.dtype(node), set()
        while match.is_cast(node) or is_method(node, "t"):
            dtypes.add(match.dtype(node))
            transposed ^= node.target == "t"
            node = node.args[0]
        packed, made = self.packed(node), match.dtype(node)
        if op_name(node) != "bitsandbytes::dequantize_4bit" or packed is None or not dtypes <= {made, dtype}:
            return None
        return Weight(packed, dtype if made == torch.float32 else made, dtype, transposed)

    def linear(self, node: Node) -> Linear | None:
        """Parses `gemm_4bit(...)` and `linear(x, weight, bias)`."""
        if op_name(node) == "bitsandbytes::gemm_4bit":
            given, packed = match.given(node, *_GEMM), self.packed(node)
            x, bias, dtype = given["x"], given.get("bias"), match.dtype(node)
            weight = packed and Weight(packed, dtype, dtype)
        elif match.is_linear(node):
            x, operand, bias = match.linear_args(node)
            weight = self.weight(operand)
        else:
            return None
        outer = [item and self.outer(item) for item in (x, bias)]
        if weight is None or outer[0] is None or (outer[1] is None) != (bias is None):
            return None
        return Linear(node, outer[0], weight, outer[1])


def in_function(gm: GraphModule, node: Node) -> Linear | str | None:
    """The linear in an `autograd_function_apply`, a reason, or None where that has no quantized weight."""
    if getattr(node.target, "__name__", "") != "autograd_function_apply":
        return None
    (forward, backward), operands = (list(getattr(gm, item.target).graph.nodes) for item in node.args[:2]), node.args[2:]
    reason = _candidate(forward)
    if reason is None:
        return None
    (results, saved), known = forward[-1].args[0], dict(zip(_inputs(forward), operands, strict=True))
    reader = Reader(known.get)
    found = reader.linear(results[0])
    # torch 2.11 returns what is saved, and more, beside the result: only that may be read.
    if found is None or {user.args[1] for user in node.users if user.users} != {0}:
        return reason
    if any(match.is_mutating(item) and not is_sum(item) for item in forward + backward):
        return BACKWARD
    grad, *others = _inputs(backward)
    known = dict(zip(others[len(results) - 1 :], (reader.input(item) for item in saved), strict=True))
    gradients = dict(zip(operands, backward[-1].args[0], strict=True))
    dx, d_bias = gradients.pop(found.x), gradients.pop(found.bias, None)
    right = _is_product(dx, grad, found.weight.packed, Reader(known.get)) if dx is not None else not value(found.x).requires_grad
    if not right or d_bias is not None and not _is_sum_of(d_bias, grad) or any(item is not None for item in gradients.values()):
        return BACKWARD
    return dataclasses.replace(found, node=node)


def _inputs(nodes: list[Node]) -> list[Node]:
    return [node for node in nodes if node.op == "placeholder"]


def _candidate(forward: list[Node]) -> str | None:
    """What a body is a candidate for, None for one without quantized weights: the reason to give if it is not taken."""
    names = {op_name(node) for node in forward}
    if any(item.startswith("bitsandbytes::int8") for item in names):
        return EIGHT_BITS
    if any(item.startswith("bitsandbytes::") for item in names):
        return OTHER
    return EIGHT_BITS if any(map(is_eight_bits, _inputs(forward))) else None


def _is_product(node: Node, grad: Node, packed: Packed, reader: Reader) -> bool:
    """True for `grad @ weight`."""
    if not is_function(node, torch.matmul) or node.args[0] is not grad:
        return False
    weight = reader.weight(node.args[1])
    return weight is not None and weight.packed == packed and not weight.transposed


def _is_sum_of(node: Node, grad: Node) -> bool:
    """True for `grad.sum(0)`; autograd sums the other dimensions of a bias gradient."""
    return is_method(node, "sum") and node.args == (grad, 0) and set(node.kwargs) <= {"dtype"}
