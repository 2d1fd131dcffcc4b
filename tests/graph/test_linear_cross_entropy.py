"""linear_cross_entropy on whole models: one rewrite, nothing as wide as the vocabulary left, loss and gradients in the contract, logits made when read."""

import types
from unittest import mock

import pytest
import tiny
import torch
from conftest import Autocast, Rewriter, assert_same, batch_for, tiny_lora
from torch import nn
from torch.nn import functional as F

from fastft import contract, match, passes
from fastft.deferred import PLANS
from fastft.kernels import linear_cross_entropy as kernel
from fastft.kernels.valid_rows import valid_rows
from fastft.passes.linear_cross_entropy import linear_cross_entropy

ARCHS = ["llama", "qwen3", "gemma2", "gemma3_text", "granite", "cohere", "phi3", "gpt2", "mistral", "olmo2", "mixtral", "gpt_oss"]
PASSES = [*(run for run in passes.STAGE_1 if run is not linear_cross_entropy), linear_cross_entropy]
VOCABULARY = 271  # as no other size of the tiny models
DEFERRED, NOT_RETURNED = "chunked, logits deferred", "chunked, logits not returned"


class Loss(Rewriter):
    """A Rewriter whose graphs make deferred logits at once, by the plan's recipe."""

    def __init__(self, **options):
        super().__init__(only=PASSES, of="linear_cross_entropy", **options)

    def __call__(self, gm, example_inputs):
        super().__call__(gm, example_inputs)
        gm, plans = self.graphs[-1], self.plans

        def run(*args):
            results = list(gm(*args))
            for plan in plans:
                made = plan.recipe(results[plan.output], *(args[i] for i in plan.inputs))
                assert made.dtype == plan.dtype and made.shape == (*results[plan.output].shape[:-1], plan.vocabulary)
                results[plan.output] = made
            return tuple(results)

        return run

    @property
    def plans(self):
        return self.graphs[-1].meta.get(PLANS, [])

    @property
    def calls(self):
        """The arguments of every op in the graphs, by name."""
        names = [argument.name for argument in kernel.op._schema.arguments]
        return [
            types.SimpleNamespace(**dict(zip(names, node.args, strict=True)))
            for gm in self.graphs
            for body in match.graph_modules(gm)
            for node in body.graph.nodes
            if node.target is kernel.op
        ]


def wide(gm):
    """The nodes that are as wide as the vocabulary, and losses over it."""
    losses = (F.cross_entropy, F.nll_loss, F.log_softmax, torch.logsumexp)
    tensors = [node for node in gm.graph.nodes if isinstance(match.value(node), torch.Tensor) and node.op not in ("placeholder", "get_attr")]
    return [node for node in tensors if node.target in losses or match.value(node).dim() > 1 and match.value(node).shape[-1] == VOCABULARY]


def assert_rewritten(rewriter, provider=DEFERRED, head="lm_head"):
    assert rewriter.providers == {provider: 1} and rewriter.misses == {} and rewriter.groups == [[head]]
    assert len(rewriter.calls) == 1 and not wide(rewriter.graphs[-1])
    assert len(rewriter.plans) == (provider == DEFERRED)
    # The count of valid labels is on its way before anything else is computed.
    nodes = list(rewriter.graphs[-1].graph.nodes)
    (rows,) = (node for node in nodes if node.target is valid_rows)
    first = next(i for i, node in enumerate(nodes) if node.target is F.embedding)
    assert nodes.index(rows) < first and rewriter.calls[0].order.args == (rows, 0) and rewriter.calls[0].count.args == (rows, 1)


def model_for(arch, dtype=torch.float32):
    with mock.patch.dict(tiny.SMALL, vocab_size=VOCABULARY):
        return tiny.tiny_model(arch, layers=1, seq=16, dtype=dtype).train()


def lora_for(arch="llama", targets=("lm_head",), **options):
    with mock.patch.dict(tiny.SMALL, vocab_size=VOCABULARY):
        return tiny_lora(arch, target_modules=list(targets), **options)


def labelled(model, seq=16):
    given = batch_for(model, seq=seq)
    given["labels"][0, :5] = -100
    return given


class ByHand(nn.Module):
    """A loop's own loss, compiled together with the model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.criterion = model, nn.CrossEntropyLoss()

    def forward(self, input_ids, labels):
        logits = self.model(input_ids=input_ids).logits
        return types.SimpleNamespace(loss=self.criterion(logits[:, :-1].reshape(-1, VOCABULARY).float(), labels[:, 1:].reshape(-1)))


def both(outputs, batch):
    """A loss that reads the logits too."""
    return outputs.loss + outputs.logits.float().square().mean()


def assert_same_gradients(model, compiled, given, loss_fn=None):
    """For what is about the graph: no float64 run. Each run has a batch of its own, which it may write to."""

    def own():
        return {name: item.clone() if isinstance(item, torch.Tensor) else item for name, item in given.items()}

    found, wanted = (contract.gradients(run, own(), loss_fn) for run in (compiled, model))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_architectures(arch):
    """Loss, gradients, the logits that are read afterwards and the gradients through these."""
    model = model_for(arch)
    given, rewriter = labelled(model), Loss()
    compiled = rewriter.compile(model)
    contract.assert_contract(model, compiled, given, both)
    assert_rewritten(rewriter)
    found, wanted = compiled(**given).logits, model(**given).logits
    assert found.dtype == wanted.dtype and found.requires_grad
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    expected = {"gemma2": (1.0, 30.0), "granite": (1.0, 0.0), "cohere": (0.0625, 0.0)}.get(arch, (1.0, 0.0))
    assert (rewriter.calls[0].scale, rewriter.calls[0].softcap) == expected


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["int", "tensor", "by hand"])
def test_losses(arch, kind):
    model = model_for(arch)
    given, rewriter = labelled(model), Loss()
    if kind == "by hand":
        model = ByHand(model)
    else:
        given["num_items_in_batch"] = 27 if kind == "int" else torch.tensor(27)
    assert_same_gradients(model, rewriter.compile(model), given)
    assert_rewritten(rewriter, *((NOT_RETURNED, "model.lm_head") if kind == "by hand" else ()))
    assert rewriter.calls[0].reduction == ("mean" if kind == "by hand" else "sum")


@pytest.mark.parametrize("arch, dtype", [(arch, torch.bfloat16) for arch in ("llama", "gemma2", "granite", "cohere")] + [("llama", torch.float16)])
def test_16_bit(arch, dtype):
    """Scale and softcap are in 16 bits in eager, before the cast."""
    model = model_for(arch, dtype)
    if arch == "granite":
        model.config.logits_scaling = 8.0
    rewriter = Loss()
    assert_same(model, rewriter.compile(model), labelled(model))
    assert_rewritten(rewriter)
    assert rewriter.calls[0].scale == {"granite": 1 / 8, "cohere": 1 / 16}.get(arch, 1.0)


def test_deferred_logits_hold_only_the_hidden_state():
    model = model_for("gemma2", torch.bfloat16)
    rewriter = Loss()
    rewriter.compile(model)(**labelled(model))
    (plan,) = rewriter.plans
    output = next(node for node in rewriter.graphs[0].graph.nodes if node.op == "output")
    assert match.value(output.args[0][plan.output]).shape == (2, 16, 64) and plan.dtype == torch.bfloat16
    inputs = [node for node in rewriter.graphs[0].graph.nodes if node.op == "placeholder"]
    assert [tuple(match.value(inputs[i]).shape) for i in plan.inputs] == [(VOCABULARY, 64)]
    assert not any(node.meta for node in plan.recipe.graph.nodes)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])  # gemma3 ties its head to the embedding, which is trained
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_the_head(arch, dtype):
    model = lora_for(arch, ("q_proj", "lm_head"), dtype=dtype)
    rewriter = Loss()
    contract.assert_contract(model, rewriter.compile(model), labelled(model), both if dtype == torch.float32 else None)
    assert_rewritten(rewriter)
    assert match.value(rewriter.calls[0].lora_b).shape == (VOCABULARY, 4) and match.dtype(rewriter.calls[0].lora_b) == dtype


def test_several_adapters_with_bias_on_the_head():
    model = lora_for(lora_bias=True)
    model.add_adapter("second", type(model.peft_config["default"])(r=2, lora_alpha=4, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape) if "lora_B" in name else 0)
    rewriter = Loss()
    contract.assert_contract(model, rewriter.compile(model), labelled(model), both)
    assert_rewritten(rewriter)
    assert match.value(rewriter.calls[0].lora_b).shape == (VOCABULARY, 6) and rewriter.calls[0].bias is not None


@pytest.mark.parametrize("frozen", ["everything but the head", "the head"])
def test_frozen_parts(frozen):
    model = model_for("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head") == (frozen != "the head"))
    rewriter = Loss()
    contract.assert_contract(model, rewriter.compile(model), labelled(model), both)
    assert_rewritten(rewriter)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "LoRA"])
@pytest.mark.parametrize("where", ["in the graph", "around it"])
def test_autocast(arch, where):
    model = lora_for() if arch == "LoRA" else model_for(arch)
    rewriter, outer = Loss(), Autocast(model)
    compiled = rewriter.compile(outer) if where == "in the graph" else Autocast(model, rewriter.compile(model))
    contract.assert_contract(outer, compiled, labelled(model), dtype=torch.bfloat16)
    inner = "inner.base_model.model.lm_head" if arch == "LoRA" else "inner.lm_head"
    assert_rewritten(rewriter, head=inner if where == "in the graph" else "lm_head")
    assert compiled(**labelled(model)).logits.dtype == torch.bfloat16


def test_symbolic_sizes():
    model = model_for("llama")
    rewriter = Loss()
    compiled = rewriter.compile(model, dynamic=True)
    assert_same_gradients(model, compiled, labelled(model))
    assert_rewritten(rewriter)
    assert_same_gradients(model, compiled, labelled(model, seq=11))
    assert len(rewriter.graphs) == 1


@pytest.mark.parametrize("ignored", [0, 1, 14, 15])
def test_ignored_labels(ignored):
    """Of 15 a row. No valid label: nan, and the gradients of eager."""
    model = model_for("llama")
    given = batch_for(model)
    given["labels"][:, 16 - ignored :] = -100
    compiled = Loss().compile(model)
    assert_same_gradients(model, compiled, given)
    assert compiled(**given).loss.isnan() == (ignored == 15)


def test_checkpointed_layers():
    """The head is outside of them; a loss inside is left."""
    model = model_for("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    given = labelled(model)
    rewriter = Loss()
    assert_same_gradients(model, rewriter.compile(model), given)
    assert rewriter.providers == {DEFERRED: 1} and not rewriter.misses
