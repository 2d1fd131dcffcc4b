"""The whole way, Inductor included: three compiles. Everything else is tested without it, in seconds."""

import pytest
import torch
from conftest import batch_for, tiny_lora
from torch import nn
from torch.nn import functional as F

import fastft
from fastft import contract


def losses(model, compiled, batches, **adam):
    """A few steps of training with clipping, as a user writes them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **adam)
    found = []
    for batch in batches:
        loss = compiled(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def test_training_follows_eager():
    """fp32, every parameter trained, two layers: the same loss in every step, lower at the end."""
    eager, model = (tiny_lora(layers=2).requires_grad_(True) for _ in range(2))
    batches = [batch_for(model, seed=step % 2) for step in range(6)]
    compiled = torch.compile(model, backend="fastft", options={"strict": True})
    expected, found = losses(eager, eager, batches, lr=1e-2), losses(model, compiled, batches, lr=1e-2)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-4, atol=0)
    assert found[-1] < 0.7 * found[0]
    (report,) = fastft.reports()
    assert sum(len(row.fqn) for row in report.rewrites if row.pass_name == "lora_linear") == 14 and not report.misses and not report.dropped
    assert report.compile_seconds > report.rewrite_seconds > sum(run.seconds for run in report.passes) > 0


def test_fp32_adapters_on_a_bf16_base_keep_the_contract():
    """peft's default, layer 0 with a frozen input; the gradients of the adapters stay in fp32."""
    model = tiny_lora(layers=1, dtype=torch.bfloat16)
    model.get_input_embeddings().requires_grad_(False)
    compiled = torch.compile(model, backend="fastft", options={"strict": True})
    result = contract.assert_contract(model, compiled, batch_for(model))
    assert len(result.rows) == 1 + 14
    gradients = contract.gradients(compiled, batch_for(model))
    assert {gradient.dtype for name, gradient in gradients.items() if name != "loss"} == {torch.float32}
    assert len(fastft.reports()) == 1


class Checkpointed(nn.Module):
    """Two checkpointed blocks with LoRA and dropout, in float64 for finite differences."""

    def __init__(self, width=32):
        super().__init__()
        for name, shape in {"W": (width, width), "A": (4, width), "B": (width, 4)}.items():
            for number in range(2):
                self.register_parameter(f"{name}{number}", nn.Parameter(torch.randn(shape, dtype=torch.float64) / shape[1] ** 0.5))

    def block(self, number, x):
        W, A, B = (getattr(self, f"{name}{number}") for name in "WAB")
        return F.gelu(F.linear(x, W) + F.linear(F.linear(F.dropout(x, 0.4), A), B) * 2)

    def forward(self, x):
        for number in range(2):
            x = torch.utils.checkpoint.checkpoint(self.block, number, x, use_reentrant=False)
        return x


def loss(outputs, batch):
    return outputs.square().sum()


def test_checkpointed_dropout_recomputes_the_mask_it_used():
    """The gradient is that of the loss with the seeds held fixed: finite differences along a random direction."""
    model, x = Checkpointed(), torch.randn(24, 32, dtype=torch.float64)
    compiled = torch.compile(model, backend="fastft", options={"strict": True})
    gradients = contract.gradients(compiled, {"x": x}, loss, seed=3)
    assert contract.gradients(compiled, {"x": x}, loss, seed=4)["loss"] != gradients["loss"]
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
            values.append(contract.gradients(compiled, {"x": x}, loss, seed=3)["loss"].item())
            with torch.no_grad():
                parameter.sub_(direction, alpha=step)
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx((gradients[name] * direction).sum().item(), rel=1e-5), name
    (report,) = fastft.reports()
    assert len(report.rewrites) == 2 and not report.dropped
