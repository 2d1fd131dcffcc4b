"""`fastft::lora_grads(dy, s, b) -> (dy @ b, dy^T @ s)`: both low-rank gradients of a LoRA linear.

Reference only for now.
"""

import torch
from torch import Tensor

from fastft.kernels.accumulate import LIBRARY

LIBRARY.define("lora_grads(Tensor dy, Tensor s, Tensor b) -> (Tensor, Tensor)")


def reference(dy: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return dy @ b, (dy.t() @ s).float()


LIBRARY.impl("lora_grads", reference, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastft::lora_grads",
    lambda dy, s, b: (dy.new_empty((dy.shape[0], b.shape[1])), dy.new_empty((dy.shape[1], s.shape[1]), dtype=torch.float32)),
    lib=LIBRARY,
)
lora_grads = torch.ops.fastft.lora_grads.default


def provider(device: torch.device, dtype: torch.dtype, ranks: list[int]) -> str:
    return "mm"
