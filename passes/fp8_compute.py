"""fp8_compute: linears with frozen bf16 weights multiply in fp8; only with `options={"base_compute": "fp8"}`.

    before   y = linear(x, W, b)                                    after   y = fastft::fp8_linear(x, W, b)
             r0, r1 = fastft::lora_linear(x, [W0, W1], ..., forward, backward)
                                                                    after   ... fastft::lora_linear(x, [W0, W1], ..., "fp8", backward)

Adapters stay in bf16. Left, each with a Miss: the reasons below. Also left: what no linear, attention or product comes behind and is wider than its input: the
head, whose logits are compared with each other.
"""

import functools
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.kernels import fp8_linear, lora_linear
from fastft.match import linear_args, value
from fastft.result import Match, Miss

TRAINED = "fp8: the weight is trained"
QUANTIZED = "fp8: the weight is quantized already"
DTYPE = "fp8: weight or input is not bfloat16"
SIZES = f"fp8: sizes are no multiples of {fp8_linear.ALIGNMENT}"
FEW_ROWS = f"fp8: fewer than {fp8_linear.MIN_ROWS} rows"
HEAD = "fp8: the model's head"

_PRODUCTS = {torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.nn.functional.scaled_dot_product_attention}


def fp8_compute(gm: GraphModule) -> Iterator[Match | Miss]:
    autocast = functools.cache(lambda device: match.autocast_dtypes(gm, device))
    for node in list(gm.graph.nodes):
        if node.target is lora_linear.op:
            x, weights = node.args[:2]
            bases = sorted(node.users, key=lambda item: item.args[1])  # they carry the modules' paths
        elif match.is_linear(node):
            x, weight, _ = linear_args(node)
            weights, bases = [weight], [node]
        else:
            continue
        why = _reason(gm, node, x, weights, autocast(value(x).device.type)[node])
        if why is not None:
            yield from (Miss(why, base) for base in bases)
        elif node.target is lora_linear.op:
            node.args = (*node.args[:-2], "fp8", node.args[-1])
            yield Match("fastft::lora_linear", f"fp8+{node.args[-1]}", bases)
        else:
            node.target, node.args, node.kwargs = fp8_linear.op, linear_args(node), {}
            yield Match("fastft::fp8_linear", "fp8", bases)


def _reason(gm: GraphModule, node: Node, x: Node, weights: list[Node], autocast: torch.dtype | None) -> str | None:
    """Why this linear or group is left, None where it is taken."""
    if any(value(weight).requires_grad for weight in weights):
        return TRAINED
    if not all(map(_is_parameter, weights)):
        return QUANTIZED
    if any(match.dtype(weight) != torch.bfloat16 for weight in weights) or (autocast or match.dtype(x)) != torch.bfloat16:
        return DTYPE
    if any(size % fp8_linear.ALIGNMENT for weight in weights for size in value(weight).shape):
        return SIZES
    rows = value(x).numel() // value(x).shape[-1]
    if isinstance(rows, int) and rows < fp8_linear.MIN_ROWS:
        return FEW_ROWS
    if gm is match.outermost(gm) and sum(value(weight).shape[0] for weight in weights) > value(x).shape[-1] and _is_last(node):
        return HEAD
    return fp8_linear.unavailable(value(x).device)


def _is_parameter(weight: Node) -> bool:
    while match.is_method(weight, "t", "detach"):
        weight = weight.args[0]
    return weight.op in ("placeholder", "get_attr")


def _is_last(node: Node) -> bool:
    """True where nothing that reads `node` is multiplied with anything further."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if match.is_linear(user) or user.target in _PRODUCTS or match.op_name(user).startswith("fastft::"):
                return False
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return True
