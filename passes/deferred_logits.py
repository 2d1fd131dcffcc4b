"""Logits that a graph returns beside the loss made of them: a recipe that makes them of the hidden state when somebody reads them (fastft/deferred.py).

Of a head in 4 bits the recipe reads the packed weight and its statistics, and dequantizes each time it runs.
"""

import torch
from torch.fx import Graph, GraphModule, Node

from fastft import match
from fastft.deferred import LOGITS, PLANS, Plan
from fastft.kernels.dequantize import dequantize_4bit
from fastft.match import value
from fastft.passes.cross_entropy_head import Chain, Head, tensor_of, walk
from fastft.passes.labels import are_written, writes

OFF = "logits are materialized: deferring them is turned off"  # why: Report.logits
MOVED = "logits are materialized: other rows are returned than the hidden state has"
MORE = "logits are materialized: more than the hidden state and inputs of the graph goes into them"
WRITTEN = "logits are materialized: the hidden state or an input that makes them is written to"


def output_of(gm: GraphModule) -> Node:
    return next(node for node in reversed(gm.graph.nodes) if node.op == "output")


def returned(gm: GraphModule, head: Head) -> dict[int, Chain]:
    """Which outputs of the graph are logits of this head, scaled, capped or cast."""
    found = {}
    for index, item in enumerate(output_of(gm).args[0]):
        if isinstance(item, Node) and isinstance(value(item), torch.Tensor) and value(item).dim() > 1:
            chain = walk(item, value(item).dim() - 1)
            if isinstance(chain, Chain) and chain.head == head:
                found[index] = chain
    return found


def defer(gm: GraphModule, chains: dict[int, Chain]) -> list[Plan] | str:
    """A plan for every output, or the reason why they are made in the graph."""
    if chains and gm.meta.get(LOGITS) == "materialize":
        return OFF
    plans = []
    for index, chain in chains.items():
        plan = _plan(gm, index, chain)
        if isinstance(plan, str):
            return plan
        plans.append(plan)
    return plans


def carry_out(gm: GraphModule, plans: list[Plan], held: Node) -> None:
    """The graph returns `held` in place of the logits."""
    output = output_of(gm)
    items = list(output.args[0])
    gone = [items[plan.output] for plan in plans]
    for plan in plans:
        items[plan.output] = held
    output.args = (tuple(items),)
    for item in gone:
        match.erase_dead(item)
    gm.meta[PLANS] = [*gm.meta.get(PLANS, ()), *plans]


def _plan(gm: GraphModule, index: int, chain: Chain) -> Plan | str:
    head, item = chain.head, chain.nodes[-1]
    if chain.moves() or value(item).shape[:-1] != value(head.x).shape[:-1]:
        return MOVED
    given = [head.weight, head.bias, *(tensor for *tensors, _ in head.adapters for tensor in tensors)]
    made: set[Node] = {head.first}
    sources: set[Node] = set()
    if not all(node is None or _collect(node, made, sources) for node in given):
        return MORE
    output = output_of(gm)
    if are_written({head.x}, writes(head.first, output)) or are_written(sources, writes(min(made), output)):  # nodes compare by their place in the graph
        return WRITTEN
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = [node for node in placeholders if node in sources]
    graph = _recipe(chain, inputs)
    return Plan(index, GraphModule(torch.nn.Module(), graph), tuple(map(placeholders.index, inputs)), head.vocabulary, match.dtype(item))


def _collect(node: Node, made: set[Node], sources: set[Node]) -> bool:
    """Adds the graph's inputs that `node` is a cast, transpose, detached alias or dequantization of, and what is made on the way; False where it is more."""
    if node.op == "placeholder":
        sources.add(node)
        return True
    made.add(node)
    form = match.is_cast(node) or match.is_method(node, "t", "transpose", "detach") or match.is_function(node, torch.t, torch.transpose)
    same = form and len(node.all_input_nodes) == 1 or node.target is dequantize_4bit
    return same and all(_collect(item, made, sources) for item in node.all_input_nodes)


def _recipe(chain: Chain, inputs: list[Node]) -> Graph:
    """The logits as a function of the hidden state and `inputs`, whatever autocast says when it runs: casts are written out."""
    graph, head = Graph(), chain.head
    held = graph.placeholder("held")
    known = {node: graph.placeholder(node.name) for node in inputs}

    def bring(node: Node | None) -> Node | None:
        if node is None or node in known:
            return known.get(node)
        known[node] = graph.node_copy(node, bring)
        return known[node]

    def as_head(node: Node, made: Node) -> Node:
        dtype = match.dtype(head.node)
        return made if match.dtype(node) == dtype else graph.call_method("to", (made, dtype))

    x = as_head(head.x, held)
    if head.adapters:
        known[head.x] = x  # the op casts the others to the dtype of x
        logits = bring(head.node)
    else:
        weight = as_head(head.weight, bring(head.weight))
        weight = graph.call_method("t", (weight,)) if head.transposed else weight
        bias = None if head.bias is None else graph.call_method("reshape", (as_head(head.bias, bring(head.bias)), -1))
        logits = graph.call_function(torch.nn.functional.linear, (x, weight, bias))
    for kind, node in chain.steps:
        if kind == "cast":
            logits = graph.call_method("to", (logits, match.dtype(node)))
        elif kind in ("number", "tanh"):
            known[tensor_of(node)] = logits
            logits = graph.node_copy(node, bring)
    if not value(chain.nodes[-1]).requires_grad:
        logits = graph.call_method("detach", (logits,))
    graph.output(logits)
    for node in graph.nodes:
        node.meta = {}
    return graph
