"""linear_cross_entropy: lm_head and its loss become one canonical op, which never makes the whole logits.

    before   logits = linear(hidden, W, b)                                   [B, S, V]; also with LoRA, scaled, soft-capped
             scores = logits.float().view(-1, V)
             shifted = pad(labels, (0, 1), value=-100)[..., 1:].view(-1)
             loss = cross_entropy(scores, shifted, ignore_index=-100, reduction="sum") / num_items
             return loss, logits
    after    shifted = ...                                                   the labels' few nodes, copied to the front
             order, count = fastft::valid_rows(shifted, -100)                which rows count: on the host long before the loss
             ...
             loss = fastft::linear_cross_entropy(hidden.reshape(-1, K), W, b, shifted, ..., order, count, -100, "sum", ...)[0] / num_items
             return loss, hidden                                             and a plan to make logits of it: fastft/deferred.py

Taken: the losses of passes/cross_entropy_pattern.py over the heads of passes/cross_entropy_head.py, whatever views, slices and transposes of rows are between:
they are done to the hidden states instead. Scale and softcap in 16 bits before the cast to float32 are done in float32.
The head's weight may be in 4 bits: it is dequantized for the op, and again for logits that are read.
Logits that the graph returns too, before or after scale, softcap and cast, are made when somebody reads them. Where that is not possible the graph stays.
Left silently: losses over classes of a sequence or token, which are few. Left with a Miss: the reasons here and in those files.
"""

import operator

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.kernels import linear_cross_entropy as kernel
from fastft.kernels.valid_rows import valid_rows
from fastft.match import value
from fastft.passes.cross_entropy_head import INTERRUPTED, Chain, Head, cast, emit, low_rank
from fastft.passes.cross_entropy_pattern import Loss, find, z_loss
from fastft.passes.deferred_logits import carry_out, defer, returned
from fastft.passes.labels import at_front, writes
from fastft.result import Match, Miss

INSIDE = "loss inside a checkpoint or region"
READ = "logits are read by something else than the loss"
READ_BY = {
    "logsumexp": "logits are read by a logsumexp too (a z-loss, unless it leaves out ignored labels)",
    "argmax": "logits are read by an argmax too (accuracy)",
    "softmax": "logits are read by a softmax too (entropy, distillation)",
    "log_softmax": "logits are read by a softmax too (entropy, distillation)",
    "cross_entropy": "logits are read by several losses",
}


def linear_cross_entropy(gm: GraphModule) -> list[Match | Miss]:
    return [found if isinstance(found, Miss) else _take(gm, z_loss(found)) for found in find(gm)]


def _take(gm: GraphModule, loss: Loss) -> Match | Miss:
    head = loss.chain.head
    if match.calls(gm):
        return Miss(INSIDE, loss.anchor)
    if _is_interrupted(head, loss.anchor):
        return Miss(INTERRUPTED, loss.anchor)
    outputs = returned(gm, head)
    reader = _other_reader(gm, loss, outputs)
    if reader is not None:
        return Miss(READ_BY.get(_name(reader), READ), reader)
    plans = defer(gm, outputs)
    if isinstance(plans, str):
        return Miss(plans, loss.anchor)
    _replace(gm, loss)
    carry_out(gm, plans, head.x)
    match.erase_dead(loss.anchor)
    return Match(kernel.op.name(), "chunked, logits deferred" if plans else "chunked, logits not returned", [head.first])


def _is_interrupted(head: Head, anchor: Node) -> bool:
    """True where something between head and loss changes the meaning of operations, or writes into anything but integers (labels)."""
    node = head.first
    while node is not anchor:
        node = node.next
        if match.changes_state(node):
            return True
    for write in writes(head.first, anchor):
        tensors = [value(item) for item in write.all_input_nodes if isinstance(value(item), torch.Tensor)]
        if not tensors or any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
            return True
    return False


def _other_reader(gm: GraphModule, loss: Loss, outputs: dict[int, Chain]) -> Node | None:
    """What reads the logits for another purpose than the loss and the outputs that can be made later."""
    returned_nodes = [node for chain in outputs.values() for node in chain.nodes]
    between = [node for node in gm.graph.nodes if node in loss.between]
    known = dict.fromkeys([*loss.chain.nodes, *between, *returned_nodes])
    last = {chain.nodes[-1] for chain in outputs.values()}
    for node in [loss.chain.head.first, *known]:
        for user in list(node.users):
            if node is loss.anchor or user in known or user.op == "output" and node in last:
                continue
            match.erase_dead(user)
            if not user._erased:
                return user if user.op != "output" else node
    return None


def _name(reader: Node) -> str:
    """What the logits are read for, behind views and casts."""
    while len(reader.users) == 1 and (match.is_cast(reader) or match.is_method(reader, *match.VIEWS) or match.is_function(reader, operator.getitem)):
        (reader,) = reader.users
    return reader.target if reader.op == "call_method" else getattr(reader.target, "__name__", "")


def _replace(gm: GraphModule, loss: Loss) -> None:
    """Puts the op in front of the loss and hands its result to those who read the loss."""
    head, anchor = loss.chain.head, loss.anchor
    labels, rows = _labels(gm, loss)
    with gm.graph.inserting_before(anchor):
        hidden = loss.chain.rows_of(cast(head.node, head.x, match.dtype(head.node)))
        weight = emit(head.node, "t", head.weight) if head.transposed else head.weight
        reduced, lora_b, bias = low_rank(head, hidden) if head.adapters else (None, None, head.bias)
        if bias is not None and value(bias).dim() > 1:
            bias = emit(head.node, "reshape", bias, -1)
        numbers = (loss.chain.scale, loss.chain.softcap, loss.label_smoothing, loss.z_loss)
        call = gm.graph.call_function(kernel.op, (hidden, weight, bias, labels, reduced, lora_b, *rows, loss.ignore_index, loss.reduction, *numbers))
        with value(head.node).fake_mode:
            made = value(labels).new_empty(value(labels).shape if loss.reduction == "none" else (), dtype=_wide(head))
        call.meta = {**anchor.meta, "example_value": [made]}
        result = emit(anchor, operator.getitem, call, 0)
        if loss.log_probabilities:
            result = emit(anchor, operator.neg, result)
        result = cast(anchor, result, match.dtype(anchor))
        if value(result).dim() < value(anchor).dim():
            result = emit(anchor, "unsqueeze", result, -1)
    anchor.replace_all_uses_with(result)


def _wide(head: Head) -> torch.dtype:
    return torch.promote_types(match.dtype(head.node), torch.float32)


def _labels(gm: GraphModule, loss: Loss) -> tuple[Node, tuple[Node | None, Node | None]]:
    """The labels and `(order, count)` of `valid_rows`, at the front of the graph where the labels are made from its inputs alone."""
    front = at_front(gm, loss.labels, loss.anchor)
    labels, before = front or (loss.labels, loss.anchor.prev)
    with gm.graph.inserting_before(before.next):
        if value(labels).dim() == value(loss.chain.nodes[-1]).dim():
            labels = emit(loss.anchor, "squeeze", labels, -1)
        if front is None:
            return labels, (None, None)
        flat = labels if value(labels).dim() == 1 else emit(loss.anchor, "reshape", labels, -1)
        rows = emit(loss.anchor, valid_rows, flat, loss.ignore_index)
        return labels, (emit(loss.anchor, operator.getitem, rows, 0), emit(loss.anchor, operator.getitem, rows, 1))
