"""Encoders, encoder-decoders, classifiers and vision models: exact counts and eager's gradients, texts padded."""

import re

import pytest
import tiny
import tiny_tasks
from conftest import Rewriter, assert_same, lora_modules

from .test_attention import take_flex

PADDING = "mask: padding"
CASES = {
    ("bert", "masked-lm"): ({PADDING: 2}, "cls.predictions.decoder"),
    ("modernbert", "masked-lm"): ({PADDING: 1, "mask: window 9, ahead 8, padding": 1}, "decoder"),
    ("bart", "seq2seq-lm"): ({PADDING: 4, "flash: causal": 2}, "lm_head"),
    ("t5", "seq2seq-lm"): ({"math: padding": 2}, "lm_head"),  # the others have relative biases
    ("llama", "sequence-classification"): ({"mask: causal, padding": 2}, None),
    ("roberta", "question-answering"): ({PADDING: 2}, None),
    ("qwen3", "token-classification"): ({"mask: causal, padding": 2}, None),
    ("vit", "image-classification"): ({"flash: full": 2}, None),
}


@pytest.mark.parametrize("provider", ["cpu", "flex"])
@pytest.mark.parametrize("arch, task", CASES)
def test_task(arch, task, provider, monkeypatch):
    attention, head = CASES[arch, task]
    if provider == "flex":
        take_flex(monkeypatch)
        attention = {re.sub("mask|math", "flex", row): count for row, count in attention.items()}
    model = tiny.add_lora(tiny.tiny_model(arch, task=task, seq=32)).train()
    batch = tiny_tasks.batch(model.config, task, tiny.tiny_batch(model.config, seq=32))
    rewriter = Rewriter(of="attention")
    assert_same(model, rewriter.compile(model), batch)
    assert rewriter.providers == attention
    rewriter.of = "lora_linear"
    assert sorted(rewriter.modules) == sorted(lora_modules(model)) and not rewriter.misses
    rewriter.of = "linear_cross_entropy"
    assert rewriter.groups == ([[head]] if head else []) and not rewriter.misses
