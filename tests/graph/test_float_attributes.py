"""With `dynamic=True` the same is rewritten as without; what is a number for good is a constant, what may change with every call is not."""

import collections

import pytest
import torch
from conftest import Rewriter, assert_same, batch_for, tiny_lora
from torch import nn

from fastft import passes
from fastft.options import Options
from fastft.report import Report
from fastft.runner import Snapshot, run_passes

ARCHS = ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "olmo2", "granite", "cohere", "gpt_neox"]


def rows(found: Rewriter) -> collections.Counter:
    rewrites = [(row.pass_name, row.op, *row.fqn) for report in found.reports for row in report.rewrites]
    return collections.Counter(rewrites + [(row.pass_name, row.reason) for report in found.reports for row in report.misses])


@pytest.mark.parametrize("arch", ARCHS)
def test_the_same_is_rewritten(arch):
    model, static, dynamic = tiny_lora(arch, lora_dropout=0.1), Rewriter(), Rewriter()
    for found, options in ((static, {}), (dynamic, {"dynamic": True})):
        torch._dynamo.reset()
        found.compile(model, **options)(**batch_for(model))
    assert rows(dynamic) == rows(static)
    assert [report.logits for report in dynamic.reports] == [report.logits for report in static.reports]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "granite"])
def test_numerics(arch, rewriter):
    """Two lengths, one graph."""
    model = tiny_lora(arch)
    compiled = rewriter.compile(model, dynamic=True)
    for seq in (16, 13):
        assert_same(model, compiled, batch_for(model, seq=seq))
    assert len(rewriter.graphs) == 1 and rewriter.modules


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointed(reentrant, rewriter):
    """The bodies of checkpoints get the numbers as operands. The reference is a twin without checkpointing, as in test_lora_variants.py."""
    plain, model = tiny_lora(layers=2), tiny_lora(layers=2)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(plain, rewriter.compile(model, dynamic=True), batch_for(model))
    assert len(rewriter.modules) == 14 and not rewriter.misses


def test_another_scaling_compiles_anew(rewriter):
    model = tiny_lora()
    compiled = rewriter.compile(model, dynamic=True)
    assert_same(model, compiled, batch_for(model))
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.5)
    assert_same(model, compiled, batch_for(model))
    assert len(rewriter.graphs) == 2 and len(rewriter.modules) == 14


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factor, self.offset = nn.Linear(8, 8), 0.3, 1.5

    def forward(self, x, temperature):
        return self.linear(x) * (self.factor / 2 + self.offset) * temperature


def test_arguments_stay_symbolic(rewriter):
    model, x = Scaled(), torch.randn(4, 8)
    compiled = rewriter.compile(model, dynamic=True)
    for temperature in (0.5, 0.7, 1.25):
        torch.testing.assert_close(compiled(x, temperature), model(x, temperature))
    (gm,) = rewriter.graphs
    numbers = [arg for node in gm.graph.nodes for arg in node.args if isinstance(arg, float)]
    assert numbers == [0.3 / 2 + 1.5] and sum(node.target == "item" for node in gm.graph.nodes) == 1
    model.factor = 0.4
    torch.testing.assert_close(compiled(x, 0.5), model(x, 0.5))
    assert len(rewriter.graphs) == 2


def boom(gm):
    raise RuntimeError("boom")


def test_after_a_pass_has_failed():
    """What Dynamo knows of its inputs survives in the graph that is taken instead."""
    model, report = tiny_lora(), Report()

    def backend(gm, example_inputs):
        return run_passes(Snapshot(gm), [*passes.STAGE_1, boom], Options(logits="materialize"), report).forward

    with pytest.warns(UserWarning, match="pass boom failed and was dropped"):
        assert_same(model, torch.compile(model, backend=backend, dynamic=True), batch_for(model))
    assert sum(len(row.fqn) for row in report.rewrites if row.pass_name == "lora_linear") == 7
