"""linear_cross_entropy by hand: every spelling of a head, of what is between, of a loss, and of logits that are returned."""

import pytest
import torch
from conftest import Lowered
from graph.test_linear_cross_entropy import DEFERRED, NOT_RETURNED, PASSES, Loss
from torch import nn
from torch.nn import functional as F
from trl.trainer.utils import selective_log_softmax

from fastft import contract

B, S, K, V = 2, 7, 16, 53


class Small(nn.Module):
    """Embedding, one layer, a head and a test's own loss: `loss(model, hidden, labels)`, perhaps with what else is returned."""

    def __init__(self, loss, bias=False, dtype=torch.float32):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(V, K), nn.Linear(K, K), nn.Linear(K, V, bias=bias)
        self.other = nn.Linear(K, V, bias=False)
        self.temperature, self.vector = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(V))
        self.a, self.b = nn.Parameter(torch.randn(2, K) / 4), nn.Parameter(torch.randn(V, 2) / 4)
        self.table, self.row = nn.Parameter(torch.randn(K, V) / 4), nn.Parameter(torch.randn(1, V))
        self.loss = loss
        self.to(dtype)

    def forward(self, input_ids, labels):
        return self.loss(self, torch.sin(self.layer(self.embed(input_ids))), labels)


def batch():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[0, 2:4] = labels[1, 0] = -100
    return {"input_ids": torch.randint(0, V, (B, S), generator=generator), "labels": labels}


def first(outputs, _):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def check(loss, *, read=first, **options):
    """The contract, for the loss and every gradient; returns the rewriter."""
    torch.manual_seed(1)
    model, rewriter = Small(loss, **options), Loss()
    compiled = rewriter.compile(model)
    contract.assert_contract(model, compiled, batch(), read)
    assert first(compiled(**batch()), None).dtype == first(model(**batch()), None).dtype
    return rewriter


def flat(logits, labels, **options):
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), **options)


def capped(logits, cap=3.0):
    return torch.tanh(logits / cap) * cap


def in_range(labels):
    return labels.clamp(min=0)


def counts(labels):
    return (labels != -100).float()


def difference(logits, labels):
    return (logits.gather(2, labels.unsqueeze(2)).squeeze(2) - logits.logsumexp(-1)).square().mean()


def row_by_row(logits, labels, rows):
    index = labels.unsqueeze(-1)
    return torch.stack([F.log_softmax(logits[i], -1).gather(-1, index[i]) for i in rows])


def with_z(logits, labels):
    squares = torch.logsumexp(logits, -1) ** 2
    return flat(logits, labels) + 0.1 * ((squares * counts(labels)).sum() / counts(labels).sum())


def with_z_sum(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum") + 0.25 * (counts(labels) * logits.logsumexp(-1).square()).sum()


# name: (loss, options of the model, arguments of the op that are expected)
TAKEN = {
    # the loss
    "positional": (lambda m, x, y: F.cross_entropy(m.head(x).view(-1, V), in_range(y).view(-1), None, None, 5, None, "sum", 0.1), {}, {"ignore_index": 5, "reduction": "sum", "label_smoothing": 0.1}),
    "by name": (lambda m, x, y: F.cross_entropy(target=y.view(-1), input=m.head(x).view(-1, V)), {}, {"reduction": "mean"}),
    "module": (lambda m, x, y: nn.CrossEntropyLoss(ignore_index=7, label_smoothing=0.2)(m.head(x).flatten(0, 1), in_range(y).flatten()), {}, {"ignore_index": 7, "label_smoothing": 0.2}),
    "none": (lambda m, x, y: (flat(m.head(x), y, reduction="none") * torch.arange(B * S)).sum(), {}, {"reduction": "none"}),
    "none, frozen head": (lambda m, x, y: (F.cross_entropy(F.linear(x, m.head.weight.detach()).mT, y, reduction="none") ** 2).sum(), {}, {"reduction": "none"}),
    "log_softmax and nll": (lambda m, x, y: F.nll_loss(F.log_softmax(m.head(x), dim=-1).view(-1, V), y.view(-1)), {}, {"reduction": "mean"}),
    "nll, classes second": (lambda m, x, y: F.nll_loss(m.head(x).transpose(1, 2).log_softmax(1), y, reduction="sum"), {}, {"reduction": "sum"}),
    "modules": (lambda m, x, y: nn.NLLLoss(ignore_index=3)(nn.LogSoftmax(-1)(m.head(x).float()).flatten(0, 1), in_range(y).flatten()), {}, {"ignore_index": 3}),
    "log_softmax in float32": (lambda m, x, y: F.nll_loss(F.log_softmax(m.head(x).view(-1, V), -1, dtype=torch.float32), y.view(-1)), {"dtype": torch.bfloat16}, {}),
    "smoothing": (lambda m, x, y: flat(m.head(x), y, label_smoothing=0.1), {}, {"label_smoothing": 0.1}),
    "sum and division": (lambda m, x, y: flat(m.head(x), y, reduction="sum") / (y != -100).sum(), {}, {"reduction": "sum"}),
    # rows
    "shifted": (lambda m, x, y: flat(m.head(x)[..., :-1, :].contiguous(), y[..., 1:].contiguous()), {}, {}),
    "shifted, two indices": (lambda m, x, y: flat(m.head(x)[:, :-1], y[:, 1:]), {}, {}),
    "classes second": (lambda m, x, y: F.cross_entropy(m.head(x)[:, :-1].transpose(1, 2), y[:, 1:]), {}, {}),
    "permute": (lambda m, x, y: F.cross_entropy(m.head(x).permute(0, 2, 1)[:, :, :-1], y[:, 1:]), {}, {}),
    "mT": (lambda m, x, y: F.cross_entropy(m.head(x).mT, y), {}, {}),
    "movedim": (lambda m, x, y: F.cross_entropy(torch.movedim(m.head(x), -1, 1), y), {}, {}),
    "length first": (lambda m, x, y: flat(m.head(x).transpose(0, 1), y.t()), {}, {}),
    "last token": (lambda m, x, y: F.cross_entropy(m.head(x)[:, -1], y[:, -1]), {}, {}),
    "every second token": (lambda m, x, y: flat(m.head(x)[:, ::2], y[:, ::2]), {}, {}),
    "new dimensions": (lambda m, x, y: flat(m.head(x)[None].unsqueeze(2).squeeze(0), y), {}, {}),
    "reshape of a tuple": (lambda m, x, y: F.cross_entropy(torch.reshape(m.head(x), (-1, V)), y.view(-1)), {}, {}),
    "whole vocabulary": (lambda m, x, y: flat(m.head(x)[..., :V], y), {}, {}),
    "rows before the head": (lambda m, x, y: F.cross_entropy(m.head(x.view(-1, K)), y.view(-1)), {}, {}),
    # scale, cap, cast
    "temperature": (lambda m, x, y: flat(m.head(x) / 0.7, y), {}, {"scale": 1 / 0.7}),
    "scale": (lambda m, x, y: flat(0.25 * m.head(x).float(), y), {"dtype": torch.bfloat16}, {"scale": 0.25}),
    "softcap": (lambda m, x, y: flat(capped(m.head(x)), y), {}, {"scale": 1.0, "softcap": 3.0}),
    "softcap, F.tanh": (lambda m, x, y: flat(F.tanh(m.head(x) / 3.0) * 3.0, y), {}, {"scale": 1.0, "softcap": 3.0}),
    "softcap after the cast": (lambda m, x, y: flat(capped(m.head(x).float()), y), {"dtype": torch.bfloat16}, {"softcap": 3.0}),
    "softcap before the cast": (lambda m, x, y: flat(capped(m.head(x)).float(), y), {"dtype": torch.bfloat16}, {"softcap": 3.0}),
    "scale, softcap, scale": (lambda m, x, y: flat(capped(m.head(x) * 2.0).float() / 4.0, y), {}, {"scale": 0.5, "softcap": 0.75}),
    "bf16 loss": (lambda m, x, y: flat(m.head(x), y), {"dtype": torch.bfloat16}, {}),
    "float16 loss": (lambda m, x, y: flat(m.head(x), y), {"dtype": torch.float16}, {}),
    "float64": (lambda m, x, y: flat(m.head(x), y), {"dtype": torch.float64}, {}),
    "cast to the hidden state's": (lambda m, x, y: flat(m.head(x).float().type_as(x), y), {"dtype": torch.bfloat16}, {}),
    # the head
    "bias": (lambda m, x, y: flat(m.head(x), y), {"bias": True}, {}),
    "matmul": (lambda m, x, y: flat(x @ m.head.weight.T, y), {}, {}),
    "matmul and bias": (lambda m, x, y: flat(torch.matmul(x, m.head.weight.t()) + m.vector, y), {}, {}),
    "bias of one row": (lambda m, x, y: flat(m.row + m.head(x), y), {}, {}),  # BART's final_logits_bias
    "weight [K, V]": (lambda m, x, y: flat(x @ m.table, y), {}, {}),
    "tied": (lambda m, x, y: flat(F.linear(x, m.embed.weight), y), {}, {}),
    "float32 head": (lambda m, x, y: flat(F.linear(x.float(), m.head.weight.float()), y), {"dtype": torch.bfloat16}, {}),
    "computed weight": (lambda m, x, y: flat(F.linear(x, m.head.weight * m.temperature), y), {}, {}),
    "LoRA by hand": (lambda m, x, y: flat(m.head(x) + F.linear(F.linear(x, m.a), m.b) * 2.0, y), {}, {}),
    "LoRA, shifted": (lambda m, x, y: F.cross_entropy((m.head(x) + F.linear(F.linear(x, m.a), m.b))[:, :-1].transpose(1, 2), y[:, 1:]), {}, {}),
    # log-probabilities
    "gather": (lambda m, x, y: (F.log_softmax(m.head(x), -1).gather(-1, in_range(y).unsqueeze(-1)).squeeze(-1) * counts(y)).sum(), {}, {"reduction": "none"}),
    "gather of a slice": (lambda m, x, y: -torch.gather(m.head(x)[:, :-1].log_softmax(-1), 2, in_range(y)[:, 1:, None]).mean(), {}, {"reduction": "none"}),
    "one row": (lambda m, x, y: row_by_row(m.head(x), in_range(y), [0]).square().sum(), {}, {"reduction": "none"}),
    "row by row": (lambda m, x, y: row_by_row(m.head(x), in_range(y), [0, 1]).square().sum(), {}, {"reduction": "none"}),
    "difference": (lambda m, x, y: difference(m.head(x), in_range(y)), {}, {"reduction": "none"}),
    "TRL": (lambda m, x, y: selective_log_softmax(m.head(x), in_range(y)).sum(), {}, {"reduction": "none"}),
    "TRL, temperature": (lambda m, x, y: selective_log_softmax(m.head(x)[:, :-1], in_range(y)[:, 1:], temperature=0.7).sum(), {}, {"scale": 1 / 0.7}),
    "TRL in bf16": (lambda m, x, y: selective_log_softmax(m.head(x), in_range(y)).float().square().sum(), {"dtype": torch.bfloat16}, {"reduction": "none"}),
    # z-loss over the rows that count
    "z-loss": (lambda m, x, y: with_z(m.head(x), y), {}, {"z_loss": 0.1}),
    "z-loss, sum": (lambda m, x, y: with_z_sum(capped(m.head(x)).view(-1, V), y.view(-1)), {}, {"z_loss": 0.25, "softcap": 3.0}),
    "z-loss of shifted logits": (lambda m, x, y: with_z(m.head(x)[:, :-1], y[:, 1:]), {}, {"z_loss": 0.1}),
    "z-loss, shifted": (lambda m, x, y: with_z(m.head(x), F.pad(y, (0, 1), value=-100)[:, 1:]), {}, {"z_loss": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_taken(case):
    loss, options, expected = TAKEN[case]
    rewriter = check(loss, **options)
    assert rewriter.providers == {NOT_RETURNED: 1} and not rewriter.misses
    (call,) = rewriter.calls
    assert {name: getattr(call, name) for name in expected} == expected
    assert call.order is not None and call.count is not None
    assert call.bias is None or call.bias.meta["example_value"].dim() == 1
    targets = {node.target for node in rewriter.graphs[0].graph.nodes}
    assert not targets & {F.cross_entropy, F.nll_loss, F.log_softmax, torch.logsumexp, "gather", "logsumexp"}
    assert not any(v.dim() > 1 and v.shape[-1] == V for node in made(rewriter) if isinstance(v := node.meta.get("example_value"), torch.Tensor))


def made(rewriter):
    """What the graph computes of activations."""
    return [node for node in rewriter.graphs[0].graph.nodes if node.op != "placeholder" and any(item.op != "placeholder" for item in node.all_input_nodes)]


RETURNED = {
    "logits": lambda m, x, y: (flat(logits := m.head(x), y), logits),
    "all along the chain": lambda m, x, y: (flat(c := (b := capped(a := m.head(x))).float(), y), a, b, c),
    "a cast of its own": lambda m, x, y: (flat((logits := m.head(x) * 0.5).float(), y), logits.float()),
    "shifted loss": lambda m, x, y: (F.cross_entropy((logits := m.head(x))[:, :-1].mT, y[:, 1:]), logits),
    "weight [K, V]": lambda m, x, y: (flat(logits := x @ m.table + m.vector, y), logits),
    "bias of one row": lambda m, x, y: (flat(logits := m.head(x) + m.row, y), logits),
    "hidden state too": lambda m, x, y: (flat(logits := m.head(x), y), logits, x),
    "contiguous": lambda m, x, y: (flat(logits := m.head(x), y), logits.contiguous()[:]),
    "detached head": lambda m, x, y: (flat(logits := F.linear(x, m.head.weight.detach()), y), logits),
    "integers written": lambda m, x, y: (flat(logits := m.head(x), y), logits, y.clone().fill_(1)),
}


@pytest.mark.parametrize("case", RETURNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deferred(case, dtype):
    def read(outputs, _):
        return outputs[0] + sum(item.float().square().mean() for item in outputs[1:] if item.is_floating_point())

    rewriter = check(RETURNED[case], read=read, dtype=dtype)
    assert rewriter.providers == {DEFERRED: 1} and not rewriter.misses
    assert [plan.output for plan in rewriter.plans] == {"all along the chain": [1, 2, 3]}.get(case, [1])


def test_logits_have_no_gradient_where_eagers_have_none():
    def loss(m, x, y):
        with torch.no_grad():
            logits = m.head(x)
            return flat(logits, y), logits

    model, rewriter = Small(loss), Loss()
    found, logits = rewriter.compile(model)(**batch())
    assert rewriter.providers == {DEFERRED: 1} and not found.requires_grad and not logits.requires_grad
    assert not any(needed for needed in (found.grad_fn, logits.grad_fn))


@pytest.mark.parametrize("form", ["shifted", "softcap", "weight [K, V]", "LoRA, shifted", "TRL"])
def test_through_autograd(form):
    """AOTAutograd, fastft's partitioner and its post-grad passes: nothing of rows x vocabulary there either."""
    torch.manual_seed(1)
    model, lowered = Small(TAKEN[form][0]), Lowered(only=PASSES, of="linear_cross_entropy")
    contract.assert_contract(model, lowered.compile(model), batch(), first)
    values = [node.meta.get("val") for graph in lowered.aten for node in graph.graph.nodes]
    shapes = {tuple(value.shape) for value in values if isinstance(value, torch.Tensor)}
    assert len(lowered.aten) == 2 and {shape for shape in shapes if len(shape) > 1 and shape[-1] == V} <= {(K, V), (2, V)}  # weight and adapter, turned
