"""Whatever of fastft raises is dropped with a warning and a report row; the model trains on. Bad options raise.

Everything but Inductor runs: `compile_fx` is replaced by `conftest.lower`.
"""

import gc
import re

import pytest
import torch
from conftest import batch_for, dequantized, lower, tiny_qlora
from torch import nn
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch.nn import functional as F

import fastft
from fastft import _torch, backend, contract, kernels, passes
from fastft.options import Options


class Adapted(nn.Module):
    """Two siblings with LoRA."""

    def __init__(self):
        super().__init__()
        for name, shape in {"W": (16, 24), "A": (4, 24), "B": (16, 4)}.items():
            for number in range(2):
                self.register_parameter(f"{name}{number}", nn.Parameter(torch.randn(shape) / 4))

    def forward(self, x):
        first = F.linear(x, self.W0) + F.linear(F.linear(x, self.A0), self.B0) * 2
        return (first * (F.linear(x, self.W1) + F.linear(F.linear(x, self.A1), self.B1) * 2)).sin()


BATCH = {"x": torch.linspace(-1, 1, 5 * 24).view(5, 24)}


def loss(outputs, batch):
    return outputs.square().mean()


def boom(*args, **kwargs):
    raise RuntimeError("boom")


@pytest.fixture
def settings(monkeypatch):
    """The settings that `compile_fx` was called with, one entry a call."""
    calls = []

    def compile_fx(gm, example_inputs, config_patches):
        calls.append(config_patches)
        return lower(gm, example_inputs, config_patches)

    monkeypatch.setattr(_torch, "compile_fx", compile_fx)
    return calls


def train(**options):
    """One step through the backend, held against eager; returns the report."""
    model = Adapted()
    compiled = torch.compile(model, backend="fastft", options=options)
    contract.assert_contract(model, compiled, BATCH, loss)
    (report,) = fastft.reports()
    return report


def test_nothing_raises(settings, recwarn):
    report = train()
    assert len(report.rewrites) == 1 and not report.dropped
    assert not [warning for warning in recwarn if "fastft" in str(warning.message)]


def assert_dropped(report, name):
    """Only `name` was dropped; a post-grad pass may fail in the forward and in the backward graph."""
    assert {dropped for dropped, _ in report.dropped} == {name}
    rows = [row for row in report.to_dict()["misses"] if row["reason"].startswith("dropped: ")]
    assert rows and all(row["pass"] == name and "boom" in row["reason"] for row in rows)


def half_done(gm):
    """A stage 1 pass that fails with the graph in pieces."""
    linears = [node for node in gm.graph.nodes if node.name.startswith("linear")]
    assert len(linears) == 6
    for node in linears[:2]:
        node.replace_all_uses_with(node.args[0])
    boom()


def test_failing_pass(settings, monkeypatch):
    half_done.__name__ = "lora_linear"
    monkeypatch.setattr(passes, "STAGE_1", [passes.STAGE_1[0], half_done])
    with pytest.warns(UserWarning, match="fastft: pass lora_linear failed and was dropped.*boom"):
        report = train()
    assert_dropped(report, "lora_linear")
    assert report.rewrites == []


def test_other_passes_go_on(settings, monkeypatch):
    half_done.__name__ = "other"
    monkeypatch.setattr(passes, "STAGE_1", [half_done, *passes.STAGE_1])
    with pytest.warns(UserWarning, match="fastft: pass other failed"):
        report = train()
    assert_dropped(report, "other")
    assert len(report.rewrites) == 1


@pytest.mark.parametrize("part", ["added", "parameter_grads", "low_rank_input"])
def test_failing_lowering(part, settings, monkeypatch):
    """What the op decomposes into raises while AOTAutograd traces it, in the forward or in the backward."""
    monkeypatch.setattr(kernels.lora_linear, part, boom)
    with pytest.warns(UserWarning, match="fastft: rewrite lora_linear failed and was dropped.*boom"):
        report = train()
    assert_dropped(report, "lora_linear")
    assert report.rewrites == [] and len(settings) == 2


def test_failing_lowering_of_a_quantized_base(settings, monkeypatch, recwarn):
    """quant_linear has by then removed the bodies of bitsandbytes' autograd functions from the graph module."""
    model = tiny_qlora()
    monkeypatch.setattr(kernels.lora_products, "accumulate_mm", boom)
    compiled = torch.compile(model, backend="fastft")
    contract.assert_contract(dequantized(model), compiled, batch_for(model))
    (report,) = fastft.reports()
    assert {name for name, _ in report.dropped} >= {"lora_linear"}
    assert [warning for warning in recwarn if "fastft: rewrite lora_linear failed and was dropped" in str(warning.message)]


def half_lowered(graph):
    """A post-grad pass that fails with the graph in pieces."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.sin.default:
            node.target = torch.ops.aten.cos.default
    boom()


def test_failing_post_grad_pass(settings, monkeypatch):
    monkeypatch.setattr(passes, "POST_GRAD", [half_lowered, *passes.POST_GRAD])
    with pytest.warns(UserWarning, match="fastft: pass half_lowered failed and was dropped.*boom"):
        report = train()
    assert_dropped(report, "half_lowered")
    assert len(report.rewrites) == 1


@pytest.mark.parametrize("where", ["STAGE_1", "POST_GRAD"])
def test_strict_raises(where, settings, monkeypatch):
    monkeypatch.setattr(passes, where, [boom, *getattr(passes, where)])
    with pytest.raises(Exception, match="boom"):
        train(strict=True)


def test_strict_raises_in_a_lowering(settings, monkeypatch):
    monkeypatch.setattr(kernels.lora_products, "accumulate_mm", boom)
    with pytest.raises(Exception, match="boom"):
        train(strict=True)


def test_what_is_not_ours_raises(settings, monkeypatch):
    """With nothing rewritten there is nothing to take back."""
    monkeypatch.setattr(_torch, "compile_fx", boom)
    with pytest.raises(Exception, match="boom"):
        train(disable=["lora_linear"])


BAD = [
    ({"strickt": True}, None, "unknown option 'strickt'; did you mean 'strict'?"),
    ({"disable": ["lora_liner"]}, None, "unknown pass 'lora_liner'; did you mean 'lora_linear'?"),
    ({"disable": "lora_linear"}, None, "takes a list of pass names, not 'lora_linear'"),
    ({"disable": [3]}, None, "takes a list of pass names"),
    ({"strict": "yes"}, None, "option 'strict' takes True or False, not 'yes'"),
    ({"strict": 1}, None, "option 'strict' takes True or False, not 1"),
    ({"inductor": ["max_autotune"]}, None, "takes a dict of Inductor settings"),
    ({"inductor": {"max_autotun": True}}, None, "unknown Inductor setting 'max_autotun'; did you mean 'max_autotune'?"),
    ({}, "max-autotun", "unknown mode 'max-autotun'; did you mean 'max-autotune'?"),
]


@pytest.mark.parametrize("options, mode, message", BAD)
def test_bad_options(options, mode, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Options.parse(options, mode, passes.NAMES)


def test_bad_options_through_torch_compile():
    with pytest.raises(ValueError, match="did you mean 'strict'"):
        torch.compile(Adapted(), backend="fastft", options={"strickt": True})(**BATCH)


def test_modes_and_inductor_settings_are_passed_on(settings):
    torch.compile(Adapted(), backend="fastft", mode="max-autotune-no-cudagraphs")(**BATCH)
    torch.compile(Adapted(), backend="fastft", options={"inductor": {"epilogue_fusion": False, "coordinate-descent-tuning": True}})(**BATCH)
    assert settings[0]["max_autotune"] is True
    assert settings[1]["epilogue_fusion"] is False and settings[1]["coordinate_descent_tuning"] is True
    assert len(fastft.reports()) == 2 and all(report.rewrites for report in fastft.reports())


@pytest.mark.parametrize("where", ["graph", "body", None])
def test_floats_of_users_kernels(where, monkeypatch):
    """Triton hands Python floats to a kernel as float32; Inductor does only when it is told so. tests/gpu/test_trainers_gpu.py has such a kernel."""
    inner, outer = torch.fx.Graph(), torch.fx.Graph()
    for graph, name in ((inner, "body"), (outer, "graph")):
        x = graph.placeholder("x")
        if name == where:
            graph.call_function(triton_kernel_wrapper_mutation, kwargs={"kernel_idx": 0, "kwargs": {"x": x}})
        graph.output((x,) if graph is inner else (graph.get_attr("body"),))
    body = torch.fx.GraphModule({}, inner)
    given = []
    monkeypatch.setattr(_torch, "compile_fx", lambda gm, example_inputs, config_patches: given.append(config_patches))
    backend._compile(torch.fx.GraphModule({"body": body}, outer), [], Options(), None)
    assert given[0].get("_use_fp64_for_unbacked_floats", True) is (where is None)


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_collected_as_before_after_a_compile(fails, monkeypatch):
    before, within = gc.get_threshold(), []

    def compile_fx(gm, example_inputs, config_patches):
        within.append(gc.get_threshold())
        if fails:
            raise RuntimeError("broken")
        return lower(gm, example_inputs, config_patches)

    monkeypatch.setattr(_torch, "compile_fx", compile_fx)
    model = torch.compile(Adapted(), backend="fastft", options={"disable": ["lora_linear"]})
    if fails:
        with pytest.raises(Exception, match="broken"):
            model(**BATCH)
    else:
        model(**BATCH)
    assert gc.get_threshold() == before
    assert within and all(now[:2] == before[:2] and now[2] > before[2] for now in within)


def test_partitions_are_for_cuda_graphs(settings):
    for options in ({}, {"inductor": {"triton.cudagraphs": True}}, {"inductor": {"graph_partition": True}}):
        torch.compile(Adapted(), backend="fastft", options=options)(**BATCH)
    assert [patches.get("graph_partition") for patches in settings] == [False, None, True]


def test_disabled_passes_do_not_run(settings):
    report = train(disable=["lora_linear", "accumulate_inplace"])
    assert report.rewrites == [] and "lora_linear" not in [run.name for run in report.passes]
    assert "accumulate_inplace" not in [run.__name__ for run in settings[0]["post_grad_custom_post_pass"].passes]


def test_failing_kernel_is_named_once(monkeypatch):
    from fastft import report, runner

    monkeypatch.setattr(runner, "_failed_kernels", set())
    monkeypatch.setattr(runner, "_strict_kernels", False)
    report.record(report.Report())
    with pytest.warns(UserWarning, match="fastft: kernel some_kernel failed"):
        assert kernels.guard.guarded("some_kernel", boom, lambda: 3) == 3
    assert kernels.guard.guarded("some_kernel", boom, lambda: 4) == 4
    assert [name for name, _ in fastft.reports()[0].dropped] == ["some_kernel"]
    monkeypatch.setattr(runner, "_strict_kernels", True)
    with pytest.raises(RuntimeError, match="boom"):
        kernels.guard.guarded("some_kernel", boom, lambda: 3)
