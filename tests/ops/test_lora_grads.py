"""The one-read kernel of LoRA's low-rank gradients: numerics in Triton's interpreter, resources on every target GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from .targets import TARGETS, resources  # noqa: E402

from fastft.kernels import lora_grads, low_rank  # noqa: E402

INTERPRETED = """
import itertools, torch
from fastft.kernels import lora_grads
torch.manual_seed(0)
worst = 0.0
for (m, n, r), config in itertools.product([(40, 96, 16), (129, 200, 5), (1, 64, 1), (64, 520, 33)], [(32, 64, 4, 2), (64, 32, 4, 2)]):
    # s is a slice of a wider matrix and dy a column slice, as the graph hands them over
    dy = torch.randn(m, n + 8, dtype=torch.float16)[:, :n]
    s, b = torch.randn(m, r + 3, dtype=torch.float16)[:, :r], torch.randn(n, r, dtype=torch.float16)
    ds, db = lora_grads.launch([dy], s, [b], config)
    assert ds.shape[0] == lora_grads.column_spans(n, config[1])[0] and db.shape[0] == lora_grads.row_blocks(m, config[0])
    for got, want in zip((ds, db), lora_grads.reference([dy], s, [b])):
        error = (got.sum(0) - want[0]).norm() / want.norm()
        worst = max(worst, error.item())
print("worst", worst)
assert worst < 1e-5, worst
"""


# Every sibling as it is alone, filled up to the group's rank; where it has fewer spans than another, zeros follow. bf16 is held against
# nothing else: the interpreter's `dot` multiplies its bits.
SIBLINGS = """
import itertools, torch
from torch.nn.functional import pad
from fastft.kernels import lora_grads
torch.manual_seed(0)
cases = [(130, (200, 64, 600), (16, 16, 16)), (5, (129,), (3,)), (65, (128, 1), (33, 64)), (64, (40, 40, 40), (1, 7, 20)), (129, (512, 100), (16, 48))]
configs = [(32, 64, 4, 2), (64, 32, 4, 2)]
for dtype, (m, widths, ranks), config in itertools.product((torch.float16, torch.bfloat16), cases, configs):
    total, most = sum(ranks), max(ranks)
    s = torch.randn(m, total + 3, dtype=dtype)[:, :total]
    dy = [torch.randn(m, n + 8, dtype=dtype)[:, :n] for n in widths]
    b = [torch.randn(n, r, dtype=dtype) for n, r in zip(widths, ranks)]
    ds, db = lora_grads.launch(dy, s, b, config)
    for got, want in zip((ds, db), lora_grads.reference(dy, s, b)):
        assert got.shape[1:] == want.shape[1:]
        assert dtype == torch.bfloat16 or (got.sum(0) - want[0]).norm() / want.norm() < 1e-5
    db = db.split([matrix.numel() for matrix in b], 1)
    for y, part, matrix, ds_i, db_i in zip(dy, s.split(ranks, 1), b, ds.split(ranks, 2), db):
        n, r = matrix.shape
        ds_alone, db_alone = lora_grads.launch([y], pad(part, (0, most - r)), [pad(matrix, (0, most - r))], config)
        spans = ds_alone.shape[0]
        assert torch.equal(ds_i[:spans], ds_alone[:, :, :r]) and not ds_i[spans:].any(), (m, widths, ranks, config)
        assert torch.equal(db_i.reshape(-1, n, r), db_alone.view(-1, n, most)[:, :, :r]), (m, widths, ranks, config)
"""


@pytest.mark.parametrize("program", [INTERPRETED, SIBLINGS], ids=["reference", "siblings"])
def test_interpreted_kernel_equals(program):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_reference_in_place_of_a_kernel_that_fails_has_the_promised_shape(monkeypatch):
    def fail(*args):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("fastft.runner._failed_kernels", set())
    monkeypatch.setattr("fastft.runner._strict_kernels", False)
    monkeypatch.setattr(lora_grads, "config_for", lambda index, rank: (32, 64, 4, 2))
    monkeypatch.setattr(lora_grads, "launch", fail)
    dy, s, b = [torch.randn(100, 600), torch.randn(100, 70)], torch.randn(100, 7), [torch.randn(600, 3), torch.randn(70, 4)]
    with pytest.warns(UserWarning, match="lora_grads"):
        ds, db = lora_grads._cuda(dy, s, b)
    assert ds.shape == (lora_grads.column_spans(600)[0], 100, 7) and db.shape == (4, 600 * 3 + 70 * 4)
    for got, want in zip((ds, db), lora_grads.reference(dy, s, b), strict=True):
        assert torch.equal(got.sum(0), want[0])


@pytest.mark.parametrize("siblings", [1, 2, 3])
@pytest.mark.parametrize("capability, memory", TARGETS)
@pytest.mark.parametrize("rank", [16, 64])
def test_compiles_without_spills_within_shared_memory(capability, memory, rank, siblings):
    block_m, block_n, warps, stages = lora_grads.pick(memory, rank)
    types = {"s_ptr": "*bf16", "ds_ptr": "*fp32", "db_ptr": "*fp32"} | dict.fromkeys(("M", "R", "size", "stride_s"), "i32")
    types |= dict.fromkeys(("dy_ptrs", "b_ptrs"), ("*bf16",) * siblings)
    types |= dict.fromkeys(("Ns", "strides_dy", "strides_b", "spans", "offsets"), ("i32",) * siblings)
    ranks = (rank,) * siblings
    constants = {"STARTS": low_rank.before(ranks), "RANKS": ranks, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": rank}
    needs = resources(lora_grads.lora_grads_kernel, types, constants, capability, num_warps=warps, num_stages=stages)
    assert needs["spilled"] == 0 and needs["shared"] <= memory, needs
