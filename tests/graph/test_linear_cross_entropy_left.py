"""linear_cross_entropy leaves what it does not understand, says why, and the gradients stay right."""

import pytest
import tiny
import torch
from conftest import batch_for
from graph.test_linear_cross_entropy import NOT_RETURNED, VOCABULARY, ByHand, Loss, assert_rewritten, assert_same_gradients, labelled, lora_for, model_for
from graph.test_linear_cross_entropy_forms import B, S, Small, V, batch, capped, check, counts, first, flat, in_range, row_by_row
from torch import nn
from torch.nn import functional as F

from fastft.passes import cross_entropy_head as head
from fastft.passes import cross_entropy_pattern as pattern
from fastft.passes import deferred_logits as deferred
from fastft.passes.linear_cross_entropy import INSIDE, READ, READ_BY


def no_grad_between(m, x, y):
    logits = m.head(x)
    with torch.no_grad():
        loss = flat(logits, y)
    return loss + x.sum()


def hidden_written_between(m, x, y):
    logits = F.linear(x, m.head.weight.detach())
    x.mul_(2.0)
    return flat(logits, y)


def autocast_between(m, x, y):
    logits = m.head(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return flat(logits, y)


def written_between(m, x, y):
    logits = m.head(x)
    logits[..., 0] = 0.0
    return flat(logits, y)


def with_plain_z(m, x, y):
    """It counts rows whose labels are ignored."""
    logits = m.head(x)
    return flat(logits, y) + 0.1 * logits.logsumexp(-1).pow(2).mean()


def with_z_of_other_rows(m, x, y):
    logits, ones = m.head(x), counts(y.flip(1))
    return flat(logits, y) + 0.1 * ((logits.logsumexp(-1) ** 2 * ones).sum() / ones.sum())


def with_z_before_the_shift(m, x, y):
    logits = m.head(x)
    return flat(logits[:, :-1], y[:, 1:]) + 0.1 * ((logits.logsumexp(-1) ** 2 * counts(y)).sum() / counts(y).sum())


def with_z_in_another_order(m, x, y):
    logits, turned = m.head(x[:, :B]), y[:, :B].t()
    return flat(logits.transpose(0, 1), turned) + 0.1 * ((logits.logsumexp(-1) ** 2 * counts(turned)).sum() / counts(turned).sum())


def with_z_twice(m, x, y):
    logits = m.head(x)
    z = (logits.logsumexp(-1) ** 2 * counts(y)).sum() / counts(y).sum()
    return flat(logits, y) + 0.1 * z, z


def with_accuracy(m, x, y):
    logits = m.head(x)
    return flat(logits, y), (logits.argmax(-1) == y).float().mean()


def with_entropy(m, x, y):
    logits = m.head(x)
    return flat(logits, y) + (F.softmax(logits.float(), -1) * F.log_softmax(logits, -1)).sum(-1).mean()


def two_losses(m, x, y):
    logits = m.head(x)
    return flat(logits, y) + flat(logits.view(-1, V), y.roll(1))


def one_by_one(m, x, y):
    return torch.stack([F.cross_entropy(row, label) for row, label in zip(m.head(x), y, strict=True)]).mean()


def norm_of_logits(m, x, y):
    logits = m.head(x)
    return flat(logits, y) + logits.square().mean()


def two_adapted_heads(m, x, y):
    one = m.head(x) + F.linear(F.linear(x, m.a), m.b)
    other = m.other(x) + F.linear(F.linear(x, m.a), m.b)
    return flat(one, y) + flat(other, y)


def soft(labels):
    return F.one_hot(in_range(labels), V).float()


# name: (loss, reason)
MISSES = {
    "class weights": (lambda m, x, y: flat(m.head(x), y, weight=m.vector.detach().abs()), pattern.CLASS_WEIGHTS),
    "probabilities": (lambda m, x, y: F.cross_entropy(m.head(x).view(-1, V), soft(y).view(-1, V)), pattern.PROBABILITIES),
    "deprecated": (lambda m, x, y: flat(m.head(x), y, size_average=False), pattern.ARGUMENTS),
    "tensor scale": (lambda m, x, y: flat(m.head(x) * m.temperature, y), head.TENSOR_SCALE),
    "negative scale": (lambda m, x, y: flat(m.head(x) * -1.0, y), head.NOT_POSITIVE),
    "negative cap": (lambda m, x, y: flat(torch.tanh(m.head(x)) * -2.0, y), head.NOT_POSITIVE),
    "double": (lambda m, x, y: flat(m.head(x).double(), y), head.FLOAT64),
    "two caps": (lambda m, x, y: flat(capped(capped(m.head(x))), y), head.NOT_LINEAR),
    "einsum": (lambda m, x, y: flat(torch.einsum("bsk,vk->bsv", x, m.head.weight), y), head.NOT_LINEAR),
    "sum of two heads": (lambda m, x, y: flat(m.head(x) + m.other(x), y), head.NOT_LINEAR),
    "masked entries": (lambda m, x, y: flat(m.head(x).masked_fill(m.vector > 0, -9.0), y), head.NOT_LINEAR),
    "chosen rows": (lambda m, x, y: F.cross_entropy(m.head(x)[torch.arange(B)[:, None], torch.tensor([[1, 3]])].mT, y[:, :2]), head.NOT_LINEAR),
    "detached": (lambda m, x, y: flat(m.head(x).detach(), y) + x.sum(), head.NOT_LINEAR),
    "nll of a log_softmax over tokens": (lambda m, x, y: F.nll_loss(m.head(x).log_softmax(1).view(-1, V), y.view(-1)), head.NOT_LINEAR),
    "tokens as classes": (lambda m, x, y: F.cross_entropy(m.head(x), torch.arange(B * V).view(B, V) % S), head.NOT_LINEAR),
    "nll of plain scores": (lambda m, x, y: F.nll_loss(m.head(x).view(-1, V), y.view(-1)), head.NOT_LINEAR),
    "scaled log_softmax": (lambda m, x, y: F.nll_loss((2.0 * m.head(x).log_softmax(-1)).view(-1, V), y.view(-1)), head.NOT_LINEAR),
    "bias that adds a dimension": (lambda m, x, y: flat(m.head(x) + m.vector.view(1, 1, 1, V), y), head.NOT_LINEAR),
    "part of the vocabulary": (lambda m, x, y: F.cross_entropy(m.head(x)[..., : V - 1].reshape(-1, V - 1), y.view(-1).clamp(max=V - 2)), head.CUT),
    "an input": (lambda m, x, y: flat(m.scores, y) + x.sum(), head.INPUT),
    "in place": (lambda m, x, y: flat(m.head(x).div_(2.0), y), head.INTERRUPTED),
    "written to": (written_between, head.INTERRUPTED),
    "hidden state written to before the loss": (hidden_written_between, head.INTERRUPTED),
    "no_grad": (no_grad_between, head.INTERRUPTED),
    "autocast": (autocast_between, head.INTERRUPTED),
    "two adapted heads": (two_adapted_heads, head.SIBLINGS),
    "z-loss over all": (with_plain_z, READ_BY["logsumexp"]),
    "z-loss over others": (with_z_of_other_rows, READ_BY["logsumexp"]),
    "z-loss before the shift": (with_z_before_the_shift, READ_BY["logsumexp"]),
    "z-loss in another order": (with_z_in_another_order, READ_BY["logsumexp"]),
    "z-loss returned": (with_z_twice, READ),
    "rows in another order": (lambda m, x, y: row_by_row(m.head(x), in_range(y), [1, 0])[0].sum(), READ_BY["log_softmax"]),
    "rows twice": (lambda m, x, y: row_by_row(m.head(x), in_range(y), [0, 1, 1]).sum(), READ_BY["log_softmax"]),
    "accuracy": (with_accuracy, READ_BY["argmax"]),
    "entropy": (with_entropy, READ_BY["softmax"]),
    "two losses": (two_losses, READ_BY["cross_entropy"]),
    "row by row": (one_by_one, READ_BY["cross_entropy"]),
    "another reader": (norm_of_logits, READ),
    "log-probabilities returned": (lambda m, x, y: (F.nll_loss((logp := m.head(x).log_softmax(-1)).view(-1, V), y.view(-1)), logp), READ_BY["log_softmax"]),
    # what is returned
    "flat logits returned": (lambda m, x, y: (flat(logits := m.head(x), y), logits.view(-1, V)), deferred.MOVED),
    "a part returned": (lambda m, x, y: (flat(logits := m.head(x), y), logits[:, -1:]), deferred.MOVED),
    "transposed and returned": (lambda m, x, y: (flat(logits := m.head(x[:, :B]), y[:, :B]), logits.transpose(0, 1)), deferred.MOVED),
    "computed weight": (lambda m, x, y: (flat(logits := F.linear(x, m.head.weight * m.temperature), y), logits), deferred.MORE),
    "hidden state written to": (lambda m, x, y: (flat(logits := F.linear(x, m.head.weight.detach()), y), logits, x[:, 1:].zero_()), deferred.WRITTEN),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSES)
def test_left(case):
    loss, reason = MISSES[case]
    model, rewriter = Small(loss), Loss()
    model.register_buffer("scores", torch.randn(B, S, V))
    assert_same_gradients(model, rewriter.compile(model), batch(), first)
    assert set(rewriter.misses) == {reason} and not rewriter.calls and not rewriter.providers


SILENT = {
    "classes of a sequence": lambda m, x, y: F.cross_entropy(m.head(x.mean(1)), in_range(y[:, 0])),
    "classes of a token": lambda m, x, y: F.cross_entropy(F.linear(x, m.head.weight[:5]).view(-1, 5), in_range(y).view(-1) % 5),
    "chosen rows": lambda m, x, y: F.cross_entropy(m.head(x)[torch.arange(B), torch.tensor([1, 3])], in_range(y[:, 0])),
    "a router": lambda m, x, y: F.softmax(m.head(x), -1).gather(-1, in_range(y)[..., None]).sum(),
    "top entries": lambda m, x, y: F.log_softmax(m.head(x), -1).gather(-1, in_range(y)[..., None].expand(-1, -1, 3)).sum(),
    "regression": lambda m, x, y: F.mse_loss(m.head(x), soft(y)),
}


@pytest.mark.parametrize("case", SILENT)
def test_left_silently(case):
    rewriter = check(SILENT[case])
    assert not rewriter.misses and not rewriter.calls


def test_rows_that_were_never_tokens_count_by_size(monkeypatch):
    def loss(m, x, y):
        return F.cross_entropy(m.head(x.mean(1)), in_range(y[:, 0]))

    monkeypatch.setattr(head, "LARGE", B * V)
    assert len(check(loss).calls) == 1
    torch._dynamo.reset()
    monkeypatch.setattr(head, "LARGE", B * V + 1)
    assert not check(loss).calls


def random_labels(m, x, y):
    return flat(m.head(x), torch.where(torch.randint(0, 2, (B, S)) > 0, y, -100)) + F.dropout(x, 0.5).sum()


def labels_of_activations(m, x, y):
    return flat(m.head(x), torch.where(x.detach()[..., 0] > 0, y, -100))


@pytest.mark.parametrize("loss", [random_labels, labels_of_activations])
def test_labels_that_are_not_made_of_inputs_alone(loss):
    """The op finds the rows itself, and random numbers are drawn in eager's order."""
    assert check(loss).calls[0].order is None


def write_labels(m, x, y):
    logits = m.head(x)
    y = y.clone()
    y[y == 3] = -100
    return flat(logits, y)


def write_the_input(m, x, y):
    y[:, 4:] = -100
    return flat(m.head(x), y)


@pytest.mark.parametrize("loss", [write_labels, write_the_input])
def test_labels_that_are_written_to(loss):
    """Their rows are not known before; the rewrite stays right."""
    model, rewriter = Small(loss), Loss()
    assert_same_gradients(model, rewriter.compile(model), batch(), first)
    assert rewriter.calls[0].order is None and not rewriter.misses


def test_dropout_of_the_heads_adapter_is_left():
    model = lora_for(lora_dropout=0.1)
    rewriter = Loss()
    rewriter.compile(model)(**labelled(model)).loss.backward()
    assert rewriter.misses == {head.DROPOUT: 1} and not rewriter.calls


def test_inside_a_checkpoint():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)

        def loss(self, x, labels):
            return F.cross_entropy(self.head(x).view(-1, VOCABULARY), labels.view(-1))

        def forward(self, input_ids, labels):
            return torch.utils.checkpoint.checkpoint(self.loss, self.embed(input_ids), labels, use_reentrant=False)

    model, rewriter = Inside(), Loss()
    ids = torch.randint(0, VOCABULARY, (2, 8))
    rewriter.compile(model)(ids, ids).backward()
    assert rewriter.misses == {INSIDE: 1} and not rewriter.calls


def test_materialized():
    """The option; without logits among the outputs it says nothing."""
    model = model_for("llama")
    given = labelled(model)
    rewriter = Loss(logits="materialize")
    compiled = rewriter.compile(model)
    assert_same_gradients(model, compiled, given)
    assert rewriter.misses == {deferred.OFF: 1} and not rewriter.calls and not rewriter.plans
    torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
    rewriter = Loss(logits="materialize")
    assert_same_gradients(ByHand(model), rewriter.compile(ByHand(model)), given)
    assert_rewritten(rewriter, NOT_RETURNED, "model.lm_head")


def test_no_labels():
    model = model_for("llama").eval()
    rewriter = Loss()
    ids = labelled(model)["input_ids"]
    torch.testing.assert_close(rewriter.compile(model)(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not rewriter.calls and not rewriter.misses and not rewriter.plans


def test_graph_break_between_head_and_loss():
    model = tiny.tiny_model("llama", layers=1, seq=16).train()
    model.lm_head.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    rewriter = Loss()
    assert_same_gradients(model, rewriter.compile(model), labelled(model))
    assert not rewriter.calls and set(rewriter.misses) == {head.INPUT}


@pytest.mark.parametrize("task", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_other_heads_are_left_silently(task):
    import transformers

    config = tiny.tiny_config("llama", layers=1, seq=16)
    config.num_labels, config.pad_token_id = 5, 0
    model = getattr(transformers, task)(config).train()
    given = batch_for(model)
    given["labels"] = given["labels"] % 5 if "Token" in task else given["labels"][:, 0] % 5
    rewriter = Loss()
    assert_same_gradients(model, rewriter.compile(model), given)
    assert not rewriter.misses and not rewriter.calls
