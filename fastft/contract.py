"""The numerics contract of DESIGN.md as a check."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

LossFn = Callable[[object, Mapping], Tensor]
_LOW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


def _grouped_mm(a, b, *, offs=None, bias=None, out_dtype=None):
    if a.dim() == 3 and b.dim()==3:
        return a @ b
    ends = offs.tolist()
    parts = [a[s:e] @ b[i] for i, (s, e) in enumerate(zip([0] + ends[:-1], ends))]
    parts.append(a.new_zeros(a.shape[0] - ends[-1], b.shape[-1]))
    return torch.cat(parts)


def _twin(model):
    memo = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


class _Float64(TorchFunctionMode):
    """Casts to a lower precision written in the model's code become casts to float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _CASTS:
            return args[0].double()
        if getattr(func, "__name__", "") == "_grouped_mm":
            return _grouped_mm(*args, **kwargs)
        args, kwargs = tree_map(lambda a: torch.float64 if isinstance(a, torch.dtype) and a in _LOW else a, (args, kwargs))
        return func(*args, **kwargs)


def gradients(model: nn.Module, batch: Mapping, loss_fn: LossFn | None = None, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    outputs = model(**batch)
    loss = loss_fn(outputs, batch) if loss_fn else outputs.loss
    loss.backward()
    result = {"loss": loss.detach().clone()}
    result |= {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return result


def float64_reference(model, batch, loss_fn=None, seed=0, mode=True):
    import contextlib
    twin = _twin(model).cpu().double()
    batch = tree_map(lambda t: (t.double() if t.is_floating_point() else t).cpu() if isinstance(t, Tensor) else t, dict(batch))
    d = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (_Float64() if mode else contextlib.nullcontext()):
            return gradients(twin, batch, loss_fn, seed)
    finally:
        torch.set_default_dtype(d)
