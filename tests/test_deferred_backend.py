"""Deferred logits in compiled models: what the backend makes of a pass's plans, options, failures, graph breaks.

The pass is linear_cross_entropy; `compile_fx` is replaced by `conftest.lower`.
"""

import re

import pytest
import tiny
import torch
from conftest import batch_for, lower, with_lora
from test_deferred import Cube, assert_equal
from torch import nn
from torch.nn import functional as F

import fastft
from fastft import _torch, deferred, passes
from fastft.deferred import PLANS, DeferredTensor
from fastft.hooks import uuid
from fastft.options import Options


@pytest.fixture
def lowered(monkeypatch):
    """Everything but Inductor."""
    monkeypatch.setattr(_torch, "compile_fx", lambda gm, example_inputs, config_patches: lower(gm, example_inputs, config_patches))


class Model(nn.Module):
    """Logits with a softcap, and their loss."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x, labels):
        logits = torch.tanh(self.head(self.body(x).sin()) / 2) * 2
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def batch():
    return torch.linspace(-2, 2, 48).view(2, 3, 8), torch.arange(6).view(2, 3)


def compiled_model(**options):
    model = Model()
    return model, torch.compile(model, backend="fastft", options=options)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_backend_defers(lowered):
    model, compiled = compiled_model()
    before = deferred.computed()
    loss, logits = compiled(*batch())
    assert type(logits) is DeferredTensor and logits.requires_grad and logits.shape == (2, 3, 16)
    expected = model(*batch())
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected[0]))
    assert deferred.computed() == before and fastft.reports()[0].logits == fastft.reports()[0].to_dict()["logits"] == "deferred"
    for use in (lambda loss, logits: logits.float().square().sum(), lambda loss, logits: loss + Cube.apply(logits).sum()):
        torch.testing.assert_close(gradients(model, use(*compiled(*batch()))), gradients(model, use(*model(*batch()))))
    with torch.no_grad():
        logits = compiled(*batch())[1]
    assert not logits.requires_grad and not (logits * 2).requires_grad
    assert_equal(logits, model(*batch())[1].detach())
    model.requires_grad_(False).head.bias.requires_grad_(True)  # the hidden state has no gradient, the head has
    torch.testing.assert_close(gradients(model, compiled(*batch())[1].sum()), gradients(model, model(*batch())[1].sum()))


def test_a_fused_step_is_seen_after_compiling(lowered):
    """Fused optimizers write without raising `_version`, and Dynamo patches optimizers."""
    model, compiled = compiled_model()
    loss, logits = compiled(*batch())
    loss.backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()
    with pytest.raises(RuntimeError, match="Read them before that"):
        logits.sum()


@pytest.mark.parametrize("arch, adapted", [("llama", False), ("gemma2", True), ("granite", False), ("cohere", True)])
def test_models(arch, adapted, lowered):
    """Softcap, scale, tied heads, adapters on the head: the logits, and gradients of a loss of one's own."""
    model = tiny.tiny_model(arch, layers=1, seq=16).train()
    if adapted:
        model = with_lora(model, target_modules=["lm_head", "q_proj"])
    compiled = torch.compile(model, backend="fastft")
    found, expected = compiled(**batch_for(model)), model(**batch_for(model))
    assert type(found.logits) is DeferredTensor and found.logits.shape == expected.logits.shape
    torch.testing.assert_close(found.logits.detach() * 1, expected.logits.detach(), rtol=1e-5, atol=1e-5)
    losses = [output.loss + output.logits.log_softmax(-1).square().mean() for output in (found, expected)]
    torch.testing.assert_close(*(gradients(model, loss) for loss in losses), rtol=1e-4, atol=1e-5)


SETTINGS = [
    ({"logits": "materialize"}, None, 'materialized: options={"logits": "materialize"}'),
    ({}, "reduce-overhead", "materialized: CUDA graphs use the memory of outputs again"),
    ({}, "max-autotune", "materialized: CUDA graphs use the memory of outputs again"),
    ({"inductor": {"triton.cudagraphs": True}}, None, "materialized: CUDA graphs use the memory of outputs again"),
    ({"inductor": {"triton.cudagraphs": False}}, "reduce-overhead", "deferred"),
    ({"logits": "deferred"}, "max-autotune-no-cudagraphs", "deferred"),
    ({"disable": ["lora_linear"]}, None, "deferred"),
]


@pytest.mark.parametrize("options, mode, said", SETTINGS)
def test_what_turns_it_off(options, mode, said, lowered):
    model = Model()
    compiled = torch.compile(model, backend=lambda gm, inputs: fastft.fastft(gm, inputs, mode=mode, options=options))
    _, logits = compiled(*batch())
    assert (type(logits) is DeferredTensor) == (said == "deferred")
    (report,) = fastft.reports()
    assert report.logits == said
    torch.testing.assert_close(logits * 1, model(*batch())[1])


def test_cuda_graphs_set_for_the_process(lowered):
    with _torch.inductor_config.patch("triton.cudagraphs", True):
        assert type(compiled_model()[1](*batch())[1]) is torch.Tensor


def test_option_is_checked_and_part_of_the_cache_key():
    with pytest.raises(ValueError, match=re.escape("option 'logits' takes 'deferred' or 'materialize', not 'materialise'")):
        Options.parse({"logits": "materialise"}, None, passes.NAMES)
    with pytest.raises(ValueError, match="not True"):
        Options.parse({"logits": True}, None, passes.NAMES)
    assert Options.parse({}, None, passes.NAMES).logits == "deferred"
    assert uuid(Options(logits="materialize")) != uuid(Options())


def test_a_graph_without_logits_says_nothing(lowered):
    torch.compile(lambda x: x.sin(), backend="fastft")(torch.ones(3))
    assert fastft.reports()[0].logits is None


BREAKS = {
    "in a function": lambda loss, logits: (torch._dynamo.graph_break(), loss + logits[:, 1:].exp().mean())[1],
    "cast": lambda loss, logits: (torch._dynamo.graph_break(), loss + logits.double().argmax(-1).sum() + logits.float().sum())[1],
    "written": lambda loss, logits: (torch._dynamo.graph_break(), logits[0].mul_(2).sum() + logits.sin().sum())[1],
    "compiled apart": lambda loss, logits: torch.compile(lambda x: x.log_softmax(-1)[0].square().sum(), backend="aot_eager")(logits) + loss,
    "a view, compiled apart": lambda loss, logits: torch.compile(lambda x: x.mul_(2).sum(), backend="aot_eager", fullgraph=True)(logits[0]) + logits.sum(),
    "only handed on": lambda loss, logits: (torch._dynamo.graph_break(), loss)[1],
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("around", [False, True])
def test_graph_breaks(name, around, lowered):
    """What reads logits after a graph break, or is compiled by itself, gets real ones; two calls, so that guards are passed too."""
    model = Model()
    inner = torch.compile(model, backend="fastft") if not around else model

    def whole(x, labels):
        return BREAKS[name](*inner(x, labels))

    step = torch.compile(whole, backend="fastft") if around else whole
    before = deferred.computed()
    for _ in range(2):
        expected = gradients(model, BREAKS[name](*model(*batch())))
        torch.testing.assert_close(gradients(model, step(*batch())), expected)
    assert (deferred.computed() == before) == (name == "only handed on" or around and "apart" in name)  # Dynamo inlines what is compiled apart
    assert len(fastft.reports()) <= 3  # nothing of DeferredTensor itself is compiled


def later(gm):
    """A pass that fails after it has added a plan of its own."""
    gm.meta.setdefault(PLANS, []).append("of a pass that failed")
    raise RuntimeError("boom")


@pytest.mark.parametrize("position", [0, -1])
def test_a_dropped_pass_leaves_no_plan(position, lowered, monkeypatch):
    order = [later, *passes.STAGE_1] if position == 0 else [*passes.STAGE_1, later]
    monkeypatch.setattr(passes, "STAGE_1", order)
    model, compiled = compiled_model()
    with pytest.warns(UserWarning, match="pass later failed and was dropped"):
        _, logits = compiled(*batch())
    assert type(logits) is DeferredTensor
    assert_equal(logits.detach(), model(*batch())[1].detach())


def test_a_failed_compile_leaves_no_plan(lowered, monkeypatch):
    def fails_once(gm, example_inputs, config_patches):
        assert not gm.meta.get(PLANS)
        if not calls.append(1) and len(calls) == 1:
            raise RuntimeError("boom")
        return lower(gm, example_inputs, config_patches)

    calls = []
    monkeypatch.setattr(_torch, "compile_fx", fails_once)
    model, compiled = compiled_model()
    with pytest.warns(UserWarning, match="rewrite linear_cross_entropy failed and was dropped"):
        _, logits = compiled(*batch())
    assert type(logits) is torch.Tensor and fastft.reports()[0].logits is None
    torch.testing.assert_close(logits, model(*batch())[1])
