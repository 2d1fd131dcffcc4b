"""Nodes that a mask needs once a step: in the graph of the tensors it reads, right after them, shared by all layers."""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.kernels import mask as masks
from fastft.match import value


def once(gm: GraphModule, target: Any, args: tuple, fake_mode: Any) -> Node:
    """`target(*args)` in the graph of the nodes among `args` (of the outermost graph without any); one node for the same arguments."""
    nodes: list[Node] = []
    torch.fx.node.map_arg(args, nodes.append)
    graph = nodes[0].graph if nodes else match.outermost(gm).graph
    order = list(graph.nodes)
    for node in order:
        if node.target is target and node.args == args:
            return node
    last = max([order.index(node) for node in nodes] + [i for i, node in enumerate(order) if node.op == "placeholder"])
    with graph.inserting_after(order[last]):
        made = graph.call_function(target, args)
    with fake_mode:
        made.meta["example_value"] = target(*torch.fx.node.map_arg(args, value))
    return made


def several(gm: GraphModule, target: Any, args: tuple, fake_mode: Any) -> list[Node]:
    """The tensors of the list that `target(*args)` gives, as nodes of its graph."""
    made = once(gm, target, args, fake_mode)
    found = sorted(made.users, key=lambda node: node.args[1])
    for number in range(len(found), len(made.meta["example_value"])):
        with made.graph.inserting_after(found[-1] if found else made):
            found.append(made.graph.call_function(operator.getitem, (made, number)))
        found[-1].meta["example_value"] = made.meta["example_value"][number]
    return found


def tiles(gm: GraphModule, args: tuple, fake_mode: Any) -> list[Node]:
    """The eight lists of `fastft::block_mask(*args)`, as nodes that `gm` can use."""
    return [match.bring_in(gm, node) for node in several(gm, masks.op, args, fake_mode)]
