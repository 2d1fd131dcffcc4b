"""Canonical ops, one a file: schema, reference, backward, GPU kernels. Importing this package registers them."""

from fastft.kernels import accumulate, lora_grads, lora_linear, low_rank, packed

__all__ = ["accumulate", "lora_grads", "lora_linear", "low_rank", "packed"]
