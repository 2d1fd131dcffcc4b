"""`fastft::dequantize_4bit` on a GPU: bit for bit what bitsandbytes' CUDA kernels make, zero's sign, subnormals and NaN included."""

import itertools
import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
pytest.importorskip("bitsandbytes")

from fastft.kernels import dequantize
from fastft.kernels.dequantize import dequantize_4bit

from .test_dequantize import DTYPES, arguments, bits, bitsandbytes


def check(args: tuple, launch=dequantize.launch) -> None:
    found, want = launch(*args), bitsandbytes(*args)
    assert found.shape == want.shape and found.dtype == want.dtype and found.is_cuda and found.is_contiguous()
    assert torch.equal(bits(found), bits(want)), (args[5:], (bits(found) != bits(want)).sum())


KINDS = list(itertools.product(dequantize.CODES, [True, False], DTYPES))


@pytest.mark.parametrize("quant_type, nested, dtype", KINDS, ids=str)
def test_equals_bitsandbytes_bit_for_bit(quant_type, nested, dtype):
    for shape, blocksize in itertools.product([(1024, 512), (33, 96), (5, 4099), (130,), (3, 1)], dequantize.BLOCKSIZES):
        check(arguments(shape, blocksize=blocksize, quant_type=quant_type, nested=nested, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("quant_type, nested, dtype", KINDS, ids=str)
def test_special_statistics(quant_type, nested, dtype):
    """Overflow in 16 and in 32 bits, subnormal statistics and products, infinity, NaN, negative statistics."""
    rest = dict(quant_type=quant_type, nested=nested, dtype=dtype, device="cuda")
    for spread in (-1.0, 1e-6, 1e5, 3e38, 1e-35, 1e-37, 1e-38, 1e-40, 1e-45, math.inf, math.nan):
        args = arguments((2048, 64), spread=spread, **rest)
        check(args)
        if nested:  # a product that is flushed, plus an offset that is not
            args[4].fill_(1e-39)
            check(args)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_quantized_on_the_gpu(nested):
    import bitsandbytes.functional as functional

    for quant_type, storage, dtype in itertools.product(dequantize.CODES, (torch.uint8, *DTYPES), DTYPES):
        w = torch.randn(1024, 768, device="cuda", dtype=dtype)
        packed, state = functional.quantize_4bit(w, compress_statistics=nested, quant_type=quant_type, quant_storage=storage)
        stats = (state.state2.absmax, state.absmax, state.state2.code, state.offset) if nested else (state.absmax, None, None, None)
        found = dequantize_4bit(packed, *stats, 64, quant_type, list(w.shape), dtype)
        assert torch.equal(bits(found), bits(functional.dequantize_4bit(packed, state)))


def test_weights_that_start_anywhere():
    packed, *rest = arguments((64, 512), device="cuda")
    for start in range(17):
        check((torch.cat([packed[:start], packed]).flatten()[start:], *rest))


def test_more_than_2_to_the_31_elements():
    """Beyond what bitsandbytes takes: the last rows, and those around 2^31, are those of the reference."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB")
    rows, columns = 2**19 + 3, 4096
    packed = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device="cuda")
    stored = torch.randint(0, 256, (rows * columns // 64,), dtype=torch.uint8, device="cuda")
    second, code = torch.rand(-(-stored.numel() // 256), device="cuda"), torch.linspace(-1, 1, 256, device="cuda")
    rest = (code, torch.tensor(0.3, device="cuda"), 64, "nf4")
    found = dequantize.launch(packed, second, stored, *rest, [rows, columns], torch.bfloat16)
    for first in (0, 2**18, 2**19 - 4, 2**19):  # whole groups of 256 blocks: 4 rows
        last = min(first + 4, rows)
        part = (packed[first * 2048 : last * 2048], second[first // 4 :], stored[first * 64 : last * 64])
        assert torch.equal(found[first:last], dequantize.reference(*part, *rest, [last - first, columns], torch.bfloat16))


def test_in_a_cuda_graph():
    args = arguments((256, 512), device="cuda")
    want = dequantize_4bit(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = dequantize_4bit(*args)
    args[0].bitwise_not_()
    graph.replay()
    assert not torch.equal(found, want) and torch.equal(found, dequantize_4bit(*args))


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_opcheck(nested):
    torch.library.opcheck(dequantize_4bit, arguments((64, 64), nested=nested, device="cuda"))
