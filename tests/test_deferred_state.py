"""Deferred logits and what lies between the forward and the reading: optimizer steps, autocast, inference mode; what they hold."""

import contextlib
import gc
import weakref

import pytest
import torch
from test_deferred import VOCABULARY, Head, assert_equal
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from fastft import deferred
from fastft.deferred import Plan, defer


def linear(held, weight, bias):
    return F.linear(held, weight, bias)


def optimizer_step(make):
    def change(model, logits):
        model.logits().sum().backward()
        make(model.parameters()).step()

    return change


def moved(model, logits):
    model.weight.data = model.weight.data.clone()


def written(model, logits):
    with torch.no_grad():
        model.bias.zero_()


def bitsandbytes(parameters):
    return pytest.importorskip("bitsandbytes").optim.AdamW(parameters, lr=0.1)


CHANGES = {
    "adamw": optimizer_step(lambda parameters: torch.optim.AdamW(parameters, lr=0.1)),
    "fused": optimizer_step(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True)),
    "bitsandbytes": optimizer_step(bitsandbytes),
    "written": written,
    "moved": moved,
    "loaded": lambda model, logits: model.load_state_dict(Head().state_dict()),
}
READS = {
    "values": lambda logits: logits.argmax(-1),
    "cast": lambda logits: logits.double() + 1,
    "item": lambda logits: logits[0, 0, 0].item(),
    "numpy": lambda logits: logits.detach().numpy(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_raise(change):
    for read in READS.values():
        model = Head()
        logits = model.deferred()
        CHANGES[change](model, logits)
        with pytest.raises(RuntimeError, match='Read them before that, or compile with options={"logits": "materialize"}'):
            read(logits)
        assert logits.shape == (2, 3, VOCABULARY) and "not computed" in repr(logits)


def test_read_before_the_step_they_stay():
    model = Head()
    logits, expected = model.deferred(), model.logits().detach()
    logits.sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    assert_equal(logits.detach() * 1, expected)
    with pytest.raises(RuntimeError, match="Read them before that"):
        logits.sum().backward()


def test_frozen_weights_do_not_mind_a_step():
    model = Head()
    model.weight.requires_grad_(False), model.bias.requires_grad_(False)
    logits, expected = model.deferred(), model.logits()
    CHANGES["fused"](model, logits)
    assert_equal(logits.detach() * 1, expected.detach())


def test_a_changed_hidden_state_raises():
    plan = Plan(0, torch.fx.symbolic_trace(linear), (1, 2), VOCABULARY, torch.float32)
    model, held = Head(), torch.ones(2, 8)
    (logits,) = defer(lambda held, weight, bias: (held,), [plan])(held, model.weight, model.bias)
    held.zero_()
    with pytest.raises(RuntimeError, match="the hidden state"):
        logits.sum()


AUTOCAST = {
    "off": contextlib.nullcontext,
    "bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "half": lambda: torch.autocast("cpu", torch.float16),
    "disabled": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize("read", AUTOCAST)
@pytest.mark.parametrize("forward", AUTOCAST)
def test_autocast_of_the_forward_counts(forward, read):
    results = []
    for make in (Head.logits, Head.deferred):
        model = Head(linear)
        with AUTOCAST[forward]():
            logits = make(model)
        with AUTOCAST[read]():
            results.append([logits.dtype, logits + 0, logits @ torch.ones(VOCABULARY, 2, dtype=logits.dtype)])
        results[-1][1].double().sin().sum().backward()
        results[-1] += [model.weight.grad, model.x.grad]
    assert results[0][0] == results[1][0]
    assert_equal(results[1][1:], results[0][1:])


def test_first_read_below_autocast():
    """With `__torch_function__` off, the first that reads them is an operation that autocast has already taken apart."""
    expected, model = Head(linear), Head(linear)
    for bf16 in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits, result = model.deferred(), expected.logits()
        with torch._C.DisableTorchFunctionSubclass(), torch.autocast("cpu", torch.bfloat16, enabled=not bf16):
            found = torch.mm(logits.flatten(0, 1), torch.ones(VOCABULARY, 2, dtype=logits.dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=not bf16):
            assert_equal(found, torch.mm(result.flatten(0, 1), torch.ones(VOCABULARY, 2, dtype=result.dtype)))
        assert_equal(logits * 1, result * 1)


MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("read", MODES)
@pytest.mark.parametrize("forward", MODES)
def test_grad_modes(forward, read):
    found = []
    for make in (Head.logits, Head.deferred):
        model = Head()
        with MODES[forward]():
            logits = make(model)
        with MODES[read]():
            results = [logits.clone(), logits.to(torch.float64), logits.detach(), logits * 2, logits.detach().sin(), logits.clone(), logits.double(), logits[0]]
        again = logits * 3
        results.append(again)
        if again.requires_grad:
            again.sum().backward()
        states = [(x.requires_grad, x.is_inference(), x.dtype, x.is_leaf) for x in (logits, *results)]
        found.append((states, [torch.Tensor.double(x) for x in results], model.gradients()))
    assert found[1][0] == found[0][0]
    assert_equal(found[1][1:], found[0][1:])


def test_reading_under_a_dispatch_mode():
    """Values are the user's, not the mode's: under fake tensors they would be fake for good."""
    logits = Head().deferred()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(logits + 1, FakeTensor)
    assert_equal(logits + 1, Head().logits() + 1)


def test_reading_without_gradients_keeps_no_graph():
    model = Head()
    logits = model.deferred()
    with torch.no_grad():
        assert not logits.exp().requires_grad and logits[0].grad_fn is None
    assert logits.exp().requires_grad and logits[0].grad_fn is not None


def test_nothing_is_held_longer_than_the_logits():
    """No reference cycle, read or not: memory is freed at once, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        for read in (lambda logits: None, lambda logits: logits.sum().backward(), lambda logits: logits.mul_(2), lambda logits: logits.float().half() * 2):
            model, held = Head(), []
            plan = Plan(0, torch.fx.symbolic_trace(linear), (1, 2), VOCABULARY, torch.float32)

            def graph(x, weight, bias, held=held):
                hidden = x * 2
                held.append(weakref.ref(hidden))
                return (hidden,)

            (logits,) = defer(graph, [plan])(model.x, model.weight, model.bias)
            assert held[0]() is not None
            read(logits)
            values = weakref.ref(logits._values)
            del logits
            assert held[0]() is None and values() is None
    finally:
        gc.enable()


def test_only_the_converted_logits_stay():
    """bf16 logits that only a cast reads are not kept beside it."""
    logits = Head(dtype=torch.bfloat16).deferred()
    converted = logits.float()
    before = deferred.computed()
    converted.sum(), converted.argmax()
    assert deferred.computed() == before + 1 and logits._values.known is None


RECIPES = {
    "columns": lambda held, weight, bias: F.linear(held, weight, bias)[..., 1:],
    "transposed": lambda held, weight, bias: F.linear(held, weight, bias).transpose(0, 1).contiguous().transpose(0, 1),
    "behind others": lambda held, weight, bias: torch.stack([F.linear(held, weight), F.linear(held, weight, bias)])[1],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_that_end_in_a_view(recipe):
    found = []
    for make in (Head.logits, Head.deferred):
        model = Head(RECIPES[recipe])
        logits = make(model)
        logits[0, 1:].mul_(3)
        torch.cat([logits.sin().flatten(), logits[..., 1].exp().flatten()]).sum().backward()
        found.append((logits.detach() * 1, model.gradients()))
    assert_equal(*found)


RESHAPES = {
    "squeeze_": lambda logits: logits.unsqueeze_(0),
    "transpose_": lambda logits: logits.transpose_(0, 1),
    "resize_": lambda logits: logits.resize_(1),
    "set_": lambda logits: logits.set_(torch.ones(1)),
    "data": lambda logits: setattr(logits, "data", logits.data * 2),
}


@pytest.mark.parametrize("change, function", [(change, function) for change in RESHAPES for function in (True, False) if function or change != "data"])
def test_shape_changes_in_place_raise(change, function):
    """They would reach the view that is handed out and not the logits: an error instead."""
    logits = Head().deferred().detach()
    with pytest.raises(RuntimeError), contextlib.nullcontext() if function else torch._C.DisableTorchFunctionSubclass():
        RESHAPES[change](logits)


class Quantized(torch.Tensor):
    """A weight that is the negative of its data, as far as `linear` goes."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return -F.linear(*(tensor.as_subclass(torch.Tensor) for tensor in args))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("function", [contextlib.nullcontext, torch._C.DisableTorchFunctionSubclass])
def test_weights_that_are_subclasses(function):
    model = Head(linear)
    model.weight = nn.Parameter(model.weight.detach().as_subclass(Quantized), requires_grad=False)
    expected, logits = model.logits(), model.deferred()
    with function():
        found = torch.sin(logits)
    assert_equal(found, expected.sin())


def test_logits_that_the_model_detached():
    model = Head(lambda held, weight, bias: F.linear(held, weight, bias).detach())
    logits, expected = model.deferred(), model.logits()
    assert not logits.requires_grad and logits.is_leaf and not logits.double().requires_grad
    assert_equal(logits * 1, expected)


def test_a_recipe_that_gives_something_else_raises():
    plan = Plan(0, torch.fx.symbolic_trace(lambda held, weight: F.linear(held, weight).double()), (1,), VOCABULARY, torch.float32)
    (logits,) = defer(lambda held, weight: (held,), [plan])(torch.ones(2, 8), Head().weight)
    with pytest.raises(RuntimeError, match="a recipe made torch.float64"):
        logits.sum()


def test_as_a_parameter_of_its_own():
    """`requires_grad_` on logits without a gradient, as for an adversarial step."""
    with torch.no_grad():
        pair = Head().logits(), Head().deferred()
    for logits in pair:
        logits.requires_grad_()
        logits.sin().sum().backward()
    assert_equal(pair[1].grad, pair[0].grad)
    assert nn.Parameter(pair[1]).shape == pair[0].shape
