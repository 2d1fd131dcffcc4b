"""Canonical ops, one a file: schema, reference, backward, GPU kernels. Importing this package registers them."""

from fastft.kernels import (
    accumulate,
    attention,
    dequantize,
    linear_cross_entropy,
    lora_grads,
    lora_linear,
    low_rank,
    low_rank_dropout,
    mask,
    packed,
    valid_rows,
)

__all__ = [
    "accumulate",
    "attention",
    "dequantize",
    "linear_cross_entropy",
    "lora_grads",
    "lora_linear",
    "low_rank",
    "low_rank_dropout",
    "mask",
    "packed",
    "valid_rows",
]
