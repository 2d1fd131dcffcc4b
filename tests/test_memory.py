"""What a compiled training step keeps: the partition of two layers, and the generated code of two linears, are read."""

import collections
import re

import pytest
import torch
from conftest import batch_for, tiny_lora
from peft import LoraConfig
from peft.tuners import lora
from torch import nn
from torch._inductor.utils import run_and_get_code

from fastft import hooks, saved

LAYERS = 2


@pytest.fixture(autouse=True)
def no_caches():
    """A hit would skip the partition."""
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def test_inputs_of_lora_are_made_again(monkeypatch):
    """Neither a norm's output nor SwiGLU's product is saved: both are element-wise in what is saved anyway."""
    model = tiny_lora("llama", layers=LAYERS, dtype=torch.bfloat16, r=4)
    batch = batch_for(model)
    tokens, config = batch["input_ids"].numel(), model.config
    found = []
    partition = hooks._torch.min_cut_rematerialization_partition

    def recording(gm, joint_inputs, **kwargs):
        forward, backward = partition(gm, joint_inputs, **kwargs)
        outputs = next(node for node in forward.graph.nodes if node.op == "output").args[0]
        found.extend(node.meta["val"] for node in outputs[kwargs["num_fwd_outputs"] :] if node.op != "placeholder")
        return forward, backward

    monkeypatch.setattr(hooks._torch, "min_cut_rematerialization_partition", recording)
    # The compiler without generated C++: 12 s instead of 55.
    call = torch.compile(model, backend="fastft", options={"strict": True, "inductor": {"fallback_by_default": True}})
    call(**batch).loss.backward()
    widths = collections.Counter(x.numel() // tokens for x in found if isinstance(x, torch.Tensor) and x.numel() % tokens == 0)
    assert config.intermediate_size != config.hidden_size
    assert widths[config.intermediate_size] == 2 * LAYERS, "gate and up"
    # A layer: its input, q, attention's output and the residual after it. Beside: the loss's gradient, and what it normalises.
    assert widths[config.hidden_size] == 4 * LAYERS + 2


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(32, 48, dtype=torch.bfloat16), nn.Linear(48, 32, dtype=torch.bfloat16)
        self.first, self.second = (lora.Linear(base, "default", r=4, config=LoraConfig(r=4)) for base in (first, second))

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_sums_are_freed():
    """Every buffer that a GEMM adds into is deleted, handed on or returned, under the one name it has."""
    model = Chain()

    def step():
        torch.compile(model, backend="fastft", options={"strict": True})(torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True)).sum().backward()

    _, codes = run_and_get_code(step)
    written = 0
    for code in codes:
        assert not re.search(r"= torch\.(ops\.aten|Tensor)\.addmm_", code), "the result has a name of its own"
        assert "torch.ops.fastft.accumulate_mm" not in code, "called through the dispatcher"
        names = re.findall(r"torch\.Tensor\.addmm_\((buf\d+)", code)
        written += len(names)
        returned = code[code.index("return (") :].splitlines()[0]
        assert all(re.search(rf"del {name}\b", code) or re.search(rf"\b{name}\b", returned) for name in names), (names, code)
    assert written == 4, "two linears, forward and backward"


class OneHead(nn.Module):
    """What attention returns is saved for its own backward and, through `unbind`, for the norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        q = self.project(x).unsqueeze(1)
        (h,) = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).unbind(-2)
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_saved_tensors_do_not_overlap():
    """Plain Inductor of torch 2.11 to 2.15 writes the norm's gradient over attention's output before that is read: 94 times the gradient."""
    model, x, upstream = OneHead(), torch.randn(2, 64, 64), torch.randn(2, 64, 64)
    model(x).backward(upstream)
    expected, model.project.weight.grad = model.project.weight.grad, None
    torch.compile(model, backend="fastft", options={"strict": True})(x).backward(upstream)
    torch.testing.assert_close(model.project.weight.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "one, other, disjoint",
    [
        (lambda x: x[:, :16], lambda x: x[:, 16:48], True),  # columns: what each linear of a group reads of s
        (lambda x: x[:, :17], lambda x: x[:, 16:48], False),
        (lambda x: x[:8], lambda x: x[8:], True),
        (lambda x: x[:8], lambda x: x[7:], False),
        (lambda x: x.view(12, 4, 3, 16)[:, :, 0], lambda x: x.view(12, 4, 3, 16)[:, :, 2], True),  # packed q, k, v
        (lambda x: x.view(12, 3, 4, 16)[:, 1].transpose(0, 1), lambda x: x.view(12, 3, 4, 16)[:, 2].transpose(0, 1), True),
        (lambda x: x, lambda x: x.t(), False),
        (lambda x: x, lambda x: x.unsqueeze(1), False),
        (lambda x: x[:, :1].expand(12, 8), lambda x: x[:, 4:5].expand(12, 8), False),  # apart, but not known to be
    ],
)
def test_parts_of_one_memory(one, other, disjoint):
    x = torch.arange(12 * 192).view(12, 192)
    parts = one(x), other(x)
    assert saved._disjoint(*parts) == saved._disjoint(*reversed(parts)) == disjoint
    overlap = set(parts[0].flatten().tolist()) & set(parts[1].flatten().tolist())
    assert not (disjoint and overlap)
