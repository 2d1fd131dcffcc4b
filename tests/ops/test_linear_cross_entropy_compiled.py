"""`fastft::linear_cross_entropy` through torch.compile: symbolic rows, what is saved, how often the logits are made."""

import pytest
import torch

from fastft import _torch
from fastft.kernels import linear_cross_entropy as module
from fastft.kernels import valid_rows

from .plain_loss import PLAIN, arguments, assert_equal, fused, plain

ROWS, VOCABULARY = 64, 512


@pytest.fixture
def no_cache():
    """Inductor's cache on disk does not see that the op decomposes in another way than before (docs/design.md, Cache)."""
    with _torch.inductor_config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [(), ("weight", "lora_b")], ids=["trained", "frozen"])
def test_compiled(no_cache, monkeypatch, reduction, frozen):
    """Through Inductor, with a symbolic number of rows; nothing of rows x vocabulary is saved for the backward, and nothing made twice."""
    saved, runs = [], []
    monkeypatch.setattr(module, "rows_on_host", lambda count: runs.append(count) or valid_rows.rows_on_host(count))

    def call(tensors, labels, *options):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
            return compiled(tensors, labels, *options)

    compiled = torch.compile(fused, fullgraph=True, dynamic=True)
    for rows in (ROWS, ROWS + 9):
        tensors, labels = arguments([rows], vocabulary=VOCABULARY, rank=2, dtype=torch.float32, ignored=0.3, frozen=frozen)
        assert_equal(tensors, labels, {"reduction": reduction, "softcap": 5.0}, call, rtol=1e-4, atol=1e-6)
        assert len(runs) == (2 if reduction == "none" and not frozen else 1)
        with torch.no_grad():
            loss = compiled(tensors, labels, *(PLAIN | {"reduction": reduction}).values())
        torch.testing.assert_close(loss, plain(tensors, labels, *(PLAIN | {"reduction": reduction}).values()).detach())
        runs.clear()
    assert saved and max(saved) <= max((ROWS + 9) * 8, VOCABULARY * 8)


def test_compiled_under_autocast_saves_no_cast_of_the_head(no_cache):
    tensors, labels = arguments([ROWS], vocabulary=VOCABULARY, dtype=torch.float32, frozen=("weight",))
    saved = []

    def loss(tensors, labels):
        with torch.autocast("cpu", torch.bfloat16):
            return fused(tensors, labels, *PLAIN.values())

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
        torch.compile(loss, fullgraph=True)(tensors, labels).backward()
    assert saved and max(saved) <= ROWS * 8
