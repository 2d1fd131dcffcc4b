"""rope: finds every application of rotary position embedding to a query or a key. The graph stays as it is.

    before, after    x1, x2 = x[..., :h], x[..., h:]
                     rotated = x * cos + cat((-x2, x1), -1) * sin        Match("rope", "inductor", [rotated])

Inductor's own kernels for it are as good as hand-written ones: the match is for the report and for the memory planner. Its node
is the rotated tensor after the cast back, joined with the part that is passed on. The provider is "inductor, after q/k norm"
where x comes out of a norm, reshaped or not.

Matched by what is computed: the entries of x's last dimension are followed, each with its sign, through slices, cat, stack,
views and products; the result has to be, entry by entry, `x[i] * cos -+ x[j] * sin` in pairs that turn a plane, or an x[i].
Taken so: halves (Llama), halves written as two sums (gpt-oss), even and odd entries (GPT-J, Cohere), even and odd entries that
come out as halves (DeepSeek-V3), complex numbers (Llama 4, DeepSeek-V2), a part of x (Phi-3, GPT-NeoX), either sense.
cos and sin are of one angle, `polar` of an angle, or two inputs (of a checkpoint's body; parts of a table, as in GPT-J); cast,
scaled by a number (YaRN), repeated, sliced.
Left, with a Miss: a tensor multiplied with the cos of something, or with `polar`, in any other way.

There is no cos to merge: no causal LM of transformers 5.23 computes one twice from one buffer (Moshi and DeepSeek-V4's indexer
compute one in each layer, from a buffer of the layer), and AOTAutograd merges equal chains anyway.
"""

import heapq
import math
import operator
from collections.abc import Container

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fastft import match
from fastft.match import is_cast, is_function, value
from fastft.result import Match, Miss

NOT_ROTARY = "product with a cosine that is not rotary"
PLAIN, NORMED = "inductor", "inductor, after q/k norm"

# What moves the entries of a tensor, or changes their sign.
_JOIN = {torch.cat, torch.concat, torch.stack}
_PARTS = {torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind"}
_NEG = {operator.neg, torch.neg, "neg"}
_SUB = {operator.sub, torch.sub, "sub"}
_RESHAPE = {torch.reshape, torch.flatten, torch.unflatten, "reshape_as", "view_as", *match.VIEWS}
_COMPLEX = {torch.view_as_complex, torch.view_as_real}
_COSINE, _SINE = {torch.cos, "cos"}, {torch.sin, "sin"}
_TRANSPOSE = {torch.transpose, torch.permute, "transpose", "permute"}
# What cos and sin go through on the way to the product, in their first argument.
_SPREAD = {"unsqueeze", "squeeze", "expand", "expand_as", "repeat", "repeat_interleave", "index_select", "gather", "to"}
_SPREAD |= {torch.unsqueeze, torch.repeat_interleave, torch.index_select, torch.gather, operator.getitem, *_NEG, *_RESHAPE, *_TRANSPOSE}

Factor = tuple[Node, str]  # "cos", "sin" or "polar" of a node, or an "input"
Lanes = torch.Tensor  # for each entry of the last dimensions: i for x[i - 1], -i for its negative, 0 for none
Form = dict[Factor | None, Lanes]  # a node as a function of x: the sum of these, each times its factor
Forms = dict[Node, Form | list[Form]]  # a list for chunk, split, unbind


def rope(gm: GraphModule) -> list[Match | Miss]:
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    found, misses = {}, []
    for x, product in _candidates(gm).items():
        rotated = _rotations(x, position)
        found |= dict.fromkeys(rotated, NORMED if rotated and _is_norm(x) else PLAIN)
        if product is not None and not rotated:
            misses.append(Miss(NOT_ROTARY, product))
    return [Match("rope", found[node], [node]) for node in sorted(found, key=position.get)] + misses


def _is(node: object, targets: Container) -> bool:
    """True for a call of one of these, its first argument given by position."""
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and bool(node.args) and node.target in targets


def _is_tensor(node: object) -> bool:
    return isinstance(node, Node) and isinstance(value(node), torch.Tensor)


def _candidates(gm: GraphModule) -> dict[Node, Node | None]:
    """Every x of which some slice is multiplied with what may be cos or sin, and its first product with a certain cos."""
    found: dict[Node, Node | None] = {}
    for node in gm.graph.nodes:
        if not is_function(node, operator.mul):
            continue
        for tensor, other in (node.args, node.args[::-1]):
            factor = _factor(other)
            if factor is not None and _is_tensor(tensor):
                x = _under_slices(tensor)
                found[x] = found.get(x) or (node if factor[1] in ("cos", "polar") else None)
    return found


def _under_slices(node: Node) -> Node:
    """The node under slices of the last dimension, reshapes and casts."""
    while True:
        if is_cast(node) or _is(node, _COMPLEX) or _slices_last(node) or _keeps_last(node):
            node = node.args[0]
        elif is_function(node, operator.getitem) and _slices_last(node.args[0]):
            node = node.args[0].args[0]
        else:
            return node


def _slices_last(node: Node) -> bool:
    """True for a slice, an index or a split of the last dimension alone."""
    if _is(node, _PARTS):
        names = ("input", "dim") if node.target in (torch.unbind, "unbind") else ("input", "size", "dim")
        return match.given(node, *names).get("dim", 0) in (-1, value(node.args[0]).dim() - 1)
    if not is_function(node, operator.getitem) or not _is_tensor(node.args[0]) or not isinstance(node.args[1], tuple):
        return False
    *others, last = node.args[1]
    whole = others == [Ellipsis] or others == [slice(None)] * (value(node.args[0]).dim() - 1)
    return whole and isinstance(last, int | slice)


def _keeps_last(node: Node) -> bool:
    """True for a reshape that at most splits the last dimension of its input."""
    return _is(node, _RESHAPE) and _reshaped(node, math.prod(value(node.args[0]).shape[-1:])) is not None


def _reshaped(node: Node, entries: int) -> torch.Size | None:
    """As many of a reshape's last dimensions as hold the entries that were last in its input."""
    sizes = value(node).shape
    for start in range(len(sizes) - 1, -1, -1):
        if all(isinstance(size, int) for size in sizes[start:]) and math.prod(sizes[start:]) == entries:
            return sizes[start:]
    return None


def _factor(node: object) -> Factor | None:
    """What a factor of a product holds the entries of, where that can be cos or sin."""
    if not isinstance(node, Node):
        return None
    if _is(node, _COSINE | _SINE):
        return node.args[0], "cos" if node.target in _COSINE else "sin"
    if is_function(node, torch.polar):
        return node, "polar"
    if node.op in ("placeholder", "get_attr"):
        return node, "input"
    if _is(node, _JOIN) and isinstance(node.args[0], list | tuple):
        held = {_factor(item) for item in node.args[0]}
        return held.pop() if len(held) == 1 else None
    if is_function(node, operator.getitem) and _is(node.args[0], _PARTS):
        held = _factor(node.args[0].args[0])
        return (node, "input") if held and held[1] == "input" else held
    if is_function(node, torch.nn.functional.embedding) and len(node.args) > 1:
        return _factor(node.args[1])
    if is_function(node, operator.mul):
        tensors = [arg for arg in node.args if _is_tensor(arg)]
        return _factor(tensors[0]) if len(tensors) == 1 else None
    return _factor(node.args[0]) if is_cast(node) or _is(node, _SPREAD) else None


def _rotations(x: Node, position: dict[Node, int]) -> list[Node]:
    """The nodes that hold a rotated x, with all that is passed on."""
    size = value(x).shape[-1:]
    if not (size and isinstance(size[0], int)):
        return []
    forms: Forms = {x: {None: torch.arange(1, size[0] + 1, device="cpu")}}
    rotated: dict[Node, bool] = {}  # False where a later node holds all of it
    pending = [(position[user], user) for user in x.users]
    heapq.heapify(pending)
    while pending:
        _, node = heapq.heappop(pending)
        form = None if node in forms else _form(node, forms)
        if form is None:
            continue
        if isinstance(form, dict) and _is_rotation(form) and not value(node).is_complex():
            inner = [item for item in node.all_input_nodes if item in rotated]
            if inner and not (_is(node, _JOIN) or _casts_back(node, inner[0], x)) and _shape(form) == _shape(forms[inner[0]]):
                continue  # a cast, view or slice for what comes after
            rotated |= dict.fromkeys(inner, False) | {node: True}
        forms[node] = form
        for user in node.users:
            heapq.heappush(pending, (position[user], user))
    return [node for node, last in rotated.items() if last]


def _casts_back(cast: Node, rotated: Node, x: Node) -> bool:
    """True for the cast back to x's dtype."""
    return is_cast(cast) and match.dtype(cast) == match.dtype(x) != match.dtype(rotated)


def _shape(form: Form) -> torch.Size:
    return next(iter(form.values())).shape


def _form(node: Node, forms: Forms) -> Form | list[Form] | None:
    """What a node is as a function of x; None where it is not one of the kind that is followed."""
    if is_function(node, operator.mul):
        return _product(node, forms)
    if is_function(node, operator.add) or _is(node, _SUB):
        return _sum(node, forms)
    if is_function(node, operator.getitem) and isinstance(forms.get(node.args[0]), list):
        return forms[node.args[0]][node.args[1]]
    if is_cast(node) or _is(node, _COMPLEX):
        return forms.get(node.args[0])  # a complex entry stays two lanes
    if not (_is(node, _JOIN) or _is(node, _NEG) or _is(node, _RESHAPE) or _slices_last(node)):
        return None
    tensors = node.args[:1] if _is(node, _RESHAPE) else node.all_input_nodes
    given = {item: forms.get(item) for item in tensors}
    if not all(isinstance(form, dict) and not value(item).is_complex() for item, form in given.items()):
        return None
    moved = {key: _moved(node, given, key) for key in dict.fromkeys(key for form in given.values() for key in form)}
    if any(lanes is None for lanes in moved.values()):
        return None
    if _is(node, _PARTS):
        return [dict(zip(moved, part, strict=True)) for part in zip(*moved.values(), strict=True)]
    return moved


def _moved(node: Node, given: dict[Node, Form], key: Factor | None) -> Lanes | list[Lanes] | None:
    """Does to the lanes of one factor what the node does to the tensors."""
    if _is(node, _RESHAPE):
        lanes = given[node.args[0]][key]
        shape = _reshaped(node, lanes.numel())
        return None if shape is None else lanes.reshape(shape)

    def lanes_of(item: Node) -> Lanes:
        shape = _shape(given[item])
        lanes = given[item].get(key, torch.zeros(shape, dtype=torch.int64, device="cpu"))
        return lanes.reshape((1,) * (value(item).dim() - len(shape)) + shape)

    args, kwargs = map_arg((node.args, node.kwargs), lanes_of)
    result = getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)
    several = not isinstance(result, torch.Tensor)
    batch = min(value(item).dim() - len(_shape(form)) for item, form in given.items())
    lanes = [part.reshape(part.shape[batch:]) for part in (result if several else [result])]
    examples = value(node) if several else [value(node)]
    if any(part.shape != example.shape[batch:] for part, example in zip(lanes, examples, strict=True)):
        return None
    return lanes if several else lanes[0]


def _product(node: Node, forms: Forms) -> Form | None:
    for tensor, other in (node.args, node.args[::-1]):
        form, factor = forms.get(tensor) if isinstance(tensor, Node) else None, _factor(other)
        if factor is None or not isinstance(form, dict) or set(form) != {None} or value(tensor).shape[-1:] != value(node).shape[-1:]:
            continue
        if not value(node).is_complex():
            return {factor: form[None]}
        if value(tensor).is_complex():
            real, imaginary = form[None].unbind(-1)
            return {(factor[0], "cos"): form[None], (factor[0], "sin"): torch.stack((-imaginary, real), -1)}
    return None


def _sum(node: Node, forms: Forms) -> Form | None:
    given = [forms.get(arg) for arg in node.args if isinstance(arg, Node)]
    if len(given) != 2 or node.kwargs or not all(isinstance(form, dict) for form in given):
        return None
    one, other = given
    if _shape(one) != _shape(other) or one.keys() & other.keys():
        return None
    return one | {key: -lanes if _is(node, _SUB) else lanes for key, lanes in other.items()}


def _is_rotation(form: Form) -> bool:
    """True where every entry is one of x, or belongs to a pair `x[i] * cos - x[j] * sin`, `x[j] * cos + x[i] * sin`."""
    factors = sorted((key for key in form if key is not None), key=lambda factor: factor[1])
    if len(factors) != 2:
        return False
    (one, first), (other, second) = factors
    if not (first == second == "input" or (first, second) == ("cos", "sin") and one is other):
        return False
    orders = [factors, factors[::-1]] if first == "input" else [factors]
    return any(_turns(form[cos].flatten(), form[sin].flatten(), form.get(None)) for cos, sin in orders)


def _turns(cos: Lanes, sin: Lanes, kept: Lanes | None) -> bool:
    turned = cos != 0
    alone = torch.zeros_like(turned) if kept is None else kept.flatten() != 0
    if not turned.any() or not torch.equal(turned, sin != 0) or not torch.equal(turned, ~alone):
        return False
    cos, sin = cos[turned], sin[turned]
    partner = torch.zeros(int(torch.cat((cos, sin)).abs().max()) + 1, dtype=torch.int64, device="cpu")
    partner[cos.abs()] = sin
    return bool((cos > 0).all() and torch.equal(partner[sin.abs()] * sin.sign(), -cos))


def _is_norm(node: Node) -> bool:
    """True for the output of a layer or RMS norm, in one call or written out: a product with `rsqrt`, a weight, a bias."""
    while _is(node := _under_slices(node), _TRANSPOSE):
        node = node.args[0]
    if is_function(node, torch.nn.functional.layer_norm, torch.nn.functional.rms_norm, torch.rms_norm):
        return True
    return is_function(node, operator.mul, operator.add) and any(_is_rsqrt(arg) or _is_norm(arg) for arg in node.args if isinstance(arg, Node))


def _is_rsqrt(node: Node) -> bool:
    return _is(node, {torch.rsqrt, "rsqrt"}) or (_is(node, {torch.pow, operator.pow, "pow"}) and node.args[1] == -0.5)
