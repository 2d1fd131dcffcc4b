"""What only a GPU can show: the kernels as they run there, and whole models through Inductor's Triton code."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import tiny
from conftest import ROOT  # noqa: F401

import fastft
from fastft.kernels import lora_grads, low_rank

BF16 = torch.bfloat16


@pytest.mark.parametrize("m, n, r", [(8192, 4096, 16), (4097, 1000, 5), (8192, 1024, 64), (33, 64, 1)])
def test_lora_grads(m, n, r):
    dy, b = torch.randn(m, n, device="cuda", dtype=BF16), torch.randn(n, r, device="cuda", dtype=BF16)
    s = torch.randn(m, r + 8, device="cuda", dtype=BF16)[:, :r]
    for got, want in zip(lora_grads.lora_grads(dy, s, b), (dy.double() @ b.double(), dy.double().t() @ s.double()), strict=True):
        assert (got.sum(0) - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize("ranks, dropout", [((16,), (0.0,)), ((16, 16, 16), (0.05, 0.05, 0.05)), ((8, 33), (0.0, 0.5))])
def test_low_rank_mm(ranks, dropout):
    m, n, total = 4099, 4096, sum(ranks)
    s, b = torch.randn(m, total, device="cuda", dtype=BF16), torch.randn(n, total, device="cuda", dtype=BF16).t()
    seeds = torch.randint(-(2**31), 2**31 - 1, (2, m), dtype=torch.int32, device="cuda")
    want = low_rank.reference_dropout(s.double(), b.double(), seeds, list(ranks), list(dropout))
    got = low_rank.low_rank_mm_dropout(s, b, seeds, list(ranks), list(dropout))
    assert torch.equal(got == 0, want == 0)
    assert (got - want).norm() / want.norm() < 3e-3
    bias = torch.randn(n, device="cuda", dtype=BF16)
    want = s.double() @ b.double() + bias.double()
    assert (low_rank.low_rank_mm(s, b, bias) - want).norm() / want.norm() < 3e-3


def step(model, call, batch):
    model.zero_grad()
    loss = call(**batch).loss
    loss.backward()
    return {"loss": loss.detach().double()} | {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options, dropout", [({}, 0.0), ({"pack_weights": True}, 0.0), ({}, 0.1)])
def test_llama_trains_right(options, dropout):
    """4096 rows, so that every kernel is used; against float32 on the same weights and, with dropout, against its own masks."""
    torch._dynamo.reset()
    fastft.reset()
    model = tiny.add_lora(tiny.tiny_model("llama", dtype=BF16, seq=1024), r=8, alpha=16, dropout=dropout).cuda().train()
    batch = {k: v.cuda() for k, v in tiny.tiny_batch(model.config, batch=4, seq=1024).items()}
    compiled = torch.compile(model, backend="fastft", options={"strict": True, **options})
    torch.manual_seed(0)
    got = step(model, compiled, batch)
    providers = {row.provider for report in fastft.reports() for row in report.rewrites}
    assert any("one_read" in name for name in providers) and (not options or any("k_extended" in name for name in providers))
    torch.manual_seed(0)
    again = step(model, compiled, batch)
    assert all(torch.allclose(got[n], again[n], rtol=1e-3, atol=1e-6) for n in got), "the same seed gives the same masks"
    if dropout:
        return
    eager = step(model, model, batch)
    exact = step(model.float(), model, batch)
    for name, want in exact.items():
        error, plain = (got[name] - want).norm(), (eager[name] - want).norm()
        assert error <= 1.5 * plain + 4e-3 * want.norm(), (name, error / want.norm(), plain / want.norm())
