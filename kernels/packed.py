"""`fastft::packed_linears`: K-extended GEMMs on weights that live in padded storage.

    s   = x A^T                                    written into the last columns of x's own buffer
    y_i = [x | s] @ [W_i | tail_i]^T + b_i         tail_i: the scaled B matrix, in the columns of linear i's adapters

x is [M, K + PAD], its last PAD columns free to be written. A weight is an [N, K] view of an [N, K + PAD] buffer that fastft
laid it into (fastft/packing.py). The op refreshes the tail columns of both, which no other tensor of the program sees. So
the low-rank term costs PAD / K more of the GEMM instead of a pass over y: H200, 8192 rows, ms for the frozen GEMM /
K-extended / `accumulate_mm`: 4096 -> 4096 0.387/0.393/0.418, 4096 -> 14336 1.414/1.435/1.504, 2048 -> 8192
0.412/0.425/0.481. 64 extra columns beat 16, 32, 128 and 256.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import mm_flop, register_flop_formula

from fastft.kernels.accumulate import LIBRARY

PAD = 64

LIBRARY.define("packed_linears(Tensor x, Tensor low_rank, bool is_s, Tensor[] weights, Tensor[] tails, Tensor?[] biases) -> Tensor[]")


def packed_linears(x: Tensor, low_rank: Tensor, is_s: bool, weights: list[Tensor], tails: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """See the module's docstring.

    Args:
        x: [M, K + PAD]. low_rank: A [PAD, K], or s [M, PAD] itself where `is_s` (dropout).
        weights: [N_i, K]. tails: [N_i, PAD]. biases: [N_i] or None.
    Returns:
        s [M, PAD], then y_i [M, N_i].
    """
    k = weights[0].shape[1]
    s = low_rank.clone() if is_s else torch.mm(x[:, :k], low_rank.t())
    x[:, k:].copy_(s)
    outputs = [s]
    for weight, tail, bias in zip(weights, tails, biases, strict=True):
        n = weight.shape[0]
        if weight.stride() == (k + PAD, 1):
            whole = weight.as_strided((n, k + PAD), (k + PAD, 1))
            whole[:, k:].copy_(tail)
        else:  # the parameter was laid out anew since compilation: correct, with a copy
            whole = torch.cat([weight, tail], 1)
        outputs.append(torch.mm(x, whole.t()) if bias is None else torch.addmm(bias, x, whole.t()))
    return outputs


def _fake(x, low_rank, is_s, weights, tails, biases) -> list[Tensor]:
    return [x.new_empty((x.shape[0], PAD)), *(x.new_empty((x.shape[0], w.shape[0])) for w in weights)]


LIBRARY.impl("packed_linears", packed_linears, "CompositeExplicitAutograd")
torch.library.register_fake("fastft::packed_linears", _fake, lib=LIBRARY)
op = torch.ops.fastft.packed_linears.default


@register_flop_formula(torch.ops.fastft.packed_linears)
def _flops(x_shape, low_rank_shape, is_s, weight_shapes, *rest, out_shape=None, **kwargs) -> int:
    widths = [shape[0] for shape in weight_shapes] + ([] if is_s else [PAD])
    return sum(mm_flop(x_shape, (x_shape[1], n)) for n in widths)
