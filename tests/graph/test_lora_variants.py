"""lora_linear on tiny Llamas: dtypes, adapter options, training modes, changing shapes, and what is not taken."""

import contextlib

import pytest
import tiny
import torch
from conftest import Rewriter, assert_same, batch_for, lora_modules, random_b, tiny_lora

from fastft import contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def autocast():
    return torch.autocast("cpu", BF16)


def assert_all_rewritten(model, rewriter, batch=None, **options):
    assert_same(model, rewriter.compile(model), batch or batch_for(model), **options)
    assert rewriter.modules == lora_modules(model)
    assert rewriter.misses == {}


# name -> (base dtype, adapters in fp32, autocast)
DTYPES = {
    "fp32": (FP32, True, contextlib.nullcontext),
    "fp32, autocast": (FP32, True, autocast),
    "bf16, fp32 adapters": (BF16, True, contextlib.nullcontext),
    "bf16, fp32 adapters, autocast": (BF16, True, autocast),
    "bf16 throughout": (BF16, False, contextlib.nullcontext),
    "fp16, fp32 adapters": (FP16, True, contextlib.nullcontext),
    "fp64": (torch.float64, True, contextlib.nullcontext),
}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name, rewriter):
    base, wide, context = DTYPES[name]
    model = tiny_lora(dtype=base, autocast_adapter_dtype=wide)
    adapters = {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
    assert adapters == {FP32 if wide and base in (BF16, FP16) else base}
    with context():
        assert_all_rewritten(model, rewriter, dtype=BF16 if context is autocast else base)


# LoraConfig settings, on Llama unless `arch` says otherwise
ADAPTERS = {
    "rsLoRA": dict(use_rslora=True, r=16),
    "lora_bias": dict(lora_bias=True),
    "base bias trained": dict(arch="qwen2", bias="lora_only"),
    "rank 1": dict(r=1),
    "rank 7": dict(r=7),
    "unequal ranks": dict(rank_pattern={"q_proj": 1, "v_proj": 7}, alpha_pattern={"q_proj": 3}),
    "one of a group": dict(target_modules=["k_proj", "up_proj"]),
    "first layer only": dict(layers=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[0]),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_adapter_options(name, rewriter):
    config = {"arch": "llama"} | ADAPTERS[name]
    assert_all_rewritten(tiny_lora(**config), rewriter)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_trained_base(dtype, rewriter):
    model = tiny_lora(dtype=dtype).requires_grad_(True)
    assert_all_rewritten(model, rewriter, dtype=dtype)


def second_adapter(model, **config):
    """Adds adapter "other" beside the first, both active and trained."""
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "up_proj"]} | config)))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return random_b(model)


def test_two_active_adapters(rewriter):
    assert_all_rewritten(second_adapter(tiny_lora()), rewriter)
    assert rewriter.sizes == [3, 1, 2, 1]


@pytest.mark.parametrize("arch, reentrant", [("llama", False), ("llama", True), ("falcon", False)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing(arch, reentrant, rewriter):
    """Dynamo makes the transposes in Falcon's `x @ weight.T` outside of the checkpoint."""
    model = tiny_lora(arch, layers=2)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # breaks the graph: Dynamo does not trace `requires_grad_`
        model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    assert_same(model, rewriter.compile(model), batch_for(model))
    # behind the graph break paths start at the inner model
    assert [path.removeprefix("model.") for path in rewriter.modules] == [path.removeprefix("model.") for path in lora_modules(model)]
    assert rewriter.misses == {}


def logits(compiled, batch):
    return compiled(**batch).logits


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_modes_without_dropout_agree(mode, rewriter):
    model = tiny_lora(lora_dropout=0.0 if mode == "train" else 0.5).train(mode == "train")
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, contextlib.nullcontext)
    with context():
        torch.testing.assert_close(logits(rewriter.compile(model), batch_for(model)), logits(model, batch_for(model)))
    assert rewriter.modules == lora_modules(model)


def test_train_and_eval_of_one_compiled_model(rewriter):
    model, batch = tiny_lora(lora_dropout=0.5), None
    compiled, batch = rewriter.compile(model), batch_for(model)
    torch.testing.assert_close(logits(compiled.eval(), batch), logits(model, batch))
    assert not torch.allclose(logits(compiled.train(), batch), logits(model.eval(), batch))
    assert any(node.target is torch.randint for node in rewriter.graphs[-1].graph.nodes)
    assert not any(node.target is torch.randint for node in rewriter.graphs[0].graph.nodes)


def test_generate(rewriter):
    model = tiny_lora().eval()
    prompt = batch_for(model, seq=5)["input_ids"]
    expected = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    base = model.get_base_model()
    base.forward = rewriter.compile(base.forward)
    torch.testing.assert_close(model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)
    assert set(rewriter.modules) == set(lora_modules(model)) and not rewriter.misses


@pytest.mark.parametrize("how", ["disabled", "merged"])
def test_no_adapter_in_the_graph(how, rewriter):
    model = tiny_lora()
    if how == "merged":
        model.merge_adapter()
    with model.disable_adapter() if how == "disabled" else contextlib.nullcontext():
        assert_same(model, rewriter.compile(model), batch_for(model))
    assert rewriter.sizes == [] and rewriter.misses == {} and len(rewriter.graphs) == 1


def test_switching_adapters_off_and_on(rewriter):
    model, compiled = tiny_lora(), None
    compiled, batch = rewriter.compile(model), batch_for(model)
    with_adapters = logits(compiled, batch)
    with model.disable_adapter():
        torch.testing.assert_close(logits(compiled, batch), logits(model, batch))
    torch.testing.assert_close(logits(compiled, batch), with_adapters)
    assert rewriter.sizes == [3, 1, 2, 1]


def test_changing_lengths_compile_twice(rewriter):
    """Once for the first length, once for all others; a batch of one is another specialisation of Dynamo's."""
    model = tiny_lora()
    compiled = rewriter.compile(model)
    for length in (16, 24, 17, 31, 8):
        batch = batch_for(model, seq=length)
        torch.testing.assert_close(logits(compiled, batch), logits(model, batch))
    assert len(rewriter.graphs) == 2
    assert_same(model, compiled, batch_for(model, seq=25))
    assert_same(model, compiled, batch_for(model, batch=1, seq=13))
    assert_same(model, compiled, batch_for(model, batch=1, seq=21))
    assert len(rewriter.graphs) == 3
    assert rewriter.sizes == [3, 1, 2, 1] * 3 and not rewriter.misses


def test_dora_is_named_and_trains_right(rewriter):
    model = tiny_lora(use_dora=True, target_modules=["q_proj", "v_proj"])
    assert_same(model, rewriter.compile(model), batch_for(model))
    assert rewriter.sizes == [] and set(rewriter.misses) == {"scaled by a tensor (DoRA)"}
    assert sum(rewriter.misses.values()) == 2


def test_embedding_lora_is_named_and_trains_right(rewriter):
    model = tiny_lora(target_modules=["embed_tokens", "q_proj"])
    assert_same(model, rewriter.compile(model), batch_for(model))
    assert rewriter.modules == ["model.layers.0.self_attn.q_proj"]
    assert rewriter.misses == {"adapter on an embedding": 1}
    assert [row.fqn for report in rewriter.reports for row in report.misses] == [["model.embed_tokens"]]


def test_autocast_leaves_float64_alone():
    model = tiny_lora(target_modules=["q_proj", "down_proj"]).double()
    rewriter, batch = Rewriter(), batch_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        eager, found = contract.gradients(model, batch), contract.gradients(rewriter.compile(model), batch)
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-8)
    rows = {row.pass_name for report in rewriter.reports for row in report.rewrites}
    assert rows >= {"lora_linear", "attention", "linear_cross_entropy"}


def test_a_linear_of_the_embedding_is_no_adapter(rewriter):
    """OLMo 2 has no norm before its attention; with float32 weights under autocast only a cast stands between."""
    model = tiny.add_lora(tiny.tiny_model("olmo2", layers=1)).train()
    model.config.use_cache = False
    with torch.autocast("cpu", torch.bfloat16):
        rewriter.compile(model)(**batch_for(model))
    assert sorted(rewriter.sizes) == [1, 1, 2, 3] and not rewriter.misses


def test_disabled_pass():
    rewriter = Rewriter(disable=("lora_linear",))
    model = tiny_lora()
    assert_same(model, rewriter.compile(model), batch_for(model))
    assert rewriter.sizes == [] and rewriter.misses == {}
