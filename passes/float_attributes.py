"""float_attributes: with `dynamic=True`, numbers that modules hold are constants again.

    before   s = scaling.item()                     a graph input, symbolic: LoRA's scaling, attention's, a norm's epsilon, a dropout's p
             z = mul(linear(...), s)
    after    z = mul(linear(...), 2.0)              and a guard on the value: another one compiles anew, as without `dynamic=True`

Dynamo makes every Python float symbolic then, and no pass would know a scaling from any other tensor. Numbers that come as arguments of a call, which may
change with every step, stay symbolic. Nothing is reported.
"""

import operator

import torch
from torch.fx import GraphModule, Node

from fastft import match

_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow}


def float_attributes(gm: GraphModule) -> list:
    for node in list(gm.graph.nodes):
        if not isinstance(match.value(node), torch.SymFloat):
            continue
        if _is_attribute(node):
            _replace(node, float(match.value(node)))  # guards
        elif node.target in _ARITHMETIC and all(isinstance(arg, int | float) for arg in node.args):
            _replace(node, node.target(*node.args))
    return []


def _is_attribute(node: Node) -> bool:
    """True for a graph input that Dynamo has read from a module and for the number in it, also where a checkpointed body gets either."""
    if match.is_method(node, "item"):
        return _is_attribute(node.args[0])
    source = getattr(node, "_dynamo_source", None)
    if source is not None:
        return source.guard_source.is_unspecialized_nn_module()
    outer = match.outside(node) if node.op == "placeholder" else None
    return outer is not None and _is_attribute(outer)


def _replace(node: Node, number: float) -> None:
    for user in list(node.users):
        if not isinstance(user.target, torch._ops.HigherOrderOperator):
            user.args, user.kwargs = torch.fx.map_arg((user.args, user.kwargs), lambda arg: number if arg is node else arg)
    match.erase_dead(node)
