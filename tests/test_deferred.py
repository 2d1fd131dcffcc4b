"""Deferred logits: whatever reads them gets what eager gives, gradients included; what only asks for their shape computes nothing."""

import copy
import io
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastft import deferred
from fastft.deferred import DeferredTensor, Plan, defer

ROWS, HIDDEN, VOCABULARY = (2, 3), 8, 5


def head(held, weight, bias):
    return torch.tanh(F.linear(held, weight, bias) / 2) * 2


class Head(nn.Module):
    """A hidden state, and logits of it: as eager makes them, or deferred."""

    def __init__(self, recipe=head, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"x": (*ROWS, HIDDEN), "weight": (VOCABULARY, HIDDEN), "bias": (VOCABULARY,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        self.recipe = recipe

    def held(self, x):
        return x * 1.5 + self.weight.sum(0)  # a tied head: the hidden state depends on the weight too

    def logits(self):
        return self.recipe(self.held(self.x), self.weight, self.bias)

    def deferred(self):
        example = self.logits()
        plan = Plan(1, torch.fx.symbolic_trace(self.recipe), (1, 2), example.shape[-1], example.dtype)
        _, logits = defer(lambda x, weight, bias: (x.sum(), self.held(x)), [plan])(self.x, self.weight, self.bias)
        assert type(logits) is DeferredTensor
        return logits

    def gradients(self):
        return {name: parameter.grad for name, parameter in self.named_parameters()}


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def outcome(make, use):
    """What `use` returns or raises, and the gradients after a backward through it."""
    model = Head()
    logits = make(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = use(logits)
            if isinstance(result, torch.Tensor) and result.requires_grad:
                result.sum().backward()
    except Exception as error:
        return type(error), str(error)[:60], model.gradients()
    return type(result), result, model.gradients()


def assert_as_eager(use, runs=None):
    """`use` gives for deferred logits what it gives for eager's; `runs`: how often it may compute them."""
    kind, result, gradients = outcome(Head.logits, use)
    before = deferred.computed()
    found = outcome(Head.deferred, use)
    if runs is not None:
        assert deferred.computed() - before == runs
    assert issubclass(found[0], kind)
    if isinstance(result, (str, bool)):
        assert found[1] == result
    else:
        assert_equal(found[1], result)
    assert_equal(found[2], gradients)
    return result


class Cube(torch.autograd.Function):
    """Reaches autograd without `__torch_function__`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradient


class Double(torch.autograd.Function):
    """Writes into its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Same(torch.autograd.Function):
    """Returns its input with another gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        return 7 * gradient


def written(write):
    """Both what was written and what was made of the logits before."""

    def use(logits):
        before, early = logits.double(), logits.detach()
        write(logits)
        return (before * 3).sum() + logits.sin().sum() + early.sum()

    return use


def saved(logits):
    buffer = io.BytesIO()
    torch.save(logits, buffer)
    buffer.seek(0)
    return torch.load(buffer) * logits


def read_without_gradients(logits):
    with torch.no_grad():
        best = logits.argmax(-1)
    return logits.gather(-1, best[..., None])


def written_through_a_view(logits):
    row = logits[1]
    row.mul_(3)
    with torch.no_grad():
        logits[0].add_(1)
    return logits.cos().sum() + row.sum()


def hooked(logits):
    logits.register_hook(lambda gradient: gradient * 2)
    logits.retain_grad()
    logits.float().sin().sum().backward(retain_graph=True)
    return logits.grad.clone() * logits


def written_and_hooked(logits):
    logits.register_hook(lambda gradient: gradient * 2)
    logits.mul_(3)
    logits.register_hook(lambda gradient: gradient * 5)
    return Cube.apply(logits)


def backward_from_it(logits):
    torch.autograd.backward([logits.sum(), logits], [None, torch.ones_like(logits)], retain_graph=True)
    logits.backward(torch.full_like(logits, 2.0), retain_graph=True)
    return logits * 2


def gradient_of_the_gradient(logits):
    (gradient,) = torch.autograd.grad(logits.sin().sum(), logits, create_graph=True)
    return gradient * logits


READS = {
    "index": lambda logits: logits[:, 1:, ::2],
    "argmax": lambda logits: logits.argmax(-1),
    "arithmetic": lambda logits: 1 - logits * 2 / logits.exp(),
    "loss": lambda logits: F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), torch.tensor([1, 2, -100, 4])),
    "log_probs": lambda logits: logits.float().log_softmax(-1).gather(-1, torch.zeros(*ROWS, 1, dtype=torch.long)),
    "matmul": lambda logits: logits @ torch.ones(VOCABULARY, 2),
    "lists": lambda logits: torch.cat([torch.stack([logits, logits + 1]), logits[None]]),
    "einsum": lambda logits: torch.einsum("bsv,bsv->b", logits, logits),
    "function": lambda logits: torch.logsumexp(input=logits, dim=-1),
    "topk": lambda logits: logits.topk(2).values,
    "iterate": lambda logits: sum(row.sin() for row in logits),
    "split": lambda logits: torch.mul(*logits.split(1)),
    "device": lambda logits: str(logits.to("meta").device),
    "cast": lambda logits: logits.to(torch.float64).half().float(),
    "clone": lambda logits: logits.clone().mul_(logits),
    "detached": lambda logits: logits.detach().exp() * logits,
    "data": lambda logits: logits.data * 2,
    "item": lambda logits: logits[0, 0, 0].item() + logits.sum().item(),
    "tolist": lambda logits: logits.tolist(),
    "numpy": lambda logits: logits.detach().numpy(),
    "numpy of what has a gradient": lambda logits: logits.numpy(),
    "asarray": lambda logits: np.asarray(logits.detach().float()) + 1,
    "bool": lambda logits: bool(logits),
    "truth": lambda logits: bool((logits > -3).all()),
    "pickle": lambda logits: pickle.loads(pickle.dumps(logits)) * logits,
    "save": saved,
    "deepcopy of what has a gradient": copy.deepcopy,
    "deepcopy": lambda logits: copy.deepcopy([logits.detach()] * 2)[1],
    "dlpack": lambda logits: torch.from_dlpack(logits.detach()),
    "as_tensor": lambda logits: torch.as_tensor(logits).sin(),
    "tensor": lambda logits: torch.tensor(logits).sin(),
    "print": lambda logits: str(logits.detach().mul_(1)) + f"{logits.sum().detach():.3f}",
    "without gradients first": read_without_gradients,
    "mul_": written(lambda logits: logits.mul_(2)),
    "setitem": written(lambda logits: logits.__setitem__((0, slice(None), 1), -1.0)),
    "masked_fill_": written(lambda logits: logits.masked_fill_(torch.eye(3, 5, dtype=torch.bool), 0.0)),
    "iadd": written(lambda logits: logits.__iadd__(logits)),
    "copy_": written(lambda logits: logits.copy_(logits * 2)),
    "exp_": written(lambda logits: logits.exp_()),
    "foreach": written(lambda logits: torch._foreach_mul_([logits], 2.0)),
    "out": lambda logits: torch.add(torch.ones(VOCABULARY), 1, out=logits.detach()[0, 0]) + logits,
    "no_grad write": written(lambda logits: torch.no_grad()(logits.mul_)(2)),
    "view": written_through_a_view,
    "custom": lambda logits: Cube.apply(logits) + logits,
    "custom after a write": lambda logits: Cube.apply(logits.mul_(2)) + logits,
    "custom write": lambda logits: Double.apply(logits).sin() + logits,
    "custom identity": lambda logits: Same.apply(logits).sin(),
    "hooks": hooked,
    "written and hooked": written_and_hooked,
    "backward": backward_from_it,
    "second order": gradient_of_the_gradient,
    "wrong": lambda logits: logits @ logits,
}


@pytest.mark.parametrize("use", READS)
def test_reads_as_eager(use):
    assert_as_eager(READS[use])


@pytest.mark.parametrize("use", ["index", "argmax", "loss", "tolist", "without gradients first", "custom", "mul_"])
def test_is_computed_once_and_again_for_the_backward(use):
    assert_as_eager(READS[use], runs=1 + (use not in ("argmax", "tolist")) + (use == "mul_"))


QUERIES = """
    logits.shape logits.size() logits.size(-1) logits.stride() logits.dim() logits.ndim logits.numel() logits.nelement() len(logits) logits.dtype logits.device
    logits.layout logits.is_cuda logits.is_cpu logits.is_meta logits.is_sparse logits.is_nested logits.is_quantized logits.get_device() logits.itemsize
    logits.element_size() logits.nbytes logits.storage_offset() logits.is_contiguous() logits.is_floating_point() logits.is_complex()
    logits.is_inference() logits.requires_grad logits.is_leaf logits.grad logits._version logits.type() torch.is_tensor(logits) torch.numel(logits)
    torch.is_floating_point(logits) isinstance(logits,torch.Tensor) isinstance(logits,torch.nn.Parameter) hasattr(logits,"shape") callable(logits)
    logits.retains_grad logits.is_signed() hash(logits)==id(logits) weakref.ref(logits)()is(logits) {logits:1}[logits]
    logits.dim_order() bool(logits.grad_fn) logits.to(logits.device)is(logits) logits.float()is(logits) logits.cpu()is(logits) logits.contiguous()is(logits)
    logits.type_as(logits)is(logits) logits.detach().requires_grad logits.detach().shape logits.double().dtype logits.to(torch.bfloat16).float().shape
    logits.to("cpu",torch.half).dtype logits.type(torch.bfloat16).dtype logits.clone().shape logits.bfloat16().requires_grad
""".split()


@pytest.mark.parametrize("query", QUERIES)
def test_questions_compute_nothing(query):
    model = Head()
    names = {"torch": torch, "weakref": weakref}
    before = deferred.computed()
    found = eval(query, names, {"logits": model.deferred()})
    assert deferred.computed() == before
    assert found == eval(query, names, {"logits": model.logits()})


def test_the_ways_of_libraries_compute_nothing():
    """What Trainer, accelerate, DDP and DataLoader code do with outputs, and showing them in a debugger."""
    from accelerate.utils import convert_to_fp32, find_device, recursively_apply, send_to_device
    from torch.utils._pytree import tree_map
    from transformers.modeling_outputs import CausalLMOutput
    from transformers.trainer_pt_utils import nested_detach

    before = deferred.computed()
    logits = Head(dtype=torch.bfloat16).deferred()
    output = CausalLMOutput(loss=torch.ones(()), logits=logits)
    assert output["logits"] is output[1] is logits and "not computed yet" in repr(output)
    converted = convert_to_fp32(output)
    assert converted.logits.dtype == torch.float32 and converted.logits.requires_grad and type(converted) is CausalLMOutput
    kept = [converted.logits, nested_detach(output.to_tuple())[1], send_to_device(output, "cpu").logits, recursively_apply(lambda x: x.float(), output).logits]
    kept += [tree_map(lambda x: x, output).logits, copy.copy(output).logits]
    assert {type(tensor) for tensor in kept} == {DeferredTensor} and find_device(output) == torch.device("cpu")
    assert deferred.computed() == before
    expected = Head(dtype=torch.bfloat16).logits()
    for tensor in kept:
        assert_equal(tensor, expected.to(tensor.dtype))


def test_repr_says_whether_it_is_computed():
    logits = Head().deferred().detach()
    assert repr(logits) == "DeferredTensor(shape=(2, 3, 5), dtype=torch.float32, device='cpu', requires_grad=False, not computed yet)"
    logits.sum()
    assert repr(logits) == repr(Head().logits().detach())
