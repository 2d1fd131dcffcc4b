"""The one-read kernel of LoRA's low-rank gradients: numerics in Triton's interpreter, resources on every target GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from .targets import TARGETS, resources  # noqa: E402

from fastft.kernels import lora_grads  # noqa: E402

INTERPRETED = """
import itertools, torch
from fastft.kernels import lora_grads
torch.manual_seed(0)
worst = 0.0
for (m, n, r), config in itertools.product([(40, 96, 16), (129, 200, 5), (1, 64, 1), (64, 520, 33)], [(32, 64, 4, 2), (64, 32, 4, 2)]):
    # s is a slice of a wider matrix and dy a column slice, as the graph hands them over
    dy = torch.randn(m, n + 8, dtype=torch.float16)[:, :n]
    s, b = torch.randn(m, r + 3, dtype=torch.float16)[:, :r], torch.randn(n, r, dtype=torch.float16)
    ds, db = lora_grads.launch(dy, s, b, config)
    assert ds.shape[0] == lora_grads.column_spans(n, config[1])[0] and db.shape[0] == lora_grads.row_blocks(m, config[0])
    for got, want in zip((ds, db), lora_grads.reference(dy, s, b)):
        error = (got.sum(0) - want[0]).norm() / want.norm()
        worst = max(worst, error.item())
print("worst", worst)
assert worst < 1e-5, worst
"""


def test_interpreted_kernel_equals_the_reference():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("capability, memory", TARGETS)
@pytest.mark.parametrize("rank", [16, 64])
def test_compiles_without_spills_within_shared_memory(capability, memory, rank):
    block_m, block_n, warps, stages = lora_grads.pick(memory, rank)
    types = dict.fromkeys(("dy_ptr", "s_ptr", "b_ptr"), "*bf16") | dict.fromkeys(("ds_ptr", "db_ptr"), "*fp32")
    types |= dict.fromkeys(("M", "N", "R", "stride_dy", "stride_s", "stride_b", "span"), "i32")
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": rank}
    needs = resources(lora_grads.lora_grads_kernel, types, constants, capability, num_warps=warps, num_stages=stages)
    assert needs["spilled"] == 0 and needs["shared"] <= memory, needs
