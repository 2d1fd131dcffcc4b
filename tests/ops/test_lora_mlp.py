"""`fastft::lora_mlp` against autograd of the three linears and the gate it stands for."""

import collections

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fastft import contract
from fastft.kernels.gated import gated, gated_backward
from fastft.kernels.lora_mlp import op

from .test_lora_linear import F64, Calls, assert_close, leaves, run
from .test_lora_linear import formula as linears

ACTIVATE = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def formula(x, weights, biases, lora_a, lora_b, lora_biases, owner, scaling, activation):
    """down(act(gate(x)) * up(x)), every linear as peft writes it."""

    def apply(x, *which):
        mine = [j for j, linear in enumerate(owner) if linear in which]
        pick = lambda values: [values[j] for j in mine]  # noqa: E731
        own = [which.index(owner[j]) for j in mine]
        adapters = (pick(lora_a), pick(lora_b), pick(lora_biases), own, pick(scaling), [0.0] * len(mine), None)
        return linears(x, [weights[i] for i in which], [biases[i] for i in which], *adapters)

    gate, up = apply(x, 0, 1)
    return apply(ACTIVATE[activation](gate) * up, 2)


def fused(forward="outer", backward="one_read"):
    return lambda *args: [op(*args, forward, backward)]


def arguments(leading, width, inner, out, ranks, owner, activation="silu", *, bias=(False,) * 3, lora_bias=None, scaling=None, base=F64, adapters=F64):
    rand = lambda *shape, dtype: (torch.randn(shape, dtype=F64) / max(shape[-1], 1) ** 0.5).to(dtype).requires_grad_()  # noqa: E731
    shapes = [(inner, width), (inner, width), (out, inner)]
    down = rand(*shapes[2], dtype=base).detach()  # what the op is for: the gradient of a trained one needs h
    return (
        torch.randn(*leading, width, dtype=F64).to(base).requires_grad_(),
        [*(rand(*shape, dtype=base) for shape in shapes[:2]), down],
        [rand(shape[0], dtype=base) if has else None for shape, has in zip(shapes, bias, strict=True)],
        [rand(r, shapes[i][1], dtype=adapters) for r, i in zip(ranks, owner, strict=True)],
        [rand(shapes[i][0], r, dtype=adapters) for r, i in zip(ranks, owner, strict=True)],
        [rand(shapes[i][0], dtype=adapters) if has else None for i, has in zip(owner, lora_bias or [False] * len(owner), strict=True)],
        list(owner),
        scaling or [1.0 + 0.5 * j for j in range(len(owner))],
        activation,
    )


def assert_equal(args, *providers, **tolerance):
    assert_close(run(fused(*providers), args), run(formula, args), **tolerance)


@st.composite
def cases(draw):
    few = lambda low, high: st.integers(low, high)  # noqa: E731
    owner = [i for i in range(3) for _ in range(draw(few(1, 2)))]
    pick = lambda strategy, size: draw(st.lists(strategy, min_size=size, max_size=size))  # noqa: E731
    return dict(
        leading=draw(st.lists(few(0, 4), max_size=3)),
        width=draw(few(1, 9)),
        inner=draw(few(1, 9)),
        out=draw(few(1, 9)),
        ranks=pick(few(1, 5), len(owner)),
        owner=owner,
        activation=draw(st.sampled_from(list(ACTIVATE))),
        bias=pick(st.booleans(), 3),
        lora_bias=pick(st.booleans(), len(owner)),
        scaling=pick(st.sampled_from([1.0, 2.0, 0.0, -0.3, 16.0]), len(owner)),
    )


@hypothesis.given(cases(), st.sampled_from(["accumulate", "outer"]))
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_formula(case, forward):
    assert_equal(arguments(**case), forward, "mm")


@pytest.mark.parametrize("activation", ACTIVATE)
def test_the_kernels_form(activation):
    args = arguments([2, 9], 24, 40, 16, [4, 7, 1, 3], [0, 1, 1, 2], activation, bias=[True, False, True], base=torch.float32, adapters=torch.float32)
    assert_equal(args, rtol=2e-5, atol=2e-5)


def groups(args):
    x, weights, biases, lora_a, lora_b, lora_biases = args[:6]
    return [[x], weights[:1], weights[1:2], [biases[2]], lora_a[:1], lora_a[2:], lora_b[1:2], lora_b[2:], [*lora_a, *lora_b], leaves(args)[1:]]


@pytest.mark.parametrize("providers", [("accumulate", "mm"), ("outer", "one_read")])
@pytest.mark.parametrize("frozen", range(10))
def test_gradients_of_some(frozen, providers):
    """Any input may need no gradient."""
    close = {"rtol": 1e-5, "atol": 1e-5} if "one_read" in providers else {}  # which is float32
    args = arguments([3], 8, 6, 5, [2, 3, 1], [0, 1, 2], bias=[True] * 3, lora_bias=[True, False, True])
    for tensor in groups(args)[frozen]:
        tensor.requires_grad_(False)
    assert_equal(args, *providers, **close)


@pytest.mark.parametrize("base, adapters", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_low_precision_is_as_exact_as_the_formula(base, adapters):
    args = arguments([64], 96, 160, 80, [8, 16, 4], [0, 1, 2], base=base, adapters=adapters)
    cast = lambda tensor, to: None if tensor is None else tensor.detach().to(to).requires_grad_(tensor.requires_grad)  # noqa: E731
    as_dtype = lambda to: (cast(args[0], to), *([cast(t, to) for t in group] for group in args[1:6]), *args[6:])  # noqa: E731
    reference, eager, found = run(formula, as_dtype(F64)), run(formula, as_dtype(base)), run(fused("outer", "mm"), args)
    assert {found[str(i)].dtype for i in range(3)} == {base} and {found[str(i)].dtype for i in range(3, 9)} == {adapters}
    result = contract.compare(found, eager, reference, base)
    assert result.ok, str(result)


@pytest.mark.parametrize("providers", [("accumulate", "mm"), ("outer", "one_read")])
@pytest.mark.parametrize("owner, dropout", [([0, 1, 2], (0.5, 0.2, 0.3)), ([0, 1, 2], (0.0, 0.4, 0.0)), ([0, 0, 1, 2], (0.1, 0.0, 0.3, 0.5))])
def test_dropout_is_that_of_the_seeds(owner, dropout, providers):
    rows, inner, width = 12, 24, 16
    args = arguments([rows], width, inner, 8, [3] * len(owner), owner)
    draw = lambda n: torch.randint(-(1 << 31), 1 << 31, (n, rows), dtype=torch.int32)  # noqa: E731
    first, seeds, down_seeds = len(owner) - 1, draw(2), draw(1)

    def by_hand(x, weights, biases, lora_a, lora_b, lora_biases, owner, scaling, activation):
        pick = lambda values: values[:first]  # noqa: E731
        gate, up = linears(x, weights[:2], biases[:2], *map(pick, (lora_a, lora_b, lora_biases, owner, scaling, dropout)), seeds)
        h = ACTIVATE[activation](gate) * up
        last = [values[first:] for values in (lora_a, lora_b, lora_biases)]
        return linears(h, weights[2:], biases[2:], *last, [0], scaling[first:], dropout[first:], down_seeds)

    fused = lambda *args: [op(*args, *providers, list(dropout), seeds, down_seeds)]  # noqa: E731
    close = {"rtol": 1e-5, "atol": 1e-5} if "one_read" in providers else {}  # which is float32
    assert_close(run(fused, args), run(by_hand, args), **close)


def test_dropout_in_several_adapters_of_down_is_refused():
    args = arguments([4], 16, 24, 8, [2] * 4, [0, 1, 2, 2])
    with pytest.raises(ValueError, match="several adapters of down"):
        op(*args, "outer", "one_read", [0.0, 0.0, 0.1, 0.0], None, torch.zeros(1, 4, dtype=torch.int32))


def test_a_trained_down_weight_is_refused():
    args = arguments([4], 16, 24, 8, [2, 2, 2], [0, 1, 2])
    args[1][2].requires_grad_()
    with pytest.raises(ValueError, match="must be frozen"):
        fused()(*args)
    with torch.no_grad():
        torch.testing.assert_close(fused()(*args), formula(*args))


def test_autocast_decides_the_dtype():
    args = arguments([4], 16, 24, 8, [2, 2, 2], [0, 1, 2], base=torch.float32, adapters=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = fused()(*args)
    assert y.dtype == torch.bfloat16
    assert {grad.dtype for grad in torch.autograd.grad(y.float().sum(), [leaf for leaf in leaves(args) if leaf.requires_grad])} == {torch.float32}
    (exact,) = formula(*args)
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()


def test_one_launch_of_each_kernel_and_the_flops_of_the_products():
    args = arguments([7], 12, 10, 6, [3, 1, 2], [0, 1, 2], base=torch.float32, adapters=torch.float32)
    with Calls() as calls:
        run(fused(), args)
    assert calls.count[gated] == calls.count[gated_backward] == 1
    totals = []
    for call in (formula, fused()):
        for weight in args[1]:
            weight.requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            run(call, args)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_what_it_saves():
    """x, g, u, s and s_d beside the tensors given: not h."""
    args = arguments([7], 12, 10, 6, [3, 1, 2], [0, 1, 2], base=torch.float32, adapters=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fused()(*args)
    given = collections.Counter(tensor.shape for tensor in leaves(args)[1:])
    beside = collections.Counter(tensor.shape for tensor in saved) - given
    assert sorted(beside.elements()) == sorted([(7, 12), (7, 10), (7, 10), (7, 4), (7, 2)])
