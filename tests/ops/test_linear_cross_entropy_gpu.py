"""`fastft::linear_cross_entropy` on a GPU: the kernel and cuBLAS against the plain form, the count that comes back on its own."""

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from fastft import contract
from fastft.kernels import cross_entropy, valid_rows
from fastft.kernels import linear_cross_entropy as module

from .plain_loss import ALL, F64, LOW, PLAIN, arguments, assert_equal, fused, plain, run


def on_gpu(**shape):
    tensors, labels = arguments(**shape)
    return {name: tensor.detach().cuda().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}, labels.cuda()


@pytest.mark.parametrize("dtype, adapters", LOW)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocabulary, options", [(1000, {}), (1000, ALL), (50257, {}), (32000, {"softcap": 8.0})], ids=str)
@pytest.mark.parametrize("bias, frozen", [(True, ()), (False, ("weight", "lora_b"))], ids=["trained", "frozen"])
def test_as_exact_as_the_plain_form(monkeypatch, dtype, adapters, reduction, vocabulary, options, bias, frozen):
    monkeypatch.setattr(module, "CHUNK_BYTES", 256 * cross_entropy.padded(vocabulary) * 2)
    shape = dict(leading=[2, 450], width=256, vocabulary=vocabulary, rank=8, bias=bias, dtype=dtype, adapters=adapters, spread=3.0, ignored=0.3)
    tensors, labels = on_gpu(**shape, frozen=frozen)
    options = options | {"reduction": reduction}
    reference, eager, found = (run(call, tensors, labels, options, to=to) for call, to in ((plain, F64), (plain, None), (fused, None)))
    result = contract.compare(found, eager, {name: value.cpu() for name, value in reference.items()}, dtype)
    assert result.ok, str(result)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_propagate(value):
    tensors, labels = on_gpu(leading=[4], vocabulary=70_000, bias=True, dtype=torch.float32)
    with torch.no_grad():
        tensors["hidden"][1, 0] = value
        tensors["bias"][labels[0]] = value
    assert_equal(tensors, labels, {"reduction": "none"}, rtol=1e-4, atol=1e-5)


def test_the_host_waits_for_the_count_alone():
    tensors, labels = on_gpu(leading=[600], dtype=torch.bfloat16, ignored=0.5)
    order, count = valid_rows.valid_rows(labels, -100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(tensors, labels, *PLAIN.values(), order=order, count=count).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_counts_are_never_mixed_up():
    labels = torch.full((200,), -100, device="cuda")
    counts = []
    for valid in range(150):
        labels[:valid] = 1
        counts.append(valid_rows.valid_rows(labels, -100)[1])
    assert len(valid_rows._copies) == valid_rows.KEPT
    assert [valid_rows.rows_on_host(count) for count in counts] == list(range(150))
    del counts
    other = [torch.full((), 1000 + i, device="cuda") for i in range(300)]  # may take the addresses of forgotten counts, never of remembered ones
    assert [valid_rows.rows_on_host(count) for count in other] == [1000 + i for i in range(300)]
