"""Runs a GPU kernel with its ATen reference behind it: a kernel that fails costs speed, never the training run."""

from collections.abc import Callable
from typing import TypeVar

import torch

from fastft.kernels import warmup

T = TypeVar("T")


def guarded(name: str, kernel: Callable[[], T], fallback: Callable[[], T]) -> T:
    """`kernel()`, or `fallback()` with one warning where it raises.

    Raises:
        torch.cuda.OutOfMemoryError: always the caller's to see.
        Exception: what the kernel raised, where a graph of this process was compiled with `strict`.
    """
    if warmup.preparing():
        return kernel()
    try:
        return kernel()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        from fastft.runner import kernel_failed

        if not kernel_failed(name, error):
            raise
    return fallback()
