"""An lm_head in 4 bits: linear_cross_entropy takes it, its logits are deferred, and nothing keeps the dequantized weight."""

import collections
import contextlib
import copy
from unittest import mock

import pytest
import tiny
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import Lowered, assert_same, dequantized, lower, tiny_qlora
from graph.test_linear_cross_entropy import DEFERRED, NOT_RETURNED, PASSES, VOCABULARY, ByHand, Loss, assert_rewritten, labelled
from graph.test_linear_cross_entropy_forms import K, Small, V, batch, flat
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

import fastft
from fastft import _torch, contract, deferred, match
from fastft.deferred import DeferredTensor
from fastft.kernels import dequantize
from fastft.kernels.dequantize import dequantize_4bit as op
from fastft.kernels.dequantize_after import dequantize_after
from fastft.passes.cross_entropy_head import NOT_LINEAR
from fastft.passes.deferred_logits import WRITTEN

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = {"nf4": {"kind": "nf4"}, "fp4": {"kind": "fp4", "compress_statistics": False}}  # nested statistics, plain ones
ADAPTED = ("q_proj", "lm_head")


def model_for(arch="llama", kind="nf4", targets=("q_proj",), dtype=FP32, compute=None, **config):
    """phi's head has a bias; gemma2 has a softcap."""
    with mock.patch.dict(tiny.SMALL, vocab_size=VOCABULARY):
        return tiny_qlora(arch, dtype=dtype, quant=KINDS[kind] | {"head": True, "compute_dtype": compute}, target_modules=list(targets), **config)


def inputs_of(gm, plan):
    """What a plan's recipe reads beside the hidden state."""
    inputs = [match.value(node) for node in gm.graph.nodes if node.op == "placeholder"]
    return [inputs[i] for i in plan.inputs]


def assert_contract(reference, compiled, given, dtype=None):
    """For the loss, the logits that are read, and the gradients through both."""
    seen = []

    def read(outputs, _):
        loss, logits = outputs[0], outputs[1]
        seen.append(logits.detach() * 1)
        return loss + logits.float().square().mean()

    contract.assert_contract(reference, compiled, given, read, dtype=dtype)
    wanted, eager, found = ({"logits": logits} for logits in seen[:3])
    assert found["logits"].dtype == eager["logits"].dtype
    result = contract.compare(found, eager, wanted, dtype or FP32)
    assert result.ok, str(result)


def assert_holds_the_packed_weight(rewriter, kind, others=()):
    """The packed weight, its statistics and `others` (their sizes, all float32) are all that the plan reads."""
    (plan,) = rewriter.plans
    tensors = inputs_of(rewriter.graphs[-1], plan)
    elements = VOCABULARY * 64
    blocks = elements // 64
    statistics = {"nf4": [(torch.uint8, blocks), (FP32, -(-blocks // 256)), (FP32, 256), (FP32, 1)], "fp4": [(FP32, blocks)]}[kind]
    expected = [(torch.uint8, elements // 2), *statistics]
    assert collections.Counter((tensor.dtype, tensor.numel()) for tensor in tensors) == collections.Counter([*expected, *((FP32, size) for size in others)])
    assert [node.target for node in plan.recipe.graph.nodes].count(op) == 1


@pytest.mark.parametrize("arch, kind", [("llama", "nf4"), ("llama", "fp4"), ("gemma2", "nf4"), ("gemma2", "fp4"), ("phi", "nf4")])
@pytest.mark.parametrize("targets", [("q_proj",), ADAPTED])
def test_loss_with_labels(arch, kind, targets):
    """Loss, gradients, the logits that are read, and the gradients through these."""
    model = model_for(arch, kind, targets)
    rewriter = Loss()
    assert_contract(dequantized(model), rewriter.compile(model), labelled(model))
    assert_rewritten(rewriter)
    assert rewriter.calls[0].weight.target is op and rewriter.calls[0].softcap == (30.0 if arch == "gemma2" else 0.0)
    assert (rewriter.calls[0].lora_b is not None) == (targets == ADAPTED) and (rewriter.calls[0].bias is not None) == (arch == "phi")
    others = [VOCABULARY] * (arch == "phi") + [4 * 64, VOCABULARY * 4] * (targets == ADAPTED)
    assert_holds_the_packed_weight(rewriter, kind, others)


@pytest.mark.parametrize("arch, kind", [("llama", "nf4"), ("llama", "fp4"), ("gemma2", "nf4"), ("phi", "nf4")])
@pytest.mark.parametrize("targets", [("q_proj",), ADAPTED])
def test_loss_by_hand(arch, kind, targets):
    model = model_for(arch, kind, targets)
    given, rewriter = labelled(model), Loss()
    assert_same(ByHand(dequantized(model)), rewriter.compile(ByHand(model)), given)
    head = "model.base_model.model.lm_head"
    assert_rewritten(rewriter, NOT_RETURNED, head)
    assert rewriter.calls[0].reduction == "mean" and rewriter.calls[0].weight.target is op


# base dtype, compute dtype, autocast
DTYPES = {
    "bf16": (BF16, None, False),
    "fp16": (FP16, None, False),
    "bf16, autocast": (BF16, None, True),
    "fp32, autocast": (FP32, None, True),
    "fp32, computed in bf16, autocast": (FP32, BF16, True),
    "bf16, computed in fp32": (BF16, FP32, False),
    "bf16, computed in fp32, autocast": (BF16, FP32, True),
}


@pytest.mark.parametrize("targets", [("q_proj",), ADAPTED])
@pytest.mark.parametrize("name, arch", [(name, arch) for name in DTYPES for arch in ("llama", "gemma2" if DTYPES[name][1] else "phi")])
def test_dtypes(name, arch, targets):
    base, compute, autocast = DTYPES[name]
    model = model_for(arch, targets=targets, dtype=base, compute=compute)
    rewriter = Loss()
    with torch.autocast("cpu", BF16) if autocast else contextlib.nullcontext():
        assert_contract(dequantized(model), rewriter.compile(model), labelled(model), BF16 if autocast else base)
    assert_rewritten(rewriter)
    assert [node.target for node in rewriter.plans[0].recipe.graph.nodes].count(op) == 1


@pytest.mark.parametrize("targets", [("q_proj",), ADAPTED])
def test_compute_dtype_coarser_than_the_model(targets):
    """lora_linear leaves adapters that are finer than their base, so logits with them are a sum of two linears."""
    model = model_for(targets=targets, compute=BF16)
    rewriter = Loss()
    assert_contract(dequantized(model), rewriter.compile(model), labelled(model), BF16)
    if targets == ADAPTED:
        assert rewriter.misses == {NOT_LINEAR: 1} and not rewriter.plans
    else:
        assert_rewritten(rewriter)


class Packed(Small):
    """A head that a test calls itself, on a weight that it dequantizes."""

    def __init__(self, loss, dtype=FP32):
        super().__init__(loss, dtype=dtype)
        self.packed, self.state = quantize_4bit(torch.randn(V, K, dtype=dtype) / 4, quant_type="nf4")
        # Not bitsandbytes' on CPUs: rows are shorter than blocks.
        self.register_buffer("made", dequantize.reference(self.packed, self.state.absmax, None, None, None, 64, "nf4", [V, K], dtype))

    def weight(self):
        return dequantize_4bit(self.packed, self.state) if self.packed is not None else self.made


FORMS = {
    "linear": lambda m, x: F.linear(x, m.weight()),
    "linear with bias": lambda m, x: F.linear(x, m.weight(), m.vector),
    "cast": lambda m, x: F.linear(x.float(), m.weight().float()),
    "cast and transposed": lambda m, x: x.float() @ m.weight().float().t(),
    "transposed twice": lambda m, x: F.linear(x, m.weight().t().t()),
    "adapters": lambda m, x: F.linear(x, m.weight()) + F.linear(F.linear(x, m.a), m.b) * 2.0,
}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, dtype):
    """The weight may be cast and transposed before the head reads it."""
    torch.manual_seed(1)
    model = Packed(lambda m, x, y: (flat(logits := FORMS[form](m, x), y), logits), dtype)
    reference, rewriter = copy.deepcopy(model), Loss()
    reference.packed = None
    assert_contract(reference, rewriter.compile(model), batch(), dtype)
    assert rewriter.providers == {DEFERRED: 1} and not rewriter.misses


@pytest.mark.parametrize("early", [False, True])
def test_a_packed_weight_that_is_written_to_is_left(early):
    """After the head, and between it and the dequantization."""

    def loss(m, x, y):
        weight = m.weight()
        if early:
            m.packed.add_(1)
        result = flat(logits := x @ weight.t(), y)
        if not early:
            m.packed.add_(1)
        return result, logits

    model, rewriter = Packed(loss), Loss()
    compiled, reference = rewriter.compile(model), copy.deepcopy(model)
    reference.packed, reference.loss = None, lambda m, x, y: (flat(logits := x @ m.weight().t(), y), logits)
    for found, wanted in zip(compiled(**batch()), reference(**batch()), strict=True):
        torch.testing.assert_close(found, wanted)
    assert rewriter.misses == {WRITTEN: 1}


def heads_made(gm):
    """How often a graph dequantizes the head."""
    return sum(node.target in (op, dequantize_after) and node.args[7] == [VOCABULARY, 64] for node in gm.graph.nodes)


class Rows(ByHand):
    """A loss for each row: its adapter's gradient is made in the backward, of logits that are made again."""

    def forward(self, input_ids, labels):
        logits = self.model(input_ids=input_ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return CausalLMOutput(loss=(loss * torch.linspace(0.5, 1.5, loss.numel())).mean())


@pytest.mark.parametrize("targets", [("q_proj",), ADAPTED])
@pytest.mark.parametrize("wrap, again", [(lambda model: model, False), (ByHand, False), (Rows, True)], ids=["labels", "by hand", "row by row"])
def test_the_dequantized_head_is_not_saved(wrap, again, targets):
    """It is made for the forward's one op, which makes the gradient too; and once more where the backward needs the logits."""
    model = model_for(targets=targets, dtype=BF16)
    lowered = Lowered(only=PASSES, of="linear_cross_entropy")
    lowered.compile(wrap(model))(**labelled(model)).loss.backward()
    assert sum(lowered.providers.values()) == 1
    forward, backward = lowered.aten
    saved = [tuple(node.meta["val"].shape) for node in backward.graph.find_nodes(op="placeholder")]
    assert saved and not {(VOCABULARY, 64), (64, VOCABULARY)} & set(saved)
    assert heads_made(forward) == 1 and heads_made(backward) == (again and targets == ADAPTED)


@contextlib.contextmanager
def recorded():
    """The storages of all weights as large as the head that are dequantized meanwhile."""
    found = []

    def record(*args):
        weight = dequantize.reference(*args)
        if tuple(weight.shape) == (VOCABULARY, 64):
            found.append(StorageWeakRef(weight.untyped_storage()))
        return weight

    with torch.library._scoped_library("fastft", "IMPL") as library:
        library.impl("dequantize_4bit", record, "CPU", allow_override=True)
        yield found


@pytest.fixture
def without_inductor(monkeypatch):
    """The whole backend else; a graph may be kept for a second backward."""
    monkeypatch.setattr(_torch, "compile_fx", lambda gm, example_inputs, config_patches: lower(gm, example_inputs, config_patches))
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def step(model, call, given):
    """Two backwards, the second through the logits: the gradients, and the logits."""
    model.zero_grad()
    outputs = call(**given)
    outputs.loss.backward(retain_graph=True)
    (outputs.logits.log_softmax(-1).square().mean() + outputs.logits[:, 0].sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}, outputs.logits


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("arch, kind, targets", [("llama", "nf4", ADAPTED), ("llama", "fp4", ("q_proj",)), ("gemma2", "nf4", ("q_proj",))])
def test_nothing_keeps_the_dequantized_head(arch, kind, targets, kept, without_inductor):
    """It is made for the loss, for the values and for the backward through them; `keep_dequantized` is what keeps it for the loss."""
    model = model_for(arch, kind, targets)
    given, call = labelled(model), torch.compile(model, backend="fastft", options={"strict": True, "keep_dequantized": kept})
    expected, wanted = step(reference := dequantized(model), reference, given)
    computed = deferred.computed()
    with recorded() as weights:
        found, logits = step(model, call, given)
        assert len(weights) == 3 and [weight.expired() for weight in weights] == [not kept, True, True]
        outputs = call(**given)
        assert type(outputs.logits) is DeferredTensor and len(weights) == (3 if kept else 4) and weights[-1].expired()
        outputs.logits.sum()
        assert weights[-1].expired()
    assert deferred.computed() == computed + 3
    (report,) = fastft.reports()
    assert report.logits == "deferred" and {row.provider for row in report.rewrites if row.pass_name == "quant_linear"} == {"kept" if kept else "dequantize"}
    torch.testing.assert_close((found, logits.detach() * 1), (expected, wanted.detach()), rtol=1e-4, atol=1e-5)


def test_a_changed_packed_weight_is_noticed(without_inductor):
    model = model_for()
    logits = torch.compile(model, backend="fastft")(**labelled(model)).logits
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    with pytest.raises(RuntimeError, match="Read them before that"):
        logits.sum()


def test_head_is_quantized_where_it_is_asked_for():
    for head in (False, True):
        model = tiny.quantize(tiny.tiny_model("gemma2", layers=1, seq=16), head=head)
        assert (type(model.lm_head) is nn.Linear) != head and model.config.tie_word_embeddings != head
        assert model.get_input_embeddings().weight.shape == (256, 64)
