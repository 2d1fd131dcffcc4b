"""normalize: one spelling for each operation, so that the passes after it know only one.

    before                                          after
    F.linear(x, w, b)                               torch._C._nn.linear(x, w, b)
    x @ w.t(), torch.matmul(x, w.T), x.matmul(...)  torch._C._nn.linear(x, w)          w a 2-D graph input, also transposed around a checkpoint
    torch.addmm(b, x, w)                            torch._C._nn.linear(x, w.t(), b)   b 1-D (transformers' Conv1D)
    torch.add(a, b), a.add(b), operator.iadd        operator.add(a, b)                 likewise mul; iadd only on fresh results
    F.dropout(x, p, False), F.dropout(x, 0.0)       x
    aten.numpy_T(x), aten.mT(x)                     getattr(x, "T"), "mT"              torch 2.15's Dynamo writes the former

Nothing is reported: a spelling not listed is left as it is.
"""

import operator

import torch
from torch.fx import GraphModule, Node

from fastft import match

_BINARY = {
    torch.add: operator.add,
    torch.mul: operator.mul,
    torch.multiply: operator.mul,
    torch.div: operator.truediv,
    "add": operator.add,
    "mul": operator.mul,
    "div": operator.truediv,
}
_PROPERTIES = {torch.ops.aten.numpy_T: "T", torch.ops.aten.mT: "mT"}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm"}


def normalize(gm: GraphModule) -> list:
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        for rule in (_property, _linear, _addmm, _matmul, _binary, _dropout):
            if rule(gm, node):
                break
    return []


def _property(gm: GraphModule, node: Node) -> bool:
    name = _PROPERTIES.get(node.target)
    if name is None:
        return False
    node.target, node.args = getattr, (node.args[0], name)
    return True


def _linear(gm: GraphModule, node: Node) -> bool:
    if not match.is_function(node, torch.nn.functional.linear):
        return False
    node.target = torch._C._nn.linear
    node.args, node.kwargs = match.linear_args(node), {}
    return True


def _binary(gm: GraphModule, node: Node) -> bool:
    target = _BINARY.get(node.target)
    if target is None or node.kwargs or len(node.args) != 2:
        return False
    node.op, node.target = "call_function", target
    return True


def _is_input(node: object) -> bool:
    return isinstance(node, Node) and node.op in ("placeholder", "get_attr")


def _transposed(node: object) -> Node | None:
    """w where node is `w.t()`, `w.T`, `w.mT` or `w.transpose(0, 1)` of a 2-D graph input."""
    if match.is_method(node, "t") or match.is_function(node, torch.t):
        inner = node.args[0]
    elif match.is_method(node, "transpose") or match.is_function(node, torch.transpose):
        inner = node.args[0] if sorted(d % 2 for d in node.args[1:]) == [0, 1] else None
    elif match.is_function(node, getattr) and node.args[1] in ("T", "mT"):
        inner = node.args[0]
    else:
        return None
    return inner if _is_input(inner) and match.value(inner).dim() == 2 else None


def _turned(gm: GraphModule, weight: Node, reader: Node) -> Node:
    """`weight.t()`, in front of `reader`."""
    with gm.graph.inserting_before(reader):
        turned = gm.graph.call_method("t", (weight,))
    turned.meta = {**reader.meta, "example_value": match.value(weight).t()}
    return turned


def _matmul(gm: GraphModule, node: Node) -> bool:
    if node.target not in _MATMUL or len(node.args) != 2 or node.kwargs:
        return False
    x, other = node.args
    if not isinstance(x, Node) or not isinstance(match.value(x), torch.Tensor) or match.value(x).dim() < 2:
        return False
    weight = _transposed(other)
    if weight is None and _is_input(other) and _transposed(match.origin(other)):  # Dynamo transposes a checkpoint's weights outside of its body
        weight = _turned(gm, other, node)
    if weight is None:
        return False
    node.op, node.target = "call_function", torch._C._nn.linear
    node.args = (x, weight, None)
    return True


def _addmm(gm: GraphModule, node: Node) -> bool:
    if not match.is_function(node, torch.addmm) or node.kwargs or len(node.args) != 3:
        return False
    bias, x, weight = node.args
    if not (_is_input(bias) and _is_input(weight)) or match.value(bias).dim() != 1:
        return False
    node.target, node.args = torch._C._nn.linear, (x, _turned(gm, weight, node), bias)
    return True


def _dropout(gm: GraphModule, node: Node) -> bool:
    if not match.is_function(node, torch.nn.functional.dropout):
        return False
    x, p, training = match.dropout_args(node)
    if training and p != 0:
        return False
    node.replace_all_uses_with(x)
    gm.graph.erase_node(node)
    return True
