"""`fastft::materialize(x) = x`, copied: a contiguous tensor that is computed here, once, and read from memory by all that use it.

For passes/rope_tables.py: Inductor repeats what is element-wise in every kernel that reads it. For kernels/mask.py: it chooses strides.
"""

import torch
from torch import Tensor

from fastft.kernels.accumulate import LIBRARY

LIBRARY.define("materialize(Tensor x) -> Tensor")


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


LIBRARY.impl("materialize", _copy, "CompositeExplicitAutograd")
torch.library.register_fake("fastft::materialize", _copy, lib=LIBRARY)
materialize = torch.ops.fastft.materialize.default
