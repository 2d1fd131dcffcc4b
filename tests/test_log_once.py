"""`logger.warning_once` in a model's forward does not break its graph."""

import logging

import pytest
import tiny
import torch
from conftest import Rewriter, assert_same, batch_for

import fastft


def test_a_class_that_names_no_loss():
    """transformers says so once, between lm_head and loss."""
    model, rewriter = tiny.tiny_model("gpt2", layers=1).train(), Rewriter(of="linear_cross_entropy")
    assert_same(model, rewriter.compile(model, fullgraph=True), batch_for(model))
    assert rewriter.groups == [["lm_head"]] and not rewriter.misses


def test_checkpointing_with_a_cache():
    """`use_cache` is a config's default; every checkpointed layer says once that it makes none."""
    model, rewriter = tiny.tiny_model("llama").train(), Rewriter(of="attention")
    model.gradient_checkpointing_enable()
    model.config.use_cache = True
    assert_same(model, rewriter.compile(model, fullgraph=True), batch_for(model))
    assert len(rewriter.groups) == 2


def test_explain_traces_past_them_too():
    model = tiny.tiny_model("gpt2", layers=1).train()
    with torch._dynamo.config.patch(ignore_logging_functions=set()):  # as before the backend was looked up
        assert len(fastft.explain(model, **batch_for(model)).graphs) == 1


def test_other_messages_still_break():
    model = torch.nn.Linear(4, 4)
    model.register_forward_hook(lambda *_: logging.getLogger("test").warning("shown every time"))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Logger"):
        Rewriter().compile(model, fullgraph=True)(torch.ones(1, 4))
