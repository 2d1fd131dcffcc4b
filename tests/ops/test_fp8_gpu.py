"""Row-wise fp8 on a GPU: the kernels bit for bit, the products, and a compiled model."""

import pytest
import torch
from conftest import batch_for, tiny_lora

import fastft
from fastft import contract
from fastft.kernels import fp8_linear, quantize_fp8

from .test_fp8_linear import by_hand, error
from .test_quantize_fp8 import AFTER, weight

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if why := fp8_linear.unavailable(torch.device("cuda")):
    pytest.skip(why, allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 64), (1024, 4096), (4096, 14336), (129, 4112), (2064, 8208)], ids=str)
def test_kernels_equal_the_reference_bit_for_bit(shape, dtype):
    w = weight(*shape, dtype).clamp(-6e4, 6e4)
    (want, want_scale), (got, scale) = quantize_fp8.reference(w, AFTER), quantize_fp8.launch(w.cuda())
    assert torch.equal(scale.cpu(), want_scale) and torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))
    both = quantize_fp8.launch_t([w.cuda(), w[:16].cuda()], [scale, scale[:16]])
    assert torch.equal(both.cpu().view(torch.uint8), torch.cat([want, want[:16]]).view(torch.uint8).t())


@pytest.mark.parametrize("rows", [1, 17, 2048])
@pytest.mark.parametrize("bias", [False, True])
def test_products(rows, bias):
    x, weights = torch.randn(rows, 512, dtype=torch.bfloat16), [torch.randn(n, 512, dtype=torch.bfloat16) / 16 for n in (256, 1024)]
    grads = [torch.randn(rows, len(w), dtype=torch.bfloat16) for w in weights]
    b = torch.randn(256, dtype=torch.bfloat16) if bias else None
    cuda = [w.cuda() for w in weights]
    outputs, scales = fp8_linear.products(x.cuda(), cuda, [b if b is None else b.cuda(), None])
    dx = fp8_linear.gradient([grad.cuda() for grad in grads], cuda, scales)
    (x8, x_scale), quantized = by_hand(x), [by_hand(w) for w in weights]
    for y, (w8, w_scale), add in zip(outputs, quantized, (b, None), strict=True):
        assert error(y.cpu(), x8 @ w8.t() * x_scale * w_scale.t() + (0 if add is None else add.double())) < 6e-3
    g8, g_scale = by_hand(torch.cat([grad.float() * scale[:, 0].float() for grad, (_, scale) in zip(grads, quantized, strict=True)], 1))
    assert error(dx.cpu(), g8 @ torch.cat([w8 for w8, _ in quantized]) * g_scale) < 6e-3


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_model(dropout, monkeypatch):
    monkeypatch.setattr(fp8_linear, "MIN_ROWS", 1)
    model = tiny_lora(dtype=torch.bfloat16, layers=2, lora_dropout=dropout).cuda()
    batch = {name: tensor.cuda() for name, tensor in batch_for(model, batch=4).items()}
    results = []
    for options in ({}, {"base_compute": "fp8"}):
        torch._dynamo.reset()
        fastft.reset()
        results.append(contract.gradients(torch.compile(model, backend="fastft", options={"strict": True} | options), batch))
    (report,) = fastft.reports()
    assert sum(row.pass_name == "fp8_compute" for row in report.rewrites) == 8
    want, got = results
    distance, norm = (sum(value.norm() ** 2 for value in values) ** 0.5 for values in ([got[name] - want[name] for name in got], want.values()))
    assert 0.01 * norm < distance < 0.3 * norm
