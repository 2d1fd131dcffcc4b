"""`fastft::accumulate_mm(acc, a, b) = acc + a @ b`, the GEMM that adds into a buffer.

Functional in the joint graph; `passes/accumulate_inplace.py` turns it into `fastft::accumulate_mm_` after partitioning
wherever `acc` dies there, so that no y-sized sum is read and written again. It is an op of its own because Inductor takes
`aten.addmm` apart again when only pointwise operations read the result (`unfuse_bias_add_to_pointwise`), and copies `acc`
otherwise. The writing form returns nothing: to the result of `aten.addmm_` Inductor gives a second name, which it never
deletes, so every sum stayed alive until its graph ended (6 GiB of Llama-8B's 57 at 4 x 2048).

H200, bf16, 8192 tokens, time relative to the frozen GEMM alone: 1.06 in place, 1.13 with the copy (docs/notes.md).
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import mm_flop, register_flop_formula

from fastft import _torch

LIBRARY = torch.library.Library("fastft", "FRAGMENT")
LIBRARY.define("accumulate_mm(Tensor acc, Tensor a, Tensor b) -> Tensor")
LIBRARY.define("accumulate_mm_(Tensor(a!) acc, Tensor a, Tensor b) -> ()", tags=(torch.Tag.needs_exact_strides,))


def _reference(acc: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """acc: [M, N], a: [M, K], b: [K, N], one dtype; returns a new [M, N]. The specification."""
    return torch.addmm(acc, a, b)


def _fake(acc: Tensor, a: Tensor, b: Tensor) -> Tensor:
    torch._check(a.shape[1] == b.shape[0], lambda: f"accumulate_mm: {a.shape} @ {b.shape}")
    return acc.new_empty((a.shape[0], b.shape[1]))


def _inplace(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """As `_reference`, into `acc`."""
    acc.addmm_(a, b)


LIBRARY.impl("accumulate_mm", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("accumulate_mm_", _inplace, "CompositeExplicitAutograd")
torch.library.register_fake("fastft::accumulate_mm", _fake, lib=LIBRARY)
torch.library.register_fake("fastft::accumulate_mm_", lambda acc, a, b: None, lib=LIBRARY)

accumulate_mm = torch.ops.fastft.accumulate_mm.default
accumulate_mm_ = torch.ops.fastft.accumulate_mm_.default


def _call(node, writeline) -> None:
    """In Inductor's Python code the method itself: without the dispatcher and `_inplace` a call takes the host 2 us instead of 6."""
    writeline(f"torch.Tensor.addmm_({', '.join(node.codegen_args())})")


_torch.CUSTOM_EXTERN_KERNEL_CODEGEN["torch.ops.fastft.accumulate_mm_.default"] = _torch.CustomCodegen(python=_call)


@register_flop_formula(torch.ops.fastft.accumulate_mm)
def _flops(acc_shape, a_shape, b_shape, out_shape=None, **kwargs) -> int:
    return mm_flop(a_shape, b_shape)
