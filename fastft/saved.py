"""What the forward saves for the backward has memory of its own, where PyTorch takes that for granted.

    before   return loss, a, v              v = view(a): AOTAutograd "donates" both to the backward, and Inductor
    after    return loss, a, clone(v)       writes a result over `a` although `v` is still to be read

torch 2.11 to 2.15 (`collect_bw_donated_buffer_idxs`) look whether a saved tensor shares memory with an input or an output of
the program, but not with another saved one. Seen on inkling2_text: gradients off by 2e-4 (attention's output, saved for its own backward
and, through `unbind`, for the norm behind it). Parts that do not overlap are left: one is never written through another.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


def give_own_memory(forward: GraphModule, backward: GraphModule, outputs: int) -> int:
    """Copies saved tensors that overlap with another saved one; returns how many.

    Args:
        forward, backward: as the partitioner returns them, changed in place. outputs: how many results of `forward` are not saved tensors.
    """
    (result,) = forward.graph.find_nodes(op="output")
    results = list(result.args[0])
    placeholders = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    by_memory: dict[int, list[Node]] = {}
    for node in results[outputs:]:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.op != "placeholder" and node.name in placeholders:
            by_memory.setdefault(value.untyped_storage()._cdata, []).append(node)
    copies: dict[Node, Node] = {}
    for nodes in by_memory.values():
        kept: list[Node] = []
        for node in sorted(nodes, key=_known_size):
            if all(_disjoint(node.meta["val"], other.meta["val"]) for other in kept):
                kept.append(node)
                continue
            with forward.graph.inserting_before(result), node.meta["val"].fake_mode:
                copies[node] = forward.graph.call_function(torch.ops.aten.clone.default, (node,))
                copies[node].meta = {**node.meta, "val": node.meta["val"].clone()}
            placeholders[node.name].meta["val"] = copies[node].meta["val"]
    if copies:
        result.args = ([*results[:outputs], *(copies.get(node, node) for node in results[outputs:])],)
        forward.recompile()
        backward.recompile()
    return len(copies)


def _known_size(node: Node) -> int:
    """Orders the largest first, so that the small ones are copied."""
    size = node.meta["val"].numel()
    return -size if isinstance(size, int) else 0


def _disjoint(one: Tensor, other: Tensor) -> bool:
    """True where two tensors in one memory are known to be different columns, heads or rows of the same matrix."""
    if one.stride() != other.stride():
        return False
    first, second = sorted((one, other), key=lambda x: x.storage_offset())
    distance = second.storage_offset() - first.storage_offset()
    strides = one.stride()
    for dim, stride in enumerate(strides):
        sizes = (first.shape[dim], second.shape[dim])
        if not all(isinstance(number, int) for number in (distance, *sizes, *strides)) or stride == 0 or distance % stride:
            continue
        start = distance // stride
        wider = [larger for larger in strides if larger > stride]
        if start >= sizes[0] and (not wider or (start + sizes[1]) * stride <= min(wider)):
            return True
    return False
