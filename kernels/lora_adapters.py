"""What `fastft::lora_linear` computes from its adapters: s = x A^T, the stacked A, B side by side, biases; dropout included."""

import dataclasses
import itertools
import math

import torch
from torch import Tensor

from fastft.kernels import dropout as masks
from fastft.kernels import low_rank_dropout

# Keys of `node.meta["custom"]` that fastft's partitioner turns into MUST_RECOMPUTE and, on what leaves the marked nodes, MUST_SAVE.
RECOMPUTE = "fastft_recompute"
SAVE = "fastft_save"


@dataclasses.dataclass(frozen=True)
class Spec:
    """What of a call is not a tensor. `owner[j]` is the linear that adapter j belongs to (ascending)."""

    linears: int
    ranks: tuple[int, ...]
    owner: tuple[int, ...]
    scaling: tuple[float, ...]
    dropout: tuple[float, ...]
    forward: str
    backward: str
    dtype: torch.dtype
    saves_adapters: bool = False

    def owned(self, linear: int) -> list[int]:
        return [j for j, owner in enumerate(self.owner) if owner == linear]


def split(spec: Spec, tensors) -> list[tuple]:
    """weights, biases, lora_a, lora_b, lora_biases"""
    sizes = (spec.linears, spec.linears, *[len(spec.ranks)] * 3)
    ends = list(itertools.accumulate(sizes))
    return [tuple(tensors[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def columns(spec: Spec) -> list[tuple[int, int]]:
    """Where each linear's adapters stand among the columns of s."""
    ends = list(itertools.accumulate(spec.ranks))
    starts = [0, *ends[:-1]]
    return [(starts[owned[0]], ends[owned[-1]]) for owned in map(spec.owned, range(spec.linears))]


# Cast, scaled and stacked adapters are saved for the backward where they take at most this part of the memory of what their linears read:
# 40 MB of Llama-8B's 40 GB at 8192 tokens and rank 16.
SAVED_PART = 32


def saves(x: Tensor, ranks, dropout) -> bool:
    """What `Spec.saves_adapters` is for a group with these ranks on x (or on as many rows), [..., K]."""
    rows = math.prod(x.shape[:-1])
    return not any(dropout) and isinstance(rows, int) and sum(ranks) * SAVED_PART <= rows


def recomputed():
    """Nodes traced in here are made again in the backward instead of saved: cheap, and Inductor fuses them.

    PyTorch's partitioner saves what a GEMM of the backward reads. For the cast and stacked adapters that is 41 MB a step of
    a 16-layer Llama-8B, for dropped inputs as much as all inputs of the linears together (docs/notes.md).
    """
    return torch.fx.traceback.annotate({RECOMPUTE: True})


def converted(spec: Spec):
    """As `recomputed`, or saved: 4 launches fewer a layer, 11 with adapters in float32."""
    return torch.fx.traceback.annotate({SAVE: True}) if spec.saves_adapters else recomputed()


def b_of(spec: Spec, lora_b, linear: int) -> Tensor:
    """[N, sum r]: the linear's B matrices side by side, in the dtype of the arithmetic."""
    with converted(spec):
        parts = [lora_b[j].to(spec.dtype) for j in spec.owned(linear)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def dropped(spec: Spec, seeds: Tensor, x: Tensor, adapter: int) -> Tensor:
    with recomputed():
        return masks.dropped(x, seeds, adapter, spec.dropout[adapter])


def mask_arguments(spec: Spec, seeds, x: Tensor) -> tuple | None:
    """What `dropped_mm` and `dropped_grad` take beside the factors, None where plain products serve."""
    if spec.backward != "one_read" or not low_rank_dropout.serves(x, spec.ranks):
        return None
    with recomputed():
        return seeds, masks.columns(x.shape[1], x.device), spec.ranks, spec.dropout


def low_rank_input(spec: Spec, seeds, x: Tensor, lora_a) -> Tensor:
    """s = x [A_0; A_1; ...]^T, [M, sum r]; with dropout each adapter sees its own x."""
    if not any(spec.dropout):
        return x @ stack(spec, lora_a).t()
    if arguments := mask_arguments(spec, seeds, x):
        return low_rank_dropout.dropped_mm(x, stack(spec, lora_a), *arguments).sum(0).to(spec.dtype)
    parts = [dropped(spec, seeds, x, j) @ a_of(spec, lora_a, j).t() for j in range(len(spec.ranks))]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def bias_of(spec: Spec, biases, lora_biases, linear: int) -> Tensor | None:
    """The base bias and the scaled biases of the linear's adapters in one."""
    total = None if biases[linear] is None else biases[linear].to(spec.dtype)
    for j in spec.owned(linear):
        if lora_biases[j] is not None:
            more = (lora_biases[j] * spec.scaling[j]).to(spec.dtype)
            total = more if total is None else total + more
    return total


def a_of(spec: Spec, lora_a, adapter: int) -> Tensor:
    """[r, K]: an A matrix times its scaling, in the dtype of the arithmetic."""
    with converted(spec):
        return (lora_a[adapter] * spec.scaling[adapter]).to(spec.dtype)


def stack(spec: Spec, lora_a, rows: int = 0) -> Tensor:
    """[sum r, K]: the scaled A matrices one below the other, with rows of zeros up to `rows`."""
    with converted(spec):
        parts = [a_of(spec, lora_a, j) for j in range(len(spec.ranks))]
        missing = rows - sum(spec.ranks)
        if missing > 0:
            parts.append(parts[0].new_zeros((missing, parts[0].shape[1])))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
