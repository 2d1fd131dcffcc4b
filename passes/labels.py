"""Labels at the front of the graph: what a loss reads of them is known to the host long before the loss needs it."""

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.match import value

# Operations whose result depends on nothing but their arguments: a copy of them is the same wherever it stands.
_PURE = {
    *("pad", "getitem", "view", "reshape", "flatten", "unflatten", "contiguous", "squeeze", "unsqueeze", "t", "transpose", "permute", "expand", "expand_as"),
    *("to", "long", "int", "bool", "clone", "detach", "view_as", "narrow", "chunk", "split", "unbind", "stack", "cat", "concat", "roll", "flip"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "and_", "or_", "invert", "add", "sub", "mul", "clamp"),
    *("where", "masked_fill", "full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones", "full", "zeros", "ones", "arange", "cumsum", "sum"),
    *("getattr", "size"),
}


def storages(node: object) -> set[int]:
    """What memory the tensors in a node's value share with others."""
    example = value(node) if isinstance(node, Node) else None
    items = example if isinstance(example, list | tuple) else [example]
    return {item.untyped_storage()._cdata for item in items if isinstance(item, torch.Tensor)}


def writes(first: Node, last: Node) -> list[Node]:
    """The nodes between two of a graph, both left out, that write into a tensor."""
    found, node = [], first.next
    while node is not last:
        found += [node] if match.is_mutating(node) else []
        node = node.next
    return found


def are_written(nodes: set[Node], by: list[Node]) -> bool:
    """True where one of `by` takes a tensor that lies in the memory of one of `nodes`."""
    memory = set().union(*map(storages, nodes)) if by else set()
    return any(storages(item) & memory for write in by for item in write.all_input_nodes)


def at_front(gm: GraphModule, node: Node, reader: Node) -> tuple[Node, Node] | None:
    """A node with the value of `node`, right behind the graph's inputs, where its few operations are copied to; and the last node copied, or last input.

    None where it is not made from inputs alone by operations on integers, or one of these is written to before `reader`.
    """
    chain, pending = {node}, [node]
    while pending:
        item = pending.pop()
        if item.op == "placeholder":
            continue
        name = item.target if item.op == "call_method" else getattr(item.target, "__name__", "")
        example = value(item)
        if item.op not in ("call_function", "call_method") or name not in _PURE or isinstance(example, torch.Tensor) and example.is_floating_point():
            return None
        new = set(item.all_input_nodes) - chain
        chain |= new
        pending += new
    order = list(gm.graph.nodes)
    inputs = [item for item in order if item.op == "placeholder"]
    if not inputs or are_written(chain, writes(inputs[0], reader)):
        return None
    copies: dict[Node, Node] = {}
    last = inputs[-1]
    for item in order:
        if item in chain and item.op != "placeholder":
            with gm.graph.inserting_after(last):
                last = copies[item] = gm.graph.node_copy(item, lambda given: copies.get(given, given))
    return copies.get(node, node), last
