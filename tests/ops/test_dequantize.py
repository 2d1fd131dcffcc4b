"""`fastft::dequantize_4bit`: bit for bit bitsandbytes' values on a CPU; the kernel in Triton's interpreter and compiled for every target GPU."""

import itertools
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fastft.kernels import dequantize
from fastft.kernels.dequantize import dequantize_4bit

TESTS = str(pathlib.Path(__file__).parents[1])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def arguments(shape, *, blocksize=64, quant_type="nf4", nested=True, dtype=torch.bfloat16, device="cpu", spread=1.0) -> tuple:
    """The op's arguments for a weight of random nibbles; statistics between 0 and `spread`, some 0 (negative and 0 where nested)."""
    n = math.prod(shape)
    blocks = -(-n // blocksize)
    packed = torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8)
    if nested:
        second = torch.rand(-(-blocks // 256)) * spread
        stats = (second, torch.randint(0, 256, (blocks,), dtype=torch.uint8), torch.linspace(-1, 1, 256), torch.tensor(0.3 * spread))
    else:
        stats = (torch.where(torch.rand(blocks) < 0.1, 0.0, torch.rand(blocks) * spread), None, None, None)
    tensors = (x if x is None else x.to(device) for x in (packed, *stats))
    return *tensors, blocksize, quant_type, list(shape), dtype


def bitsandbytes(packed, absmax, absmax_8bit, absmax_code, absmax_offset, blocksize, quant_type, shape, dtype) -> torch.Tensor:
    """The same by bitsandbytes. The weight is one row to it: its AVX-512 form takes wrong statistics where a row is no whole number of blocks."""
    functional = pytest.importorskip("bitsandbytes.functional")
    rest = dict(shape=(math.prod(shape),), blocksize=blocksize, quant_type=quant_type, dtype=dtype)
    if absmax_8bit is None:
        state = functional.QuantState(absmax, **rest)
    else:
        second = functional.QuantState(absmax, code=absmax_code, blocksize=256, dtype=torch.float32)
        state = functional.QuantState(absmax_8bit, offset=absmax_offset, state2=second, **rest)
    with torch.compiler.set_stance("force_eager"):  # it compiles its form for odd sizes
        return functional.dequantize_4bit(packed.reshape(-1, 1), state).reshape(shape)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


SHAPES = [(64, 128), (7, 96), (3, 5, 48), (33, 31), (130,), (1, 1), (5, 4099), (3, 8192)]


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_equals_bitsandbytes_bit_for_bit(nested, dtype):
    for shape, blocksize in itertools.product(SHAPES, dequantize.BLOCKSIZES):
        args = arguments(shape, blocksize=blocksize, nested=nested, dtype=dtype)
        found = dequantize_4bit(*args)
        assert found.shape == torch.Size(shape) and found.dtype == dtype and found.is_contiguous()
        assert torch.equal(bits(found), bits(bitsandbytes(*args))), (shape, blocksize)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp4_equals_bitsandbytes(nested, dtype):
    """Zero's sign excepted: code 8 is -0.0, as in its CUDA and scalar forms; its AVX-512 and Python forms have 0.0."""
    for shape, blocksize in itertools.product(SHAPES, dequantize.BLOCKSIZES):
        args = arguments(shape, blocksize=blocksize, quant_type="fp4", nested=nested, dtype=dtype)
        assert torch.equal(dequantize_4bit(*args), bitsandbytes(*args)), (shape, blocksize)
    zeros = dequantize_4bit(torch.tensor([0x08], dtype=torch.uint8), torch.ones(1), None, None, None, 32, "fp4", [2], dtype)
    assert torch.signbit(zeros).tolist() == [False, True]


@pytest.mark.parametrize("quant_type, nested", list(itertools.product(dequantize.CODES, [True, False])))
def test_quantized_weights_come_back(quant_type, nested):
    """What `quantize_4bit` gives, in every storage dtype; the arguments of the op as `Linear4bit` has them."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(96, 128)
    w[3] = 0
    w[4] *= 1e-30
    w[5] *= 1e30
    for storage, dtype, blocksize in itertools.product((torch.uint8, *DTYPES), DTYPES, (32, 64, 128)):
        packed, state = functional.quantize_4bit(w.to(dtype), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage)
        stats = (state.state2.absmax, state.absmax, state.state2.code, state.offset) if nested else (state.absmax, None, None, None)
        found = dequantize_4bit(packed, *stats, blocksize, quant_type, list(w.shape), dtype)
        assert packed.dtype == storage
        torch.testing.assert_close(found, functional.dequantize_4bit(packed, state), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 3e-39, 1e-38, 6e-8, 65504.0, 65519.9, 7e4, 3.4e38, -1.0, math.inf, -math.inf, math.nan], ids=str)
def test_special_statistics(value, dtype):
    """Rounding to infinity and to subnormals, NaN, all as bitsandbytes on a CPU: in the statistics of a block, of 256 and in the offset.

    Its AVX-512 form makes subnormal bf16 zero (`vcvtneps2bf16`).
    """
    subnormal = 2.0**-126 if dtype == torch.bfloat16 else 0
    for quant_type, place in itertools.product(dequantize.CODES, ("absmax", "second", "offset")):
        args = arguments((1024, 32), nested=place != "absmax", quant_type=quant_type, dtype=dtype)
        args[1][1] = value if place != "offset" else 0.0
        if place == "offset":
            args[4].fill_(value)
        torch.testing.assert_close(dequantize_4bit(*args), bitsandbytes(*args), rtol=0, atol=subnormal, equal_nan=True)


def scalar(packed, absmax, absmax_8bit, absmax_code, absmax_offset, blocksize, quant_type, shape, dtype) -> list[float]:
    """The definition, one element after the other, in float32."""
    out = []
    for i in range(math.prod(shape)):
        byte, block = packed.flatten()[i // 2].item(), i // blocksize
        if absmax_8bit is None:
            scale = np.float32(absmax[block])
        else:
            scale = np.float32(np.float32(absmax_code[absmax_8bit[block].int()]) * np.float32(absmax[block // 256])) + np.float32(absmax_offset)
        out.append(np.float32(dequantize.CODES[quant_type][byte & 15 if i % 2 else byte >> 4]) * scale)
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.sampled_from((32, 64, 128)), st.sampled_from(sorted(dequantize.CODES)), st.booleans(), st.integers(0, 2**31))
def test_equals_the_definition(n, blocksize, quant_type, nested, seed):
    torch.manual_seed(seed)
    args = arguments((n,), blocksize=blocksize, quant_type=quant_type, nested=nested, dtype=torch.float32)
    assert torch.equal(bits(dequantize_4bit(*args)), bits(torch.tensor(np.array(scalar(*args)))))


INTERPRETED = """
import itertools, operator, torch
from fastft.kernels import dequantize
from ops.test_dequantize import DTYPES, arguments, bits
torch.manual_seed(0)
dequantize._times = operator.mul  # the interpreter has no libdevice
new_empty = torch.Tensor.new_empty

def check(args):
    (n,), dtype = args[7:]
    buffer = torch.full((n + 64,), 7.0, dtype=dtype)
    torch.Tensor.new_empty = lambda self, shape, **more: buffer[:n] if shape == [n] else new_empty(self, shape, **more)
    found = dequantize.launch(*args)
    assert found.data_ptr() == buffer.data_ptr()
    want = dequantize.reference(*args)
    same = torch.equal(bits(found), bits(want))
    if dtype == torch.bfloat16 and not same:  # the interpreter cuts off instead of rounding
        exact = dequantize.reference(*args[:8], torch.float32)
        same = torch.equal(bits(found), (bits(exact) >> 16).to(torch.int16))
    assert same, (args[5:], found, want)
    assert (buffer[n:] == 7).all(), "written beyond the end"

# One element, a part of a tile, several groups of 256 blocks, an odd number.
SIZES = {32: (1, 66, 2 * 8192 + 40), 64: (4096, 9001), 4096: (3 * 4096 + 8,)}
for blocksize, quant_type, nested, dtype in itertools.product(SIZES, dequantize.CODES, (True, False), DTYPES):
    for n in SIZES[blocksize]:
        check(arguments((n,), blocksize=blocksize, quant_type=quant_type, nested=nested, dtype=dtype))

# Weights that start anywhere, in words of 4, 2 and 1 bytes; any storage dtype.
*_, stats = packed, *stats = arguments((4200,), dtype=torch.float16)
widths = set()
for start in range(4):
    part = torch.cat([packed[:start], packed])[start:].flatten()
    widths.add(dequantize.words(part, 4).element_size())
    check((part, *stats))
assert widths == {4, 2, 1}, widths
for storage in DTYPES:
    check((packed.flatten().view(storage), *stats))

# Every tensor a column of another.
args = arguments((4200,))
check((*(torch.stack([x, x], -1)[..., 1] for x in args[:5]), *args[5:]))
"""


def test_interpreted_kernel_equals_the_reference():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    code = f"import sys; sys.path[:0] = {[TESTS, *sys.path]!r}\n{INTERPRETED}"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


TYPES = {"absmax_8bit_ptr": "*u8", "n": "i32", "log_blocksize": "i32"} | dict.fromkeys(("absmax_ptr", "absmax_code_ptr", "absmax_offset_ptr"), "*fp32")


def compiled_with(packed: str, out: str, vec: int, **options) -> tuple[dict, dict]:
    """Types and constants of the kernel."""
    constants = {"BITS": dequantize.BITS["nf4"], "NESTED": True, "ROWS": dequantize.TILE // vec, "VEC": vec} | options
    return {"packed_ptr": packed, "out_ptr": out} | TYPES, constants


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(
    "packed, out, vec, options",
    [("*i32", "*bf16", 8, {}), ("*i32", "*fp16", 8, {"NESTED": False}), ("*i16", "*fp32", 4, {}), ("*u8", "*bf16", 2, {})],
    ids=["bf16", "plain", "fp32", "bytes"],
)
def test_compiles_without_spills_at_full_occupancy(packed, out, vec, options, capability):
    pytest.importorskip("triton")
    from .targets import TARGETS, resources

    types, constants = compiled_with(packed, out, vec, **options)
    needs = resources(dequantize.dequantize_kernel, types, constants, capability, num_warps=dequantize.WARPS)
    assert needs["spilled"] == 0 and needs["shared"] <= dict(TARGETS)[capability], needs
    assert needs["shared"] == 64, "the table alone: no tile passes through shared memory"
    if vec == 8:
        assert needs["registers"] <= 40, needs  # 48 warps a multiprocessor, all that sm_86, 89 and 120 have


@pytest.mark.parametrize("packed, out, vec, conversion", [("*i32", "*bf16", 8, "cvt.rn.bf16"), ("*i32", "*fp16", 8, "cvt.rn.f16"), ("*i16", "*fp32", 4, None)])
def test_generated_code_rounds_as_bitsandbytes_and_moves_16_bytes(packed, out, vec, conversion):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, (types, constants) = dequantize.dequantize_kernel, compiled_with(packed, out, vec)
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types if name != "log_blocksize"}
    source = ASTSource(kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": dequantize.WARPS}).asm["ptx"]
    count = {name: ptx.count(name) for name in ("mul.rn.ftz.f32", "mul.f32", "add.rn.f32", "add.f32", "fma", "st.global.v4.b32", "st.global")}
    threads = 32 * dequantize.WARPS
    rows = dequantize.TILE // vec // threads  # of a thread
    assert count["mul.rn.ftz.f32"] == dequantize.TILE // threads + rows, "one product an element and one a row, subnormals flushed"
    assert count["add.rn.f32"] + count["add.f32"] == rows and not count["fma"] and not count["mul.f32"], count
    assert count["st.global.v4.b32"] == count["st.global"] == rows, count
    assert conversion is None or conversion in ptx


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_opcheck(nested):
    torch.library.opcheck(dequantize_4bit, arguments((6, 32), blocksize=32, nested=nested))


def test_a_frozen_weight_under_autograd():
    """Nothing flows into it; it counts no flops."""
    args = arguments((24, 64), dtype=torch.float32)
    x = torch.randn(5, 64, requires_grad=True)

    def linear(x):
        return torch.nn.functional.linear(x, dequantize_4bit(*args))

    for call in (linear, torch.compile(linear, backend="aot_eager", fullgraph=True)):
        (grad,) = torch.autograd.grad(call(x).sum(), x)
        torch.testing.assert_close(grad, dequantize.reference(*args).sum(0).expand(5, 64))
    with FlopCounterMode(display=False) as counter:
        linear(x).sum().backward()
    assert torch.ops.fastft.dequantize_4bit in flop_registry and counter.get_total_flops() == 2 * (2 * 5 * 24 * 64)


def test_a_fake_weight_on_a_gpu():
    from torch._subclasses import FakeTensorMode

    args = arguments((24, 64))
    with FakeTensorMode():
        tensors = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in args[:5]]
        found = dequantize_4bit(*tensors, *args[5:])
    assert found.shape == (24, 64) and found.device.type == "cuda" and found.dtype == torch.bfloat16 and found.is_contiguous()


BAD = {
    "quant_type": (6, "int4"), "blocksize": (5, 96), "shape": (7, [25, 64]), "dtype": (8, torch.float64), "packed": (0, torch.zeros(767, dtype=torch.uint8)),
    "second": (1, torch.ones(0)), "second_dtype": (1, torch.ones(1).half()), "stored": (2, torch.zeros(23, dtype=torch.uint8)), "stored_dtype": (2, torch.zeros(24)),
    "code": (3, torch.ones(255)), "code_dtype": (3, torch.ones(256).double()), "offset": (4, torch.ones(2)), "offset_dtype": (4, torch.ones(()).double()),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_describes_no_weight(name):
    args = list(arguments((24, 64)))
    at, args[at] = BAD[name]
    for call in (dequantize.reference, dequantize._cuda, dequantize._fake, dequantize_4bit):
        with pytest.raises(RuntimeError, match="dequantize_4bit"):
            call(*args)


def test_a_failing_kernel_is_replaced(monkeypatch):
    def boom(*args):
        raise ValueError("boom")

    monkeypatch.setattr(dequantize, "launch", boom)
    monkeypatch.setattr("fastft.runner._failed_kernels", set())
    monkeypatch.setattr("fastft.runner._strict_kernels", False)
    monkeypatch.setattr(dequantize, "triton", object())
    args = arguments((24, 64))
    with pytest.warns(UserWarning, match="kernel dequantize_4bit failed.*boom"):
        found = dequantize._cuda(*args)
    assert torch.equal(found, dequantize.reference(*args))
