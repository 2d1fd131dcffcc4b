"""rope_tables: exact counts, what is left, and one cosine in the generated code."""

import re

import pytest
import torch
from conftest import Rewriter, batch_for, tiny_lora
from torch import nn
from torch._inductor.utils import run_and_get_code

from fastft.kernels.materialize import materialize


def tables(rewriter):
    return [node for gm in rewriter.graphs for node in gm.graph.nodes if node.target is materialize]


# gemma3_text: one pair for local, one for global layers
@pytest.mark.parametrize("arch, count", [("llama", 2), ("gemma3_text", 4), ("gpt_neox", 2), ("phi3", 2), ("gpt_oss", 2), ("gpt2", 0), ("bloom", 0)])
def test_one_of_each(arch, count):
    model = tiny_lora(arch, layers=2)
    rewriter = Rewriter(of="rope_tables")
    batch = batch_for(model)
    loss = rewriter.compile(model)(**batch).loss
    torch.testing.assert_close(loss, model(**batch).loss)
    assert len(tables(rewriter)) == sum(rewriter.providers.values()) == count
    assert not any(node.meta["example_value"].requires_grad for node in tables(rewriter))


def test_checkpointed_layers_read_the_table_from_outside():
    model = tiny_lora("llama", layers=2)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rewriter = Rewriter(of="rope_tables")
    rewriter.compile(model)(**batch_for(model)).loss.backward()
    assert len(tables(rewriter)) == 2


class Waves(nn.Module):
    """cos as an activation (SIREN), and one that a single operation reads."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x).cos()
        return y * y + y + x.cos()


def test_activations_are_left():
    rewriter = Rewriter(of="rope_tables")
    x = torch.randn(4, 8)
    torch.compile(Waves(), backend=rewriter)(x).sum().backward()
    assert not tables(rewriter)


class Rotated(nn.Module):
    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x, angle):
        cos, sin = angle.cos(), angle.sin()
        for linear in self.linears:
            x = linear(x)
            x = x * cos + torch.cat([-x[..., 16:], x[..., :16]], -1) * sin
        return x


def test_computed_once():
    """Without the pass: in 3 kernels forward and 3 backward."""
    model = Rotated()
    x, angle = torch.randn(4, 32), torch.rand(4, 32)

    def cosines(**options):
        torch._dynamo.reset()
        call = torch.compile(model, backend="fastft", options={"strict": True, **options})
        with torch.compiler.config.patch(force_disable_caches=True):
            _, codes = run_and_get_code(lambda: call(x, angle).sum().backward())
        return sum(len(re.findall(r"\.cos\(\)", code)) for code in codes)

    assert 0 < 2 * cosines() < cosines(disable=["rope_tables"])
