"""What the tests of `fastft::linear_cross_entropy` share: the loss as models write it, random arguments, gradients."""

import torch
from torch.nn import functional as F

from fastft.kernels.linear_cross_entropy import op

F64 = torch.float64
NAMES = ("hidden", "weight", "bias", "low_rank", "lora_b")
PLAIN = {"ignore_index": -100, "reduction": "mean", "scale": 1.0, "softcap": 0.0, "label_smoothing": 0.0, "z_loss": 0.0}
# Everything at once.
ALL = {"scale": 0.7, "softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01}

# The model's dtype and the adapters' (None: the same).
LOW = [(torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, None), (torch.float32, None)]


def plain(tensors, labels, ignore_index, reduction, scale, softcap, label_smoothing, z_loss):
    """The loss as models write it."""
    logits = F.linear(tensors["hidden"], tensors["weight"], tensors.get("bias"))
    if "lora_b" in tensors:
        logits = logits + F.linear(tensors["low_rank"].to(logits.dtype), tensors["lora_b"].to(logits.dtype))
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    flat = labels.flatten()
    loss = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    if z_loss:
        ignored = flat == ignore_index
        z = z_loss * torch.logsumexp(logits, 1).square().masked_fill(ignored, 0)
        loss = loss + {"none": z, "sum": z.sum(), "mean": z.sum() / (~ignored).sum()}[reduction]
    return loss.view(labels.shape) if reduction == "none" else loss


def fused(tensors, labels, ignore_index, *options, order=None, count=None):
    hidden, weight, bias, low_rank, lora_b = map(tensors.get, NAMES)
    (loss,) = op(hidden, weight, bias, labels, low_rank, lora_b, order, count, ignore_index, *options)
    return loss


def arguments(leading, width=8, vocabulary=37, rank=0, bias=False, dtype=F64, adapters=None, spread=1.0, ignored=0.0, frozen=()):
    """Random tensors by name and labels of which a part `ignored` is -100."""
    shapes = {"hidden": (*leading, width), "weight": (vocabulary, width)}
    shapes |= {"bias": (vocabulary,)} if bias else {}
    shapes |= {"low_rank": (*leading, rank), "lora_b": (vocabulary, rank)} if rank else {}
    tensors = {}
    for name, shape in shapes.items():
        factor = spread if name == "hidden" else width**-0.5
        tensor = (torch.randn(shape, dtype=F64) * factor).to((adapters or dtype) if name in ("low_rank", "lora_b") else dtype)
        tensors[name] = tensor.requires_grad_(name not in frozen)
    labels = torch.randint(0, vocabulary, tuple(leading))
    labels[torch.rand(labels.shape) < ignored] = -100
    return tensors, labels


def run(call, tensors, labels, options, to=None):
    """{"loss": ..., name: gradient}, the upstream gradient of every loss another number."""
    if to is not None:
        tensors = {name: tensor.detach().to(to).requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
    loss = call(tensors, labels, *(PLAIN | options).values())
    inputs = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    upstream = torch.linspace(1.7, -1, max(1, loss.numel()), dtype=loss.dtype, device=loss.device)[: loss.numel()].view(loss.shape)
    return {"loss": loss.detach()} | dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), upstream), strict=True))


def assert_equal(tensors, labels, options, call=fused, **tolerance):
    expected, found = run(plain, tensors, labels, options), run(call, tensors, labels, options)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        torch.testing.assert_close(found[name], expected[name], equal_nan=True, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
