"""quant_linear leaves what it does not understand, says why, and the gradients stay right."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import Rewriter, assert_same, dequantized
from graph.test_quant_forms import K, N, Adapted, left, loss, reasons, rows
from torch import nn
from torch.nn import functional as F

from fastft import contract


def assert_same_gradients(model, compiled, batch):
    expected, found = contract.gradients(model, batch, loss), contract.gradients(compiled, batch, loss)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("training", [False, True])
def test_gemv(training, rewriter):
    """One row in older versions; on a CPU any number of rows once an evaluation has changed the weight's layout, which has no backward."""
    model = Adapted(quant_type="nf4", compress_statistics=False)

    def call(linear, x):
        state = linear.weight.quant_state
        return torch.ops.bitsandbytes.gemv_4bit.default(x, linear.weight, state.shape, state.absmax, state.code, state.blocksize)

    model.call = call
    with torch.set_grad_enabled(training):
        rewriter.compile(model)(torch.randn(1, 1, K))
    if training:
        assert reasons(rewriter) == {"gemv_4bit in training has no backward": 2} and not rows(rewriter)
    else:
        assert rows(rewriter) == {("bitsandbytes::gemv_4bit", "gemv_4bit"): 2} and not reasons(rewriter)
    assert rewriter.misses == {"base is bitsandbytes' kernel for few rows": 2}


class Left(torch.autograd.Function):
    """A function of somebody else's: `how` says in what it differs from a linear."""

    @staticmethod
    def forward(ctx, x, packed, state, how):
        ctx.packed, ctx.state, ctx.how = packed, state, how
        y = torch.ops.bitsandbytes.gemm_4bit(x, packed, state.shape, state.absmax, state.blocksize, state.quant_type)
        if how != "two results":
            return y.relu() if how == "forward" else y
        ctx.mark_non_differentiable(most := y.amax())
        return y, most

    @staticmethod
    def backward(ctx, grad, *unused):
        if ctx.how == "write":
            grad.mul_(2)
        dx = torch.matmul(grad, dequantize_4bit(ctx.packed, ctx.state))
        return dx * 2 if ctx.how == "backward" else dx, None, None, None


@pytest.mark.parametrize("how", ["forward", "two results", "backward", "write", "other weight"])
def test_functions_that_are_no_linears(how, rewriter):
    reason = "4-bit weight in a form that is not known" if how in ("forward", "two results") else "backward is not that of a linear"
    model = Adapted(quant_type="nf4", compress_statistics=False)
    other = model.second.weight

    class Other(Left):
        @staticmethod
        def backward(ctx, grad):
            return torch.matmul(grad, dequantize_4bit(other, ctx.state)), None, None, None

    function = Other if how == "other weight" else Left

    def call(linear, x):
        y = function.apply(x, linear.weight, linear.weight.quant_state, how)
        return y[0] + y[1] if how == "two results" else y

    model.call = call
    batch = {"x": torch.randn(4, 5, K)}
    assert_same_gradients(model, rewriter.compile(model), batch)
    # `other` is the second linear's own weight.
    assert reasons(rewriter) == {reason: 1 if how == "other weight" else 2} and len(left(rewriter)) == reasons(rewriter)[reason]


class Int8Weight(torch.Tensor):
    """A weight-only tensor subclass, as torchao's: int8 with a scale a row."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Int8Weight(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].values, args[0].scale)
        plain = torch.utils._pytree.tree_map(lambda item: item.values * item.scale if isinstance(item, cls) else item, args)
        return func(*plain, **(kwargs or {}))


class EightBits(torch.autograd.Function):
    """As transformers' FP8Linear: the backward goes through the dequantized weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0].to(grad.dtype), None


@pytest.mark.parametrize("kind", ["subclass", "fp8", "int8"])
def test_weights_in_8_bits(kind, rewriter):
    model = Adapted()
    del model.first, model.second
    if kind == "subclass":
        weights = [nn.Parameter(Int8Weight(torch.randint(-127, 127, (N, K), dtype=torch.int8), torch.rand(N, 1) / K), requires_grad=False) for _ in range(2)]
        model.first, model.second = weights
        model.call = lambda weight, x: F.linear(x, weight)
    else:
        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        model.first, model.second = ((torch.randn(N, K) * 3).to(dtype) for _ in range(2))
        model.call = lambda weight, x: EightBits.apply(x, weight)
    batch = {"x": torch.randn(4, 5, K)}
    assert_same_gradients(model, rewriter.compile(model), batch)
    reason = "weight is a quantized tensor subclass" if kind == "subclass" else "weight in 8 bits (LLM.int8, fp8)"
    assert reasons(rewriter) == {reason: 2} and not rewriter.sizes
    assert rewriter.misses == {"base is a quantized tensor subclass" if kind == "subclass" else "base is not a plain linear": 2}


def test_disabled():
    rewriter, model = Rewriter(disable=("quant_linear",)), Adapted(quant_type="nf4")
    assert_same(dequantized(model), rewriter.compile(model), {"x": torch.randn(4, 5, K)}, loss_fn=loss)
    assert len(left(rewriter)) == 2 and not rows(rewriter) and rewriter.misses == {"base is not a plain linear": 2}
