"""The products in fp8 against the formula in float64, for values quantized by hand; what an outlier costs; gradients of bias; autocast."""

import pytest
import torch
from torch import Tensor

from fastft.kernels import fp8_linear
from fastft.kernels.fp8_linear import gradient, op, products

from .test_lora_linear import arguments, formula, fused, run

BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(fp8_linear.unavailable(torch.device("cpu")) is not None, reason="this PyTorch has no row-wise fp8 products on CPUs")


def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    """float64 values that e4m3 holds, and the scales of the rows."""
    scale = (x.float().abs().amax(1, keepdim=True) * (1 / 448)).clamp(min=1e-12)
    return (x.float() * (1 / scale)).to(torch.float8_e4m3fn).double(), scale.double()


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def inputs(*outputs: int, rows: int = 48, columns: int = 64):
    x = torch.randn(rows, columns, dtype=BF16)
    return x, [torch.randn(n, columns, dtype=BF16) / 8 for n in outputs], [torch.randn(rows, n, dtype=BF16) * 1e-3 for n in outputs]


def test_products():
    x, weights, _ = inputs(32, 16)
    bias = torch.randn(16, dtype=BF16)
    outputs, scales = products(x, weights, [None, bias])
    x8, x_scale = by_hand(x)
    for y, w, scale, b in zip(outputs, weights, scales, (0, bias.double()), strict=True):
        w8, w_scale = by_hand(w)
        assert y.dtype == BF16 and torch.equal(scale.double(), w_scale[:, 0])
        assert error(y, x8 @ w8.t() * x_scale * w_scale.t() + b) < 3e-3
        assert 0.01 < error(y, x.double() @ w.double().t() + b) < 0.05


def test_gradient_of_siblings():
    """The scale of W's rows goes into the gradient before that is quantized."""
    x, weights, grads = inputs(32, 16, 16)
    _, scales = products(x, weights, [None] * 3)
    dx = gradient(grads, weights, scales)
    g = torch.cat([grad.float() * scale for grad, scale in zip(grads, scales, strict=True)], 1)
    g8, g_scale = by_hand(g)
    w8 = torch.cat([by_hand(w)[0] for w in weights])
    assert dx.dtype == BF16 and error(dx, g8 @ w8 * g_scale) < 3e-3
    assert 0.01 < error(dx, sum(grad.double() @ w.double() for grad, w in zip(grads, weights, strict=True))) < 0.06


def test_an_outlier_costs_its_own_row_precision():
    x, weights, _ = inputs(32)
    want = products(x, weights, [None])[0][0]
    x[3, 5], weights[0][7, 9] = 1e4, 1e4
    got = products(x, weights, [None])[0][0]
    rows, columns = torch.arange(48) != 3, torch.arange(32) != 7
    assert torch.equal(got[rows][:, columns], want[rows][:, columns]) and not torch.equal(got[3], want[3])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_rows_of_zeros_and_of_what_is_not_finite(value):
    x, weights, _ = inputs(32)
    want = products(x, weights, [None])[0][0]
    x[5] = value
    got = products(x, weights, [None])[0][0]
    assert torch.equal(got[:5], want[:5]) and torch.equal(got[6:], want[6:])
    assert not got[5].any() if value == 0 else not got[5].isfinite().any()


@pytest.mark.parametrize("bias", [False, True])
def test_op_is_its_two_products(bias):
    x, (w,), (grad,) = inputs(32)
    b = torch.randn(32, dtype=BF16, requires_grad=True) if bias else None
    x.requires_grad_()
    y = op(x.view(2, 24, 64), w, b)
    y.backward(grad.view(2, 24, 32))
    (want,), (scale,) = products(x.detach(), [w], [b])
    assert torch.equal(y.view(48, 32), want) and torch.equal(x.grad, gradient([grad], [w], [scale]))
    if bias:
        assert error(b.grad, grad.double().sum(0)) < 4e-3


def test_autocast_casts_x_and_its_gradient_comes_back_in_float32():
    x, (w,), _ = inputs(32)
    wide = x.float().requires_grad_()
    with torch.autocast("cpu", BF16):
        y = op(wide, w, None)
    y.sum().backward()
    assert torch.equal(y, products(x, [w], [None])[0][0]) and wide.grad.dtype == torch.float32


def test_no_gradient_of_x_where_it_needs_none(monkeypatch):
    x, (w,), _ = inputs(32)
    b = torch.zeros(32, dtype=BF16, requires_grad=True)
    monkeypatch.setattr(fp8_linear, "gradient", lambda *args: pytest.fail("dX was made"))
    op(x, w, b).sum().backward()
    assert b.grad is not None


def test_what_a_device_cannot_is_said(monkeypatch):
    fp8_linear.unavailable.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "8.9 or newer" in fp8_linear.unavailable(torch.device("cuda"))
    assert fp8_linear.unavailable(torch.device("cuda", 0)) == fp8_linear.unavailable(torch.device("cuda"))
    fp8_linear.unavailable.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("not here\nbut there")))
    assert fp8_linear.unavailable(torch.device("cpu")) == "fp8 does not run here: not here"
    fp8_linear.unavailable.cache_clear()


@pytest.mark.parametrize("dropout", [(), (0.0, 0.3, 0.1)], ids=["", "dropout"])
def test_under_lora(dropout):
    """What the adapters give, by the formula in float64 over weights of zero, and the base's two products by hand."""
    args = arguments(
        (3, 16), 64, [32, 16], [4, 8, 2], [0, 0, 1], bias=[True, False], lora_bias=[True, False, True], dropout=dropout, base=BF16, adapters=torch.float32
    )
    weights = [w.detach() for w in args[1]]
    got = run(fused("fp8"), (args[0], weights, *args[2:]))
    want = run(formula, (args[0], [torch.zeros_like(w) for w in weights], *args[2:]), to=torch.float64)
    x8, x_scale = by_hand(args[0].detach().view(48, 64))
    quantized = [by_hand(w) for w in weights]
    bases = [x8 @ w8.t() * x_scale * w_scale.t() for w8, w_scale in quantized]
    grads = [torch.linspace(-1, 2, 48 * n, dtype=torch.float64).view(48, n).to(BF16) for n in (32, 16)]
    g8, g_scale = by_hand(torch.cat([grad.float() * w_scale[:, 0].float() for grad, (_, w_scale) in zip(grads, quantized, strict=True)], 1))
    want["loss"] += torch.cat([y.flatten() for y in bases])
    want["0"] += (g8 @ torch.cat([w8 for w8, _ in quantized]) * g_scale).view(3, 16, 64)
    # the weights of zero are leaves of the formula
    names = dict(zip(got, [name for name in want if name not in ("1", "2")], strict=True))
    for name, other in names.items():
        assert error(got[name], want[other]) < 6e-3, name
