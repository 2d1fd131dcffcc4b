"""unread_queries: the loss and every gradient stay, whatever the labels of padding are; and what must not be taken. documents: who is named."""

import pytest
import tiny
import torch
from conftest import Rewriter, assert_same
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from fastft import match
from fastft.kernels import attention as kernel
from fastft.kernels import mask as masks
from fastft.passes.documents import LEAK
from fastft.passes.unread_queries import MIXES, NO_LOSS, OTHER_OUTPUT

from .test_attention import take_flex

BATCH, LENGTH = 2, 24


@pytest.fixture(autouse=True)
def flex(monkeypatch):
    """FlexAttention for whatever it can do; its tiles are held against its mask."""
    take_flex(monkeypatch)


def batch(side="right", labels="ignored"):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 200, (BATCH, LENGTH), generator=generator)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, slice(15, None) if side == "right" else slice(0, 9)] = 0
    target = ids.clone()
    if labels == "ignored":
        target = target.masked_fill(mask == 0, -100)
    elif labels == "one":  # one padded token counts
        target = target.masked_fill(mask == 0, -100)
        target[1, 18 if side == "right" else 4] = 7
    return {"input_ids": ids, "attention_mask": mask, "labels": target}


def taken(rewriter):
    return sum(row.pass_name == "unread_queries" for report in rewriter.reports for row in report.rewrites)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("labels", ["ignored", "one", "all"])
def test_loss_and_gradients_stay(attention, side, labels):
    """Left padding and eager attention: the last query without a key predicts the first real token, and weighs all values alike."""
    model = tiny.tiny_model("llama", attn_implementation=attention, seq=LENGTH).train()
    rewriter = Rewriter(of="unread_queries")
    assert_same(model, rewriter.compile(model), batch(side, labels))
    assert taken(rewriter) == 1 and not rewriter.misses


@pytest.mark.parametrize("arch", ["gemma2", "gpt_oss", "mistral", "deepseek_v3", "mixtral"])
def test_architectures(arch):
    model = tiny.tiny_model(arch, attn_implementation="eager" if arch in ("gemma2", "gpt_oss") else "sdpa", seq=LENGTH).train()
    rewriter = Rewriter(of="unread_queries")
    assert_same(model, rewriter.compile(model), batch("left"))
    assert taken(rewriter) == 1 and not rewriter.misses


def test_tiles_are_fewer(monkeypatch):
    """More than one tile of padding: those tiles are gone, for keys and for queries."""
    monkeypatch.setattr(masks, "BLOCK", 128)
    model = tiny.tiny_model("llama", layers=1, seq=400).train()
    given = {"input_ids": torch.randint(8, 200, (1, 400)), "attention_mask": (torch.arange(400) < 200).long()[None]}
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    counts = []
    for disable in ((), ("unread_queries",)):
        torch._dynamo.reset()
        rewriter = Rewriter(disable=disable)
        rewriter.compile(model)(**given)
        (node,) = (n for n in rewriter.graphs[0].graph.nodes if n.target is kernel.op)
        blocks = kernel.get(node, "blocks")[0].args[0]
        values = [given["attention_mask"]]
        if not disable:
            tokens = blocks.args[0][0].args[0]
            values = masks.tokens_op(values, *tokens.args[1:4], _read(given))
        tiles = torch.ops.fastft.block_mask(values, *blocks.args[1:])
        counts.append(int(tiles[0].sum() + tiles[2].sum()))
    assert counts == [3, 7]


def _read(given):
    return F.pad(given["labels"], (0, 1), value=-100)[:, 1:] != -100


def test_checkpointed_bodies():
    model = tiny.tiny_model("llama", seq=LENGTH).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rewriter = Rewriter(of="unread_queries")
    compiled = rewriter.compile(model)
    given = batch()
    loss = compiled(**given).loss
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(**given).loss.backward()
    assert taken(rewriter) == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)
    bodies = [body for gm in rewriter.graphs for body in match.graph_modules(gm)][1:]
    assert len(bodies) == 2 and all(any(n.target is kernel.op and "t1[b, q]" in kernel.get(n, "allowed") for n in body.graph.nodes) for body in bodies)


class Small(nn.Module):
    """One attention with padding and whatever a test puts behind or before it."""

    def __init__(self, after=None, before=None, hidden=False, causal=True, tokens=None, loss=lambda m, *given: F.cross_entropy(*given)):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(200, 32), nn.Linear(32, 96), nn.Linear(32, 200)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.register_buffer("weights", torch.rand(200))
        self.after, self.before, self.hidden, self.causal, self.tokens, self.loss = after, before, hidden, causal, tokens, loss

    def forward(self, input_ids, attention_mask, labels):
        x = self.embed(input_ids)
        if self.before:
            x = self.before(self, x)
        q, k, v = (t.view(*x.shape[:2], 2, 16).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        place, allowed = torch.arange(LENGTH), attention_mask[:, None, None, :] > 0
        if self.causal:
            allowed = (place[None, :] <= place[:, None]) & allowed
        if self.tokens:
            allowed = allowed & self.tokens(input_ids[:, None, None, :], input_ids[:, None, :, None])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).reshape(x.shape)
        x = x + y
        logits = self.head(x)
        loss = self.loss(self, logits.view(-1, 200), labels.view(-1))
        if self.after:
            loss = self.after(self, x, loss)
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=(x,) if self.hidden else None)


MISSES = {
    "hidden states returned": ({"hidden": True}, OTHER_OUTPUT),
    "another loss": ({"after": lambda m, x, loss: loss + x.pow(2).mean()}, OTHER_OUTPUT),
    "mean over the tokens": ({"before": lambda m, x: x + x.mean(1, keepdim=True)}, MIXES),
    "convolution": ({"before": lambda m, x: x + m.conv(x.transpose(1, 2)).transpose(1, 2)}, MIXES),
    "shift": ({"before": lambda m, x: x + F.pad(x, (0, 0, 1, 0))[:, :-1]}, MIXES),
    "sum over the tokens": ({"before": lambda m, x: x + x.cumsum(1)}, MIXES),
    "linear attention": ({"before": lambda m, x: x + x @ (x.transpose(1, 2) @ x)}, MIXES),
    "attention without padding": ({"before": lambda m, x: F.scaled_dot_product_attention(*[x[:, None]] * 3)[:, 0]}, MIXES),
    "labels written in the graph": ({"loss": lambda m, scores, labels: (labels.__setitem__(26, 9), F.cross_entropy(scores, labels))[1]}, NO_LOSS),
    "smoothing and weights by position": ({"loss": lambda m, *given: F.cross_entropy(*given, m.weights, None, -100, None, "mean", 0.1)}, NO_LOSS),
}


@pytest.mark.parametrize("case", MISSES)
def test_left_as_it_is(case):
    arguments, reason = MISSES[case]
    model = Small(**arguments)
    rewriter = Rewriter(of="unread_queries")
    assert_same(model, rewriter.compile(model), batch("left", "one"))
    assert rewriter.misses == {reason: 1} and not taken(rewriter)


@pytest.mark.parametrize("after", [None, lambda m, x, loss: loss / 3 + 2 * loss])
def test_small_model_is_taken(after):
    model = Small(after)
    rewriter = Rewriter(of="unread_queries")
    assert_same(model, rewriter.compile(model), batch("left", "one"))
    assert taken(rewriter) == 1 and not rewriter.misses


@pytest.mark.parametrize("arguments", [(0,), (0, None, "sum", 0.1)])
def test_ignored_by_position(arguments):
    model = Small(loss=lambda m, *given: F.cross_entropy(*given, None, None, *arguments))
    given, rewriter = batch(), Rewriter(of="unread_queries")
    given["labels"] = given["labels"].clamp(min=0)
    compiled = rewriter.compile(model)
    assert_same(model, compiled, given)
    assert taken(rewriter) == 1 and not rewriter.misses
    with torch.no_grad():
        other = (compiled(**given).logits - model(**given).logits).abs().amax(-1) > 1e-4
    assert torch.equal(other, given["attention_mask"] == 0)  # just these queries are left out


@pytest.mark.parametrize("tokens", [torch.eq, torch.le])
def test_what_else_the_mask_reads_stays(tokens):
    """Documents come before the padding in the text, what has no name after it: its tensor gets another number, because the padding's own is left out."""
    model, given, rewriter = Small(tokens=tokens), batch("left", "one"), Rewriter(of="unread_queries")
    given["input_ids"] = given["input_ids"] // 100 + 8
    assert_same(model, rewriter.compile(model), given)
    assert taken(rewriter) == 1 and not rewriter.misses
    (call,) = (node for node in rewriter.graphs[0].graph.nodes if node.target is kernel.op)
    assert "t0[b, q]" in kernel.get(call, "allowed") and kernel.get(call, "allowed").endswith("(t1[b, kv] == t2[b, q])") and len(kernel.get(call, "reads")) == 3


def test_padding_alone():
    """Keys are forbidden by their padding and by nothing else: a text of one comparison."""
    model, given, rewriter = Small(causal=False), batch(), Rewriter(of="unread_queries")
    given["attention_mask"] *= 2
    assert_same(model, rewriter.compile(model), given)
    assert taken(rewriter) == 1 and not rewriter.misses


def test_no_loss_in_the_graph():
    model = tiny.tiny_model("llama", seq=LENGTH).train()
    given = batch("right", "all")
    del given["labels"]
    rewriter = Rewriter(of="unread_queries")
    got = rewriter.compile(model)(**given).logits
    torch.testing.assert_close(got, model(**given).logits, rtol=1e-4, atol=1e-5)  # padding too
    assert rewriter.misses == {NO_LOSS: 1}


@pytest.mark.parametrize("arch, named", [("falcon_h1", 2), ("qwen3_next", 1), ("llama", 0)])
@pytest.mark.parametrize("rows", [BATCH, 1])
def test_models_that_mix_documents_are_named(arch, named, rows):
    model = tiny.tiny_model(arch, seq=LENGTH).train()
    given = {name: tensor[:rows] for name, tensor in batch().items() if name != "attention_mask"}
    given["position_ids"] = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None].expand(rows, -1).contiguous()
    rewriter = Rewriter(of="documents")
    rewriter.compile(model)(**given)
    assert rewriter.misses == ({LEAK: named} if named else {})
