"""lora_linear on whole models: every adapter is found, in the right groups, and loss and gradients keep the contract."""

import pytest
import tiny
import torch
from conftest import Lowered, assert_same, batch_for, lora_modules, tiny_lora

import fastft
from fastft.kernels import lora_linear as kernel

LLAMA = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
# architecture -> the groups of one layer, in graph order
GROUPS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,  # base bias
    "qwen3": LLAMA,
    "gemma3_text": LLAMA,
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],  # Conv1D
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "mixtral": [["q_proj", "k_proj", "v_proj"], ["o_proj"]],  # the experts are 3-D parameters
    "qwen3_moe": [["q_proj", "k_proj", "v_proj"], ["o_proj"]],
}


def tails(groups: list[list[str]], like: list[list[str]]) -> list[list[str]]:
    """The last components of module paths, as many as the table above gives."""
    names = [[name for group in like for name in group if path.endswith("." + name)] for paths in groups for path in paths]
    names = iter([found[0] if found else "?" for found in names])
    return [[next(names) for _ in group] for group in groups]


@pytest.mark.parametrize("arch", GROUPS)
def test_every_adapter_is_rewritten_in_its_group(arch, rewriter):
    model = tiny.add_lora(tiny.tiny_model(arch, layers=2, seq=16)).train()
    assert_same(model, rewriter.compile(model), batch_for(model))
    assert rewriter.misses == {}
    assert rewriter.modules == lora_modules(model)
    assert tails(rewriter.groups, GROUPS[arch]) == GROUPS[arch] * 2


@pytest.mark.parametrize("arch, layers", [("llama", 1), ("llama", 4), ("gpt2", 3), ("qwen3_moe", 3)])
def test_counts_grow_with_the_layers(arch, layers):
    model = tiny.add_lora(tiny.tiny_model(arch, layers=layers, seq=16)).train()
    found = fastft.explain(model, **batch_for(model))
    rewrites = [row for report in found.graphs for row in report.rewrites if row.pass_name == "lora_linear"]
    assert len(rewrites) == layers * len(GROUPS[arch])
    assert sum(len(row.fqn) for row in rewrites) == layers * sum(map(len, GROUPS[arch])) == len(lora_modules(model))
    assert not any(report.dropped for report in found.graphs)
    assert not [row for report in found.graphs for row in report.misses if row.pass_name == "lora_linear"]
    assert {row.op for row in rewrites} == {"fastft::lora_linear"}
    for row in rewrites:
        file, _, line = row.source.rpartition(":")
        assert file.startswith("transformers/") and int(line) > 0, row.source


def test_partial_targets(rewriter):
    model = tiny_lora(layers=2, target_modules=["q_proj", "v_proj", "up_proj"])
    assert_same(model, rewriter.compile(model), batch_for(model))
    assert tails(rewriter.groups, LLAMA) == [["q_proj", "v_proj"], ["up_proj"]] * 2
    assert rewriter.modules == lora_modules(model) and not rewriter.misses


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])  # gemma3 ties its head to the embedding
def test_lm_head(arch, rewriter):
    model = tiny_lora(arch, target_modules=["q_proj", "lm_head"])
    assert_same(model, rewriter.compile(model), batch_for(model))
    assert rewriter.modules == lora_modules(model) == ["lm_head", "model.layers.0.self_attn.q_proj"]


def test_gemms_add_into_the_buffers_of_one_launch(monkeypatch):
    """With the providers of GPUs: one op makes the summands of a group, and every GEMM writes into its own."""
    monkeypatch.setattr(kernel, "choose", lambda *args: ("outer", "one_read"))
    model, lowered = tiny_lora(), Lowered(disable=["lora_mlp"])
    assert_same(model, lowered.compile(model), batch_for(model))
    names = [node.target for graph in lowered.aten for node in graph.graph.nodes]
    ops = torch.ops.fastft
    assert names.count(ops.low_rank_mms.default) == names.count(ops.lora_grads.default) == 4
    assert ops.accumulate_mm.default not in names and names.count(ops.accumulate_mm_.default) == 14


def prepared_again(backward, rank: int, rows: int) -> tuple[list, list, list]:
    """What a backward graph has of an adapter's size; what of it scales, casts or stacks; and what of that starts from the graph's inputs alone."""
    small = [node for node in backward.graph.nodes if node.op == "call_function" and getattr(node.meta.get("val"), "ndim", 0) == 2]
    small = [node for node in small if min(node.meta["val"].shape) <= 3 * rank and node.meta["val"].shape[0] != rows]
    pointwise = [node for node in small if any(name in str(node.target) for name in ("cat", "mul.", "convert", "_to_copy"))]
    of_inputs = []
    for node in pointwise:
        if all(item.op == "placeholder" or item in of_inputs for item in node.all_input_nodes):
            of_inputs.append(node)
    return small, pointwise, of_inputs


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("disable", [[], ["lora_mlp"]])
def test_adapters_are_prepared_once(adapters, disable, monkeypatch):
    """With the providers of GPUs: stacked, scaled and cast for the forward, and saved."""
    monkeypatch.setattr(kernel, "choose", lambda *args: ("outer", "one_read"))
    lowered, rows = Lowered(disable=disable), 4 * 64
    model = tiny_lora(dtype=torch.bfloat16, r=2, lora_alpha=6, autocast_adapter_dtype=adapters == torch.float32)
    assert_same(model, lowered.compile(model), tiny.tiny_batch(model.config, batch=4, seq=64))
    small, _, of_inputs = prepared_again(lowered.aten[1], 2, rows)
    assert small and not of_inputs


@pytest.mark.parametrize("rank, adapters, prepared", [(2, torch.bfloat16, 0), (2, torch.float32, 0), (16, torch.bfloat16, 4)])
def test_few_rows_take_few_launches(rank, adapters, prepared, lowered):
    """Beside GEMMs the backward has nothing of an adapter's size: no stack of A made again, no scaling or cast of a gradient in x's dtype."""
    model = tiny_lora(dtype=torch.bfloat16, r=rank, lora_alpha=3 * rank, autocast_adapter_dtype=adapters == torch.float32)
    assert_same(model, lowered.compile(model), tiny.tiny_batch(model.config, batch=4, seq=64))
    small, pointwise, of_inputs = prepared_again(lowered.aten[1], rank, rows=4 * 64)
    assert len([node for node in of_inputs if not any(user in of_inputs for user in node.users)]) == prepared, "A is stacked once for each group"
    assert small and (adapters == torch.float32 or pointwise == of_inputs), "the gradients come out of the GEMMs"
