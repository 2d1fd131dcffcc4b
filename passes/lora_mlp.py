"""lora_mlp: gate, up, their product and down, all with adapters, become one canonical op.

    before   g, u = fastft::lora_linear(x, [W_gate, W_up], ...)
             y = fastft::lora_linear(silu(g) * u, [W_down], ...)
    after    y = fastft::lora_mlp(x, [W_gate, W_up, W_down], ..., "silu", ...)

Taken: silu and both gelus, gate and up in either order, other linears beside them on x, which stay a group, where the kernels of all three linears stream ("outer": a CUDA GPU, 16 bit,
many rows, small ranks) and nothing else reads what lies between.
Left, each with a Miss: the reasons below. Elsewhere the two `lora_linear`s stay and nothing is said: it is not a candidate.
"""

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
DROPOUT = "gated MLP: dropout in the adapters"
TRAINED = "gated MLP: down's base weight is trained"
STATE = "gated MLP: a write or a change of autocast or grad mode between gate and down"

_PRODUCTS = (operator.mul, torch.mul)


def lora_mlp(gm: GraphModule) -> Iterator[Match | Miss]:
    segment = match.segments(gm)
    for down in list(gm.graph.nodes):
        if not _streams(down) or (found := _gate(down.args[0])) is None:
            continue
        activation, gate, up = found
        result = next(iter(down.users))
        if reason := _reason(down, gate, up, segment):
            yield Miss(reason, result)
        else:
            yield _replace(gm, down, result, activation, gate, up)


def _streams(node: object) -> bool:
    return match.is_function(node, lora_linear.op) and node.args[-2:] == ("outer", "one_read")


def _gate(product: Node) -> tuple[str, Node, Node] | None:
    """`(name of the activation, gate, up)` where `product` is act(gate) * up of one lora_linear's results."""
    product = unchanged(product)
    if not match.is_function(product, *_PRODUCTS) or len(product.all_input_nodes) != 2 or product.kwargs:
        return None
    factors = [unchanged(factor) for factor in product.args]
    for act, up in (factors, factors[::-1]):
        name = _activation(act)
        if name is None:
            continue
        gate = unchanged(act.args[0])
        of = [item.args[0] for item in (gate, up) if match.is_function(item, operator.getitem) and _streams(item.args[0])]
        if len(of) == 2 and of[0] is of[1] and gate is not up:
            return name, gate, up
    return None


def _activation(node: object) -> str | None:
    if match.is_function(node, torch.nn.functional.silu):
        return "silu"
    if match.is_function(node, torch.nn.functional.gelu):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(match.given(node, "input").get("approximate", "none"))
    return None


def _is_read(node: Node, group: Node) -> bool:
    """True where something beside `node`'s one reader reads it, or what lies between it and the group."""
    return node is not group and (len(node.users) > 1 or any(_is_read(item, group) for item in node.all_input_nodes))


def _reason(down: Node, gate: Node, up: Node, segment: dict[Node, int]) -> str | None:
    """Why this MLP is left, None where it is taken."""
    if _is_read(down.args[0], gate.args[0]):
        return READ
    if len(down.args[1]) > 1:
        return SIBLINGS
    if any(gate.args[0].args[8]) or any(down.args[8]):
        return DROPOUT
    if match.value(down.args[1][0]).requires_grad:
        return TRAINED
    return None if segment[gate.args[0]] == segment[down] else STATE


def _part(group: Node, linears: list[int]) -> list:
    """The arguments of `group` up to the scalings for some of its linears, in this order."""
    x, weights, biases, lora_a, lora_b, lora_biases, owner, scaling = group.args[:8]
    adapters = [j for linear in linears for j, of in enumerate(owner) if of == linear]
    by_linear = [[values[i] for i in linears] for values in (weights, biases)]
    by_adapter = [[values[j] for j in adapters] for values in (lora_a, lora_b, lora_biases)]
    return [x, *by_linear, *by_adapter, [linears.index(owner[j]) for j in adapters], [scaling[j] for j in adapters]]


def _replace(gm: GraphModule, down: Node, result: Node, activation: str, gate: Node, up: Node) -> Match:
    group, pair = gate.args[0], [gate.args[1], up.args[1]]
    (x, *first), (_, *second) = _part(group, pair), _part(down, [0])
    second[5] = [2] * len(second[5])  # the owners: down is the third linear
    provider = down.args[-2:]
    with gm.graph.inserting_before(down):
        call = gm.graph.call_function(kernel.op, (x, *(a + b for a, b in zip(first, second, strict=True)), activation, *provider))
    call.meta = dict(result.meta)
    result.replace_all_uses_with(call)
    match.erase_dead(result)
    if not group._erased:
        _leave_out(group, pair)
    return Match("fastft::lora_mlp", f"gated {activation}, {'+'.join(provider)}", [gate, up, result])


def _leave_out(group: Node, linears: list[int]) -> None:
    """What is left of a group whose other linears share x: parallel attention (Cohere)."""
    rest = [i for i in range(len(group.args[1])) if i not in linears]
    left = _part(group, rest)
    group.args = (*left, [0.0] * len(left[-1]), *group.args[9:])
    group.meta["example_value"] = [group.meta["example_value"][i] for i in rest]
    for item in list(group.users):
        item.args = (group, rest.index(item.args[1]))
