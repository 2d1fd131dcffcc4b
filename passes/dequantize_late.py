"""dequantize_late: a weight is dequantized right before the first GEMM that reads it.

    before   W = fastft::dequantize_4bit(packed, ...)        after   z = mm(s, B)
             ...                                                     W = fastft::dequantize_4bit_after(packed, ..., z)
             z = mm(s, B)                                            y = fastft::accumulate_mm(z, x, W.t())
             y = fastft::accumulate_mm(z, x, W.t())

A dequantization reads inputs of the graph alone, so Inductor is free to make every weight before everything else: the order
with the least peak of all that it tries may hold many of them where that is not the peak. `z` is the last of the GEMM's other operands.
"""

import torch
from torch.fx import Graph, Node

from fastft.kernels.dequantize import dequantize_4bit
from fastft.kernels.dequantize_after import dequantize_after


def dequantize_late(graph: Graph) -> int:
    moved = 0
    for node in [node for node in graph.nodes if node.target is dequantize_4bit]:
        forms, readers = _readers(node)
        if not readers:
            continue
        gemm = min(readers)  # nodes compare by their place in the graph
        others = [item for item in gemm.all_input_nodes if item not in forms and item.op == "call_function" and isinstance(item.meta.get("val"), torch.Tensor)]
        if not others:
            continue
        for item in sorted(forms):
            if item < gemm:
                gemm.prepend(item)
        node.target, node.args = dequantize_after, (*node.args, max(others))
        moved += 1
    return moved


def _readers(node: Node) -> tuple[set[Node], set[Node]]:
    """The weight with its transposes and casts, and what reads them together with something else."""
    forms, readers, pending = {node}, set(), [node]
    while pending:
        for user in pending.pop().users:
            if len(user.all_input_nodes) > 1 or user.op == "output":
                readers.add(user)
            elif user not in forms:
                forms.add(user)
                pending.append(user)
    return forms, readers
