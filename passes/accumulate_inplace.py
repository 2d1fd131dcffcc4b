"""accumulate_inplace: the GEMM adds into its summand's buffer where that dies there.

    before   z = mm(s, B)                        after   z = mm(s, B)
             y = fastft::accumulate_mm(z, x, W)          fastft::accumulate_mm_(z, x, W)
             ... y ...                                   ... z ...

Taken: z is the fresh result of a GEMM, of an operation Inductor generates, or of another accumulation, and nothing else
reads it. Left: graph inputs, views, and z with another user; there `accumulate_mm` copies z first.

Runs after Inductor's own patterns: they do not match across a mutation.
"""

import operator

import torch
from torch.fx import Graph, Node

from fastft.kernels.accumulate import accumulate_mm, accumulate_mm_
from fastft.kernels.low_rank import low_rank_mm, low_rank_mm_dropout, low_rank_mms

aten = torch.ops.aten
_FRESH = {
    aten.mm.default,
    aten.addmm.default,
    aten.mm.dtype,
    aten.add.Tensor,
    aten._scaled_mm.default,
    aten.where.self,
    aten.mul.Tensor,
    accumulate_mm,
    low_rank_mm,
    low_rank_mm_dropout,
    low_rank_mms,
}


def accumulate_inplace(graph: Graph) -> int:
    changed = 0
    written: set[Node] = set()
    for node in list(graph.nodes):
        if node.target is not accumulate_mm:
            continue
        summand, a, b = node.args
        live = [user for user in summand.users if user is not node and user not in written]
        made = summand.args[0] if summand.target is operator.getitem else summand  # one of the buffers of low_rank_mms
        if live or made.target not in _FRESH:
            continue
        with graph.inserting_before(node):
            write = graph.call_function(accumulate_mm_, (summand, a, b))
        write.meta = dict(node.meta)
        written.add(write)
        node.replace_all_uses_with(summand)
        graph.erase_node(node)
        changed += 1
    return changed
