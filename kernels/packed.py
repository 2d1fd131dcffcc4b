"""`fastft::packed_mm(x, weight, tail, bias)`: the K-extended GEMM on a weight that lives in padded storage.

    [x | s] @ [W | tail]^T (+ bias)     x: [M, K + PAD], its last columns s = x A^T;  tail: [N, PAD], the scaled B

`weight` is an [N, K] view of an [N, K + PAD] buffer that fastft laid it into (fastft/packing.py). The op refreshes the
buffer's tail columns, which no tensor of the program sees, and runs one GEMM over all of it. So the low-rank term costs
PAD / K more of the GEMM instead of a pass over y: 1.015 of the frozen GEMM at 4096 -> 14336, against 1.06 for
`accumulate_mm` (FACTS: 64 extra columns beat 16, 32, 128 and 256).
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import mm_flop, register_flop_formula

from fastft.kernels.accumulate import LIBRARY

PAD = 64

LIBRARY.define("packed_mm(Tensor x, Tensor weight, Tensor tail, Tensor? bias) -> Tensor")


def _packed_mm(x: Tensor, weight: Tensor, tail: Tensor, bias: Tensor | None) -> Tensor:
    """x: [M, K + PAD], weight: [N, K], tail: [N, PAD], bias: [N] or None; returns [M, N]."""
    n, k = weight.shape
    if weight.stride() == (k + PAD, 1):
        whole = weight.as_strided((n, k + PAD), (k + PAD, 1))
        whole[:, k:].copy_(tail)
    else:  # the parameter was laid out anew since compilation: correct, with a copy
        whole = torch.cat([weight, tail], 1)
    return torch.mm(x, whole.t()) if bias is None else torch.addmm(bias, x, whole.t())


def _fake(x: Tensor, weight: Tensor, tail: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


LIBRARY.impl("packed_mm", _packed_mm, "CompositeExplicitAutograd")
torch.library.register_fake("fastft::packed_mm", _fake, lib=LIBRARY)
packed_mm = torch.ops.fastft.packed_mm.default


@register_flop_formula(torch.ops.fastft.packed_mm)
def _flops(x_shape, weight_shape, tail_shape, *rest, out_shape=None, **kwargs) -> int:
    return mm_flop(x_shape, (x_shape[1], weight_shape[0]))
