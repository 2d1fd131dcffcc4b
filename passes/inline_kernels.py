"""inline_kernels: Inductor launches fastft's Triton kernels itself.

    before   z = fastft::low_rank_mm(s, b, None)          after   z = new_empty([M, N])
                                                                  triton_kernel_wrapper_mutation(low_rank_kernel, s, b, z)

Also `lora_grads`. A custom op costs about 40 us of the host a call (dispatch, Python, Triton's launcher), a kernel that
Inductor launches about 5: Llama-1B, 2 x 1024 tokens, H200: 43 ms a step with custom ops, 30 ms for plain Inductor.

Left as custom ops, which work the same: graphs with symbolic sizes, and rows whose length is not a multiple of 128 bytes
(Inductor may pad those; the kernel's strides are fixed here, when it is traced).
"""

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fastft.kernels import lora_grads, low_rank


def _low_rank(s, b, bias):
    return low_rank.launch(s, b, bias, torch.library.wrap_triton(low_rank.low_rank_kernel))


def _lora_grads(dy, s, b):
    config = lora_grads.config_for(dy.device.index, s.shape[1])
    return lora_grads.launch(dy, s, b, config, torch.library.wrap_triton(lora_grads.lora_grads_kernel))


def inline_kernels(graph: Graph) -> int:
    changed = 0
    for node in list(graph.nodes):
        if node.target is low_rank.low_rank_mm and low_rank.serves(node.args[0].meta["val"], node.args[0].meta["val"].shape[1]):
            traced = _low_rank
        elif node.target is lora_grads.lora_grads and node.args[0].meta["val"].is_cuda:
            traced = _lora_grads
        else:
            continue
        values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in node.args]
        if not all(_fixed(value) for value in (*values, node.meta["val"])):
            continue
        _inline(graph, node, traced, values)
        changed += 1
    return changed


def _fixed(value: object) -> bool:
    """True for what has no symbolic size and no long row that Inductor might pad."""
    if isinstance(value, tuple | list):
        return all(_fixed(item) for item in value)
    if not isinstance(value, torch.Tensor):
        return True
    sizes = (*value.shape, *value.stride())
    row = value.shape[-1] * value.element_size()
    return all(isinstance(size, int) for size in sizes) and (row < 1024 or row % 128 == 0)


def _inline(graph: Graph, node: Node, traced, values: list) -> None:
    """Puts the nodes that `traced` makes of `values` in the place of `node`."""
    with values[0].fake_mode:
        body = make_fx(traced)(*values).graph
    env: dict[Node, Node] = {}
    inputs = iter(node.args)
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "placeholder":
                env[inner] = next(inputs)
            elif inner.op == "output":
                outputs = inner.args[0]
            else:
                env[inner] = graph.node_copy(inner, env.__getitem__)
                env[inner].meta = {**node.meta, **inner.meta}
    if isinstance(outputs, Node):
        node.replace_all_uses_with(env[outputs])
    else:
        for user in list(node.users):  # getitem(node, i)
            user.replace_all_uses_with(env[outputs[user.args[1]]])
            graph.erase_node(user)
    graph.erase_node(node)
