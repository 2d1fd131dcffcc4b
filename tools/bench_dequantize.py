"""The values of 4-bit weights, in bf16: `fastft::dequantize_4bit` beside bitsandbytes' own dequantize_4bit and a copy that moves as many bytes.

Weights of Llama-8B and Llama-1B, quantized by bitsandbytes. The variants of a weight run interleaved, each `CALLS` times in a row on the device's own
clock, the host ahead of it. Inputs and results go round so many buffers that nothing is found in the L2 cache. "bits" counts elements that
differ from bitsandbytes' in any bit.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from bench_models import import_fastft
from bench_systems import Clock, gemm_probe
from bench_turns import alone, shuffled
from rich.markup import escape
from rich.table import Table
from torch import Tensor

CASES = (  # type, nested statistics, shape
    *(("nf4", True, shape) for shape in ((4096, 4096), (4096, 14336), (14336, 4096), (1024, 4096), (2048, 8192))),
    ("nf4", False, (4096, 14336)),
    ("fp4", True, (4096, 14336)),
)
TINY = (("nf4", True, (64, 128)), ("nf4", False, (64, 128)), ("fp4", True, (64, 128)))
CALLS = 8
IN_FLIGHT = 512 * 2**20  # bytes in all buffers of a variant: 8 times the L2 cache of an H200
COLUMNS = "weight|shape|variant|us|best|GB/s|of copy|against bitsandbytes|bits|error".split("|")


@dataclasses.dataclass
class Weight:
    """A quantized weight, and copies of it at other addresses."""

    kind: str
    nested: bool
    copies: list[tuple[Tensor, Any]]  # packed, QuantState
    halves: list[tuple[Tensor, Tensor]]  # what the copy reads and writes
    bytes: int  # packed, statistics and result


def make(kind: str, nested: bool, shape: tuple[int, int], seed: int, device: str) -> Weight:
    from bitsandbytes.functional import quantize_4bit

    generator = torch.Generator(device=device).manual_seed(seed)
    values = torch.empty(shape, device=device).normal_(0, 0.02, generator=generator).to(torch.bfloat16)
    packed, state = quantize_4bit(values, blocksize=64, compress_statistics=nested, quant_type=kind)
    read = [packed, state.absmax] + ([state.state2.absmax] if nested else [])
    moved = sum(x.nbytes for x in (*read, values))
    number = max(2, math.ceil(IN_FLIGHT / moved)) if device == "cuda" else 2
    halves = [(torch.zeros(moved // 2, dtype=torch.uint8, device=device), torch.zeros(moved // 2, dtype=torch.uint8, device=device)) for _ in range(number)]
    return Weight(kind, nested, [(packed.clone(), copy.deepcopy(state)) for _ in range(number)], halves, moved)


def fastft(weight: Weight, i: int) -> Tensor:
    packed, state = weight.copies[i]
    statistics_of = (state.state2.absmax, state.absmax, state.state2.code, state.offset) if weight.nested else (state.absmax, None, None, None)
    return torch.ops.fastft.dequantize_4bit(packed, *statistics_of, state.blocksize, state.quant_type, list(state.shape), state.dtype)


def bitsandbytes(weight: Weight, i: int) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*weight.copies[i])


def as_many_bytes(weight: Weight, i: int) -> Tensor:
    source, target = weight.halves[i]
    return target.copy_(source)


VARIANTS: dict[str, Callable[[Weight, int], Tensor]] = {"copy": as_many_bytes, "bitsandbytes": bitsandbytes, "fastft": fastft}


def measure(weight: Weight, name: str, repeat: int, warmup: int, device: str) -> list[dict[str, Any]]:
    """The rows of one weight; a variant that fails is an error string, the others go on."""
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, list[float]] = {}
    results: dict[str, Tensor] = {}
    number = len(weight.copies)
    places = itertools.cycle(range(number))
    for variant, run in VARIANTS.items():
        rows[variant] = {"weight": name, "shape": list(weight.copies[0][1].shape), "variant": variant, "bytes": weight.bytes}
        try:
            for _ in range(warmup + 1):
                results[variant] = run(weight, next(places))
            running[variant] = []
        except Exception as error:
            rows[variant]["error"] = f"{type(error).__name__}: {error}"[:500]
    if {"fastft", "bitsandbytes"} <= running.keys():
        ours, theirs = (results[variant].contiguous().view(torch.int16) for variant in ("fastft", "bitsandbytes"))
        rows["fastft"]["differing"] = int((ours != theirs).sum())
    results.clear()
    kept: collections.deque[Tensor] = collections.deque(maxlen=number)  # results that are alive are not written again
    for turn in range(repeat):
        for variant, times in shuffled(running.items(), turn):
            clock = Clock(device)
            clock.head_start()
            clock.mark()
            for _ in range(CALLS):
                kept.append(VARIANTS[variant](weight, next(places)))
            clock.mark()
            times.append(clock.intervals()[0] / CALLS)
    for variant, times in running.items():
        rows[variant] |= {"us": 1e3 * statistics.median(times), "best_us": 1e3 * min(times)}
        rows[variant]["gb_s"] = weight.bytes / rows[variant]["us"] / 1e3
        for other, key in (("copy", "of_copy"), ("bitsandbytes", "against_bitsandbytes")):
            if other in running and "us" in rows[other]:
                rows[variant][key] = rows[other]["us"] / rows[variant]["us"]
    return list(rows.values())


def bench(args: argparse.Namespace, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All weights, one after the other."""
    import_fastft()
    import fastft.kernels  # noqa: F401  # registers the op

    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {"op": args.op, "device": device, "gemm_probe_ms": [gemm_probe(device, args.tiny)], "rows": []}
    with alone():
        for kind, nested, shape in TINY if args.tiny else CASES:
            name = f"{kind}, {'nested' if nested else 'not nested'}"
            say(f"{name}, {shape[0]} x {shape[1]}")
            result["rows"] += measure(make(kind, nested, shape, args.seed, device), name, 4 * args.steps, args.warmup, device)
            keep(result)
        result["gemm_probe_ms"].append(gemm_probe(device, args.tiny))
    return result


def table(result: dict[str, Any], gpu: str) -> Table:
    probe = " → ".join(f"{ms:.3f}" for ms in result["gemm_probe_ms"])
    made = Table(title=f"dequantize_4bit to bf16, blocks of 64, {gpu}, gemm probe {probe} ms", title_justify="left")
    for column in COLUMNS:
        made.add_column(column, justify="left" if column in ("weight", "shape", "variant", "error") else "right")
    formats = {"us": ".1f", "best_us": ".1f", "gb_s": ",.0f", "of_copy": ".3f", "against_bitsandbytes": ".2f", "differing": "d"}
    for row in result["rows"]:
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in formats.items()]
        made.add_row(row["weight"], "{} x {}".format(*row["shape"]), row["variant"], *cells, escape(" ".join(row.get("error", "").split())[:60]))
    return made
