"""Where tokens meet outside of attention: convolutions, recurrences, linear attention, reductions over the sequence."""

import re
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.match import is_function, value
from fastft.passes.attention_pattern import SDPA

# Names of what may carry one token's values to another, beside products of two activations.
_MIXING = re.compile(r"conv\d?d?|einsum|cumsum|cumprod|logcumsumexp|roll|flip|fft|scan|bmm|baddbmm|pad|pool|interpolate")


def mixing(gm: GraphModule, rows: tuple) -> Iterator[Node]:
    """The nodes, bodies included, that may carry one token's values to another, other than `fastft::attention`.

    Products of two activations, what is named above, operations of libraries not known, and results that have lost the tokens.
    rows: (batch, length) of the tokens.
    """
    active: set[Node] = set()
    for body in match.graph_modules(gm):
        for node in body.graph.nodes:
            example = value(node)
            if node.op == "placeholder":
                source = match.origin(node)
                if source in active or source is node and _is_activation(example):
                    active.add(node)
                continue
            inputs = [item for item in node.all_input_nodes if item in active]
            name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
            if not inputs and name != "embedding" or node.op == "output" or isinstance(example, torch.Tensor) and not example.is_floating_point():
                continue
            active.add(node)
            foreign = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "fastft", "bitsandbytes")
            two = name in ("matmul", "__matmul__") and len(inputs) > 1 and all(value(item).dim() > 2 for item in inputs)
            lost = (
                isinstance(example, torch.Tensor)
                and not _tokens(example, rows)
                and any(isinstance(value(i), torch.Tensor) and _tokens(value(i), rows) for i in inputs)
            )
            if node.target in SDPA or _MIXING.fullmatch(name) or foreign or two or lost and not is_function(node, torch.nn.functional.cross_entropy):
                yield node


def _is_activation(example: object) -> bool:
    """True for a floating-point tensor that is no parameter."""
    return isinstance(example, torch.Tensor) and example.is_floating_point() and not isinstance(example, torch.nn.Parameter)


def _tokens(example: torch.Tensor, rows: tuple) -> bool:
    """True where some dimension holds the tokens, or several entries for each."""
    length = rows[1]
    return any(size % length == 0 if isinstance(size, int) and isinstance(length, int) else str(length) in str(size) for size in example.shape)
