"""A weight's rows in fp8: what the reference promises; the kernels in Triton's interpreter and compiled for every target GPU that has fp8."""

import os
import subprocess
import sys

import pytest
import torch

from fastft.kernels import quantize_fp8
from fastft.kernels.quantize_fp8 import E4M3, LARGEST, quantize_weight, quantize_weights_t

AFTER = torch.empty(0)


def weight(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of very different sizes, one of zeros."""
    made = torch.randn(n, k) * torch.logspace(-6, 6, n)[:, None]
    made[n // 2] = 0
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_value_is_the_nearest(dtype):
    """e4m3 has 3 bits of mantissa down to 2^-6 and steps of 2^-9 below."""
    w = weight(9, 80, dtype).double() if dtype == torch.float32 else weight(9, 80, dtype)
    w = w.to(dtype).clamp(-6e4, 6e4)
    w8, scale = quantize_weight(w, AFTER)
    assert w8.dtype == E4M3 and w8.shape == w.shape and scale.dtype == torch.float32 and scale.shape == (9,)
    largest = w.double().abs().amax(1)
    torch.testing.assert_close(scale.double(), torch.where(largest == 0, 1e-12, largest / LARGEST), rtol=1e-6, atol=0)
    back, step = w8.double() * scale.double()[:, None], scale.double()[:, None] * 2.0**-9
    assert ((back - w.double()).abs() <= torch.maximum(w.double().abs() / 16, step / 2) * (1 + 1e-6)).all()
    assert (w8.double().abs().amax(1)[largest > 0] == LARGEST).all() and not w8.double()[4].any()


def test_transposes_hold_the_same_values():
    weights = [weight(n, 48) for n in (16, 32, 16)]
    forward = [quantize_weight(w, AFTER) for w in weights]
    both = quantize_weights_t(weights, [scale for _, scale in forward], AFTER)
    assert both.shape == (48, 64) and both.is_contiguous()
    assert torch.equal(both.view(torch.uint8), torch.cat([w8.view(torch.uint8).t() for w8, _ in forward], 1))


def test_what_is_not_a_number_stays_so():
    w = weight(4, 32)
    w[1, 3] = torch.nan
    w8, scale = quantize_weight(w, AFTER)
    assert w8[1, 3].float().isnan() and w8[[0, 2, 3]].float().isfinite().all()
    assert quantize_weights_t([w], [scale], AFTER)[3, 1].float().isnan()


def test_ops_are_what_they_say():
    w = weight(16, 32)
    _, scale = quantize_weight(w, AFTER)
    torch.library.opcheck(quantize_weight, (w, AFTER))
    torch.library.opcheck(quantize_weights_t, ([w, w], [scale, scale], AFTER))


# The interpreter loses the carry of a mantissa that is rounded up (triton 3.6 and 3.7): the cast is PyTorch's here, the chip's in test_fp8_gpu.py.
INTERPRETED = """
import numpy, torch
from triton.runtime import interpreter
own = interpreter._convert_float
def convert(data, source, target, rounding):
    if "fp8e4nv" not in str(target) or "fp32" not in str(source):
        return own(data, source, target, rounding)
    return torch.from_numpy(numpy.ascontiguousarray(data).view(numpy.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(data.shape)
interpreter._convert_float = convert
from fastft.kernels import quantize_fp8
from ops.test_quantize_fp8 import AFTER, weight
torch.manual_seed(0)
quantize_fp8.BLOCK_K = 64
def bits(x):
    return x.view({1: torch.uint8, 4: torch.int32}[x.element_size()])
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for shape in ((9, 80), (1, 64), (130, 200), (33, 16)):
        w = weight(*shape, dtype).clamp(-6e4, 6e4) if shape[0] > 1 else torch.randn(shape).to(dtype)
        for given in (w, torch.nn.functional.pad(w, (0, 24))[:, : shape[1]]):  # packed storage has longer rows
            want, got = quantize_fp8.reference(w, AFTER), quantize_fp8.launch(given)
            assert torch.equal(bits(got[1]), bits(want[1])), (dtype, shape)
            assert torch.equal(bits(got[0]), bits(want[0])), (dtype, shape)
        weights = [w, w[:1], w * 2]
        scales = [quantize_fp8.reference(w, AFTER)[1] for w in weights]
        assert torch.equal(bits(quantize_fp8.launch_t(weights, scales)), bits(quantize_fp8.reference_t(weights, scales, AFTER))), (dtype, shape)
w = weight(4, 80)
w[1, 70] = torch.nan
w8, scale = quantize_fp8.launch(w)
assert w8[1, 70].float().isnan() and w8[[0, 2, 3]].float().isfinite().all() and quantize_fp8.launch_t([w], [scale])[70, 1].float().isnan()
"""


def test_interpreted_kernels_equal_the_reference():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    code = f"import sys; sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})\n{INTERPRETED}"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("capability", [89, 90, 100, 120])
def test_compiles_without_spills(capability):
    pytest.importorskip("triton")
    from .targets import resources

    types = {"w_ptr": "*bf16", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "stride": "i32"}
    constants = {"K": 14336, "BLOCK_K": quantize_fp8.BLOCK_K}
    needs = resources(quantize_fp8.quantize_weight_kernel, types, constants, capability, num_warps=quantize_fp8.WARPS)
    assert needs["spilled"] == 0 and needs["registers"] <= 128 and needs["shared"] <= 48 << 10, needs
    types = {"w_ptr": "*bf16", "scale_ptr": "*fp32", "out_ptr": "*fp8e4nv"} | dict.fromkeys(("N", "K", "stride", "stride_out"), "i32")
    constants = {"TILE_N": quantize_fp8.TILE_N, "TILE_K": quantize_fp8.TILE_K}
    needs = resources(quantize_fp8.quantize_weight_t_kernel, types, constants, capability, num_warps=quantize_fp8.TILE_WARPS)
    assert needs["spilled"] == 0 and needs["registers"] <= 128 and needs["shared"] <= 48 << 10, needs
