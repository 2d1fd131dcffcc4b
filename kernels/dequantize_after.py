"""`fastft::dequantize_4bit_after(..., Tensor after)`: `dequantize_4bit` that waits for `after`, whose values it does not read.

For passes/dequantize_late.py: Inductor's scheduler knows no other order than what an operation reads. flexible_layout: no copy
of `after` in another layout.
"""

import torch
from torch import Tensor

from fastft.kernels import dequantize, warmup
from fastft.kernels.accumulate import LIBRARY

LIBRARY.define(
    "dequantize_4bit_after(Tensor packed, Tensor absmax, Tensor? absmax_8bit, Tensor? absmax_code, Tensor? absmax_offset, "
    "int blocksize, str quant_type, int[] shape, ScalarType dtype, Tensor after) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)


def _dequantize(*args) -> Tensor:
    return dequantize.dequantize_4bit(*args[:-1])


LIBRARY.impl("dequantize_4bit_after", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("fastft::dequantize_4bit_after", _dequantize, lib=LIBRARY)

dequantize_after = torch.ops.fastft.dequantize_4bit_after.default
warmup.IMPLEMENTATIONS[dequantize_after] = lambda *args: warmup.IMPLEMENTATIONS[dequantize.dequantize_4bit](*args[:-1])
