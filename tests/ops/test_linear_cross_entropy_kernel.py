"""The kernel of a chunk: numerics, NaN, infinity and bounds in Triton's interpreter, resources on every target GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from .targets import TARGETS, resources  # noqa: E402

from fastft.kernels import cross_entropy  # noqa: E402

INTERPRETED = """
import itertools, math, torch
from fastft.kernels import cross_entropy
torch.manual_seed(0)
CONFIG = (2, 2, 1)  # tiles of 1024 elements in 16 bits

def check(x, labels, row_scale, *options):
    logits = cross_entropy.buffer(*x.shape, x)
    logits.untyped_storage().fill_(255)  # NaN in the padding
    logits.copy_(x)
    exact = x.double()
    losses = cross_entropy.launch(logits, labels, row_scale, *options, CONFIG, 3)
    want = cross_entropy.reference(exact, labels, row_scale, *options)
    torch.testing.assert_close(losses.double(), want, rtol=2e-6, atol=2e-6, equal_nan=True)
    if not options[-1]:
        assert torch.equal(logits.view(torch.int16), x.view(torch.int16)), "written without being asked"
        return
    assert torch.equal(logits.isfinite(), exact.isfinite()), "other rows are not finite"
    error = (logits.double() - exact).nan_to_num().norm() / exact.nan_to_num().norm()
    assert error < (2e-6 if x.dtype == torch.float32 else 5e-4), (error, x.shape, x.dtype, options)

SIZES = [(1, 17), (4, 1024), (3, 1024 + 100), (2, 3500)]
OPTIONS = [(1.0, 0.0, 0.0, 0.0), (0.5, 0.0, 0.1, 0.0), (1.0, 5.0, 0.0, 1e-2), (2.0, 3.0, 0.2, 1e-3)]
MODES = [(torch.float16, False, True), (torch.float32, True, True), (torch.float16, False, False)]  # dtype, an upstream gradient a row, gradients wanted
for (rows, columns), options, (dtype, scaled, grad) in itertools.product(SIZES, OPTIONS, MODES):
    x = (3 * torch.randn(rows, columns)).to(dtype)
    check(x, torch.randint(0, columns, (rows,)), torch.rand(rows) + 0.5 if scaled else None, *options, grad)

for value, softcap, smoothing in itertools.product([math.nan, math.inf, -math.inf, 6e4], (0.0, 5.0), (0.0, 0.1)):
    x = torch.randn(5, 1300).half()
    x[0, 7] = x[1, 1290] = value  # in a whole tile, in the last one, at a label, whole rows
    x[2] = value
    x[3, :512] = value
    check(x, torch.tensor([3, 1290, 2, 600, 5]), None, 1.0, softcap, smoothing, 1e-3, True)

# The gradient of a sum is one number, expanded; labels may be a column.
check(torch.randn(4, 600).half(), torch.randint(0, 600, (4, 3))[:, 1], torch.tensor(0.5).expand(4), 1.0, 0.0, 0.0, 0.0, True)

# Logits far below a softcap, where a tanh that cancels would cost digits.
check(3 * torch.randn(3, 600), torch.randint(0, 600, (3,)), None, 1.0, 1000.0, 0.0, 0.0, True)

# Labels out of range: nothing is read or written at them.
x = cross_entropy.buffer(4, 100, torch.zeros(0, dtype=torch.float16)).copy_(torch.randn(4, 100))
probabilities = torch.softmax(x.double(), 1)
cross_entropy.launch(x, torch.tensor([-1, 100, 1 << 45, -(1 << 45)]), None, 1.0, 0.0, 0.0, 0.0, True, CONFIG, 3)
assert (x - probabilities).abs().max() < 1e-3
"""


def test_interpreted_kernel_equals_the_reference():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


TYPES = {"labels_ptr": "*i64", "row_scale_ptr": "*fp32", "losses_ptr": "*fp32"} | dict.fromkeys(("rows", "V", "stride"), "i32")
TYPES |= dict.fromkeys(("scale", "softcap", "label_smoothing", "z_loss"), "fp32")


@pytest.mark.parametrize("capability, memory", TARGETS)
@pytest.mark.parametrize("dtype, special", [("bf16", False), ("bf16", True), ("fp32", True)])
def test_compiles_without_spills_within_shared_memory(capability, memory, dtype, special):
    unroll, warps, stages = cross_entropy.CONFIG
    flags = {"GRAD": True} | dict.fromkeys(("SOFTCAP", "SMOOTH", "ROW_SCALE"), special)
    sizes = {"UNROLL": unroll, "LANES": 32 * warps, "VEC": 4 if dtype == "fp32" else 8, "STAGES": stages}
    needs = resources(cross_entropy.softmax_kernel, {"logits_ptr": f"*{dtype}"} | TYPES, flags | sizes, capability, num_warps=warps)
    assert needs["spilled"] == 0 and needs["shared"] <= memory and needs["registers"] * 32 * warps <= 65536, needs
