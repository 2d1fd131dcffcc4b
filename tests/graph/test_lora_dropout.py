"""lora_linear with dropout: the masks are those of `fastft.kernels.dropout`, drawn once a step from torch's generator."""

import pytest
import torch
from conftest import batch_for, tiny_lora
from torch import nn
from torch.nn import functional as F

from fastft import contract
from fastft.kernels import dropout as masks

RANK, WIDTH, OUT = 4, 48, 32
# (linear, dropout, scaling) of each adapter: linear 1 has two
ADAPTERS = [(0, 0.5, 2.0), (1, 0.0, 0.5), (1, 0.25, 1.0), (2, 0.1, 3.0)]


class Siblings(nn.Module):
    """Three linears on one input with the adapters above; `dropped(x, j)` is what adapter j reads."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(OUT, WIDTH) / 7 for _ in range(3))
        self.lora_a = nn.ParameterList(torch.randn(RANK, WIDTH) / 7 for _ in ADAPTERS)
        self.lora_b = nn.ParameterList(torch.randn(OUT, RANK) / 2 for _ in ADAPTERS)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, dropped=lambda x, j: F.dropout(x, ADAPTERS[j][1])):
        x = x * self.gain
        outputs = []
        for i, weight in enumerate(self.weights):
            y = F.linear(x, weight)
            for j, (owner, _, scaling) in enumerate(ADAPTERS):
                if owner == i:
                    y = y + F.linear(F.linear(dropped(x, j), self.lora_a[j]), self.lora_b[j]) * scaling
            outputs.append(y)
        return torch.cat(outputs, -1)


def loss(outputs, batch):
    return (outputs * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).mean()


def assert_equal(first, second, **options):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=lambda text, name=name: f"{name}: {text}", **options)


@pytest.mark.parametrize("shape", [(2, 5, WIDTH), (1, WIDTH)])
def test_equals_the_same_masks_by_hand(shape, rewriter):
    model, x = Siblings(), torch.randn(shape)
    torch.manual_seed(3)
    count = (len(ADAPTERS) + 1) // 2
    seeds = torch.randint(-(1 << 31), (1 << 31) - 1, [count, *shape[:-1]], dtype=torch.int32).view(count, -1)

    def dropped(x, j):
        p = ADAPTERS[j][1]
        if p == 0:
            return x
        keep = masks.keep_mask(seeds, j, p, WIDTH).view(x.shape)
        return torch.where(keep, x * masks.scale(p), 0.0)

    by_hand = contract.gradients(model, {"x": x, "dropped": dropped}, loss)
    compiled = contract.gradients(rewriter.compile(model), {"x": x}, loss, seed=3)
    assert rewriter.sizes == [3] and not rewriter.misses
    assert_equal(compiled, by_hand)


def test_follows_the_generator(rewriter):
    model, x = Siblings(), torch.randn(4, WIDTH)
    compiled = rewriter.compile(model)
    first, again, other = (contract.gradients(compiled, {"x": x}, loss, seed=seed) for seed in (1, 1, 2))
    assert_equal(first, again, rtol=0, atol=0)
    assert not torch.equal(first["loss"], other["loss"])
    torch.manual_seed(1)
    assert not torch.equal(compiled(x), compiled(x)), "one mask for two steps"


def test_mean_over_masks_is_the_model_without_dropout(rewriter):
    model, x = Siblings(), torch.randn(8, WIDTH)
    compiled = rewriter.compile(model)
    with torch.no_grad():
        draws = torch.stack([compiled(x) for _ in range(400)])
        error = (draws.mean(0) - model(x, lambda x, j: x)) / (draws.std(0) / 20).clamp_min(1e-6)
    assert error.abs().max() < 6 and 0.8 < error[..., OUT:].std() < 1.2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_recomputes_the_same_mask(reentrant, lowered):
    """Seeds are saved, masks recomputed from them: gradients as without checkpointing."""
    plain, model = (tiny_lora(layers=2, lora_dropout=0.3) for _ in range(2))
    batch = batch_for(model)
    expected = contract.gradients(lowered.compile(plain), batch, seed=5)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    compiled = lowered.compile(model)
    assert_equal(contract.gradients(compiled, batch, seed=5), expected)
    assert not torch.equal(contract.gradients(compiled, batch, seed=6)["loss"], expected["loss"])
    assert sum(lowered.sizes) == 2 * 7 * 2
    draws = [node for graph in lowered.aten for node in graph.graph.nodes if node.target is torch.ops.aten.randint.low]
    assert len(draws) == 2 * 4 * 2, "a seed is drawn once, in the forward"


def test_a_dropout_that_others_read_is_left_alone(rewriter):
    """The op draws a mask for each adapter: one mask for two adapters, or for somebody else too, has to stay one."""

    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
            self.a, self.b = torch.nn.Linear(32, 4, bias=False), torch.nn.Linear(4, 32, bias=False)

        def forward(self, x):
            h = torch.nn.functional.dropout(x, 0.5, True)
            low_rank = self.b(self.a(h))
            return self.q(x) + low_rank, h

    model, x = Shared(), torch.randn(4, 32)
    y, h = rewriter.compile(model)(x)
    assert rewriter.misses == {"base reads another input": 1} and not rewriter.groups
    assert torch.allclose(y, model.q(x) + model.b(model.a(h)), atol=1e-6)
