"""quant_linear on hand-written modules: kinds of quantization, autocast, and what older versions put into the graph."""

import copy
from collections import Counter

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from conftest import Rewriter, assert_same, dequantized
from torch import nn
from torch.nn import functional as F

from fastft import match
from fastft.kernels.dequantize import dequantize_4bit as op
from fastft.kernels.dequantize_after import dequantize_after

K, N = 128, 64
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def linear_4bit(bias=False, dtype=FP32, compute=None, **weights) -> Linear4bit:
    """A frozen quantized linear, made from a weight of `dtype`."""
    module = Linear4bit(K, N, bias, compute or dtype, device="meta")
    module.weight = Params4bit(torch.randn(N, K, dtype=dtype) / K**0.5, module=module, **weights)
    module.bias = nn.Parameter(torch.randn(N, dtype=compute or dtype)) if bias else None
    module.support_avx512bf16_for_cpu = False
    return module.to("cpu").requires_grad_(False)


class Adapted(nn.Module):
    """Two quantized siblings with adapters; `call(linear, x)` is how the base is called."""

    def __init__(self, call=lambda linear, x: linear(x), dtype=FP32, **quant):
        super().__init__()
        self.call = call
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, K, dtype=dtype))
        self.first, self.second = (linear_4bit(dtype=dtype, **quant) for _ in range(2))
        for name in ("first", "second"):
            self.register_parameter(f"{name}_a", nn.Parameter(torch.randn(4, K, dtype=dtype) / K**0.5))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.randn(N, 4, dtype=dtype) / 2))

    def adapted(self, name, x):
        return self.call(getattr(self, name), x) + F.linear(F.linear(x, getattr(self, f"{name}_a")), getattr(self, f"{name}_b")) * 2

    def forward(self, x):
        x = x * self.gain
        return torch.cat([self.adapted("first", x), self.adapted("second", x)], -1)


def loss(outputs, batch):
    return (outputs * torch.linspace(-1, 2, outputs.numel(), dtype=outputs.dtype).view(outputs.shape)).mean()


def rows(rewriter: Rewriter) -> Counter:
    """(op, provider) of what quant_linear reports."""
    return Counter((row.op, row.provider) for report in rewriter.reports for row in report.rewrites if row.pass_name == "quant_linear")


def reasons(rewriter: Rewriter) -> Counter:
    return Counter(row.reason for report in rewriter.reports for row in report.misses if row.pass_name == "quant_linear")


def left(rewriter: Rewriter) -> list[str]:
    """What a graph still has of bitsandbytes."""
    names = [str(node.target) for gm in rewriter.graphs for node in gm.graph.nodes]
    return [name for name in names if "bitsandbytes" in name or "autograd_function_apply" in name]


class OldMatMul4Bit(torch.autograd.Function):
    """As in bitsandbytes 0.46 to 0.49: the packed weight comes as a row, which makes `dequantize_4bit` transpose its result."""

    @staticmethod
    def forward(ctx, A, B, bias, state):
        ctx.state, ctx.tensors = state, B
        return F.linear(A, dequantize_4bit(B, state).to(A.dtype).t(), bias)

    @staticmethod
    def backward(ctx, grad_output):
        grad_bias = grad_output.sum(0, dtype=grad_output.dtype) if ctx.needs_input_grad[2] else None
        return torch.matmul(grad_output, dequantize_4bit(ctx.tensors, ctx.state).to(grad_output.dtype).t()), None, grad_bias, None


def old(linear, x):
    inner = x.to(linear.compute_dtype)
    return OldMatMul4Bit.apply(inner, linear.weight.t(), linear.bias, linear.weight.quant_state).to(x.dtype)


VARIANTS = {
    "nf4": dict(quant_type="nf4"),
    "nf4, one level": dict(quant_type="nf4", compress_statistics=False),
    "fp4": dict(quant_type="fp4"),
    "fp4, one level, bias": dict(quant_type="fp4", compress_statistics=False, bias=True),
    "bias": dict(quant_type="nf4", bias=True),
    "bf16": dict(quant_type="nf4", dtype=BF16, bias=True),
    "fp16": dict(quant_type="nf4", dtype=FP16),
    "bf16, computed in fp32": dict(quant_type="nf4", dtype=BF16, compute=FP32, bias=True),
    **{f"blocks of {size}": dict(quant_type="nf4", blocksize=size) for size in (128, 512, 1024, 4096)},
    **{f"stored as {dtype}": dict(quant_type="nf4", quant_storage=dtype) for dtype in (BF16, FP16, FP32)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, rewriter):
    variant = VARIANTS[name]
    model = Adapted(**variant)
    x = torch.randn(3, 5, K, dtype=variant.get("dtype", FP32))
    coarse = max(x.dtype, variant.get("compute", x.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    assert_same(dequantized(model), rewriter.compile(model), {"x": x}, loss_fn=loss, dtype=coarse)
    assert rows(rewriter) == {("fastft::dequantize_4bit", "dequantize"): 2} and rewriter.sizes == [2]
    assert not (left(rewriter) or reasons(rewriter) or rewriter.misses)
    made = [node.args for node in rewriter.graphs[0].graph.nodes if node.target is op]
    packed = model.first.weight.quant_state
    assert [args[5:] for args in made] == [(packed.blocksize, packed.quant_type, [N, K], model.first.compute_dtype)] * 2
    assert [args[2] is not None for args in made] == [packed.nested] * 2


@pytest.mark.parametrize("compute", [BF16, FP32])
@pytest.mark.parametrize("call", [Adapted().call, old])
def test_autocast(call, compute, rewriter):
    """The products are autocast's whatever the compute dtype is, those of adapters too."""
    model, x = Adapted(call, quant_type="nf4", compute=compute, bias=True), torch.randn(3, 5, K)
    plain = dequantized(model)
    plain.call = Adapted().call
    with torch.autocast("cpu", BF16):
        assert_same(plain, rewriter.compile(model), {"x": x}, loss_fn=loss, dtype=BF16)
    assert rewriter.sizes == [2] and not (left(rewriter) or reasons(rewriter) or rewriter.misses)
    assert [node.args[-1] for node in rewriter.graphs[0].graph.nodes if node.target is op] == [BF16] * 2


def test_autocast_around_a_checkpoint(rewriter):
    """The body runs under the autocast of the graph around it."""
    model, x = Adapted(quant_type="nf4"), torch.randn(3, 5, K, requires_grad=True)

    def call(x):
        with torch.autocast("cpu", BF16):
            return torch.utils.checkpoint.checkpoint(model.first, x, use_reentrant=False)

    y, expected = rewriter.compile(call)(x), call(x)
    assert torch.equal(y, expected) and torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    assert [node.args[-1] for body in match.graph_modules(rewriter.graphs[0]) for node in body.graph.nodes if node.target is op] == [BF16]


@pytest.mark.parametrize("dtype, compute", [(FP32, BF16), (FP32, FP16), (FP16, BF16)])
def test_adapters_finer_than_the_compute_dtype(dtype, compute, rewriter):
    """Their products stay in their own dtype, so base and adapter stay two."""
    model, x = Adapted(dtype=dtype, quant_type="nf4", compute=compute, bias=True), torch.randn(3, 5, K, dtype=dtype)
    assert_same(dequantized(model), rewriter.compile(model), {"x": x}, loss_fn=loss, dtype=dtype)
    assert rows(rewriter) == {("fastft::dequantize_4bit", "dequantize"): 2} and not (left(rewriter) or reasons(rewriter))
    assert rewriter.misses == {"result stays in the adapter's dtype": 2}


@pytest.mark.parametrize(
    "dtype, options, sizes",
    [
        (FP32, {}, [2]),
        (FP32, {"compress_statistics": False, "bias": True}, [2]),
        (FP32, {"compute": BF16, "bias": True}, []),
        (BF16, {"compute": FP32}, [2]),
    ],
)
def test_older_versions(dtype, options, sizes, rewriter):
    """The weight is made in the dtype that it was quantized from; float32 is made in the compute dtype at once."""
    model = Adapted(old, dtype, quant_type="nf4", **options)
    model.first.requires_grad_(False)
    if options.get("bias") and "compute" not in options:
        model.first.bias.requires_grad_(True)
    x = torch.randn(3, 5, K, dtype=dtype)
    plain = dequantized(model)
    plain.call = Adapted().call
    assert_same(plain, rewriter.compile(model), {"x": x}, loss_fn=loss, dtype=dtype)
    assert rows(rewriter) == {("fastft::dequantize_4bit", "dequantize"): 2} and rewriter.sizes == sizes
    assert not (left(rewriter) or reasons(rewriter)) and len(rewriter.misses) == (not sizes)
    made = [node.args[-1] for node in rewriter.graphs[0].graph.nodes if node.target is op]
    assert made == [BF16 if BF16 in (dtype, options.get("compute")) else FP32] * 2


def test_cast_weights_are_not_saved(lowered):
    """Older versions dequantize to the dtype before quantization, and cast: neither form is kept for the backward."""
    model = Adapted(old, BF16, quant_type="nf4", compute=FP32)
    lowered.compile(model)(torch.randn(3, 5, K, dtype=BF16)).float().sum().backward()
    assert lowered.sizes == [2] and len(lowered.aten) == 2
    (outputs,) = next(node for node in lowered.aten[0].graph.nodes if node.op == "output").args
    assert {(N, K), (K, N)}.isdisjoint(tuple(node.meta["val"].shape) for node in outputs if node is not None)
    for graph in lowered.aten:
        made = [node for node in graph.graph.nodes if node.target in (op, dequantize_after)]
        assert [node.meta["val"].dtype for node in made] == [BF16, BF16]


def test_older_versions_without_gradients(rewriter):
    """Nothing is hidden in a function then; the write of the nested statistics does not part the siblings. 64 rows: there is no gemm_4bit."""
    model, x = Adapted(old, quant_type="nf4", bias=True), torch.randn(4, 16, K)
    with torch.no_grad():
        torch.testing.assert_close(rewriter.compile(model)(x), model(x))
    assert rows(rewriter) == {("fastft::dequantize_4bit", "dequantize"): 2} and rewriter.sizes == [2]
    assert not (left(rewriter) or reasons(rewriter) or rewriter.misses)


def test_weight_quantized_as_k_by_n(rewriter):
    """bitsandbytes still takes it: dequantized, then transposed."""
    model = Adapted()
    for linear in (model.first, model.second):
        linear.weight = Params4bit(torch.randn(K, N) / K**0.5, requires_grad=False, blocksize=64, quant_type="nf4", module=linear).to("cpu")
    x = torch.randn(4, 5, K)
    plain = copy.deepcopy(model)
    for name in ("first", "second"):
        setattr(plain, name, nn.Linear(K, N, bias=False).requires_grad_(False))
        weight = getattr(model, name).weight
        getattr(plain, name).weight.copy_(dequantize_4bit(weight.data, weight.quant_state).t())
    with pytest.warns(DeprecationWarning, match="quantized from a .K, N. tensor"):
        model(x)
    assert_same(plain, rewriter.compile(model), {"x": x}, loss_fn=loss)
    assert rewriter.sizes == [2] and not (left(rewriter) or reasons(rewriter))


def test_dequantized_for_something_else(rewriter):
    packed, state = quantize_4bit(torch.randn(16, 64), quant_type="nf4", compress_statistics=True)

    def call(x):
        return (x * dequantize_4bit(packed, state)).sum(0)

    x = torch.randn(16, 64)
    assert torch.equal(torch.compile(call, backend=rewriter)(x), call(x))
    assert rows(rewriter) == {("fastft::dequantize_4bit", "dequantize"): 1} and not left(rewriter)


def test_plain_and_quantized_siblings(rewriter):
    """`llm_int8_skip_modules` may leave one of a group as it was."""
    model, x = Adapted(quant_type="nf4"), torch.randn(3, 5, K)
    model.second = nn.Linear(K, N, bias=False).requires_grad_(False)
    assert_same(dequantized(model), rewriter.compile(model), {"x": x}, loss_fn=loss)
    assert rows(rewriter) == {("fastft::dequantize_4bit", "dequantize"): 1} and rewriter.sizes == [2]
