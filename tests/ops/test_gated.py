"""The kernels of gated MLPs: numerics in Triton's interpreter, resources on every target GPU, the reference against autograd."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastft.kernels import dropout as masks
from fastft.kernels import gated, low_rank

INTERPRETED = """
import itertools, torch
from fastft.kernels import dropout, gated
torch.manual_seed(0)
half = torch.float16
gated.STEPS, gated.STEPS_BACKWARD = 2, 3
cases = [(40, 130, (16, 16, 16)), (129, 200, (5, 1, 32)), (1, 64, (1, 2, 3)), (64, 256, (16, 4, 20))]
for (m, n, (p, q, r)), activation in itertools.product(cases, gated.ACTIVATIONS):
    rand = lambda *shape: torch.randn(shape).to(half)
    # slices of wider matrices, a B in another layout
    g, u, dh = rand(m, n + 8)[:, :n], rand(m, n), rand(m, n)
    s, ds = rand(m, q + r + 3) / 4, rand(m, p + 1)[:, :p] / 4
    args = (g, u, s[:, : q + r], rand(n, q) / 4, rand(r, n).t() / 4)
    full = (dh, ds, rand(p, n) / 4, *args)
    double = lambda tensors: [tensor.double() for tensor in tensors]
    got, want = [gated.launch(*args, activation)], [gated.reference(*double(args), activation)]
    *grads, da = gated.launch_backward(*full, activation)
    assert da.shape == (-(-m // (3 * gated.BLOCK_M)), p, n) and da.dtype == torch.float32
    got, want = [*got, *grads, da.sum(0)[None]], [*want, *gated.reference_backward(*double(full), activation)]
    for rate in (0.1, 0.5):
        mask = (torch.randint(-(1 << 31), 1 << 31, (1, m), dtype=torch.int32), dropout.columns(n, g.device), rate)
        *grads, da = gated.launch_backward(*full, activation, *mask)
        got, want = [*got, *grads, da.sum(0)[None]], [*want, *gated.reference_backward(*double(full), activation, *mask)]
    for one, exact in zip(got, want, strict=True):
        assert one.shape == exact.shape and (one - exact).norm() / exact.norm() < 6e-4, (m, n, p, q, r, activation, (one - exact).norm() / exact.norm())
"""


def test_interpreted_kernels_equal_the_references():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


def operands(m=6, n=10, ranks=(3, 1, 2), dtype=torch.float64):
    """What `gated_backward` takes before the name of the activation: dh, dS, A, then what `gated` takes."""
    p, q, r = ranks
    shapes = [(m, n), (m, p), (p, n), (m, n), (m, n), (m, q + r), (n, q), (n, r)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def mask(m=6, n=10, p=0.3):
    """Seeds, columns and p, as `gated_backward` takes them."""
    return torch.randint(-(1 << 31), 1 << 31, (1, m), dtype=torch.int32), masks.columns(n, torch.device("cpu")), p


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
def test_the_backward_is_autograds(activation, dropout):
    dh, ds, a, *rest = operands()
    seeds, columns, _ = mask()
    leaves = [*rest, ds, a]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    *rest, ds, a = leaves
    h = gated.reference(*rest, activation)
    d_gate, d_up, da = gated.reference_backward(dh, ds.detach(), a.detach(), *(t.detach() for t in rest), activation, seeds, columns, dropout)
    # y = h W + dropped(h) A^T B^T with W and B such that dY W^T = dh and dY B = dS
    y = (h * dh).sum() + (masks.dropped(h, seeds, 0, dropout) @ a.t() * ds.detach()).sum()
    torch.testing.assert_close([d_gate, d_up, da[0]], list(torch.autograd.grad(y, [*rest[:2], a])))


def test_a_kernel_that_fails_is_replaced_by_the_reference(monkeypatch):
    def fail(*args):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("fastft.runner._failed_kernels", set())
    monkeypatch.setattr("fastft.runner._strict_kernels", False)
    monkeypatch.setattr(gated, "serves", lambda *args: True)
    for name in ("launch", "launch_backward"):
        monkeypatch.setattr(gated, name, fail)
    args = operands(m=2 * 16 * gated.STEPS_BACKWARD, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="kernel gated failed"):
        assert torch.equal(gated._cuda(*args[3:], "silu"), gated.reference(*args[3:], "silu"))
    with pytest.warns(UserWarning, match="kernel gated_backward failed"):
        *grads, da = gated._cuda_backward(*args, "silu")
    *wanted, wanted_da = gated.reference_backward(*args, "silu")
    assert all(map(torch.equal, grads, wanted)) and da.shape == (2, 3, 10) and torch.equal(da.sum(0), wanted_da[0])


def test_the_kernels_serve_what_the_pass_takes():
    """`lora_mlp` takes linears whose outer products stream; beyond its largest rank `gated` would run as its reference."""
    assert gated.MAX_RANK >= low_rank.MAX_RANK


def test_flops_are_those_of_the_low_rank_products():
    args = operands()
    for count, call in ((2 * 6 * 10 * (1 + 2), lambda: gated.gated(*args[3:], "gelu")), (2 * 2 * 6 * 10 * 3, lambda: gated.gated_backward(*args, "gelu"))):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_schemas_and_fakes(dtype):
    args = operands(dtype=dtype)
    torch.library.opcheck(gated.gated, (*args[3:], "gelu_tanh"), test_utils=("test_schema", "test_faketensor"))
    for rest in ((), mask()):
        torch.library.opcheck(gated.gated_backward, (*args, "silu", *rest), test_utils=("test_schema", "test_faketensor"))


try:
    from .targets import TARGETS, resources
except ImportError:  # no Triton
    TARGETS = []

STRIDES = [f"stride_{name}" for name in ("g", "u", "sg", "su", "bgr", "bgn", "bur", "bun")]
FORWARD = dict.fromkeys(("g_ptr", "u_ptr", "sg_ptr", "su_ptr", "bg_ptr", "bu_ptr"), "*bf16") | dict.fromkeys(("M", "N", *STRIDES), "i32")
BACKWARD = dict.fromkeys(("dh_ptr", "ds_ptr", "a_ptr", "dg_ptr", "du_ptr"), "*bf16") | dict.fromkeys(
    ("stride_dh", "stride_ds", "stride_ar", "stride_an"), "i32"
)


@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
@pytest.mark.parametrize("rank, dropout", [(16, 0.0), (gated.MAX_RANK, 0.0), (gated.MAX_RANK, 0.05)])
@pytest.mark.parametrize("capability, memory", TARGETS)
def test_compiles_without_spills_within_shared_memory(capability, memory, rank, dropout, activation):
    blocks = {"BLOCK_M": gated.BLOCK_M, "BLOCK_N": gated.BLOCK_N, "BLOCK_R": rank, "STAGES": gated.STAGES, "ACTIVATION": activation}
    blocks |= {"RANK_G": rank, "RANK_U": rank}
    for kernel, types, constants in (
        (gated.gated_kernel, FORWARD | {"h_ptr": "*bf16"}, {"STEPS": gated.STEPS}),
        (
            gated.gated_backward_kernel,
            FORWARD | BACKWARD | {"da_ptr": "*fp32", "seeds_ptr": "*i32", "columns_ptr": "*i32"},
            {"STEPS": gated.STEPS_BACKWARD, "RANK_D": rank, "LIMIT": masks.limit(dropout), "SCALE": masks.scale(dropout)},
        ),
    ):
        needs = resources(kernel, types, blocks | constants, capability, num_warps=gated.WARPS)
        assert needs["spilled"] == 0 and needs["shared"] <= memory, needs
