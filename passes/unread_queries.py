"""unread_queries: queries that are padding are left out of attention where the loss does not read them.

    before   tiles = fastft::block_mask([padding], "(kv <= q) & (t0[b, kv])")
             loss = cross_entropy(logits.view(-1, V), labels, ignore_index=-100)
    after    read = (labels != -100).view_as(padding)                                               the labels' few nodes, copied to the front
             keys, queries = fastft::keys_and_queries([padding], "(t0[b, kv])", ..., read)          1 or 0, 1 or 2
             tiles = fastft::block_mask([keys, queries], "(kv <= q) & (t0[b, kv] == t1[b, q])")

eager computes what a padded query attends to, and so does `attention`: 30 % padding to 8192 costs 1.33 times what it needs
(tools/results/2026-11-23-op-attention-long.json). Where every attention forbids the padded keys, such a query's row reaches nothing but its own logits: if its label
is ignored, the loss and all gradients are the same without it. A padded query whose label counts (the last before the text, in a batch padded on the left;
labels that were not set to -100) is computed as before, token by token, batch by batch. So is a whole row in which a query without any key is read (it weighs
all values alike). What changes: the logits returned for padding, as with transformers' flash_attention_2.

`keys` and `queries` are int32 because FlexAttention's kernels load them in every partly allowed tile. Triton fetches 4 and 8 bytes ahead of the loop
(cp.async), while for a bool the loop waits: 10 loads in the backward's inner loop instead of 2. Instructions of the backward's two loops over such tiles on
sm_90: 613 and 873; int64 padding and a bool `read` took 648 and 1060, int64 document numbers by hand take 714 and 1017.

Taken: one or more `cross_entropy` over all tokens, whose labels come from the graph's inputs, and no other floating-point output than a loss made from them and
the logits. Left, with a Miss: the reasons below. A model that mixes tokens in other ways than attention is left as it is.
"""

import operator
import re
from collections.abc import Container
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.kernels import attention as kernel
from fastft.kernels import mask as masks
from fastft.match import is_function, is_method, origin, value
from fastft.passes.attention_tiles import once, several, tiles
from fastft.passes.labels import are_written, writes
from fastft.passes.token_mixing import mixing
from fastft.result import Match, Miss

NO_LOSS = "no cross-entropy over all tokens in the graph"
OTHER_OUTPUT = "something but the loss and the logits is returned"
MIXES = "tokens are mixed outside of attention with this padding"

_PASSES = ("view", "reshape", "contiguous", "float", "to", "type_as")


def unread_queries(gm: GraphModule) -> list[Match | Miss]:
    if match.calls(gm):  # bodies are handled with the graph around them
        return []
    calls = [(body, node) for body in match.graph_modules(gm) for node in body.graph.nodes if node.target is kernel.op]
    padded = [(body, node, text) for body, node in calls if (text := _padding(node))]
    if not padded:
        return []
    losses = {node: match.cross_entropy_args(node) for node in gm.graph.nodes if is_function(node, torch.nn.functional.cross_entropy)}
    padding = {(text, tuple(map(origin, kernel.get(node, "reads")))) for _, node, text in padded}
    if any(node.graph is not gm.graph for _, reads in padding for node in reads):
        return [Miss(MIXES, padded[0][1])]
    like = origin(kernel.get(padded[0][1], "reads")[0])
    rows = value(like).shape
    labels = [_labels(args, rows) for args in losses.values()]
    if not losses or None in labels:
        return [Miss(NO_LOSS, padded[0][1])]
    if not _only_loss_and_logits(gm, losses):
        return [Miss(OTHER_OUTPUT, padded[0][1])]
    if len(padded) != len(calls) or len({_read_by(text, reads) for text, reads in padding}) > 1 or any(mixing(gm, rows)):
        return [Miss(MIXES, padded[0][1])]
    read = _read(gm, losses, labels, like)
    empties = [empty for _, node, _ in padded if (empty := kernel.get(node, "empty")) is not None]
    for empty in dict.fromkeys(map(origin, empties)):
        read = _with_everything_read(gm, read, empty)
    for body, node, text in padded:
        _leave_out(body, node, text, read)
    return [Match(str(kernel.op.name()), "flex: padded queries whose labels are ignored left out", [node for _, node, _ in padded])]


def _parts(text: str) -> list[str]:
    """The conjuncts of a mask's text, as passes/attention_mask.py joins them."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "&" and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def _padding(node: Node) -> str:
    """The conjuncts that depend on the key alone, over reads of [batch, length]; "" without any, or where the provider takes no text."""
    if kernel.get(node, "provider") != "flex" or any(value(read).dim() != 2 for read in kernel.get(node, "reads")):
        return ""
    return " & ".join(part for part in _parts(kernel.get(node, "allowed")) if "[" in part and re.search(r"\bkv\b", part) and not re.search(r"\bq\b", part))


def _read_by(text: str, reads: tuple[Node, ...]) -> tuple:
    """The padding with its tensors in place of their numbers."""
    return (re.sub(r"\bt\d+\b", "t", text), *(reads[int(number)] for number in re.findall(r"\bt(\d+)\b", text)))


def _labels(loss: dict[str, Any], rows: torch.Size) -> list[Node] | None:
    """The nodes from an input of the graph to the labels of a loss, last one last; None where they are not one label a token, in order."""
    scores, target = loss["input"], loss["target"]
    if len(rows) != 2 or value(scores).dim() != 2 or value(target).dim() != 1 or value(target).shape[0] != rows[0] * rows[1]:
        return None
    if not isinstance(loss["ignore_index"], int) or loss["label_smoothing"] and loss["weight"] is not None:
        return None
    flat = match.strip_casts(scores)
    if not is_method(flat, "view", "reshape") or value(flat.args[0]).dim() != 3 or tuple(value(flat.args[0]).shape[:2]) != tuple(rows):
        return None
    chain, pending, inputs = [], [target], set()
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            inputs.add(node)
            continue
        if node.op not in ("call_function", "call_method") or match.is_mutating(node) or value(node) is None or value(node).is_floating_point():
            return None
        chain.append(node)
        pending += node.all_input_nodes
    order = {node: i for i, node in enumerate(target.graph.nodes)}
    first, *_, last = order
    if are_written({*chain, *inputs}, writes(first, last)):  # a copy at the front would read what was there before
        return None
    return sorted(set(chain), key=order.__getitem__)


def _only_loss_and_logits(gm: GraphModule, losses: dict[Node, dict[str, Any]]) -> bool:
    logits = set()
    for loss in losses.values():
        node = loss["input"]
        while value(node).shape[-1:] == value(node.args[0]).shape[-1:] if node.args and isinstance(node.args[0], Node) else False:
            logits.add(node)
            node = node.args[0]
        logits.add(node)
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    return all(
        item in logits or _made_from(item, losses)
        for item in output.all_input_nodes
        if isinstance(value(item), torch.Tensor) and value(item).is_floating_point()
    )


def _made_from(node: Node, losses: Container[Node]) -> bool:
    """True for a loss, and for sums, multiples and quotients of losses and numbers."""
    if node in losses:
        return True
    arithmetic = is_function(node, operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div)
    if not (arithmetic or match.is_cast(node) or is_method(node, "add", "sub", "mul", "div", *_PASSES)):
        return False
    return all(_made_from(a, losses) or _count(a) for a in node.args if isinstance(a, Node))


def _count(node: Node) -> bool:
    """True for a number that no activation goes into: an input of the graph, through casts."""
    node = match.strip_casts(node)
    return (
        node.op == "placeholder" and not isinstance(value(node), torch.nn.Parameter) and (not isinstance(value(node), torch.Tensor) or value(node).dim() == 0)
    )


def _read(gm: GraphModule, losses: dict[Node, dict[str, Any]], labels: list[list[Node]], like: Node) -> Node:
    """bool [batch, length]: a loss reads this token."""
    order = list(gm.graph.nodes)
    last = order[max([order.index(like)] + [i for i, node in enumerate(order) if node.op == "placeholder"])]
    copies: dict[Node, Node] = {}
    found = []
    for loss, chain in zip(losses.values(), labels, strict=True):
        for node in chain:
            if node not in copies:
                with gm.graph.inserting_after(last):
                    last = copies[node] = gm.graph.node_copy(node, lambda n: copies.get(n, n))
        target = loss["target"]
        with gm.graph.inserting_after(last):
            counts = gm.graph.call_function(torch.ne, (copies.get(target, target), loss["ignore_index"]))
        with gm.graph.inserting_after(counts):
            last = gm.graph.call_method("view_as", (counts, like))
        with value(like).fake_mode:
            counts.meta["example_value"] = torch.ne(value(target), 0)
            last.meta["example_value"] = torch.ne(value(target), 0).view_as(value(like))
        found.append(last)
    read = found[0]
    for other in found[1:]:
        read = once(gm, torch.logical_or, (read, other), value(like).fake_mode)
    return read


def _with_everything_read(gm: GraphModule, read: Node, empty: Node) -> Node:
    """A query without keys weighs all values alike, those of padding too: where one is read, its whole row of the batch is."""
    fake = value(read).fake_mode
    both = once(gm, torch.logical_and, (empty, read), fake)
    return once(gm, torch.logical_or, (read, once(gm, torch.any, (both, -1, True), fake)), fake)


def _leave_out(body: GraphModule, node: Node, padding: str, read: Node) -> None:
    reads = list(map(origin, kernel.get(node, "reads")))
    block_mask = origin(kernel.get(node, "blocks")[0]).args[0]  # behind the first list
    _, _, rows_of, *lengths, device = block_mask.args
    fake = value(read).fake_mode
    tokens = several(body, masks.tokens_op, (reads, padding, rows_of, lengths[1], read), fake)
    others = [part for part in _parts(kernel.get(node, "allowed")) if part not in _parts(padding)]
    used = sorted({int(number) for part in others for number in re.findall(r"\bt(\d+)\b", part)})
    text = re.sub(r"\bt(\d+)\b", lambda number: f"t{used.index(int(number[1]))}", " & ".join(others))
    allowed = " & ".join(filter(None, [text, f"(t{len(used)}[b, kv] == t{len(used) + 1}[b, q])"]))
    reads = [*(reads[number] for number in used), *tokens]
    blocks = tiles(body, (reads, allowed, len(used), *lengths, device), fake)
    kernel.change(node, reads=[match.bring_in(body, item) for item in reads], allowed=allowed, blocks=blocks)
    empty = kernel.get(node, "empty")
    if empty is not None:  # queries without keys that are read
        rows = once(body, torch.logical_and, (origin(empty), read), fake)
        kernel.change(node, empty=match.bring_in(body, rows), empty_blocks=tiles(body, ([rows], "t0[b, q]", 0, *lengths, device), fake))
