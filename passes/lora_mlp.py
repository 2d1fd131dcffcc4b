"""lora_mlp: gate, up, their product and down, all with adapters, become one canonical op.

    before   g, u = fastft::lora_linear(x, [W_gate, W_up], ...)
             y = fastft::lora_linear(silu(g) * u, [W_down], ...)
    after    y = fastft::lora_mlp(x, [W_gate, W_up, W_down], ..., "silu", ...)

Taken: silu and both gelus, gate and up in either order or halves of one linear (`chunk`, Phi-3; W and B are cut, A counts for both),
other linears beside them on x, which stay a group, dropout with its masks, where the kernels of all three linears stream ("outer": a CUDA GPU, 16 bit,
many rows, small ranks) and nothing else reads what lies between.
Left, each with a Miss: the reasons below. Elsewhere the two `lora_linear`s stay and nothing is said: it is not a candidate.
"""

import dataclasses
import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.kernels import lora_linear, lora_mlp as kernel
from fastft.passes.quant_pattern import unchanged
from fastft.result import Match, Miss

READ = "gated MLP: something else reads the gate, up or their product"
SIBLINGS = "gated MLP: another linear reads the product"
DROPOUT = "gated MLP: dropout, and down has several adapters, or gate and up are halves or have siblings"
TRAINED = "gated MLP: down's base weight is trained"
TRAINED_WHOLE = "gated MLP: gate and up are halves of one trained base weight"
STATE = "gated MLP: a write or a change of autocast or grad mode between gate and down"

_PRODUCTS = (operator.mul, torch.mul)


def lora_mlp(gm: GraphModule) -> Iterator[Match | Miss]:
    segment = match.segments(gm)
    for down in list(gm.graph.nodes):
        if not _streams(down) or (found := _gate(down.args[0])) is None:
            continue
        activation, group, pair = found
        result = next(iter(down.users))
        if reason := _reason(down, group, pair, segment):
            yield Miss(reason, result)
        else:
            yield _replace(gm, down, result, activation, group, pair)


@dataclasses.dataclass(frozen=True)
class Part:
    """Gate or up: a linear of its group, or some of its rows; `node` is its result."""

    node: Node = dataclasses.field(compare=False)
    linear: int
    rows: slice | None = None


def _streams(node: object) -> bool:
    return match.is_function(node, lora_linear.op) and node.args[-2:] == ("outer", "one_read")


def _gate(product: Node) -> tuple[str, Node, tuple[Part, Part]] | None:
    """`(name of the activation, group, (gate, up))` where `product` is act(gate) * up of one lora_linear's results."""
    product = unchanged(product)
    if not match.is_function(product, *_PRODUCTS) or len(product.all_input_nodes) != 2 or product.kwargs:
        return None
    factors = [unchanged(factor) for factor in product.args]
    for act, up in (factors, factors[::-1]):
        name = _activation(act)
        if name and (first := _part(unchanged(act.args[0]))) and (second := _part(up)) and first[0] is second[0] and first[1] != second[1]:
            return name, first[0], (first[1], second[1])
    return None


def _activation(node: object) -> str | None:
    if match.is_function(node, torch.nn.functional.silu):
        return "silu"
    if match.is_function(node, torch.nn.functional.gelu):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(match.given(node, "input").get("approximate", "none"))
    return None


def _part(node: object) -> tuple[Node, Part] | None:
    """`(group, part)` for a result of a lora_linear, or for one half of it."""
    if not match.is_function(node, operator.getitem):
        return None
    source, index = node.args
    if _streams(source):
        return source, Part(node, index)
    if not _is_halved(source):
        return None
    whole = unchanged(source.args[0])
    if not match.is_function(whole, operator.getitem) or not _streams(whole.args[0]):
        return None
    width = match.value(node).shape[-1]
    return whole.args[0], Part(whole, whole.args[1], slice(index * width, (index + 1) * width))


def _is_halved(node: object) -> bool:
    """True for `x.chunk(2, dim=-1)` of an even width."""
    if not (match.is_method(node, "chunk") or match.is_function(node, torch.chunk)):
        return False
    args = match.given(node, "input", "chunks", "dim")
    sizes = match.value(args["input"]).shape
    return args["chunks"] == 2 and args.get("dim", 0) in (-1, len(sizes) - 1) and sizes[-1] % 2 == 0


def _is_read(node: Node, group: Node) -> bool:
    """True where something beside `node`'s reader, or the readers of its halves, reads it or what lies between it and the group."""
    return node is not group and (len(node.users) > 1 + _is_halved(node) or any(_is_read(item, group) for item in node.all_input_nodes))


def _reason(down: Node, group: Node, pair: tuple[Part, Part], segment: dict[Node, int]) -> str | None:
    """Why this MLP is left, None where it is taken."""
    if _is_read(down.args[0], group):
        return READ
    if len(down.args[1]) > 1:
        return SIBLINGS
    # masks belong to the places of adapters in their group, and halves of one linear share theirs
    if any(down.args[8]) and len(down.args[8]) > 1 or any(group.args[8]) and (len(group.args[1]) > 2 or pair[0].rows is not None):
        return DROPOUT
    if match.value(down.args[1][0]).requires_grad:
        return TRAINED
    if pair[0].rows is not None and match.value(group.args[1][pair[0].linear]).requires_grad:
        return TRAINED_WHOLE
    return None if segment[group] == segment[down] else STATE


def _arguments(group: Node, linears: list[int], rows: list[slice | None]) -> list:
    """The arguments of `group` up to its dropout for some of its linears, in this order, or for rows of them."""
    x, weights, biases, lora_a, lora_b, lora_biases, owner, scaling, dropout = group.args[:9]
    adapters = [(place, j) for place, linear in enumerate(linears) for j, of in enumerate(owner) if of == linear]
    of_linear = [[_cut(values[i], cut) for i, cut in zip(linears, rows, strict=True)] for values in (weights, biases)]
    of_b = [[_cut(values[j], rows[place]) for place, j in adapters] for values in (lora_b, lora_biases)]
    of_adapter = [[values[j] for _, j in adapters] for values in (scaling, dropout)]
    return [x, *of_linear, [lora_a[j] for _, j in adapters], *of_b, [place for place, _ in adapters], *of_adapter]


def _cut(node: Node | None, rows: slice | None) -> Node | None:
    if node is None or rows is None:
        return node
    part = node.graph.call_function(operator.getitem, (node, rows))
    part.meta = {**node.meta, "example_value": match.value(node)[rows]}
    return part


def _replace(gm: GraphModule, down: Node, result: Node, activation: str, group: Node, pair: tuple[Part, Part]) -> Match:
    linears, provider = [part.linear for part in pair], down.args[-2:]
    with gm.graph.inserting_before(down):
        (x, *first), (_, *second) = _arguments(group, linears, [part.rows for part in pair]), _arguments(down, [0], [None])
        second[5] = [2] * len(second[5])  # the owners: down is the third linear
        *arguments, dropout = (a + b for a, b in zip(first, second, strict=True))
        seeds = (dropout, group.args[9], down.args[9]) if any(dropout) else ()
        call = gm.graph.call_function(kernel.op, (x, *arguments, activation, *provider, *seeds))
    call.meta = dict(result.meta)
    result.replace_all_uses_with(call)
    match.erase_dead(result)
    if not group._erased:
        _leave_out(group, linears)
    return Match("fastft::lora_mlp", f"gated {activation}, {'+'.join(provider)}", [*dict.fromkeys(part.node for part in pair), result])


def _leave_out(group: Node, linears: list[int]) -> None:
    """What is left of a group whose other linears share x: parallel attention (Cohere)."""
    rest = [i for i in range(len(group.args[1])) if i not in linears]
    group.args = (*_arguments(group, rest, [None] * len(rest)), *group.args[9:])
    group.meta["example_value"] = [group.meta["example_value"][i] for i in rest]
    for item in list(group.users):
        item.args = (group, rest.index(item.args[1]))
