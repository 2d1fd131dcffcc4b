"""`options={"pack_weights": True}`: frozen 16-bit base weights move into padded storage (kernels/packed.py says why).

A parameter keeps its object, shape, dtype and values; its storage becomes [N, K + 64] and its row stride K + 64, 1.5 % more
memory at K = 4096. Optimizers, `state_dict`, `save_pretrained` and `load_state_dict` see the same parameter.

The first call of the backend packs and asks Dynamo to trace the frame again, so that guards and Inductor know the new
strides; from then on nothing moves.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from fastft import _torch, match
from fastft.kernels import attention, lora_linear, lora_mlp, materialize
from fastft.kernels.packed import PAD
from fastft.report import Report, Rewrite

# Parameters that fastft laid out, with the address it gave them. A stride of K + 64 alone proves nothing: the columns behind
# a slice that somebody else made hold somebody else's data.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

# What makes x with a kernel of its own: [x | s] would need a copy of x, which costs what the K-extended form saves.
_NOT_GENERATED = {
    torch._C._nn.linear,
    torch._C._nn.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.addmm,
    attention.op,
    lora_linear.op,
    lora_mlp.op,
}

# Outputs per input column from which a group gains. A norm's kernel does not write into the wider buffer itself: Inductor
# adds a pass over x. H200, 8192 tokens, ms: q,k,v of Llama-8B (6144 from 4096) saves 0.03 and pays 0.035; gate and up
# (28672 from 4096) saves 0.12 and pays 0.04; down (4096 from 14336, x an element-wise product) saves 0.02 and pays nothing.
_MIN_RATIO = 3


def is_packed(weight: torch.Tensor) -> bool:
    return _packed.get(weight) == weight.data_ptr() and weight.stride() == (weight.shape[1] + PAD, 1)


def _can_be_packed(weight: object) -> bool:
    return (
        isinstance(weight, torch.nn.Parameter)
        and type(weight.data) is torch.Tensor
        and not weight.requires_grad
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.dim() == 2
        and weight.is_contiguous()
        and weight.shape[1] % 8 == 0
        and weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    )


def _pack(weight: torch.nn.Parameter) -> None:
    n, k = weight.shape
    buffer = torch.zeros((n, k + PAD), dtype=weight.dtype, device=weight.device)
    buffer[:, :k].copy_(weight.data)
    weight.data = buffer[:, :k]
    _packed[weight] = weight.data_ptr()


def _gains(x: Node, outputs: int) -> bool:
    """True where Inductor writes x with a kernel it generates, and the group is wide enough if that is a norm's."""
    while match.is_method(x, *match.VIEWS, "transpose", "permute") or match.is_function(x, operator.getitem, materialize.materialize):
        x = x.args[0]
    if x.op not in ("call_function", "call_method") or x.target in _NOT_GENERATED:
        return False
    return outputs >= _MIN_RATIO * match.value(x).shape[-1] or not _is_normalised(x)


def _is_normalised(x: Node) -> bool:
    """True where a reduction over the last dimension (rsqrt, var, layer_norm, rms_norm) is a few steps above x."""
    pending, seen = [x], set()
    for _ in range(12):
        if not pending:
            return False
        node = pending.pop(0)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name in ("rsqrt", "var_mean", "layer_norm", "rms_norm", "mean"):
            return True
        pending += [item for item in node.all_input_nodes if item not in seen and item.op.startswith("call")]
        seen.update(node.all_input_nodes)
    return False


def _rows(report: Report, call: Node) -> list[Rewrite]:
    """The report's rows of a call: those of its op that name its module."""
    return [row for row in report.rewrites if row.op == match.op_name(call) and match.module_path(call) in row.fqn]


def pack_weights(gm: GraphModule, example_inputs: Sequence[Any], report: Report) -> None:
    """Switches the groups of `gm` whose weights are packed to the K-extended form; packs the others first.

    Raises:
        Dynamo's restart of the frame, where a parameter moved.
    """
    values = dict(zip((node for node in gm.graph.nodes if node.op == "placeholder"), example_inputs, strict=True))
    moved = False
    for call in gm.graph.nodes:
        if call.target is not lora_linear.op:
            continue
        x, weights, _, lora_a = call.args[:4]
        params = [values.get(weight) for weight in weights]
        outputs = sum(match.value(weight).shape[0] for weight in weights)
        if sum(match.value(a).shape[0] for a in lora_a) > PAD or not _gains(x, outputs):
            continue
        if not all(isinstance(param, torch.nn.Parameter) and (is_packed(param) or _can_be_packed(param)) for param in params):
            continue
        for param in params:
            if not is_packed(param):
                _pack(param)
                moved = True
        for row in _rows(report, call):
            row.provider = row.provider.replace(call.args[-2], "k_extended")
        call.args = (*call.args[:-2], "k_extended", call.args[-1])
    if moved:
        raise _torch.RestartAnalysis(restart_reason="fastft packed frozen weights")
    gm.recompile()
