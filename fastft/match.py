"""Small predicates to walk Dynamo's torch-level graph: casts, views, scalars, module paths, source lines."""

import operator
import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

LINEAR = {torch._C._nn.linear, torch.nn.functional.linear}
VIEWS = {"view", "reshape", "flatten", "contiguous", "unflatten"}
_CAST_METHODS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
_MUTATING_FUNCTIONS = {
    operator.setitem,
    operator.iadd,
    operator.imul,
    operator.isub,
    operator.itruediv,
    operator.ifloordiv,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.delitem,
}
_NAMED_LIKE_WRITES = {operator.and_, operator.or_, operator.not_, operator.is_}
# Changes the meaning of what stands between two of them: a group never spans one.
_STATE_CHANGES = {
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
    "set_stream",
}


def value(node: Node) -> torch.Tensor:
    """The fake tensor that Dynamo recorded for a node (None for what is not a tensor)."""
    return node.meta.get("example_value")


def dtype(node: Node) -> torch.dtype | None:
    example = value(node)
    return example.dtype if isinstance(example, torch.Tensor) else None


def is_function(node: object, *targets: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_method(node: object, *names: str) -> bool:
    return isinstance(node, Node) and node.op == "call_method" and node.target in names


def op_name(node: object) -> str:
    """`namespace::operation` where a registered operation is called, else nothing."""
    target = node.target if isinstance(node, Node) else None
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return str(target).replace(".", "::") if isinstance(target, torch._ops.OpOverloadPacket) else ""


def is_linear(node: object) -> bool:
    """True for `linear(x, weight[, bias])` with a 2-D weight."""
    return is_function(node, *LINEAR)


def given(node: Node, *names: str) -> dict[str, Any]:
    """The arguments that a call was given, by name: those passed by position are `names`, in order."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def linear_args(node: Node) -> tuple[Node, Node, Node | None]:
    """`(x, weight, bias or None)` of a linear call."""
    args = given(node, "input", "weight", "bias")
    return args["input"], args["weight"], args.get("bias")


def dropout_args(node: Node) -> tuple[Node, float, bool]:
    """`(x, p, training)` of a call of `torch.nn.functional.dropout`."""
    args = given(node, "input", "p", "training", "inplace")
    return args["input"], args.get("p", 0.5), args.get("training", True)


def cross_entropy_args(node: Node) -> dict[str, Any]:
    """All arguments of a call of `torch.nn.functional.cross_entropy`, by name."""
    optional = {"weight": None, "size_average": None, "ignore_index": -100, "reduce": None, "reduction": "mean", "label_smoothing": 0.0}
    return optional | given(node, "input", "target", *optional)


def is_cast(node: object) -> bool:
    """True where a node changes at most the dtype: `.to(dtype)`, `.to(other)`, `.float()`, `.type(dtype)`, ..."""
    if not isinstance(node, Node) or node.op != "call_method" or not node.args:
        return False
    if node.target not in ("to", "type", "type_as", *_CAST_METHODS):
        return False
    source, result = value(node.args[0]), value(node)
    return isinstance(source, torch.Tensor) and isinstance(result, torch.Tensor) and source.device == result.device


def strip_casts(node: Node) -> Node:
    while is_cast(node):
        node = node.args[0]
    return node


def strip_views(node: Node) -> Node:
    """The node under reshapes that keep the last dimension, and under casts."""
    while True:
        inner = strip_casts(node)
        if is_method(inner, *VIEWS) and value(inner).shape[-1:] == value(inner.args[0]).shape[-1:]:
            inner = inner.args[0]
        if inner is node:
            return node
        node = inner


def is_mutating(node: Node) -> bool:
    """True for a call that may write into one of its arguments."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return False
    if node.target in _MUTATING_FUNCTIONS or node.kwargs.get("out") is not None:
        return True
    if node.target in _NAMED_LIKE_WRITES:
        return False
    name = getattr(node.target, "__name__", "")
    return node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))


def changes_state(node: Node) -> bool:
    """True for `_set_grad_enabled`, autocast entries and the like."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _STATE_CHANGES


def autocast_dtypes(gm: GraphModule, device: str) -> dict[Node, torch.dtype | None]:
    """The dtype of the autocast that each node runs under on a type of device, None where that is off."""
    if outer := calls(gm):
        current = autocast_dtypes(outer[0].graph.owning_module, device)[outer[0]]
    else:
        current = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    found, outside = {}, {}
    for node in gm.graph.nodes:
        called = getattr(node.target, "__name__", "")
        if called == "_enter_autocast" and node.args[0] == device:
            outside[node] = current
            current = (node.args[1] or torch.get_autocast_dtype(device)) if node.args[2] else None
        elif called == "_exit_autocast" and node.args[0] in outside:
            current = outside[node.args[0]]
        found[node] = current
    return found


def segments(gm: GraphModule) -> dict[Node, int]:
    """A number for every node; nodes of one number have no write and no change of grad mode or autocast between them.

    Any write counts, whatever it goes to: which tensors share memory with its target cannot be told for certain.
    """
    numbers, current = {}, 0
    for node in gm.graph.nodes:
        numbers[node] = current
        current += changes_state(node) or is_mutating(node)
    return numbers


_HIGHER_ORDER_BODIES = {
    "tag_activation_checkpoint",
    "wrap_activation_checkpoint",
    "invoke_subgraph",
    "wrap",
    "wrap_with_set_grad_enabled",
}


# Who calls a body: each call's node.
_callers: weakref.WeakKeyDictionary[GraphModule, list[Node]] = weakref.WeakKeyDictionary()


def graph_modules(gm: GraphModule) -> Iterator[GraphModule]:
    """`gm` and the bodies of its checkpoints and regions, each once, outermost first.

    Notes who calls each body, for `outside` and `bring_in`: all calls, before the first module is given out.
    """
    found: list[GraphModule] = []
    _collect(gm, found)
    yield from found


def _collect(gm: GraphModule, found: list[GraphModule]) -> None:
    found.append(gm)
    for node in gm.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in _HIGHER_ORDER_BODIES:
            continue
        for arg in node.args:
            body = getattr(gm, arg.target, None) if isinstance(arg, Node) and arg.op == "get_attr" else None
            if not isinstance(body, GraphModule):
                continue
            if any(body is module for module in found):
                _callers[body].append(node)
            else:
                _callers[body] = [node]
                _collect(body, found)


def calls(gm: GraphModule) -> list[Node]:
    """The nodes of enclosing graphs that call a body; none for the outermost graph."""
    return _callers.get(gm, [])


def _only_call(gm: GraphModule) -> Node | None:
    found = calls(gm)
    return found[0] if len(found) == 1 else None


def outside(placeholder: Node) -> Node | None:
    """The node of the enclosing graph that a body's placeholder stands for, where the body is called once."""
    gm = placeholder.graph.owning_module
    call = None if gm is None else _only_call(gm)
    if call is None:
        return None
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    operand = call.args[len(call.args) - len(inputs) + inputs.index(placeholder)]
    return operand if isinstance(operand, Node) else None


def origin(node: Node) -> Node:
    """What a node is in the outermost graph that can hand it in: `outside` as often as there is one."""
    outer = outside(node) if node.op == "placeholder" else None
    return node if outer is None else origin(outer)


def outermost(gm: GraphModule) -> GraphModule:
    """The outermost graph that can hand something to `gm`: a body that is called more than once has none around it."""
    call = _only_call(gm)
    return gm if call is None else outermost(call.graph.owning_module)


def bring_in(gm: GraphModule, node: Node) -> Node:
    """`node`, which lives in `gm` or in a graph around it, as a node of `gm`: an input of the body is added where there is none."""
    if node.graph is gm.graph:
        return node
    call = _only_call(gm)
    inner = bring_in(call.graph.owning_module, node)
    inputs = [item for item in gm.graph.nodes if item.op == "placeholder"]
    operands = call.args[len(call.args) - len(inputs) :]
    for item, operand in zip(inputs, operands, strict=True):
        if operand is inner:
            return item
    with gm.graph.inserting_after(inputs[-1]):
        new = gm.graph.placeholder(f"fastft_{inner.name}")
    new.meta["example_value"] = value(inner)
    call.args = (*call.args, inner)
    return new


def module_path(node: Node) -> str:
    """The path of the module a node was called in, as `named_modules()` of the base model gives it.

    Dynamo writes `L['self']._modules['layers']._modules['0']` or `L['self'].layers[0]`; peft's wrapper
    (`base_model.model.`) and its inner layers (`.base_layer`, `.lora_A.default`) are cut off.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['[^']*'\]", "", path)
    path = path.replace(".__dict__['_modules']", "").replace("._modules", "")
    path = re.sub(r"\['?([^\]']*)'?\]", r".\1", path).lstrip(".")
    path = path.removeprefix("base_model.model.").removeprefix("_orig_mod.")
    return re.sub(r"\.(base_layer|lora_[A-Za-z_]+|get_base_layer\(\))(\..*)?$", "", path)


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def source_line(node: Node) -> str:
    """`file:line` of the innermost frame of the model's own code (not torch's, peft's or bitsandbytes')."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not re.search("/(torch|peft|bitsandbytes)/", frame[0])]
    if not (own or frames):
        return ""
    file, line = (own or frames)[-1]
    return f"{file.rpartition('/site-packages/')[2]}:{line}"


def erase_dead(node: Node) -> None:
    """Erases a node that nothing reads, and then those of its inputs that only it read. Writes are never erased."""
    pending = [node]
    while pending:
        node = pending.pop()
        if node._erased or node.users or node.op not in ("call_function", "call_method", "get_attr") or is_mutating(node):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        pending += inputs
