"""The kernels of the low-rank outer products: numerics and masks in Triton's interpreter, resources on every target GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from .targets import TARGETS, resources  # noqa: E402

from fastft.kernels import dropout, low_rank  # noqa: E402

INTERPRETED = """
import torch
from fastft.kernels import low_rank
torch.manual_seed(0)
half = torch.float16
for m, n, ranks, dropout in [
    (130, 200, (16,), (0.0,)), (5, 64, (3,), (0.0,)), (129, 300, (16, 8, 1), (0.1, 0.0, 0.5)), (64, 64, (33, 7), (0.05, 0.05)),
]:
    total = sum(ranks)
    s = torch.randn(m, total + 3, dtype=half)[:, :total]  # a slice, as the graph hands it over
    b = torch.randn(n, total, dtype=half).t()
    bias = torch.randn(n, dtype=half)
    seeds = torch.randint(-(2**31), 2**31 - 1, (2, m), dtype=torch.int32)
    out = low_rank.launch_dropout(s, b, seeds, ranks, dropout)
    want = low_rank.reference_dropout(s.double(), b.double(), seeds, list(ranks), list(dropout))
    assert torch.equal(out == 0, want == 0), "the masks differ from the reference's"
    assert (out - want).norm() / want.norm() < 5e-4
    for given in (bias, None):
        (out,), want = low_rank.launch(s, [b], [given]), low_rank.reference(s.double(), b.double(), None if given is None else given.double())
        assert (out - want).norm() / want.norm() < 5e-4
"""

# Every sibling as it is alone, filled up to the group's rank. bf16 is held against nothing else: the interpreter's `dot` multiplies its bits.
SIBLINGS = """
import itertools, torch
from torch.nn.functional import pad
from fastft.kernels import low_rank
torch.manual_seed(0)
for dtype, (m, widths, ranks) in itertools.product((torch.float16, torch.bfloat16), [
    (130, (200, 64, 300), (16, 16, 16)), (5, (129,), (3,)), (65, (128, 1), (33, 64)), (64, (40, 40, 40), (1, 7, 20)), (129, (512, 100), (16, 48)),
]):
    total, most = sum(ranks), max(ranks)
    s = torch.randn(m, total + 3, dtype=dtype)[:, :total]
    b = [torch.randn(r, n, dtype=dtype) if i % 2 else torch.randn(n, r, dtype=dtype).t() for i, (n, r) in enumerate(zip(widths, ranks))]
    for with_bias in ([True] * 3, [False] * 3, [False, True, False]):
        biases = [torch.randn(n, dtype=dtype) if has else None for n, has in zip(widths, with_bias)]
        outs = low_rank.launch(s, b, biases)
        want = low_rank.reference_group(s.double(), [matrix.double() for matrix in b], [None if bias is None else bias.double() for bias in biases])
        assert len({out.untyped_storage().data_ptr() for out in outs}) == len(outs) == len(widths)
        for out, exact, part, matrix, bias in zip(outs, want, s.split(ranks, 1), b, biases):
            missing = most - part.shape[1]
            (alone,) = low_rank.launch(pad(part, (0, missing)), [pad(matrix, (0, 0, 0, missing))], [bias])
            assert out.dtype == dtype and out.is_contiguous() and torch.equal(out, alone), (m, widths, ranks, with_bias)
            assert dtype == torch.bfloat16 or (out - exact).norm() / exact.norm() < 5e-4
"""


@pytest.mark.parametrize("program", [INTERPRETED, SIBLINGS], ids=["references", "siblings"])
def test_interpreted_kernels_equal(program):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


BLOCKS = {"BLOCK_M": low_rank.BLOCK_M, "BLOCK_N": low_rank.BLOCK_N}
STRIDES = ("M", "N", "stride_s", "stride_br", "stride_bn")


@pytest.mark.parametrize("siblings", [1, 2, 3])
@pytest.mark.parametrize("capability, memory", TARGETS)
def test_outer_product_compiles_without_spills(capability, memory, siblings):
    types = {"s_ptr": "*bf16", "M": "i32", "stride_s": "i32"} | dict.fromkeys(("b_ptrs", "bias_ptrs", "out_ptrs"), ("*bf16",) * siblings)
    types |= dict.fromkeys(("Ns", "strides_br", "strides_bn"), ("i32",) * siblings)
    ranks = (low_rank.MAX_RANK,) * siblings
    constants = BLOCKS | {"STARTS": low_rank.before(ranks), "RANKS": ranks, "BIASED": (True,) * siblings, "HAS_BIAS": True, "BLOCK_R": low_rank.MAX_RANK}
    needs = resources(low_rank.low_rank_kernel, types, constants, capability, num_warps=low_rank.WARPS)
    assert needs["spilled"] == 0 and needs["shared"] <= memory, needs


@pytest.mark.parametrize("capability, memory", TARGETS)
def test_outer_product_with_dropout_compiles_without_spills(capability, memory):
    types = dict.fromkeys(("s_ptr", "b_ptr", "out_ptr"), "*bf16") | {"seeds_ptr": "*i32"} | dict.fromkeys(STRIDES, "i32")
    three = {"STARTS": (0, 16, 32), "RANKS": (16, 16, 16), "LIMITS": (dropout.limit(0.05),) * 3, "SCALES": (1.05, 1.05, 1.05)}
    needs = resources(low_rank.low_rank_dropout_kernel, types, BLOCKS | three | {"BLOCK_R": 16}, capability, num_warps=low_rank.WARPS)
    assert needs["spilled"] == 0 and needs["shared"] <= memory, needs
