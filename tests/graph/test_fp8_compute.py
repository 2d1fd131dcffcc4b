"""fp8_compute on whole models: frozen bf16 linears are found, alone and under LoRA, and what is left has its reason; training follows bf16's."""

import pytest
import tiny
import torch
from conftest import Lowered, Rewriter, batch_for, lora_modules, tiny_lora, tiny_qlora
from torch import nn

import fastft
from fastft import contract, passes
from fastft.hooks import uuid
from fastft.kernels import fp8_linear
from fastft.options import Options
from fastft.passes.fp8_compute import DTYPE, FEW_ROWS, HEAD, QUANTIZED, SIZES, TRAINED

BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(fp8_linear.unavailable(torch.device("cpu")) is not None, reason="this PyTorch has no row-wise fp8 products on CPUs")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(fp8_linear, "MIN_ROWS", 1)


def rewriter(**options) -> Rewriter:
    return Rewriter(of="fp8_compute", base_compute="fp8", **options)


def run(model: nn.Module, found: Rewriter, batch: dict | None = None) -> dict[str, torch.Tensor]:
    """Loss and gradients."""
    torch._dynamo.reset()
    return contract.gradients(found.compile(model), batch or batch_for(model))


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2"])
def test_every_linear_under_lora(arch):
    model, found = tiny_lora(arch, dtype=BF16), rewriter()
    run(model, found)
    assert found.modules == lora_modules(model)
    assert not found.misses
    assert {row.op for report in found.reports for row in report.rewrites if row.pass_name == "fp8_compute"} == {"fastft::lora_linear"}


def test_linears_without_adapters():
    """The head has its loss in one op, which stays in 16 bits."""
    model, found = tiny_lora(dtype=BF16, target_modules=["q_proj"]), rewriter()
    run(model, found)
    assert sorted(path.rpartition(".")[2] for path in found.modules) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert found.providers == {"fp8+mm": 1, "fp8": 6} and not found.misses


def test_the_head_is_left():
    model, found = tiny_lora(dtype=BF16), rewriter()
    batch = batch_for(model)
    del batch["labels"]
    with torch.no_grad():
        found.compile(model)(**batch)
    assert found.misses == {HEAD: 1} and len(found.modules) == 7


def test_checkpointed():
    model, found = tiny_lora(dtype=BF16, layers=2), rewriter()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    run(model, found)
    assert found.modules == lora_modules(model) and not found.misses


def reasons(model: nn.Module, **options) -> set[str]:
    found = rewriter(**options)
    run(model, found)
    assert not found.modules
    return set(found.misses)


def test_reasons(monkeypatch):
    assert reasons(tiny_lora()) == {DTYPE}
    assert reasons(tiny_lora(dtype=torch.float16)) == {DTYPE}
    assert reasons(tiny_qlora(dtype=BF16)) == {QUANTIZED}
    assert reasons(tiny.tiny_model("llama", layers=1, dtype=BF16, seq=16).train()) == {TRAINED}
    monkeypatch.setattr(fp8_linear, "ALIGNMENT", 48)
    assert reasons(tiny_lora(dtype=BF16)) == {SIZES}
    monkeypatch.setattr(fp8_linear, "ALIGNMENT", 16)
    monkeypatch.setattr(fp8_linear, "MIN_ROWS", 33)
    assert reasons(tiny_lora(dtype=BF16)) == {FEW_ROWS}
    monkeypatch.setattr(fp8_linear, "MIN_ROWS", 1)
    monkeypatch.setattr(fp8_linear, "unavailable", lambda device: "not here")
    assert reasons(tiny_lora(dtype=BF16)) == {"not here"}


def test_off_by_default():
    found = Rewriter(of="fp8_compute")
    run(tiny_lora(dtype=BF16), found)
    assert not found.modules and not found.misses
    assert uuid(Options()) != uuid(Options(base_compute="fp8"))


@pytest.mark.parametrize(
    "options, message", [({"base_compute": "fp9"}, "takes 'base' or 'fp8', not 'fp9'"), ({"base_compute": "fp8", "pack_weights": True}, "leave it out")]
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Options.parse(options, None, passes.NAMES)
    assert Options.parse({"base_compute": "fp8"}, None, passes.NAMES).base_compute == "fp8"


def test_gradients_are_close_to_those_in_16_bits():
    """What one linear makes of fp8 is tested exactly in tests/ops; through a layer the errors of 3 % each add up."""
    model = tiny_lora("qwen2", dtype=BF16, r=16)
    want, got = contract.gradients(model, batch_for(model, batch=4)), run(model, rewriter(), batch_for(model, batch=4))
    assert got.keys() == want.keys()
    distance, norm = (sum(value.norm() ** 2 for value in values) ** 0.5 for values in ([got[name] - want[name] for name in got], want.values()))
    assert 0.01 * norm < distance < 0.2 * norm


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nothing_in_fp8_is_saved(dropout):
    """Beside what the bf16 form saves: the scales of the weights' rows."""
    saved = {}
    for compute in ("base", "fp8"):
        lowered, model = Lowered(base_compute=compute), tiny_lora(dtype=BF16, lora_dropout=dropout)
        run(model, lowered)
        outputs = [node.meta["val"] for node in lowered.aten[0].graph.output_node().args[0] if isinstance(node, torch.fx.Node)]
        saved[compute] = sum(tensor.numel() * tensor.element_size() for tensor in outputs if isinstance(tensor, torch.Tensor))
        assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in outputs if isinstance(tensor, torch.Tensor))
    scales = sum(4 * module.weight.shape[0] for name, module in model.named_modules() if name.endswith(".base_layer"))
    assert saved["fp8"] <= saved["base"] + scales


def test_low_rank_products_are_added_in_place():
    lowered = Lowered(base_compute="fp8")
    run(tiny_lora(dtype=BF16), lowered)
    names = [node.target for graph in lowered.aten for node in graph.graph.nodes]
    assert torch.ops.fastft.accumulate_mm.default not in names and names.count(torch.ops.fastft.accumulate_mm_.default) == 7 + 4


def losses(model: nn.Module, step, batches) -> torch.Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=5e-3), []
    for batch in batches:
        loss = step(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


def test_training_follows_bf16():
    eager, model = tiny_lora(dtype=BF16, layers=2), tiny_lora(dtype=BF16, layers=2)
    batches = [batch_for(model, batch=4, seed=step % 2) for step in range(12)]
    compiled = torch.compile(model, backend="fastft", options={"base_compute": "fp8", "strict": True})
    want, got = losses(eager, eager, batches), losses(model, compiled, batches)
    assert want[-1] < 0.9 * want[0]
    torch.testing.assert_close(got, want, rtol=0.02, atol=0)
    assert len([row for report in fastft.reports() for row in report.rewrites if row.pass_name == "fp8_compute"]) == 8
