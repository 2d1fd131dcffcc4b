"""The one-read kernel of LoRA's low-rank gradients: numerics in Triton's interpreter, resources on every target GPU."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

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


@pytest.mark.parametrize(
    "capability, memory",
    [(80, 163 << 10), (86, 99 << 10), (89, 99 << 10), (90, 227 << 10), (100, 227 << 10), (120, 99 << 10)],
)
@pytest.mark.parametrize("rank", [16, 64])
def test_compiles_without_spills_within_shared_memory(capability, memory, rank):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastft.kernels import lora_grads

    block_m, block_n, warps, stages = lora_grads.pick(memory, rank)
    pointers = dict.fromkeys(("dy_ptr", "s_ptr", "b_ptr"), "*bf16") | dict.fromkeys(("ds_ptr", "db_ptr"), "*fp32")
    integers = dict.fromkeys(("M", "N", "R", "stride_dy", "stride_s", "stride_b", "span"), "i32")
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": rank}
    names = lora_grads.lora_grads_kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *integers)}
    source = ASTSource(
        lora_grads.lora_grads_kernel,
        signature=pointers | integers | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=aligned,
    )
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    assert kernel.metadata.shared <= memory
    usage = _resources(kernel.asm["cubin"])
    assert usage["spill"] == 0, usage


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory (spills and stack) from the cubin, read with the cuobjdump that Triton carries."""
    import pathlib
    import re
    import tempfile

    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", out)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spill": stack + local}
