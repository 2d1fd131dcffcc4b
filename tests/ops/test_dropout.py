"""Dropout masks from seeds: rate, independence of adapters, rows and columns, and the same mask in Inductor."""

import math
import subprocess
import sys

import pytest
import torch

from fastft.kernels import dropout as masks

ROWS, COLS = 1024, 2048


def mask(adapter=0, p=0.5, generator=0, rows=ROWS, cols=COLS):
    seeds = torch.randint(-(1 << 31), (1 << 31) - 1, (2, rows), dtype=torch.int32, generator=torch.Generator().manual_seed(generator))
    return masks.keep_mask(seeds, adapter, p, cols)


def correlation(first, second):
    """In units of what independent masks of this size give (standard deviation 1)."""
    first, second = first.double() - first.double().mean(), second.double() - second.double().mean()
    return ((first * second).mean() / (first.std() * second.std())).item() * math.sqrt(first.numel())


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("adapter", range(4))
def test_rate(p, adapter):
    kept = mask(adapter, p).double()
    sigma = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.mean().item() - 1 / masks.scale(p)) < 5 * sigma
    assert abs(1 / masks.scale(p) - (1 - p)) < 2**-16
    for dim, size in ((0, ROWS), (1, COLS)):  # no row and no column stands out
        spread = (kept.mean(dim) - kept.mean()) / math.sqrt(p * (1 - p) / size)
        assert spread.abs().max() < 6 and 0.8 < spread.std() < 1.2


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_adapters_are_independent(first, second):
    if first < second:
        assert abs(correlation(mask(first), mask(second))) < 5


@pytest.mark.parametrize("shift", [1, 2, 3, 16, 64, 511])
def test_neighbours_are_independent(shift):
    kept = mask(p=0.3)
    assert abs(correlation(kept[shift:], kept[:-shift])) < 5
    assert abs(correlation(kept[:, shift:], kept[:, :-shift])) < 5
    assert abs(correlation(kept[shift:, shift:], kept[:-shift, :-shift])) < 5


def test_steps_are_independent_and_repeatable():
    assert abs(correlation(mask(generator=0), mask(generator=1))) < 5
    assert torch.equal(mask(generator=2), mask(generator=2))


@pytest.mark.parametrize("p", [0.0, 1e-9, 1.0])
def test_extreme_probabilities_stay_finite(p):
    assert math.isfinite(masks.scale(p)) and masks.scale(p) >= 1
    assert mask(p=p).any()


COMPILED = """
import torch
from fastft.kernels import dropout as masks

seeds = torch.randint(-(1 << 31), (1 << 31) - 1, (1, 33), dtype=torch.int32)

def both(seeds):
    return [torch.where(masks.keep_mask(seeds, j, 0.37, 65), 1.0, 0.0) for j in range(2)]

compiled = torch.compile(both, backend="inductor")
for _ in range(50):
    assert all(map(torch.equal, compiled(seeds), both(seeds)))
"""


def test_inductor_gives_the_same_mask():
    """In generated C++ too, on a width that is no multiple of the vector's (one compile; a process of its own: it crashed once)."""
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
