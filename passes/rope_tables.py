"""rope_tables: cos and sin of the positions are computed once a step, not in every kernel that reads them.

    before   cos = (angle.cos() * scaling).to(dtype)            after   cos = fastft::materialize((angle.cos() * scaling).to(dtype))
             ... cos in every layer, forward and backward ...           ... cos in every layer ...

Inductor takes a cosine for cheap and repeats it, with the cast and the product that makes the angle, for every entry of every
query and key. H200, Llama-8B, 4 x 2048: the kernels that rotate q take 4.1 ms forward and 6.0 ms backward of a step of 481; their
floor is 1.0 and 1.0. All element-wise kernels of the step together: 42.7 ms without, 32.2 with the pass.

Taken: cos and sin without a gradient, followed by casts and products with numbers, that several operations read. Not run under CUDA
graphs (`runner.NOT_UNDER_CUDA_GRAPHS`).
"""

import operator

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.kernels.materialize import materialize
from fastft.match import is_function, value
from fastft.result import Match, Miss

_TARGETS = {torch.cos, torch.sin, "cos", "sin"}


def rope_tables(gm: GraphModule) -> list[Match | Miss]:
    return [_keep(gm, table) for node in list(gm.graph.nodes) if (table := _table(node))]


def _table(node: Node) -> Node | None:
    """What several operations read of a cosine or sine."""
    example = value(node) if node.op.startswith("call") and node.target in _TARGETS else None
    if not isinstance(example, torch.Tensor) or not example.is_floating_point() or example.requires_grad:
        return None
    while len(node.users) == 1:
        (user,) = node.users
        if not match.is_cast(user) and not (is_function(user, operator.mul) and user.all_input_nodes == [node]):
            break
        node = user
    # One reader that spreads it is an `unsqueeze` for q and k of a single layer.
    return node if len(node.users) > 1 or any(len(user.users) > 1 for user in node.users) else None


def _keep(gm: GraphModule, table: Node) -> Match:
    with gm.graph.inserting_after(table):
        kept = gm.graph.call_function(materialize, (table,))
    kept.meta = dict(table.meta)
    table.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)
    return Match("fastft::materialize", "once a step", [kept])
