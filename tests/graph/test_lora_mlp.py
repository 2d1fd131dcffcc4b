"""lora_mlp on whole models, with the providers of GPUs: every gated MLP is found, loss and gradients keep the contract, what is left says why."""

import pytest
import torch
from conftest import Autocast, Lowered, Rewriter, assert_same, batch_for, tiny_lora, tiny_qlora
from torch import nn

from fastft import contract
from fastft.kernels import lora_linear as kernel
from fastft.passes.lora_mlp import DROPOUT, READ, SIBLINGS, STATE, TRAINED, TRAINED_WHOLE

# architecture -> its activation; gemma's are gelus, qwen2 has biases, granite scales, olmo2 norms after, cohere attention beside it on the same input
ACTIVATIONS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "cohere"), "silu")
ACTIVATIONS |= dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "gelu_tanh")


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    monkeypatch.setattr(kernel, "choose", lambda *args: ("outer", "one_read"))


@pytest.fixture
def found() -> Rewriter:
    return Rewriter(of="lora_mlp")


def mlps(layers: int) -> list[list[str]]:
    return [[f"model.layers.{i}.mlp.{name}_proj" for name in ("gate", "up", "down")] for i in range(layers)]


@pytest.mark.parametrize("arch", ACTIVATIONS)
def test_every_mlp(arch, found):
    model = tiny_lora(arch, layers=3)
    assert_same(model, found.compile(model), batch_for(model))
    assert found.groups == mlps(3) and not found.misses
    assert found.providers == {f"gated {ACTIVATIONS[arch]}, outer+one_read": 3}


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_bf16(adapters, found):
    model = tiny_lora(dtype=torch.bfloat16, autocast_adapter_dtype=adapters == torch.float32)
    assert_same(model, found.compile(model), batch_for(model), dtype=torch.bfloat16)
    assert found.groups == mlps(1)


@pytest.mark.parametrize("where", ["in the graph", "around it"])
def test_autocast(where, found):
    """A float32 model whose products are bf16, as Trainer(bf16=True) runs it."""
    model = tiny_lora()
    outer = Autocast(model)
    compiled = found.compile(outer) if where == "in the graph" else Autocast(model, found.compile(model))
    assert_same(outer, compiled, batch_for(model), dtype=torch.bfloat16)
    assert [[path.removeprefix("inner.base_model.model.") for path in group] for group in found.groups] == mlps(1)


def test_quantized(found):
    model = tiny_qlora(layers=2, dtype=torch.bfloat16)
    assert_same(model, found.compile(model), batch_for(model), dtype=torch.bfloat16)
    assert found.groups == mlps(2) and not found.misses


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointed(reentrant, found):
    model = tiny_lora(layers=2)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(model, found.compile(model), batch_for(model))
    assert found.groups == mlps(2)


def test_evaluation_and_two_adapters(found):
    model = tiny_lora(layers=1)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    assert_same(model, found.compile(model), batch_for(model))
    assert found.groups == mlps(1)
    batch = batch_for(model)
    with torch.no_grad():
        torch.testing.assert_close(found.compile(model.eval())(**batch).logits.clone(), model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_lowered_graphs():
    """In AOTAutograd's graphs: one kernel in each direction, h neither saved nor written in the backward, nothing added to g and u."""
    lowered, model = Lowered(of="lora_mlp"), tiny_lora()
    assert_same(model, lowered.compile(model), batch_for(model))
    ops, forward = torch.ops.fastft, lowered.aten[0]
    targets = [[node.target for node in graph.graph.nodes] for graph in lowered.aten]
    assert targets[0].count(ops.gated.default) == targets[1].count(ops.gated_backward.default) == 1
    assert [graph.count(ops.accumulate_mm_.default) for graph in targets] == [5, 6]  # without gate, up; without down
    (gate,) = (node for node in forward.graph.nodes if node.target is ops.gated.default)
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    saved = output.all_input_nodes
    assert gate not in saved and set(gate.args[:2]) <= set(saved)


class Mlp(nn.Module):
    """Hand-written, with LoRA as peft does it; subclasses say what else happens to the gate, up and their product."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"gate": (16, 24), "up": (16, 24), "down": (24, 16), "more": (24, 16), "both": (16, 48), "other": (16, 16)}
        self.base = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}).requires_grad_(False)
        self.a = nn.ModuleDict({name: nn.Linear(size[0], 2, bias=False) for name, size in sizes.items()})
        self.b = nn.ModuleDict({name: nn.Linear(2, size[1], bias=False) for name, size in sizes.items()})
        self.dropped = ()

    def linear(self, name, x):
        seen = nn.functional.dropout(x, 0.25) if name in self.dropped else x
        return self.base[name](x) + self.b[name](self.a[name](seen)) * {"up": 0.5, "down": 3.0}.get(name, 2.0)

    def product(self, x):
        return nn.functional.silu(self.linear("gate", x)) * self.linear("up", x)

    def forward(self, x):
        return self.linear("down", self.product(x))


class Reads(Mlp):
    def forward(self, x):
        h = self.product(x)
        return self.linear("down", h) + h.mean()


class ReadsGate(Mlp):
    def forward(self, x):
        gate = self.linear("gate", x)
        return self.linear("down", nn.functional.silu(gate) * self.linear("up", x)) + gate.mean()


class Siblings(Mlp):
    def forward(self, x):
        h = self.product(x)
        return self.linear("down", h) + self.linear("more", h)


class State(Mlp):
    def forward(self, x):
        h = self.product(x)
        with torch.no_grad():
            x = x + 1
        return self.linear("down", h) + x


class Trained(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.base["down"].weight.requires_grad_()


class Swapped(Mlp):
    def product(self, x):
        return self.linear("up", x) * nn.functional.gelu(self.linear("gate", x))


class Parallel(Mlp):
    def forward(self, x):
        return self.linear("other", x) + super().forward(x)


class Halves(Mlp):
    """Gate and up in one linear, its bias too."""

    def product(self, x):
        gate, up = self.linear("both", x).chunk(2, dim=-1)
        return up * nn.functional.silu(gate)


class ReadsHalves(Halves):
    def forward(self, x):
        both = self.linear("both", x)
        gate, up = both.chunk(2, dim=-1)
        return self.linear("down", up * nn.functional.silu(gate)) + both.mean()


class TrainedHalves(Halves):
    def __init__(self) -> None:
        super().__init__()
        self.base["both"].weight.requires_grad_()


class HalvesOfRows(Halves):
    """Another dimension is no gate and up."""

    def product(self, x):
        gate, up = self.linear("gate", x).chunk(2, dim=0)
        return up * nn.functional.silu(gate)

    def forward(self, x):
        return super().forward(torch.cat([x, x]))


class Sigmoid(Mlp):
    def product(self, x):
        return torch.sigmoid(self.linear("gate", x)) * self.linear("up", x)


class Squared(Mlp):
    """One linear twice is no pair of gate and up."""

    def product(self, x):
        gate = self.linear("gate", x)
        return nn.functional.silu(gate) * gate


class Twice(Mlp):
    """The gate of one x, up, the second of its group, of another."""

    def forward(self, x):
        y = torch.sin(x)
        other = self.linear("other", y)
        return other + self.linear("down", nn.functional.silu(self.linear("gate", x)) * self.linear("up", y))


def run(model: nn.Module, found: Rewriter) -> None:
    """Both calls give the same output and gradients."""
    x, results = torch.randn(3, 5, 16, requires_grad=True), []
    trained = [p for p in model.parameters() if p.requires_grad] + [x]
    for call in (model, found.compile(model)):
        y = call(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), trained, allow_unused=True)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind, reason",
    [(Reads, READ), (ReadsGate, READ), (Siblings, SIBLINGS), (State, STATE), (Trained, TRAINED), (ReadsHalves, READ), (TrainedHalves, TRAINED_WHOLE)],
)
def test_reasons(kind, reason, found):
    run(kind(), found)
    assert found.misses == {reason: 1} and not found.groups


@pytest.mark.parametrize("arch, layers, quantized", [("llama", 2, False), ("gemma2", 1, False), ("llama", 1, True)])
def test_dropout(arch, layers, quantized, found):
    """The masks of the two `lora_linear`s that it stands for: one seed, one step."""
    models = [(tiny_qlora if quantized else tiny_lora)(arch, layers=layers, dtype=torch.float32, lora_dropout=0.2) for _ in range(2)]
    batch, apart = batch_for(models[0]), Rewriter(disable=["lora_mlp"])
    wanted = contract.gradients(apart.compile(models[0]), batch, seed=5)
    compiled = found.compile(models[1])
    got, other = (contract.gradients(compiled, batch, seed=seed) for seed in (5, 6))
    assert found.groups == mlps(layers) and not found.misses and got.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(got[name], want, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.equal(other["loss"], got["loss"])


@pytest.mark.parametrize("dropped, reason", [(("gate", "up"), None), (("down",), None), (("both", "down"), DROPOUT), (("other", "gate", "up"), DROPOUT)])
def test_dropout_in_some(dropped, reason, found):
    model = Halves() if "both" in dropped else Parallel() if "other" in dropped else Mlp()
    model.dropped = dropped
    x = torch.randn(4, 16)
    gradients = contract.gradients(found.compile(model), {"x": x}, lambda y, batch: y.square().mean(), seed=1)
    assert found.misses == ({reason: 1} if reason else {}) and len(found.groups) == (reason is None)
    assert all(grad.isfinite().all() for grad in gradients.values())


def test_dropout_in_several_adapters_of_down(found):
    model = tiny_lora(lora_dropout=0.1)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    found.compile(model)(**batch_for(model)).loss.backward()
    assert found.misses == {DROPOUT: 1} and not found.groups


@pytest.mark.parametrize("kind", [Sigmoid, Squared, Twice, HalvesOfRows])
def test_what_is_no_candidate(kind, found):
    run(kind(), found)
    assert not found.misses and not found.groups


def test_either_order(found):
    run(Swapped(), found)
    assert found.groups == [["base.gate", "base.up", "base.down"]] and found.providers == {"gated gelu, outer+one_read": 1}


def test_halves_of_one_linear(found):
    run(Halves(), found)
    assert found.groups == [["base.both", "base.down"]] and not found.misses


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("arch", ["phi3", "glm"])
def test_packed_gate_and_up(arch, quantized, found):
    dtype = torch.bfloat16 if quantized else torch.float32
    model = tiny_qlora(arch, layers=2, dtype=dtype) if quantized else tiny_lora(arch, layers=2)
    assert_same(model, found.compile(model), batch_for(model), dtype=dtype)
    assert found.groups == [[f"model.layers.{i}.mlp.gate_up_proj", f"model.layers.{i}.mlp.down_proj"] for i in range(2)] and not found.misses


def test_other_linears_on_the_same_input_stay_a_group(found):
    run(Parallel(), found)
    assert found.groups == [["base.gate", "base.up", "base.down"]] and found.sizes == [1] and not found.misses


def test_few_rows_are_left_alone(found, monkeypatch):
    """What makes the kernels worth their launches is `lora_linear.choose`'s to say."""
    monkeypatch.undo()
    model = tiny_lora()
    assert_same(model, found.compile(model), batch_for(model))
    assert not found.groups and not found.misses


def test_disabled():
    found, model = Rewriter(of="lora_mlp", disable=["lora_mlp"]), tiny_lora()
    assert_same(model, found.compile(model), batch_for(model))
    assert not found.groups and found.sizes == [3, 1, 2, 1]


def test_partial_targets(found):
    model = tiny_lora(target_modules=["gate_proj", "down_proj"])
    assert_same(model, found.compile(model), batch_for(model))
    assert not found.groups and not found.misses
