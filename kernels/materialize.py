"""`fastft::materialize(x) = x`, copied: a tensor that is computed here, once, and read from memory by all that use it.

For passes/rope_tables.py: Inductor repeats what is element-wise in every kernel that reads it.
"""

import torch
from torch import Tensor

from fastft.kernels.accumulate import LIBRARY

LIBRARY.define("materialize(Tensor x) -> Tensor")


def _copy(x: Tensor) -> Tensor:
    return x.clone()


LIBRARY.impl("materialize", _copy, "CompositeExplicitAutograd")
torch.library.register_fake("fastft::materialize", _copy, lib=LIBRARY)
materialize = torch.ops.fastft.materialize.default
