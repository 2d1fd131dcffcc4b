"""`fastft::valid_rows(labels, ignore_index) -> (order, count)`: which rows of a batch a loss reads, known on the host in time.

    order   int64 [M]   the rows whose label is not ignored, in order, then the others
    count   int64 []    how many they are

Leaving ignored rows out of lm_head needs their number on the host, and `count.item()` in the middle of a step would drain the queue of
the GPU. So the op, which belongs at the start of a graph, also starts a copy of the count to pinned memory; `rows_on_host(count)`, much
later, waits for that copy alone: everything queued in between stays queued.

The copy is found again by the address of `count`. An entry keeps its `count` alive, so that no other tensor gets that address; the oldest
entries go first. A `count` without an entry (another process, an older step, a copy) is read with `.item()`: slower, never wrong.
"""

import collections
import threading

import torch
from torch import Tensor

from fastft.kernels.accumulate import LIBRARY

# Counts remembered at once: more than the steps that a pipeline schedule has between a forward and its loss; 512 bytes of GPU memory each.
KEPT = 64

# The copy is host state that a CUDA graph would not replay.
TAGS = (torch.Tag.cudagraph_unsafe,)

LIBRARY.define("valid_rows(Tensor labels, int ignore_index) -> (Tensor, Tensor)", tags=TAGS)

_copies: collections.OrderedDict[int, tuple[Tensor, Tensor, torch.cuda.Event]] = collections.OrderedDict()
_lock = threading.Lock()


def reference(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """labels: int64 [M]. The specification."""
    ignored = labels == ignore_index
    return torch.argsort(ignored.to(torch.uint8), stable=True), (~ignored).sum()


def _cuda(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    order, count = reference(labels, ignore_index)
    _start_copy(count)
    return order, count


def _start_copy(count: Tensor) -> None:
    host = torch.empty((), dtype=torch.int64, pin_memory=True)
    host.copy_(count, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(count.device))
    with _lock:
        _copies.pop(count.data_ptr(), None)
        _copies[count.data_ptr()] = (count, host, done)
        while len(_copies) > KEPT:
            _copies.popitem(last=False)


def rows_on_host(count: Tensor) -> int:
    """The value of a `count` that `valid_rows` made, waiting for no more than its copy."""
    if not count.is_cuda:
        return int(count.item())
    with _lock:
        found = _copies.get(count.data_ptr())
    if found is None:
        return int(count.item())
    _, host, done = found
    done.synchronize()
    return int(host.item())


def _fake(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return labels.new_empty(labels.shape, dtype=torch.int64), labels.new_empty((), dtype=torch.int64)


LIBRARY.impl("valid_rows", reference, "CPU")
LIBRARY.impl("valid_rows", _cuda, "CUDA")
torch.library.register_fake("fastft::valid_rows", _fake, lib=LIBRARY)
valid_rows = torch.ops.fastft.valid_rows.default
