"""`fastft::block_mask`: which tiles of an attention mask are empty, partly or wholly allowed.

A mask is a text such as "(kv <= q) & t0[b, kv]": a Python expression over the indices b, q, kv and the tensors t0, t1, ... that it reads.
FlexAttention's kernels take it twice: as this op's eight lists of tiles (made once a step for all layers), and inside the partly allowed tiles.
Nothing of size q x kv is stored: Inductor evaluates the text inside the reduction that counts each tile.
"""

import ast
import functools
import operator

import torch
from torch import Tensor

from fastft.kernels.accumulate import LIBRARY

# Rows and columns of a tile: FlexAttention's own default.
BLOCK = 128

LIBRARY.define("block_mask(Tensor[] reads, str allowed, int rows_of, SymInt q_len, SymInt kv_len, Device device) -> Tensor[]")
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
    """
    batch = reads[rows_of].shape[0] if rows_of >= 0 else 1
    rows, columns = (q_len + BLOCK - 1) // BLOCK, (kv_len + BLOCK - 1) // BLOCK
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1)
    q = torch.arange(rows * BLOCK, device=device).view(1, rows, BLOCK, 1, 1)
    kv = torch.arange(columns * BLOCK, device=device).view(1, 1, 1, columns, BLOCK)
    inside = (q < q_len) & (kv < kv_len)
    inside = inside & evaluate(allowed, reads, b, q.clamp(max=q_len - 1), kv.clamp(max=kv_len - 1))
    count = inside.expand(batch, rows, BLOCK, columns, BLOCK).sum((2, 4), dtype=torch.int32).unsqueeze(1)
    whole = count == BLOCK * BLOCK
    partly = (count > 0) & ~whole
    return [*_ordered(partly), *_ordered(whole), *_ordered(partly.mT), *_ordered(whole.mT)]


def empty_rows(reads: list[Tensor], allowed: str, rows_of: int, q_len, kv_len, device: torch.device) -> Tensor:
    """bool [batch, q_len]: the queries that no key is allowed for. Arguments as in `block_mask`."""
    batch = reads[rows_of].shape[0] if rows_of >= 0 else 1
    return ~dense(allowed, reads, batch, q_len, kv_len, device)[:, 0].any(-1)


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are set, and the numbers of all tiles with the set ones first, in order."""
    numbers = torch.argsort(tiles.to(torch.int32), dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), numbers.to(torch.int32).contiguous()


LIBRARY.impl("block_mask", block_mask, "CompositeImplicitAutograd")
LIBRARY.impl("empty_rows", empty_rows, "CompositeImplicitAutograd")
op = torch.ops.fastft.block_mask.default
empty_op = torch.ops.fastft.empty_rows.default
