"""Sinks on kernels that know none: values and gradients against the softmax with one more column."""

import pytest
import torch

from fastft.kernels import attention_sinks


def spelled_out(q, k, v, sinks, scale):
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.mT * scale).masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, length, 1)], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


@pytest.mark.parametrize("length, heads, kv_heads, dim", [(1, 2, 2, 16), (77, 4, 2, 8), (130, 8, 1, 64)])
@pytest.mark.parametrize("compiled", [False, True])
def test_exact(length, heads, kv_heads, dim, compiled):
    torch.manual_seed(0)
    q, k, v, sinks = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((2, heads, length, dim), (2, kv_heads, length, dim), (2, kv_heads, length, dim), (heads,))
    )
    sinks += 2  # where the sink takes much of the weight
    leaves = [t.requires_grad_() for t in (q, k, v, sinks)]
    weights = torch.randn(2, heads, length, dim, dtype=torch.float64)
    run = torch.compile(attention_sinks.causal, backend="aot_eager", fullgraph=True) if compiled else attention_sinks.causal
    got, want = run(*leaves, 0.3, "flash_cpu"), spelled_out(*leaves, 0.3)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((got * weights).sum(), leaves), torch.autograd.grad((want * weights).sum(), leaves), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-11)


def test_a_large_sink_takes_all_and_a_small_one_nothing():
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    out = attention_sinks.causal(q, k, v, torch.tensor([200.0, -200.0]), 0.25, "flash_cpu")
    assert out[:, 0].abs().max() == 0
    assert torch.allclose(out[:, 1], torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)[:, 1], atol=1e-6)
