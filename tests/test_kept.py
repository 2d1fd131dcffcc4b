"""`keep_dequantized`: two quantized linears with LoRA, compiled without generated C++, which is most of the time."""

import gc

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastft
from fastft import kept


class Chain(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.first, self.second = (self.linear(64, 128), self.linear(128, 64))

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        base = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        return Linear4bit(base.to("cpu"), "default", r=4, config=LoraConfig(r=4, init_lora_weights=False), init_lora_weights=False)

    def block(self, x):
        return self.second(nn.functional.silu(self.first(x)))

    def forward(self, x):
        return (checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)).square().mean()


def compile(model, **options):
    return torch.compile(model, backend="fastft", options={"strict": True, "inductor": {"fallback_by_default": True}, **options})


def step(model, call, rows=80):
    """`(loss, gradients)`"""
    model.zero_grad()
    loss = call(torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).requires_grad_())
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def packed_weights(model):
    return [parameter for parameter in model.parameters() if type(parameter).__name__ == "Params4bit"]


def providers():
    return [row.provider for report in fastft.reports() for row in report.rewrites if row.pass_name == "quant_linear"]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_same_values_without_dequantization(checkpointed, monkeypatch):
    model = Chain(checkpointed)
    plain = step(model, compile(model))
    assert providers() == ["dequantize"] * 2
    torch._dynamo.reset()
    fastft.reset()
    call = compile(model, keep_dequantized=True)
    step(model, call)
    assert providers() == ["kept"] * 2 and not any(report.dropped for report in fastft.reports())
    made = []
    monkeypatch.setattr(kept, "dequantize_4bit", lambda *args: made.append(args))
    loss, gradients = step(model, call)
    assert len(gradients) == 4 and not made and torch.equal(loss, plain[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain[1], strict=True))


def test_shared_made_again_when_written_and_freed():
    model = Chain()
    call = compile(model, keep_dequantized=True)
    first, _ = step(model, call)
    weights = packed_weights(model)

    def tensors():
        return [tensor for weight in weights for _, tensor in kept._kept[weight].values()]

    before = tensors()
    step(model, call, rows=96)  # a graph of its own
    assert len(fastft.reports()) == 2 and [id(tensor) for tensor in tensors()] == [id(tensor) for tensor in before]
    with torch.no_grad():
        weights[0].copy_(weights[0].flip(0))
    second, _ = step(model, call)
    assert second != first and tensors()[0] is not before[0] and tensors()[1] is before[1]
    torch.testing.assert_close(second, step(model, model)[0])
    count = len(kept._kept)
    torch._dynamo.reset()
    del model, call, tensors, before
    weights.clear()
    gc.collect()
    assert len(kept._kept) <= count - 2


def test_no_room(monkeypatch):
    def full(*_):
        raise MemoryError("keep_dequantized needs 2.0 GiB and 1.0 are free: leave the option out")

    monkeypatch.setattr(kept, "_check_room", full)
    model = Chain()
    with pytest.warns(UserWarning, match="keep_dequantized failed and was dropped"):
        step(model, compile(model, keep_dequantized=True, strict=False))
    assert providers() == ["dequantize"] * 2
    assert [name for report in fastft.reports() for name, _ in report.dropped] == ["keep_dequantized"]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="leave the option out"):
        step(model, compile(model, keep_dequantized=True))


def test_free_memory_is_asked_for(monkeypatch):
    recipe = kept.Recipe((0, None), (64,), 8 << 30)
    weight = type("Weight", (), {"device": torch.device("cuda")})()
    monkeypatch.setattr(kept, "_kept", {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 9 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    with pytest.raises(MemoryError, match=r"needs 8.0 GiB and 7.0 are free"):
        kept._check_room([recipe], [weight])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    kept._check_room([recipe], [weight])
