"""`fastft::block_mask`: which tiles of an attention mask are empty, partly or wholly allowed.

A mask is a text such as "(kv <= q) & t0[b, kv]": a Python expression over the indices b, q, kv and the tensors t0, t1, ... that it reads.
FlexAttention's kernels take it twice: as this op's eight lists of tiles (made once a step for all layers), and inside the partly allowed tiles.
Nothing of size q x kv is stored: Inductor evaluates the text inside the reduction that counts each tile.
"""

import ast
import functools
import math
import operator

import torch
from torch import Tensor

from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.materialize import materialize

# Rows and columns of a tile: FlexAttention's own default.
BLOCK = 128

LIBRARY.define("block_mask(Tensor[] reads, str allowed, int rows_of, SymInt q_len, SymInt kv_len, Device device) -> Tensor[]")
LIBRARY.define("keys_and_queries(Tensor[] reads, str allowed, int rows_of, SymInt length, Tensor read) -> Tensor[]")
LIBRARY.define("empty_rows(Tensor[] reads, str allowed, int rows_of, SymInt q_len, SymInt kv_len, Device device) -> Tensor")

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.LtE: operator.le,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.Invert: operator.invert,
    ast.USub: operator.neg,
}


@functools.lru_cache
def _parsed(allowed: str) -> ast.expr:
    return ast.parse(allowed, mode="eval").body


def evaluate(allowed: str, reads, b, q, kv) -> Tensor:
    """The truth of `allowed` at the given indices (integer tensors, broadcast against each other).

    `allowed` consists of b, q, kv, t0, t1, ..., numbers, `[]`, + - * // == <= & | ~ and parentheses.

    Raises:
        KeyError: something else is in it.
    """
    names = {"b": b, "q": q, "kv": kv} | {f"t{i}": tensor for i, tensor in enumerate(reads)}

    def at(node):
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](at(node.left), at(node.right))
        if isinstance(node, ast.UnaryOp):
            return _OPERATORS[type(node.op)](at(node.operand))
        if isinstance(node, ast.Compare):
            return _OPERATORS[type(node.ops[0])](at(node.left), at(node.comparators[0]))
        if isinstance(node, ast.Subscript):
            return _wide(at(node.value)[at(node.slice)])
        if isinstance(node, ast.Tuple):
            return tuple(at(item) for item in node.elts)
        if isinstance(node, ast.Constant):
            return node.value
        tensor = names[node.id]
        return _wide(tensor) if tensor.dim() == 0 else tensor

    return at(_parsed(allowed))


def _wide(x: Tensor) -> Tensor:
    """Numbers that a sum does not wrap around."""
    return x.to(torch.int32) if x.dtype in (torch.uint8, torch.int8, torch.int16) else x


def dense(allowed: str, reads, batch: int, q_len, kv_len, device: torch.device) -> Tensor:
    """bool [batch or 1, 1, q_len, kv_len]: the mask itself, for references and tests."""
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    q = torch.arange(q_len, device=device).view(1, 1, -1, 1)
    kv = torch.arange(kv_len, device=device).view(1, 1, 1, -1)
    return evaluate(allowed, reads, b, q, kv).expand(-1, 1, q_len, kv_len)


def block_mask(reads: list[Tensor], allowed: str, rows_of: int, q_len, kv_len, device: torch.device) -> list[Tensor]:
    """See the module's docstring.

    Args:
        reads: the tensors t0, t1, ... of `allowed`. rows_of: the one whose first dimension is the batch, or -1 where the mask is the same
            for every row of it.
    Returns:
        int32, in FlexAttention's order: for each row of tiles, how many are partly allowed [batch, 1, tiles of q] and which
        [batch, 1, tiles of q, tiles of kv], the same for those wholly allowed, then all four by columns.

    Four kernels of Inductor's, eight where the lengths are symbols, and copies. The first evaluates the text, and is what counts: 128 queries of one key
    are summed up, so that what the text reads of the key is read once. With padding at 4 x 2048 that takes 6.4 instructions a pair of query and key on
    sm_90; all of a tile in one sum took 32, because both places came from one index, and were clamped to lengths that are multiples of a tile.
    """
    batch = reads[rows_of].shape[0] if rows_of >= 0 else 1
    rows, columns = (q_len + BLOCK - 1) // BLOCK, (kv_len + BLOCK - 1) // BLOCK
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    q = torch.arange(rows * BLOCK, device=device).view(1, rows, BLOCK, 1)
    kv = torch.arange(columns * BLOCK, device=device).view(1, 1, 1, -1)
    if all(isinstance(length, int) and length % BLOCK == 0 for length in (q_len, kv_len)):
        inside = evaluate(allowed, reads, b, q, kv)
    else:
        inside = evaluate(allowed, reads, b, q.clamp(max=q_len - 1), kv.clamp(max=kv_len - 1)) & (q < q_len) & (kv < kv_len)
    of_keys = inside.expand(batch, rows, BLOCK, columns * BLOCK).sum(2, dtype=torch.int32).to(torch.uint8)
    count = of_keys.view(batch, rows, columns, BLOCK).sum(-1, dtype=torch.int32)
    whole = count == BLOCK * BLOCK
    partly = (count > 0) & ~whole
    kinds = [partly, whole, partly.mT, whole.mT]
    if type(rows) is type(columns) is int and rows == columns:  # symbols in a stack are too much for Inductor, 2.11 to 2.15: CantSplit
        return [x for pair in zip(*map(_lists, _ordered(torch.stack(kinds))), strict=True) for x in pair]
    return [x for kind in kinds for ordered in _ordered(kind[None]) for x in _lists(ordered)]


def _lists(stacked: Tensor) -> list[Tensor]:
    """[n, batch, ...] -> n times [batch, 1, ...], with the strides FlexAttention's kernels take for granted.

    They step from one row of the batch to the next by the stride of the dimension of heads, where that has one entry. Inductor gives such a dimension
    any stride (0, 1 and 256 seen, torch 2.11 to 2.15), and every row of the batch then attends by the tiles of the first. So the memory is written by an
    op that Inductor does not generate, and the strides are named.
    """
    made = materialize(stacked)
    shape = made.shape[1:]
    step = math.prod(shape[1:])
    strides = (step, step, *(math.prod(shape[i + 1 :]) for i in range(1, len(shape))))
    return [made.as_strided((shape[0], 1, *shape[1:]), strides, n * shape[0] * step) for n in range(made.shape[0])]


def keys_and_queries(reads: list[Tensor], allowed: str, rows_of: int, length, read: Tensor) -> list[Tensor]:
    """Two int32 [batch, length] that say which keys are seen and which queries see at all: the pairs whose numbers are equal.

    Args:
        reads, rows_of: as in `block_mask`. allowed: a text that depends on b and kv alone. read: bool [batch, length]; other queries see only where
            their own key is allowed.
    """
    batch = reads[rows_of].shape[0] if rows_of >= 0 else 1
    b, kv = torch.arange(batch, device=read.device)[:, None], torch.arange(length, device=read.device)
    keys = evaluate(allowed, reads, b, None, kv).expand(batch, length).to(torch.int32)
    # stacked: Inductor writes what goes into a stack, and would repeat it in attention's kernels otherwise, bools and all
    return list(torch.stack([keys, torch.where(read, 1, 2 - keys)]).unbind())


def empty_rows(reads: list[Tensor], allowed: str, rows_of: int, q_len, kv_len, device: torch.device) -> Tensor:
    """bool [batch, q_len]: the queries that no key is allowed for. Arguments as in `block_mask`."""
    batch = reads[rows_of].shape[0] if rows_of >= 0 else 1
    return ~dense(allowed, reads, batch, q_len, kv_len, device)[:, 0].any(-1)


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are set, and their numbers in order; behind them stands the last tile's, which FlexAttention's kernels do not use.

    The nth is behind all tiles that have no more than n set up to them. Sorting kept ptxas busy for more than two minutes (stopped) at 128 tiles, which is
    16384 tokens, in one of the forms that Inductor tries (32 rows at once by 2 warps; 12 s at 64 tiles).
    """
    size = tiles.shape[-1]
    so_far = tiles.cumsum(-1, dtype=torch.int32)
    number = (so_far[..., None, :] <= torch.arange(size, device=tiles.device)[:, None]).sum(-1, dtype=torch.int32)
    return tiles.sum(-1, dtype=torch.int32), number.clamp(max=size - 1)


LIBRARY.impl("block_mask", block_mask, "CompositeImplicitAutograd")
LIBRARY.impl("keys_and_queries", keys_and_queries, "CompositeImplicitAutograd")
LIBRARY.impl("empty_rows", empty_rows, "CompositeImplicitAutograd")
op = torch.ops.fastft.block_mask.default
tokens_op = torch.ops.fastft.keys_and_queries.default
empty_op = torch.ops.fastft.empty_rows.default
