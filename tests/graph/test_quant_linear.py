"""quant_linear on whole models: every quantized linear is found, and under LoRA grouped; loss and gradients keep the contract."""

import json
import sys
from collections import Counter

import inspect_graph
import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from conftest import Rewriter, assert_same, batch_for, dequantized, lora_modules, random_b, tiny_qlora, with_lora
from torch import nn

from fastft import contract, match
from fastft.kernels import lora_linear
from fastft.kernels.dequantize import dequantize_4bit
from fastft.kernels.dequantize_after import dequantize_after

BF16, FP32 = torch.bfloat16, torch.float32
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHI3 = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def quantized(rewriter: Rewriter) -> list[str]:
    """The module paths that quant_linear reports."""
    rows = [row for report in rewriter.reports for row in report.rewrites if row.pass_name == "quant_linear"]
    assert {row.op for row in rows} <= {"fastft::dequantize_4bit"}
    return sorted(path for row in rows for path in row.fqn)


def nodes(rewriter: Rewriter) -> list[torch.fx.Node]:
    """Of all graphs and their bodies."""
    return [node for gm in rewriter.graphs for module in match.graph_modules(gm) for node in module.graph.nodes]


def operations(rewriter: Rewriter) -> list[str]:
    return [getattr(node.target, "__name__", str(node.target)) for node in nodes(rewriter) if node.op.startswith("call")]


class OneLinear(nn.Module):
    """Something to hand to `tiny.quantize`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def get_output_embeddings(self) -> None:
        return None


def assert_nothing_left(rewriter: Rewriter) -> None:
    """No misses, nothing of bitsandbytes in the graphs, no body that nothing calls."""
    assert not [row for report in rewriter.reports for row in report.misses if row.pass_name in ("quant_linear", "lora_linear")]
    names = operations(rewriter)
    assert "autograd_function_apply" not in names
    for gm in rewriter.graphs:
        for module in match.graph_modules(gm):
            assert not any(getattr(node.target, "namespace", "") == "bitsandbytes" for node in module.graph.nodes)
            called = {node.target for node in module.graph.nodes if node.op == "get_attr"}
            assert {name for name, child in module.named_children() if isinstance(child, torch.fx.GraphModule)} <= called


def assert_all_rewritten(model, rewriter, batch=None, **options):
    assert_same(dequantized(model), rewriter.compile(model), batch or batch_for(model), **options)
    assert quantized(rewriter) == rewriter.modules == lora_modules(model)
    assert_nothing_left(rewriter)


@pytest.mark.parametrize("arch, layers", [("llama", 2), ("qwen2", 1), ("qwen3", 1), ("gemma3_text", 1), ("mistral", 1), ("phi3", 1)])
def test_every_quantized_linear_is_rewritten(arch, layers, rewriter):
    """The float64 run has the weights that the compute dtype holds. qwen2 has base biases."""
    model = tiny_qlora(arch, layers=layers)
    assert_all_rewritten(model, rewriter)
    assert len(quantized(rewriter)) == layers * len(PHI3 if arch == "phi3" else LLAMA)
    assert rewriter.sizes == ([1, 1, 1, 1] if arch == "phi3" else [3, 1, 2, 1]) * layers
    (report,) = rewriter.reports
    for row in report.rewrites:
        if row.pass_name == "quant_linear":
            assert row.provider == "dequantize" and row.source.startswith("transformers/models/"), row


def test_the_reference_is_what_bitsandbytes_computes():
    model = tiny_qlora(dtype=BF16)
    batch = batch_for(model)
    first, second = contract.gradients(model, batch), contract.gradients(dequantized(model), batch)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype, compute", [(FP32, BF16), (BF16, FP32)])
def test_autocast(dtype, compute, rewriter):
    """A compute dtype that is not autocast's (transformers' default is float32) does not hold in eager either: the products are autocast's."""
    model = tiny_qlora(dtype=dtype, quant={"compute_dtype": compute}, target_modules=["q_proj", "k_proj", "down_proj"])
    with torch.autocast("cpu", BF16):
        assert_same(dequantized(model), rewriter.compile(model), batch_for(model), dtype=BF16)
        assert torch.equal(model(**batch_for(model)).loss, dequantized(model)(**batch_for(model)).loss)
    assert len(quantized(rewriter)) == 7 and rewriter.sizes == [2, 1]
    assert {node.args[-1] for node in nodes(rewriter) if node.target is dequantize_4bit} == {BF16}
    assert_nothing_left(rewriter)


def test_gradient_checkpointing(rewriter):
    plain, model = (tiny_qlora(target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"]) for _ in range(2))
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(dequantized(plain), rewriter.compile(model), batch_for(model))
    assert len(quantized(rewriter)) == 7 and rewriter.sizes == [2, 2]
    assert_nothing_left(rewriter)


def test_frozen_embedding(rewriter):
    """The first layer's input needs no gradient: gemm_4bit stands there without a function around it, for few rows too."""
    model = tiny_qlora()
    model.get_input_embeddings().requires_grad_(False)
    assert_all_rewritten(model, rewriter)
    assert rewriter.sizes == [3, 1, 2, 1]


def test_dropout_and_two_adapters(rewriter):
    """Everything that lora_linear takes of plain bases."""
    from peft import LoraConfig

    model = tiny_qlora(lora_dropout=0.5)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    random_b(model)
    rewriter.compile(model)(**batch_for(model)).loss.backward()
    assert rewriter.sizes == [3, 1, 2, 1]
    assert [len(node.args[3]) for node in nodes(rewriter) if node.target is lora_linear.op] == [5, 1, 3, 1]
    assert_nothing_left(rewriter)


def test_without_adapters(rewriter):
    model = tiny_qlora(target_modules=["q_proj"]).unload().train()
    model.lm_head.weight.requires_grad_(True)  # a trained head
    assert_same(dequantized(model), rewriter.compile(model), batch_for(model))
    assert len(quantized(rewriter)) == 7 and not rewriter.sizes
    assert_nothing_left(rewriter)


@pytest.mark.parametrize("rows", [64, 66])
def test_few_rows_without_gradients_stay(rows, rewriter, recwarn):
    model = tiny_qlora().eval()
    batch = batch_for(model, seq=rows // 2)
    with torch.no_grad():
        torch.testing.assert_close(rewriter.compile(model)(**batch).logits, model(**batch).logits)
    rows_of = Counter((row.op, row.provider) for row in rewriter.reports[0].rewrites if row.pass_name == "quant_linear")
    if rows == 64:
        assert rows_of == {("bitsandbytes::gemm_4bit", "gemm_4bit"): 7} and rewriter.sizes == []
        assert rewriter.misses == {"base is bitsandbytes' kernel for few rows": 7}
    else:
        assert rows_of == {("fastft::dequantize_4bit", "dequantize"): 7} and rewriter.sizes == [3, 1, 2, 1]
    assert not [warning for warning in recwarn if "fastft" in str(warning.message)]


def test_quantized_head(rewriter):
    """transformers leaves the head alone unless `llm_int8_skip_modules` says otherwise."""
    model = tiny_qlora(target_modules=["q_proj"])
    head = model.lm_head
    model.get_base_model().lm_head = tiny.quantize(OneLinear(head)).linear
    assert_same(dequantized(model), rewriter.compile(model), batch_for(model))
    assert quantized(rewriter)[0] == "lm_head" and len(quantized(rewriter)) == 8
    assert_nothing_left(rewriter)


def test_adapters_are_saved_and_loaded_without_fastft(tmp_path, rewriter):
    from peft import PeftModel

    model, again = tiny_qlora(), tiny_qlora().unload()
    batch, compiled = batch_for(model), rewriter.compile(model)
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "lora_" in name], lr=0.5)
    first = compiled(**batch).loss
    first.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*model.safetensors.index*")) and (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000
    again = PeftModel.from_pretrained(again, tmp_path).train()
    trained, loaded = compiled(**batch), again(**batch)
    assert abs(first - loaded.loss) > 0.01
    torch.testing.assert_close(trained.loss, loaded.loss)
    torch.testing.assert_close(trained.logits + 0, loaded.logits)


def weights_made(graph: torch.fx.Graph) -> tuple[int, int]:
    """How many weights are dequantized, and how many of them are there at once at most."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    spans = []
    for node in graph.nodes:
        if node.target in (dequantize_4bit, dequantize_after):
            readers = [*node.users]
            for reader in readers:
                readers += reader.users if len(reader.all_input_nodes) == 1 else []
            spans.append((order[node], max(order[reader] for reader in readers)))
    return len(spans), max(sum(start <= at <= end for start, end in spans) for at, _ in spans)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_only_the_packed_weight_is_saved(checkpointed, lowered):
    """Each weight is dequantized right before it is read. In the backward once, also where the forward is run again: for both."""
    model = tiny_qlora(dtype=BF16, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    model.config.use_cache = False
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lowered.compile(model)(**batch_for(model, batch=3)).loss.backward()
    assert lowered.sizes == [3, 1]
    forward, backward = lowered.aten
    (outputs,) = next(node for node in forward.graph.nodes if node.op == "output").args
    saved = [node.meta["val"] for node in outputs if node is not None and node.op != "placeholder"]
    matrices = {tuple(item.shape) for item in saved if isinstance(item, torch.Tensor) and item.dim() == 2}
    weights = {tuple(module.quant_state.shape) for module in model.modules() if isinstance(module, Linear4bit)}
    assert matrices and not matrices & (weights | {shape[::-1] for shape in weights})
    assert weights_made(forward.graph) == (7, 1)
    assert weights_made(backward.graph) == (7, 7 if checkpointed else 1)


def test_inspect_graph(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inspect_graph.py", *"--arch llama --layers 1 --lora --quant fp4 --no-compile --json".split()])
    inspect_graph.main()
    (graph,) = json.loads(capsys.readouterr().out)["graphs"]
    assert [row["provider"] for row in graph["rewrites"] if row["pass"] == "quant_linear"] == ["dequantize"] * 7
    assert not graph["misses"]


def test_llm_int8_is_named_and_trains_right(rewriter):
    model = with_lora(tiny.quantize(tiny.tiny_model("llama", layers=1, dtype=BF16, seq=16), "int8")).train()
    batch = batch_for(model)
    expected, found = contract.gradients(model, batch), contract.gradients(rewriter.compile(model), batch)
    assert expected.keys() == found.keys() and all(found[name].any() for name in found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0.1, atol=0.05 * expected[name].abs().max().item())
    assert Counter(row.reason for row in rewriter.reports[0].misses if row.pass_name == "quant_linear") == {"weight in 8 bits (LLM.int8, fp8)": 7}
    assert not quantized(rewriter) and not rewriter.sizes and sum(rewriter.misses.values()) == 7
