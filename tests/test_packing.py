"""`pack_weights`: the same numbers, the same parameters, and nothing that saving or loading could see."""

import copy
import io

import pytest
import torch
from conftest import ROOT  # noqa: F401  (puts tools/ on the path)
from torch import nn

import fastft
from fastft import packing
from fastft.kernels import packed


class Lora(nn.Module):
    def __init__(self, width: int, out: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(width, out, dtype=torch.bfloat16).requires_grad_(False)
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)

    def forward(self, x):
        y = self.base(x)
        return (y + self.b(self.a(x.float())) * 2.0).to(y.dtype)


class Gated(nn.Module):
    """gate and up on one element-wise input: a group that packing takes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = Lora(64, 128), Lora(64, 128)

    def forward(self, x):
        h = torch.sin(x)
        return nn.functional.silu(self.gate(h)) * self.up(h)


def gradients(model, call, x):
    model.zero_grad()
    y = call(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_packed_training_is_right_and_invisible():
    torch.manual_seed(0)
    fastft.reset()
    model, x = Gated(), torch.randn(2, 16, 64, dtype=torch.bfloat16)
    exact = gradients(twin := copy.deepcopy(model).double(), lambda v: _float64(twin, v), x.double())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    eager = gradients(model, model, x)
    compiled = torch.compile(model, backend="fastft", options={"pack_weights": True, "strict": True})
    for _ in range(2):  # the second step must not find the first one's columns in the buffer
        packed_run = gradients(model, compiled, x)
        for got, plain, want in zip(packed_run, eager, exact, strict=True):
            assert (got - want).norm() <= 1.5 * (plain - want).norm() + 2**-9 * want.norm()
    rows = [row for report in fastft.reports() for row in report.rewrites if row.pass_name == "lora_linear"]
    assert [row.provider for row in rows] == ["k_extended+mm"]
    assert packing.is_packed(model.gate.base.weight) and model.gate.base.weight.stride() == (64 + packed.PAD, 1)
    assert len(fastft.reports()) == 1, "packing must not cost a second compile"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = Gated()
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh.up.base.weight, before["up.base.weight"])
    twin = copy.deepcopy(model)
    assert torch.equal(twin.up.base.weight, before["up.base.weight"]) and not packing.is_packed(twin.up.base.weight)


def _float64(model, x):
    h = torch.sin(x)
    gate, up = (m.base(h) + m.b(m.a(h)) * 2.0 for m in (model.gate, model.up))
    return nn.functional.silu(gate) * up


class Attended(nn.Module):
    """A linear on what attention wrote: [x | s] would be a copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.o = Lora(64, 64)

    def forward(self, x):
        heads = torch.sin(x).unflatten(-1, (4, 16)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


def test_what_other_kernels_write_is_left_alone():
    fastft.reset()
    model, x = Attended(), torch.randn(2, 16, 64, dtype=torch.bfloat16)
    gradients(model, torch.compile(model, backend="fastft", options={"pack_weights": True, "strict": True}), x)
    providers = {row.pass_name: row.provider for report in fastft.reports() for row in report.rewrites}
    assert "attention" in providers and providers["lora_linear"] == "accumulate+mm" and not packing.is_packed(model.o.base.weight)


def test_transformers_saves_packed_weights(tmp_path):
    import tiny
    from transformers import AutoModelForCausalLM

    model = tiny.tiny_model("llama", layers=1, dtype=torch.bfloat16).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for weight in model.parameters():
        if packing._can_be_packed(weight):
            packing._pack(weight)
    assert packing.is_packed(model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(tmp_path)
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("reason", ["trained", "float32", "view", "shared"])
def test_what_is_not_packed(reason):
    weight = nn.Parameter(torch.randn(16, 64, dtype=torch.bfloat16), requires_grad=reason == "trained")
    if reason == "float32":
        weight = nn.Parameter(weight.float(), requires_grad=False)
    if reason == "view":
        weight = nn.Parameter(torch.randn(16, 128, dtype=torch.bfloat16)[:, :64], requires_grad=False)
    if reason == "shared":
        weight = nn.Parameter(torch.randn(32, 64, dtype=torch.bfloat16)[:16], requires_grad=False)
    assert not packing._can_be_packed(weight)


def test_a_stride_like_a_packed_one_is_not_trusted():
    """Columns behind somebody else's slice hold somebody else's data: only what fastft laid out counts as packed."""
    whole = torch.randn(16, 64 + packed.PAD, dtype=torch.bfloat16)
    weight = nn.Parameter(whole[:, :64], requires_grad=False)
    assert weight.stride() == (64 + packed.PAD, 1) and not packing.is_packed(weight) and not packing._can_be_packed(weight)
