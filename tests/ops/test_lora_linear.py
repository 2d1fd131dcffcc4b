"""`fastft::lora_linear` against autograd of the formula it stands for, and the schemas of the ops below it."""

import collections

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastft import contract
from fastft.kernels import dropout as masks
from fastft.kernels.accumulate import accumulate_mm
from fastft.kernels.lora_grads import lora_grads
from fastft.kernels.lora_linear import op
from fastft.kernels.low_rank import low_rank_mm, low_rank_mm_dropout, low_rank_mms
from fastft.kernels.packed import PAD

F64 = torch.float64


def formula(x, weights, biases, lora_a, lora_b, lora_biases, owner, scaling, dropout, seeds):
    """y_i = x W_i^T + b_i + sum_j scaling_j (dropout_j(x) A_j^T B_j^T + c_j), as peft writes it."""
    outputs = []
    for i, weight in enumerate(weights):
        y = torch.nn.functional.linear(x, weight, biases[i])
        for j, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            if owner[j] == i:
                h = x.to(a.dtype)
                if dropout[j]:
                    keep = masks.keep_mask(seeds.reshape(seeds.shape[0], -1), j, dropout[j], x.shape[-1]).view(x.shape)
                    h = torch.where(keep, h * masks.scale(dropout[j]), 0.0)
                y = y + torch.nn.functional.linear(torch.nn.functional.linear(h, a), b, lora_biases[j]) * scaling[j]
        outputs.append(y.to(weight.dtype))
    return outputs


def arguments(leading, width, outs, ranks, owner, *, bias=(), lora_bias=(), dropout=(), scaling=(), base=F64, adapters=F64):
    """Random arguments of the op; `bias` and `lora_bias` say for each linear and adapter whether there is one."""
    rand = lambda *shape, dtype: (torch.randn(shape, dtype=F64) / max(shape[-1], 1) ** 0.5).to(dtype).requires_grad_()  # noqa: E731
    count = len(ranks)
    dropout = list(dropout) or [0.0] * count
    seeds = torch.randint(-(1 << 31), (1 << 31) - 1, [(count + 1) // 2, *leading], dtype=torch.int32) if any(dropout) else None
    return (
        torch.randn(*leading, width, dtype=F64).to(base).requires_grad_(),
        [rand(n, width, dtype=base) for n in outs],
        [rand(n, dtype=base) if has else None for n, has in zip(outs, bias or [False] * len(outs), strict=True)],
        [rand(r, width, dtype=adapters) for r in ranks],
        [rand(outs[i], r, dtype=adapters) for i, r in zip(owner, ranks, strict=True)],
        [rand(outs[i], dtype=adapters) if has else None for i, has in zip(owner, lora_bias or [False] * count, strict=True)],
        list(owner),
        list(scaling) or [1.0 + 0.5 * j for j in range(count)],
        dropout,
        seeds,
    )


def leaves(args):
    return [tensor for value in args[:6] for tensor in (value if isinstance(value, list) else [value]) if tensor is not None]


def run(call, args, to=None):
    """{"loss": all outputs, weighed; number of an input: its gradient}"""
    if to:
        cast = lambda tensor: None if tensor is None else tensor.detach().to(to).requires_grad_()  # noqa: E731
        args = tuple([cast(t) for t in value] if isinstance(value, list) else cast(value) for value in args[:6]) + args[6:]
    outputs = call(*args)
    weigh = lambda y: torch.linspace(-1, 2, y.numel(), dtype=F64).view(y.shape).to(y.dtype)  # noqa: E731
    inputs = [tensor for tensor in leaves(args) if tensor.requires_grad]
    grads = torch.autograd.grad(outputs, inputs, [weigh(y) for y in outputs])
    return {"loss": torch.cat([y.detach().flatten() for y in outputs])} | {str(i): grad for i, grad in enumerate(grads)}


def fused(forward="accumulate", backward="mm"):
    return lambda *args: op(*args, forward, backward)


def assert_equal(args, forward="accumulate", backward="mm", **tolerance):
    assert_close(run(fused(forward, backward), args), run(formula, args), **tolerance)


def assert_close(found, expected, **tolerance):
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        torch.testing.assert_close(found[name], expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@st.composite
def cases(draw):
    few = lambda low, high: st.integers(low, high)  # noqa: E731
    outs = draw(st.lists(few(1, 7), min_size=1, max_size=4))
    owner = [i for i in range(len(outs)) for _ in range(draw(few(1, 2)))]
    count = len(owner)
    pick = lambda strategy, size: draw(st.lists(strategy, min_size=size, max_size=size))  # noqa: E731
    return dict(
        leading=draw(st.lists(few(0, 4), max_size=3)),
        width=draw(few(1, 9)),
        outs=outs,
        ranks=pick(few(1, 5), count),
        owner=owner,
        bias=pick(st.booleans(), len(outs)),
        lora_bias=pick(st.booleans(), count),
        dropout=pick(st.sampled_from([0.0, 0.0, 0.1, 0.5]), count),
        scaling=pick(st.sampled_from([1.0, 2.0, 0.0, -0.3, 16.0]), count),
    )


@hypothesis.given(cases(), st.sampled_from(["accumulate", "outer", "k_extended"]))
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
def test_equals_the_formula(case, forward):
    args = arguments(**case)
    assert_equal(args, forward)


@pytest.mark.parametrize("providers", [("accumulate", "mm"), ("outer", "one_read")])
@pytest.mark.parametrize("frozen", range(7))
def test_gradients_of_some(frozen, providers):
    """Any input may need no gradient: x in the first layer, the base weights, one A, one B."""
    args = arguments([3], 8, [5, 6], [2, 3], [0, 1], bias=[True, True], lora_bias=[True, False])
    close = {"rtol": 1e-5, "atol": 1e-5} if "one_read" in providers else {}  # which is float32
    groups = [args[0:1], args[1], args[2], args[3], args[4][1:], args[3] + args[4], leaves(args)[2:]]
    for tensor in groups[frozen]:
        tensor.requires_grad_(False)
    assert_equal(args, *providers, **close)
    args = arguments([3], 8, [5, 6], [2, 3], [0, 1], dropout=[0.5, 0.0])
    args[3][frozen % 2].requires_grad_(False)
    args[0].requires_grad_(frozen < 4)
    assert_equal(args, *providers, **close)


@pytest.mark.parametrize("forward", ["accumulate", "outer", "k_extended"])
@pytest.mark.parametrize("backward", ["mm", "one_read"])
def test_providers_agree(forward, backward):
    args = arguments([2, 9], 24, [16, 8], [4, 7, 1], [0, 0, 1], dropout=[0.0, 0.3, 0.0], bias=[True, False], base=torch.float32, adapters=torch.float32)
    assert_equal(args, forward, backward, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backward", ["mm", "one_read"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_one_scaling_for_all_and_adapters_of_two_dtypes(backward, dropout):
    options = {"scaling": [2.0] * 3, "dropout": [dropout] * 3, "base": torch.float32, "adapters": torch.float32}
    args = arguments([7], 12, [6, 5, 4], [3, 1, 2], [0, 1, 2], **options)
    assert_equal(args, "outer", backward, rtol=1e-5, atol=1e-5)
    for group in args[3:5]:
        group[1] = group[1].detach().to(F64).requires_grad_()
    assert_equal(args, "outer", backward, rtol=1e-5, atol=1e-5)


class Calls(TorchDispatchMode):
    """Counts the operations that run under it."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("linears", [1, 2, 3])
def test_a_group_takes_one_launch_of_each_kernel(linears):
    args = arguments([7], 12, [6, 5, 4][:linears], [3, 1, 2][:linears], range(linears), base=torch.float32, adapters=torch.float32)
    with Calls() as calls:
        run(fused("outer", "one_read"), args)
    assert [calls.count[op] for op in (low_rank_mms, low_rank_mm, lora_grads)] == [1, 1, 1]
    assert calls.count[torch.ops.aten.sum.dim_IntList] == 2  # the partial sums of dS and of dB


def test_kernels_count_the_flops_of_the_products():
    args = arguments([7], 12, [6, 5, 4], [3, 1, 2], [0, 1, 2], base=torch.float32, adapters=torch.float32)
    totals = []
    for providers in (("accumulate", "mm"), ("outer", "one_read")):
        with FlopCounterMode(display=False) as counter:
            run(fused(*providers), args)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_k_extended_on_padded_storage():
    args = arguments([2, 3], 16, [8, 8], [4, 4], [0, 1], base=torch.float32, adapters=torch.float32)
    for weight in args[1]:
        buffer = torch.full((8, 16 + PAD), 7.0)
        buffer[:, :16] = weight.data
        weight.requires_grad_(False).data = buffer[:, :16]
    assert_equal(args, "k_extended", rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("base, adapters", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_low_precision_is_as_exact_as_the_formula(base, adapters, dropout):
    """Held against the formula in the base's dtype, where the op computes too; gradients keep the adapters' dtype."""
    args = arguments([64], 96, [80, 48], [8, 16], [0, 1], dropout=[dropout] * 2, base=base, adapters=adapters)
    reference, eager, found = run(formula, args, to=F64), run(formula, args, to=base), run(fused(), args)
    assert [found[str(i)].dtype for i in range(3)] == [base] * 3
    assert {found[str(i)].dtype for i in range(3, 7)} == {adapters}
    result = contract.compare(found, eager, reference, base)
    assert result.ok, str(result)


def test_autocast_decides_the_dtype():
    args = arguments([4], 16, [8], [2], [0], base=torch.float32, adapters=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = fused()(*args)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), leaves(args))
    assert {grad.dtype for grad in grads} == {torch.float32}
    (exact,) = formula(*args)
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()


def test_gradcheck():
    args = arguments([2], 5, [4, 3], [2, 1], [0, 1], bias=[True, False], dropout=[0.0, 0.5])
    tensors = leaves(args)

    def call(*values):
        values = iter(values)
        taken = [[None if t is None else next(values) for t in value] if isinstance(value, list) else next(values) for value in args[:6]]
        return tuple(fused()(*taken, *args[6:]))

    assert torch.autograd.gradcheck(call, tensors)


UNDER = {
    accumulate_mm: lambda: (torch.randn(6, 5), torch.randn(6, 4), torch.randn(4, 5)),
    lora_grads: lambda: ([torch.randn(6, 5), torch.randn(6, 3)], torch.randn(6, 6), [torch.randn(5, 2), torch.randn(3, 4)]),
    low_rank_mm: lambda: (torch.randn(6, 2), torch.randn(2, 5), torch.randn(5)),
    low_rank_mms: lambda: (torch.randn(6, 6), [torch.randn(2, 5), torch.randn(4, 3)], [None, torch.randn(3)]),
    low_rank_mm_dropout: lambda: (torch.randn(6, 3), torch.randn(3, 5), torch.ones(1, 6, dtype=torch.int32), [1, 2], [0.5, 0.0]),
}


@pytest.mark.parametrize("under", UNDER, ids=str)
def test_schemas_and_fakes(under):
    torch.library.opcheck(under, UNDER[under](), test_utils=("test_schema", "test_faketensor"))
