"""Canonical ops, one a file: schema, reference, backward, GPU kernels. Importing this package registers them."""

from fastft.kernels import (
    accumulate,
    attention,
    dequantize,
    dequantize_after,
    fp8_linear,
    linear_cross_entropy,
    lora_grads,
    lora_linear,
    low_rank,
    low_rank_dropout,
    mask,
    materialize,
    packed,
    quantize_fp8,
    valid_rows,
)

__all__ = [
    "accumulate",
    "attention",
    "dequantize",
    "dequantize_after",
    "fp8_linear",
    "linear_cross_entropy",
    "lora_grads",
    "lora_linear",
    "low_rank",
    "low_rank_dropout",
    "mask",
    "materialize",
    "packed",
    "quantize_fp8",
    "valid_rows",
]
