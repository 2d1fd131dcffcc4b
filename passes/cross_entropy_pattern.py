"""Finds what computes a cross-entropy over a vocabulary in Dynamo's graph, for passes/linear_cross_entropy.py.

Taken:
    cross_entropy(scores, labels), nll_loss(log_softmax(scores), labels)
    gather(log_softmax(scores), -1, labels)             log-probabilities: minus the loss of each row
    gather(scores, -1, labels) - logsumexp(scores, -1)  the same; both also row by row of the batch and stacked, as TRL writes them
    cross_entropy(scores, labels) + coefficient * (counts * logsumexp(scores, -1) ** 2).sum() / counts.sum()    counts = labels != ignore_index;
                                                        with reduction="sum" without the quotient
"""

import dataclasses
import operator

import torch
from torch.fx import GraphModule, Node

from fastft import match
from fastft.match import is_function, is_method, value
from fastft.passes.cross_entropy_head import Chain, is_language, walk
from fastft.passes.labels import writes
from fastft.result import Miss

CLASS_WEIGHTS = "loss with class weights"
PROBABILITIES = "labels are probabilities"
ARGUMENTS = "loss with deprecated or symbolic arguments"

_SUB = {operator.sub, torch.sub, "sub"}


@dataclasses.dataclass
class Loss:
    """A loss of `chain`'s scores; `anchor` holds it, `between` are the nodes that read the scores on its behalf."""

    anchor: Node
    chain: Chain
    labels: Node
    between: set[Node]
    ignore_index: int = -100
    reduction: str = "none"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    log_probabilities: bool = False  # the anchor is minus the loss, perhaps with one more dimension of size 1


def find(gm: GraphModule) -> list[Loss | Miss]:
    found: list[Loss | Miss] = []
    taken: set[Node] = set()
    for node in reversed(gm.graph.nodes):  # what is made of several comes before its parts
        if node in taken or node.op not in ("call_function", "call_method"):
            continue
        if is_function(node, torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss):
            result = _reduced(node)
        else:
            result = _selected(node)
        if isinstance(result, Loss):
            taken |= result.between
        if result is not None:
            found.insert(0, result)
    return found


def _reduced(node: Node) -> Loss | Miss | None:
    """`cross_entropy`, or `nll_loss` of a `log_softmax`."""
    nll = node.target is torch.nn.functional.nll_loss
    args = match.cross_entropy_args(node)  # nll_loss lacks the last of them
    scores, target = args["input"], args["target"]
    if value(scores).dim() < 2:
        return None
    chain = walk(scores, 1, log_softmax=nll)
    if not isinstance(chain, Chain):
        reason, end = chain
        return Miss(reason, node) if isinstance(value(end), torch.Tensor) and value(end).dim() > 2 else None
    if not is_language(chain.head):
        return None
    if args["weight"] is not None:
        return Miss(CLASS_WEIGHTS, node)
    if value(target).is_floating_point():
        return Miss(PROBABILITIES, node)
    numbers = type(args["ignore_index"]) is int and isinstance(args["label_smoothing"], int | float) and value(target).dtype == torch.int64
    if not numbers or args["size_average"] is not None or args["reduce"] is not None:
        return Miss(ARGUMENTS, node)
    return Loss(node, chain, target, {node}, args["ignore_index"], args["reduction"], float(args["label_smoothing"]))


def _selected(node: Node) -> Loss | None:
    """Log-probabilities of chosen entries, the whole of what is gathered."""
    if _calls(node, *_SUB) and len(node.args) == 2 and not node.kwargs:
        return _difference(node)
    if _calls(node, torch.stack):
        return _by_rows(node)
    gathered = _gathered(node)
    if gathered is None:
        return None
    scores, index = gathered
    return _log_probabilities(node, walk(scores, value(scores).dim() - 1, log_softmax=True), index, {node})


def _difference(node: Node) -> Loss | None:
    """`gather(scores) - logsumexp(scores)`, both as long."""
    left, right = node.args
    if not all(isinstance(item, Node) and isinstance(value(item), torch.Tensor) and value(item).shape == value(node).shape for item in (left, right)):
        return None
    chosen, total = _without_last_one(left), _without_last_one(right)
    gathered = _gathered(chosen[-1])
    if gathered is None:
        return None
    scores, index = gathered
    between = {node, *chosen, *total}
    rows = _rows(total[-1])
    if rows is None:
        if _log_sum_exp(total[-1]) is not scores:
            return None
    else:
        sums = [_log_sum_exp(row) for row in rows]
        if not _are_rows(sums, scores):
            return None
        between |= {*rows, *sums}
    return _log_probabilities(node, walk(scores, value(scores).dim() - 1), index, between)


def _by_rows(node: Node) -> Loss | None:
    """`stack([gather(log_softmax(scores[i]), -1, index[i]) for i in ...])`, as long as the scores."""
    rows = _rows(node)
    gathered = [_gathered(row) for row in rows or ()]
    if not gathered or None in gathered:
        return None
    soft = [scores for scores, _ in gathered]
    if not all(_calls(item, torch.nn.functional.log_softmax, torch.log_softmax, "log_softmax") and _dim(item) == value(item).dim() - 1 for item in soft):
        return None
    scores, indices = [item.args[0] for item in soft], [index for _, index in gathered]
    if not (_are_rows(scores, whole := _whole(scores[0])) and _are_rows(indices, index := _whole(indices[0]))):
        return None
    if any(match.dtype(item) != match.dtype(whole) for item in soft):
        return None
    return _log_probabilities(node, walk(whole, value(whole).dim() - 1), index, {node, *rows, *soft, *scores})


def _log_probabilities(node: Node, chain: Chain | tuple, index: Node, between: set[Node]) -> Loss | None:
    """Nothing where this is no head of a language model: routers and beam searches gather too."""
    if not isinstance(chain, Chain) or not is_language(chain.head):
        return None
    labels = _without_last_one(index)[-1]
    return Loss(node, chain, labels, between, log_probabilities=True)


def _calls(node: object, *targets: object) -> bool:
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in targets


def _dim(node: Node) -> int | None:
    """The dimension that a softmax, logsumexp or gather goes along, counted from the front."""
    given = match.given(node, "input", "dim")
    dim, source = given.get("dim"), given.get("input")
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    return dim % value(source).dim() if type(dim) is int and isinstance(source, Node) else None


def _gathered(node: Node) -> tuple[Node, Node] | None:
    """`(scores, index)` of a gather of one entry of the last dimension for every row."""
    if not _calls(node, torch.gather, "gather"):
        return None
    given = match.given(node, "input", "dim", "index")
    scores, index = given.get("input"), given.get("index")
    if not (isinstance(scores, Node) and isinstance(index, Node)) or _dim(node) != value(scores).dim() - 1 or value(index).dtype != torch.int64:
        return None
    return (scores, index) if value(index).shape == (*value(scores).shape[:-1], 1) else None


def _log_sum_exp(node: Node) -> Node | None:
    """What a `logsumexp` over the last dimension reads."""
    return node.args[0] if _calls(node, torch.logsumexp, "logsumexp") and node.args and _dim(node) == value(node.args[0]).dim() - 1 else None


def _without_last_one(node: Node) -> list[Node]:
    """The nodes up to the one without a last dimension of size 1 added or removed."""
    found = [node]
    while _calls(node, torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze") and node.args[1:] and not node.kwargs:
        wide = value(node) if node.target in (torch.unsqueeze, "unsqueeze") else value(node.args[0])
        if node.args[1] not in (-1, wide.dim() - 1) or wide.shape[-1] != 1:
            break
        node = node.args[0]
        found.append(node)
    return found


def _rows(node: Node) -> list[Node] | None:
    """What is stacked along a new first dimension."""
    if not _calls(node, torch.stack) or not isinstance(node.args[0], list | tuple) or match.given(node, "tensors", "dim").get("dim", 0) != 0:
        return None
    return list(node.args[0]) or None


def _whole(row: Node) -> Node | None:
    return row.args[0] if is_function(row, operator.getitem) and isinstance(row.args[0], Node) else None


def _are_rows(nodes: list[Node | None], whole: Node | None) -> bool:
    """True where the nodes are `whole[0]`, `whole[1]`, ..., all of them."""
    if whole is None or value(whole).shape[0] != len(nodes):
        return False
    return all(is_function(node, operator.getitem) and node.args == (whole, i) for i, node in enumerate(nodes))


def z_loss(loss: Loss) -> Loss:
    """The loss with the z-loss that is added to it, where that counts the same rows; else the loss as it is."""
    sums = [user for user in loss.anchor.users if is_function(user, operator.add)]
    if len(sums) != 1 or len(loss.anchor.users) != 1 or loss.reduction == "none":
        return loss
    (total,) = sums
    if writes(next(iter(total.graph.nodes)), total):
        return loss
    term = total.args[1] if total.args[0] is loss.anchor else total.args[0]
    coefficient, path = 1.0, [total, term]
    while is_function(term, operator.mul) and any(isinstance(arg, int | float) for arg in term.args):
        number, term = sorted(term.args, key=lambda arg: isinstance(arg, Node))
        coefficient *= number
        path.append(term)
    if loss.reduction == "mean":
        if not is_function(term, operator.truediv) or not _is_sum(term.args[1]) or not _counts(term.args[1].args[0], loss):
            return loss
        term = term.args[0]
        path.append(term)
    product = term.args[0] if _is_sum(term) else None
    if not is_function(product, operator.mul) or not all(isinstance(arg, Node) for arg in product.args) or coefficient < 0:
        return loss
    for square, mask in (product.args, product.args[::-1]):
        root = _squared(square)
        scores = None if root is None else _log_sum_exp(root)
        if scores is None or not _counts(mask, loss) or value(mask).shape != value(root).shape:
            continue
        chain = walk(scores, value(scores).dim() - 1)
        if isinstance(chain, Chain) and _same_rows(chain, loss.chain):
            between = loss.between.union(path, (product, square, root), chain.nodes)
            return dataclasses.replace(loss, anchor=total, between=between, z_loss=coefficient)
    return loss


def _same_rows(one: Chain, other: Chain) -> bool:
    """True for the same scores, in the same order."""
    shared = next((i for i, steps in enumerate(zip(one.steps, other.steps, strict=False)) if steps[0] != steps[1]), min(len(one.steps), len(other.steps)))
    same = (one.head, one.scale, one.softcap) == (other.head, other.scale, other.softcap)
    return same and not one.moves(shared) and not other.moves(shared)


def _is_sum(node: object) -> bool:
    return _calls(node, torch.sum, "sum") and len(node.args) == 1 and not node.kwargs


def _squared(node: Node) -> Node | None:
    if _calls(node, torch.square, "square"):
        return node.args[0]
    if _calls(node, torch.pow, operator.pow, "pow") and len(node.args) == 2 and node.args[1] == 2:
        return node.args[0]
    return node.args[0] if is_function(node, operator.mul) and node.args[0] is node.args[1] else None


def _counts(mask: Node, loss: Loss) -> bool:
    """True for `labels != ignore_index`, cast or not, of the loss's labels in the same order."""
    mask = match.strip_casts(mask)
    return _calls(mask, operator.ne, torch.ne, "ne") and mask.args[1:] == (loss.ignore_index,) and _same(_in_order(mask.args[0]), _in_order(loss.labels))


def _same(one: object, other: object) -> bool:
    """True for one node, and for the same slices and paddings of one node."""
    if one is other or not (_calls(one, operator.getitem, torch.nn.functional.pad) and _calls(other, one.target)):
        return one is other
    return _same(_in_order(one.args[0]), _in_order(other.args[0])) and (one.args[1:], one.kwargs) == (other.args[1:], other.kwargs)


def _in_order(node: Node) -> Node:
    """The labels under reshapes and casts."""
    while match.is_cast(node) or is_method(node, "view", "reshape", "flatten", "contiguous"):
        node = node.args[0]
    return node
