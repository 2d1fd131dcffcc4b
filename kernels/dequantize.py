"""`fastft::dequantize_4bit`: the values of a frozen weight that bitsandbytes packed in NF4 or FP4, nested statistics included, in one launch.

    w_i      = code[nibble_i] * absmax_(i / blocksize)                        in float32, then rounded to `dtype`
    absmax_b = absmax_code[absmax_8bit_b] * absmax_(b / 256) + absmax_offset  where nested: rounded after the product and after the sum

Bit for bit what bitsandbytes 0.50.2 computes on GPUs. Its kernels are built with `--use_fast_math`: subnormal factors and products are zero, those of
PyTorch's sum are not, and product and sum are two kernels, so no fma. Hence `mul.rn.ftz` (`_times`) and a plain sum.
On a CPU the reference flushes nothing; it equals each of bitsandbytes' CPU forms where they agree. Code 8 of FP4 is -0.0, as in CUDA and scalar C++;
AVX-512 and Python have 0.0. AVX-512 also makes subnormal bf16 zero, and takes wrong statistics where a row is no whole number of blocks
(`absmax_dim_1 = dim_1 / blocksize`): blocks run through the flat weight, which is how they were made.

Bound by memory: 0.5 bytes read and 2 written an element in 16 bits, and 1/64 for the statistics of blocks of 64: 4096 x 14336 moves 148 MB, 0.036 ms at
4.1 TB/s (H200). bitsandbytes takes three launches, and its third 26 instructions an element (sm_90) and stores of 2 bytes.
Here a thread has 8 neighbours: one load of 4 bytes, one statistic, one store of 16. Codes are looked up in a table of 64 bytes in shared memory
(`tl.gather`): 16 banks, so threads never collide. 9.2 instructions an element, of which shift, mask, lookup, product and half a conversion are 4.4;
an H200 can issue 18 in the time of the transfer. With the table read through L1 9.7, with a tree of selects 26.
Measured at that size: 0.0402 ms, a copy of as many bytes 0.0399, bitsandbytes 0.0739 (tools/results/2026-11-22-op-dequantize.json).
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastft.kernels import warmup
from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.guard import guarded

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # CPU builds of PyTorch come without Triton
    triton = None

# The value of every nibble. NF4: quantiles of a normal distribution (QLoRA, arXiv 2305.14314); FP4: sign, 2 bits of exponent, 1 of mantissa.
CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip

# As int32, because -0.0 does not survive as a constant of Triton's.
BITS = {name: tuple(torch.tensor(code, dtype=torch.float32).view(torch.int32).tolist()) for name, code in CODES.items()}

BLOCKSIZES = tuple(32 << i for i in range(8))
NESTED_BLOCK = 256  # blocks that share a second-level statistic

# Elements of a program: a multiple of every block size, and at most one second-level statistic.
TILE, WARPS = 4096, 4

LIBRARY.define(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? absmax_8bit, Tensor? absmax_code, Tensor? absmax_offset, "
    "int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor"
)


def check(packed, absmax, absmax_8bit, absmax_code, absmax_offset, blocksize, quant_type, shape, dtype) -> None:
    """Raises where the arguments do not describe a weight: the kernel would read beyond them."""
    torch._check(
        quant_type in CODES and blocksize in BLOCKSIZES and dtype in (torch.bfloat16, torch.float16, torch.float32),
        lambda: f"dequantize_4bit: {quant_type}, blocks of {blocksize}, {dtype}",
    )
    n = math.prod(shape)
    blocks = -(-n // blocksize)
    second = blocks if absmax_8bit is None else -(-blocks // NESTED_BLOCK)
    torch._check(
        2 * packed.numel() * packed.element_size() >= n and absmax.dtype == torch.float32 and absmax.numel() >= second,
        lambda: f"dequantize_4bit: {packed.shape} {packed.dtype} with statistics {absmax.shape} {absmax.dtype} for {shape}",
    )
    if absmax_8bit is not None:
        torch._check(
            absmax_8bit.dtype == torch.uint8 and absmax_8bit.numel() >= blocks
            and absmax_code.dtype == torch.float32 and absmax_code.numel() == 256
            and absmax_offset.dtype == torch.float32 and absmax_offset.numel() == 1,
            lambda: f"dequantize_4bit: nested statistics {absmax_8bit.shape} {absmax_8bit.dtype} for {shape}",
        )  # fmt: skip


def reference(
    packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None, absmax_offset: Tensor | None,
    blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The specification.

    Args:
        packed: the bytes, in any dtype and shape; the high nibble of each is the earlier element.
        absmax: float32, one for each block of the flat weight; where nested, one for 256 blocks.
        absmax_8bit, absmax_code, absmax_offset: uint8, one for each block; 256 float32; one float32. None unless nested.
        blocksize: 32 to 4096, a power of two. quant_type: "nf4" or "fp4".
    Returns:
        The weight: `shape`, bf16, fp16 or float32.
    """
    check(packed, absmax, absmax_8bit, absmax_code, absmax_offset, blocksize, quant_type, shape, dtype)
    n = math.prod(shape)
    scale = absmax.reshape(-1)
    if absmax_8bit is not None:
        stored = absmax_8bit.reshape(-1)
        scale = absmax_code[stored.int()] * scale.repeat_interleave(NESTED_BLOCK)[: stored.numel()] + absmax_offset
    code = torch.tensor(CODES[quant_type], dtype=torch.float32, device=packed.device)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)  # of every byte
    values = pairs[packed.contiguous().view(torch.uint8).reshape(-1).int()].reshape(-1)[:n]
    return (values * scale.repeat_interleave(blocksize)[:n]).to(dtype).reshape(shape)


if triton is not None:

    @triton.jit
    def _times(a, b):
        # mul.rn.ftz.f32: never part of an fma, subnormal factors and results are zero.
        return libdevice.mul_rn(a, b)

    @triton.jit
    def dequantize_kernel(
        packed_ptr, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr, out_ptr, n, log_blocksize,
        BITS: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
    ):  # fmt: skip
        # A row is VEC elements: one word of packed, one store. The hint keeps neighbouring words in different threads, as their rows are.
        row = tl.max_contiguous(tl.arange(0, ROWS)[:, None], [1, 1])
        col = tl.arange(0, VEC)[None, :]
        start = tl.program_id(0).to(tl.int64) * (ROWS * VEC)
        left = tl.minimum(n - start, ROWS * VEC).to(tl.int32)
        at = row * VEC
        word = tl.load(packed_ptr + start // VEC + row, mask=at < left, other=0)
        block = start >> log_blocksize
        if NESTED:
            stored = tl.load(absmax_8bit_ptr + block + (at >> log_blocksize), mask=at < left, other=0).to(tl.uint32)
            absmax = _times(tl.load(absmax_code_ptr + stored), tl.load(absmax_ptr + block // 256)) + tl.load(absmax_offset_ptr)
        else:
            absmax = tl.load(absmax_ptr + block + (at >> log_blocksize), mask=at < left, other=0.0)
        entry = tl.arange(0, 16)
        code = tl.zeros((16,), tl.int32)
        for i in tl.static_range(16):
            code = tl.where(entry == i, BITS[i], code)
        nibble = ((word >> 4 * (col ^ 1)) & 15).to(tl.int32)
        value = tl.gather(code.to(tl.float32, bitcast=True), nibble.reshape(ROWS * VEC), 0).reshape(ROWS, VEC)
        tl.store(out_ptr + start + at + col, _times(value, absmax).to(out_ptr.dtype.element_ty), mask=at + col < left)


def words(packed: Tensor, size: int) -> Tensor:
    """The bytes of `packed` as integers of `size` bytes, of fewer where their number or address asks for it."""
    packed = packed.contiguous().view(torch.uint8).reshape(-1)
    while packed.numel() % size or warmup.address(packed) % size:
        size //= 2
    return packed.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[size])


def launch(
    packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None, absmax_offset: Tensor | None,
    blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype, tile: int = TILE, warps: int = WARPS,
) -> Tensor:  # fmt: skip
    """`dequantize_4bit` by the kernel."""
    nested = absmax_8bit is not None
    out, n = packed.new_empty(shape, dtype=dtype), math.prod(shape)
    packed = words(packed, 8 // out.element_size())
    vec = 2 * packed.element_size()
    absmax, absmax_8bit, absmax_code, absmax_offset = (x.contiguous() for x in ((absmax, absmax_8bit, absmax_code, absmax_offset) if nested else (absmax,) * 4))
    with torch.cuda.device_of(packed):
        warmup.launch(
            dequantize_kernel, (triton.cdiv(n, tile),), packed, absmax, absmax_8bit, absmax_code, absmax_offset, out, n, blocksize.bit_length() - 1,
            BITS=BITS[quant_type], NESTED=nested, ROWS=tile // vec, VEC=vec, num_warps=warps,
        )  # fmt: skip
    return out


def _cuda(*args) -> Tensor:
    check(*args)
    if triton is None:
        return reference(*args)
    return guarded("dequantize_4bit", lambda: launch(*args), lambda: reference(*args))


def _fake(packed, absmax, absmax_8bit, absmax_code, absmax_offset, blocksize, quant_type, shape, dtype) -> Tensor:
    check(packed, absmax, absmax_8bit, absmax_code, absmax_offset, blocksize, quant_type, shape, dtype)
    return packed.new_empty(shape, dtype=dtype)


dequantize_4bit = warmup.register("dequantize_4bit", reference, _cuda, _fake)


@register_flop_formula(torch.ops.fastft.dequantize_4bit)
def _flops(*args, out_shape=None, **kwargs) -> int:
    return 0
