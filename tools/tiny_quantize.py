"""Quantized twins of the tiny models (tools/tiny.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def quantize(model: nn.Module, kind: str = "nf4", *, head: bool = False, compute_dtype: torch.dtype | None = None, **weights: Any) -> nn.Module:
    """Every nn.Linear and Conv1D but the output head as bitsandbytes has it, in place, as transformers does when it loads a model.

    kind: "nf4", "fp4" (with nested statistics) or "int8" (LLM.int8). head: the output head too, as with
    `llm_int8_skip_modules=[]`; it is not tied any more. compute_dtype: the weights' own unless given.
    weights: arguments of `Params4bit`, such as blocksize, compress_statistics, quant_storage.
    """
    import bitsandbytes as bnb
    from transformers.pytorch_utils import Conv1D

    left = None if head else model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, Conv1D) or module is left:
            continue
        weight = module.weight.data if type(module) is nn.Linear else module.weight.data.t().contiguous()
        size, bias = weight.shape[::-1], module.bias is not None
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(*size, bias, has_fp16_weights=False, threshold=6.0, device="meta")
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*size, bias, compute_dtype or weight.dtype, quant_type=kind, device="meta")
            new.weight = bnb.nn.Params4bit(weight, quant_type=kind, module=new, **weights)
        new.bias = module.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new.to(weight.device).requires_grad_(False))
    if head:
        model.config.tie_word_embeddings = False
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)  # what peft asks for
    return model
