"""`fastft::fp8_linear`: a linear with a frozen bf16 weight, its products in fp8 (e4m3): `options={"base_compute": "fp8"}`.

    forward     y   = (x8 W8^T) sx sw^T + b            x8 = x / sx, sx a row of x's largest value / 448; W8, sw likewise
    backward    dX  = (g8 [W8_0; W8_1; ...]) sg        g = [dY_0 sw_0, dY_1 sw_1, ...] for the siblings of a group, g8 and sg as x8 and sx
    saves       sw; x only where the bf16 form would

`products` and `gradient` are the two lines; `fastft::lora_linear` calls them for its base. Row-wise scales (e4m3: arXiv 2209.05433; rows: FP8-LM,
arXiv 2310.18313, and torchao's "rowwise" recipe): an outlier costs its own row precision and no other. The scale of W's rows runs along the sum in dX, so it
goes into g: both products read the same 8-bit values of W.

W is quantized in every forward and again in every backward, so no copy of it is kept: 6 ms each for Llama-8B's 7.0e9 elements at 4 TB/s, where the
copies would take 14 GB. The largest values of x and g and their casts are left to Inductor, which fuses them with what makes x and g.
"""

import functools

import torch
from torch import Tensor

from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.quantize_fp8 import E4M3, LARGEST, SMALLEST_SCALE, quantize_weight, quantize_weights_t

# Rows of x from which the faster products pay for quantizing W: at M rows they save M (2 / 700 - 2 / 1250) TFLOP/s N K and W costs 3 N K / 4 TB/s,
# equal at 600 (counted, H200).
MIN_ROWS = 1024
ALIGNMENT = 16  # of both dimensions of W: `_scaled_mm`


LIBRARY.define("fp8_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def quantize_rows(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """parts: [M, N_i]; returns e4m3 [M, sum N_i], the parts side by side, and the rows' common scales, float32 [M, 1]."""
    wide = [part.float() for part in parts]
    largest = functools.reduce(torch.maximum, [part.abs().amax(1, keepdim=True) for part in wide])
    scale = (largest * (1 / LARGEST)).clamp(min=SMALLEST_SCALE)
    inverse = scale.reciprocal()
    made = [(part * inverse).to(E4M3) for part in wide]
    return made[0] if len(made) == 1 else torch.cat(made, 1), scale


def products(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """x: bf16 [M, K], weights: bf16 [N_i, K], biases: bf16 [N_i] or None; returns bf16 [M, N_i] and the weights' scales, float32 [N_i]."""
    x8, x_scale = quantize_rows([x])
    outputs, scales = [], []
    for weight, bias in zip(weights, biases, strict=True):
        w8, scale = quantize_weight(weight, x8)
        outputs.append(torch._scaled_mm(x8, w8.t(), x_scale, scale.unsqueeze(0), bias=bias, out_dtype=x.dtype, use_fast_accum=True))
        scales.append(scale)
    return outputs, scales


def gradient(grads: list[Tensor], weights: list[Tensor], scales: list[Tensor]) -> Tensor:
    """grads: bf16 [M, N_i] of `products`' outputs; returns bf16 [M, K], the gradient of x."""
    g8, g_scale = quantize_rows([grad * scale for grad, scale in zip(grads, scales, strict=True)])
    w8 = quantize_weights_t(list(weights), list(scales), g8)
    ones = g_scale.new_ones((1, w8.shape[0]))
    return torch._scaled_mm(g8, w8.t(), g_scale, ones, out_dtype=grads[0].dtype, use_fast_accum=True)


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why this device cannot; None where it can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "fp8 needs a GPU of compute capability 8.9 or newer"
    try:
        with torch.no_grad():
            x = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
            outputs, scales = products(x, [x], [None])
            gradient(outputs, [x], scales)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"fp8 does not run here: {str(error).splitlines()[0]}"
    return None


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        (y,), (scale,) = products(x, [weight], [bias])
        ctx.save_for_backward(weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            dx = gradient([grad], [weight], [scale]) if ctx.needs_input_grad[0] else None
            d_bias = grad.sum(0, dtype=torch.float32).to(grad.dtype) if ctx.needs_input_grad[2] else None
        return dx, None, d_bias


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: bf16 [..., K] (under autocast to bf16 any float), weight: frozen bf16 [N, K], bias: [N] or None; returns bf16 [..., N]."""
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        y = _Fp8Linear.apply(rows, weight, None if bias is None else bias.to(weight.dtype))
    return y.view(*x.shape[:-1], y.shape[-1])


LIBRARY.impl("fp8_linear", fp8_linear, "CompositeImplicitAutograd")
op = torch.ops.fastft.fp8_linear.default
