"""lora_linear on hand-written LoRA, without peft: the spellings taken, those refused with their reasons, and the traps."""

import contextlib

import expecttest
import pytest
import torch
from conftest import Rewriter, assert_same
from torch import nn
from torch.nn import functional as F


class Linears(nn.Module):
    """Linears a, b, c with adapters on one input; `call(self, x)` puts them together. `gain` sees the input's gradient."""

    def __init__(self, call, *, width=48, out=32, rank=4, dtype=torch.float32):
        super().__init__()
        self.call = call
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width))
        for name in "abc":
            self.register_parameter(f"W{name}", nn.Parameter((torch.randn(out, width) / width**0.5).to(dtype)))
            self.register_parameter(f"A{name}", nn.Parameter(torch.randn(rank, width) / width**0.5))
            self.register_parameter(f"B{name}", nn.Parameter(torch.randn(out, rank) / rank**0.5))

    def forward(self, x):
        return self.call(self, x * self.gain)

    def base(self, name, x):
        return F.linear(x, getattr(self, f"W{name}"))

    def low_rank(self, name, x):
        return F.linear(F.linear(x, getattr(self, f"A{name}")), getattr(self, f"B{name}"))


def loss(outputs, batch):
    """Weighs every element of every output differently."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).mean() * (i + 1) for i, y in enumerate(outputs))


def check(call, rewriter, shape=(3, 5, 48), **options):
    """The contract for the loss and every gradient, the input's too; returns the group sizes."""
    model = Linears(call, **options)
    assert_same(model, rewriter.compile(model), {"x": torch.randn(shape)}, loss_fn=loss)
    return rewriter.sizes


def inplace(m, x):
    y = m.base("a", x)
    y += m.low_rank("a", x) * 2
    return y


def two_adapters(m, x):
    return m.base("a", x) + m.low_rank("a", x) * 2 + F.linear(F.linear(x, m.Ab), m.Bb) / 3


def half_used(m, x):
    y, h = m.base("a", x), F.linear(x, m.Aa)
    return y + F.linear(h, m.Ba), y, h


def dependent(m, x):
    """The second weight does not exist yet where a group would stand."""
    y = m.base("a", x) + m.low_rank("a", x)
    return y, F.linear(x, m.Wb * y.mean()) + m.low_rank("b", x)


TAKEN = {
    "linear": (lambda m, x: m.base("a", x) + m.low_rank("a", x) * 2.0, [1]),
    "adapter first": (lambda m, x: 2 * m.low_rank("a", x) + m.base("a", x), [1]),
    "unscaled": (lambda m, x: m.base("a", x) + m.low_rank("a", x), [1]),
    "scaled by 0": (lambda m, x: m.base("a", x) + m.low_rank("a", x) * 0, [1]),
    "negative": (lambda m, x: m.base("a", x) + -1.5 * m.low_rank("a", x), [1]),
    "divided": (lambda m, x: m.base("a", x) + m.low_rank("a", x) / 4, [1]),
    "scaled inside": (lambda m, x: m.base("a", x) + F.linear(F.linear(x, m.Aa) * 3, m.Ba) * 0.5, [1]),
    "x @ A.T @ B.T": (lambda m, x: m.base("a", x) + x @ m.Aa.T @ m.Ba.T * 2, [1]),
    "matmul, t, transpose": (lambda m, x: torch.matmul(x, m.Wa.mT) + x.matmul(m.Aa.t()) @ m.Ba.transpose(0, 1), [1]),
    "torch.add, torch.mul": (lambda m, x: torch.add(m.base("a", x), torch.mul(m.low_rank("a", x), 2)), [1]),
    "methods": (lambda m, x: m.base("a", x).add(m.low_rank("a", x).mul(2)), [1]),
    "keywords": (lambda m, x: F.linear(input=x, weight=m.Wa) + F.linear(F.linear(x, weight=m.Aa), weight=m.Ba), [1]),
    "+=": (inplace, [1]),
    "two adapters": (two_adapters, [1]),
    "siblings": (lambda m, x: tuple(m.base(n, x) + m.low_rank(n, x) * 2 for n in "abc"), [3]),
    "one weight twice": (lambda m, x: (m.base("a", x) + m.low_rank("a", x), m.base("a", x) + m.low_rank("b", x)), [2]),
    "one A twice": (lambda m, x: (m.base("a", x) + m.low_rank("a", x), m.base("b", x) + F.linear(F.linear(x, m.Aa), m.Bb)), [2]),
    "base and A read elsewhere": (half_used, [1]),
    "reshaped for the base": (lambda m, x: F.linear(x.reshape(-1, 48), m.Wa).view(3, 5, 32) + m.low_rank("a", x), [1]),
    "eval dropout": (lambda m, x: m.base("a", x) + m.low_rank("a", F.dropout(x, 0.5, training=False)), [1]),
    "lora bias": (lambda m, x: m.base("a", x) + F.linear(F.linear(x, m.Aa), m.Ba, m.Wb[:, 0]) * 2, [1]),
    "dependent siblings": (dependent, [1, 1]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name, rewriter):
    call, sizes = TAKEN[name]
    assert check(call, rewriter) == sizes
    assert rewriter.misses == {}


REFUSED = {
    "scaled by a tensor (DoRA)": lambda m, x: m.base("a", x) + m.low_rank("a", x) * m.Wb[:, 0],
    "low-rank product is not added to a linear of the same input": lambda m, x: m.low_rank("a", x).relu() + m.base("a", x),
    "base is not a plain linear": lambda m, x: F.linear(x[..., :32], m.Wa[:, :32]).relu() + m.low_rank("a", x),
    "base reads another input": lambda m, x: m.base("a", x.detach()) + m.low_rank("a", x),
    "dropout probability is 1": lambda m, x: m.base("a", x) + m.low_rank("a", F.dropout(x, 1.0)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason, rewriter):
    assert check(REFUSED[reason], rewriter) == []
    assert rewriter.misses == {reason: 1}


def test_refused_result_in_the_adapters_dtype(rewriter):
    def call(m, x):
        return F.linear(x.bfloat16(), m.Wa) + m.low_rank("a", x)

    model = Linears(call, dtype=torch.bfloat16)
    assert_same(model, rewriter.compile(model), {"x": torch.randn(3, 48)}, loss_fn=loss)
    assert rewriter.misses == {"result stays in the adapter's dtype": 1} and not rewriter.sizes


def test_bottlenecks_are_not_adapters(rewriter):
    """A ReLU between A and B, a residual around a bottleneck: nothing is rewritten."""
    assert check(lambda m, x: m.base("a", x) + F.linear(F.linear(x, m.Aa).relu(), m.Ba), rewriter) == []
    rewriter = Rewriter()
    assert check(lambda m, x: x + F.linear(F.linear(x, m.Aa), m.Ba), rewriter, out=48) == []


@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 3, 4, 48), (1, 1, 48)])
def test_input_dimensions(shape, rewriter):
    assert check(lambda m, x: m.base("a", x) + m.low_rank("a", x), rewriter, shape) == [1]


@pytest.mark.parametrize("rank", [1, 7, 16, 256])
def test_ranks(rank, rewriter):
    assert check(TAKEN["siblings"][0], rewriter, width=288, out=272, shape=(5, 288), rank=rank) == [3]


@pytest.mark.parametrize("rank, out", [(48, 64), (16, 16), (32, 16)])
def test_large_ranks_are_rewritten_or_missed(rank, out, rewriter):
    """k_proj of a Qwen2-0.5B has 128 outputs: r = 128 must not vanish from the report."""
    check(TAKEN["linear"][0], rewriter, out=out, rank=rank)
    assert rewriter.sizes or rewriter.misses


def no_grad_sibling(m, x):
    y = m.base("a", x) + m.low_rank("a", x)
    with torch.no_grad():
        z = m.base("b", x) + m.low_rank("b", x)
    return y, z


def no_grad_base(m, x):
    with torch.no_grad():
        y = m.base("a", x)
    return y + m.low_rank("a", x)


def no_grad_adapter(m, x):
    with torch.no_grad():
        z = m.low_rank("a", x)
    return m.base("a", x) + z


def test_no_group_across_no_grad(rewriter):
    assert check(no_grad_sibling, rewriter) == [1, 1]


@pytest.mark.parametrize("call", [no_grad_base, no_grad_adapter])
def test_base_and_adapter_in_different_grad_modes(call, rewriter):
    check(call, rewriter)


def autocast_both(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y, z = m.base("a", x), m.low_rank("a", x)
    return y + z


def autocast_base(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.base("a", x)
    return (y + m.low_rank("a", x)).bfloat16()


@pytest.mark.parametrize("call", [autocast_both, autocast_base])
def test_sum_outside_of_autocast_keeps_its_dtype(call, rewriter):
    model, x = Linears(call), torch.randn(3, 48)
    assert rewriter.compile(model)(x).dtype == model(x).dtype == torch.bfloat16


def write_between_base_and_adapter(m, x):
    y = m.base("a", x)
    x.mul_(2)
    return y + m.low_rank("a", x)


def write_before_the_sum(m, x):
    y, z = m.base("a", x), m.low_rank("a", x)
    F.relu(x, inplace=True)
    return y + z


def write_between_siblings(m, x):
    y = m.base("a", x) + m.low_rank("a", x)
    x[0] = 3.0
    return y, m.base("b", x) + m.low_rank("b", x)


def write_through_a_view(m, x):
    row = x[0]
    y = m.base("a", x) + m.low_rank("a", x)
    row.mul_(2)
    return y, m.base("b", x) + m.low_rank("b", x)


@pytest.mark.parametrize(
    "call",
    [
        write_between_siblings,
        write_through_a_view,
        write_between_base_and_adapter,
        write_before_the_sum,
    ],
)
@pytest.mark.parametrize("grad", [torch.no_grad, contextlib.nullcontext])
def test_writes_to_the_input(call, grad, rewriter):
    model, x = Linears(call).requires_grad_(False), torch.randn(3, 5, 48)
    with grad():
        torch.testing.assert_close(rewriter.compile(model)(x), model(x))


def test_printed_graph(rewriter):
    """The exact graphs: one op for two siblings, scalings and dropout as numbers; what reads a weight only is left for dead."""

    def call(m, x):
        first = F.linear(x, m.Wa) + F.linear(F.linear(F.dropout(x, 0.25), m.Aa), m.Ba) * 2.0
        return first, x @ m.Wb.T + x @ m.Ab.t() @ m.Bb.t() / 4

    before, model, x = Rewriter(only=[]), Linears(call), torch.randn(3, 48)
    before.compile(model)(x)
    torch._dynamo.reset()
    rewriter.compile(model)(x)
    expecttest.assert_expected_inline(
        code(before),
        """\
mul = mul(x, gain)
linear = linear(mul, wa)
dropout = dropout(mul, 0.25)
linear_1 = linear(dropout, aa)
linear_2 = linear(linear_1, ba)
mul_1 = mul(linear_2, 2.0)
first = add(linear, mul_1)
getattr_1 = getattr(wb, T)
matmul = matmul(mul, getattr_1)
t = t(ab)
matmul_1 = matmul(mul, t)
t_1 = t(bb)
matmul_2 = matmul(matmul_1, t_1)
truediv = truediv(matmul_2, 4)
add_1 = add(matmul, truediv)""",
    )
    expecttest.assert_expected_inline(
        code(rewriter),
        """\
mul = mul(x, gain)
randint = randint(-2147483648, 2147483647, [1, 3], dtype=torch.int32, device=cpu)
lora_linear_default = lora_linear.default(mul, [wa, wb], [None, None], [aa, ab], [ba, bb], [None, None], [0, 1], [2.0, 0.25], [0.25, 0.0], randint, accumulate, mm)
getitem = getitem(lora_linear_default, 0)
getitem_1 = getitem(lora_linear_default, 1)
getattr_1 = getattr(wb, T)
t = t(ab)
t_1 = t(bb)""",
    )


def code(rewriter: Rewriter) -> str:
    """The operations of the one graph, parameters by their names."""
    (gm,) = rewriter.graphs
    lines = []
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method"):
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            arguments = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
            lines.append(f"{node.name} = {target}({', '.join(arguments)})")
    text = "\n".join(lines)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            text = text.replace(node.name, node.name.removeprefix("l_self_parameters_").strip("_").removeprefix("l_"))
    return text.replace("numpy_T(wb)", "getattr(wb, T)").replace("numpy_t", "getattr_1")  # torch 2.15's names
