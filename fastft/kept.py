"""`options={"keep_dequantized": True}`: quantized weights are dequantized once, and the graph gets them as inputs.

    before   W = fastft::dequantize_4bit(packed, absmax, ...)          in the forward, and again in the backward
    after    W = fastft_kept_0                                         an input of the outermost graph

The same values for 16 bits a weight of memory: for cards with room. All graphs of a process share the tensors, which are
made again when what they are made from was written or moved, and freed with the packed weight.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from fastft import match
from fastft.deferred import stamp
from fastft.kernels.dequantize import dequantize_4bit
from fastft.report import Report
from fastft.runner import copy_graph

# packed weight -> {how it is dequantized: (state of what it is made from, the dequantized weight)}
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One call of `dequantize_4bit`; tensors are given by their position among the graph's inputs."""

    tensors: tuple[int | None, ...]
    constants: tuple
    nbytes: int

    def make(self, inputs: Sequence[Any]) -> torch.Tensor:
        """The dequantized weight, from the cache where nothing has changed."""
        given = [None if i is None else inputs[i] for i in self.tensors]
        state = [stamp(tensor) for tensor in given]
        known = _kept.setdefault(given[0], {})
        if self.constants not in known or known[self.constants][0] != state:
            known.pop(self.constants, None)  # frees the old one first
            *rest, shape, dtype = self.constants
            with torch.no_grad():
                known[self.constants] = state, dequantize_4bit(*given, *rest, list(shape), dtype)
        return known[self.constants][1]


def keep_dequantized(gm: GraphModule, example_inputs: Sequence[Any], report: Report) -> tuple[GraphModule, dict[Recipe, torch.Tensor]]:
    """Turns every dequantization of graph inputs into one more input; returns the graph, and how the inputs are made with an example each.

    The graph is a copy: Dynamo looks at the inputs of its own once more. The examples are fake tensors: a real one that
    Dynamo does not know would get symbolic sizes.

    Args:
        gm: a rewritten graph. example_inputs: its inputs. report: its rows get the provider "kept".
    Raises:
        MemoryError: the dequantized weights do not fit.
    """
    gm = copy_graph(gm)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    position = {node: i for i, node in enumerate(inputs)}
    found: dict[Recipe, list[tuple[GraphModule, Node]]] = {}
    for module in match.graph_modules(gm):
        for node in module.graph.nodes:
            if node.target is dequantize_4bit and (recipe := _recipe(node, position)):
                found.setdefault(recipe, []).append((module, node))
    _check_room(found, example_inputs)
    for number, nodes in enumerate(found.values()):
        with gm.graph.inserting_after(inputs[-1]):
            kept = gm.graph.placeholder(f"fastft_kept_{number}")
        kept.meta["example_value"] = match.value(nodes[0][1])
        inputs.append(kept)
        for module, node in nodes:
            path = match.module_path(node)
            node.replace_all_uses_with(match.bring_in(module, kept))
            module.graph.erase_node(node)
            for row in report.rewrites:
                if row.pass_name == "quant_linear" and path in row.fqn:
                    row.provider = "kept"
    for module in match.graph_modules(gm):
        module.recompile()
    return gm, {recipe: match.value(kept) for recipe, kept in zip(found, inputs[len(position) :], strict=True)}


def _recipe(node: Node, position: dict[Node, int]) -> Recipe | None:
    """How `node` is made from inputs of the outermost graph; None where it is made from something else."""
    tensors: list[int | None] = []
    for arg in node.args[:5]:
        root = match.origin(arg) if isinstance(arg, Node) else arg
        if root is not None and root not in position:
            return None
        tensors.append(None if root is None else position[root])
    blocksize, quant_type, shape, dtype = node.args[5:]
    example = match.value(node)
    return Recipe(tuple(tensors), (blocksize, quant_type, tuple(shape), dtype), example.numel() * example.element_size())


def _check_room(recipes: Collection[Recipe], example_inputs: Sequence[Any]) -> None:
    missing = [recipe for recipe in recipes if recipe.constants not in _kept.get(example_inputs[recipe.tensors[0]], {})]
    devices = {example_inputs[recipe.tensors[0]].device for recipe in missing}
    if not devices or any(device.type != "cuda" for device in devices):
        return
    needed = sum(recipe.nbytes for recipe in missing)
    free = sum(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) for device in devices)
    if needed > free:
        raise MemoryError(f"keep_dequantized needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free: leave the option out")


def with_kept(compiled: Callable[..., Any], recipes: Collection[Recipe]) -> Callable[..., Any]:
    """`compiled`, which takes the kept weights after its other inputs, as a function of the others."""
    if not recipes:
        return compiled
    return lambda *inputs: compiled(*inputs, *(recipe.make(inputs) for recipe in recipes))
