"""Deferred logits on a GPU: devices, autocast, fused optimizers, and the memory that is not used."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import tiny
from conftest import ROOT  # noqa: F401
from torch import nn
from torch.nn import functional as F

import fastft
from fastft import deferred
from fastft.deferred import DeferredTensor, Plan, defer

ROWS, HIDDEN, VOCABULARY = 4096, 256, 32000


class Head(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.x, self.weight = (nn.Parameter(torch.randn(n, HIDDEN, device="cuda", dtype=dtype)) for n in (ROWS, VOCABULARY))

    def logits(self):
        return F.linear(self.x * 1.5, self.weight)

    def deferred(self):
        recipe = torch.fx.symbolic_trace(lambda held, weight: F.linear(held, weight))
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else self.x.dtype
        (logits,) = defer(lambda x, weight: (x * 1.5,), [Plan(0, recipe, (1,), VOCABULARY, dtype)])(self.x, self.weight)
        return logits


def test_devices():
    before, model = deferred.computed(), Head()
    logits = model.deferred()
    assert logits.is_cuda and logits.device == model.x.device and logits.get_device() == 0
    assert logits.to("cuda") is logits and logits.cuda() is logits and type(logits.to("cuda:0", torch.float32)) is DeferredTensor
    assert deferred.computed() == before
    assert torch.equal(logits.cpu(), model.logits().cpu()) and deferred.computed() == before + 1


def test_memory_of_what_nobody_reads():
    model, size = Head(), 2 * ROWS * VOCABULARY
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logits = model.deferred()
    converted = logits.float()
    assert torch.cuda.max_memory_allocated() - held < size / 50
    converted.sum()
    assert 2 * size < torch.cuda.memory_allocated() - held < 2.2 * size  # float32 alone
    del logits, converted
    assert torch.cuda.memory_allocated() <= held


@pytest.mark.parametrize("forward", [False, True])
def test_gradients_and_autocast(forward):
    results = []
    for make in (Head.logits, Head.deferred):
        model = Head(torch.float32)
        with torch.autocast("cuda", torch.bfloat16, enabled=forward):
            logits = make(model)
        with torch.autocast("cuda", torch.bfloat16, enabled=not forward):
            (logits @ torch.ones(VOCABULARY, 3, device="cuda", dtype=logits.dtype)).sin().sum().backward()
        results.append([logits * 1, model.x.grad, model.weight.grad])
    for found, expected in zip(results[1], results[0], strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_fused_step():
    model = Head()
    logits = model.deferred()
    model.logits().sum().backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()
    with pytest.raises(RuntimeError, match="Read them before that"):
        logits.sum()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_llama(mode):
    """Through Inductor; CUDA graphs write over their outputs, so there logits are made in the graph."""
    torch._dynamo.reset()
    fastft.reset()
    model = tiny.tiny_model("llama", dtype=torch.bfloat16, layers=1).cuda().train()
    batch = {name: tensor.cuda() for name, tensor in tiny.tiny_batch(model.config).items()}
    compiled = torch.compile(model, backend="fastft", mode=mode)
    before = deferred.computed()
    for _ in range(3):
        model.zero_grad()  # under CUDA graphs gradients lie in memory that the next step writes over, here and with Inductor alone
        output = compiled(**batch)
        output.loss.backward()
    assert deferred.computed() == before
    assert (type(output.logits) is DeferredTensor) == (fastft.reports()[0].logits == "deferred") == (mode is None)
    output, expected = compiled(**batch), model(**batch)
    found = output.logits.float().log_softmax(-1)
    torch.testing.assert_close(found, expected.logits.float().log_softmax(-1), rtol=0, atol=0.1)
    model.zero_grad()
    (output.loss + found.square().mean()).backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())
