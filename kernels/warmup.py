"""Compiles fastft's Triton kernels in threads while Inductor lowers, instead of one after the other at their first launch.

`prepare(graph)` runs the CUDA implementation of each distinct op of a post-grad graph on the graph's own fake tensors. Where it
would launch, `launch` hands the signature to a thread, which compiles it, builds Triton's launcher and loads the binary. The
first real launch afterwards waits for what is still under way; whatever failed there is compiled again by the launch, in
`guarded`.

Llama-8B in NF4 on an H200: eleven kernels, 0.3 to 0.5 s each to compile and as much again for launcher and loading. The first
execution took 9.3 s at 8 layers without this and takes 2.9 s at 32 (docs/notes.md). A compile holds the GIL for 15 % of its time.
"""

import concurrent.futures
import contextlib
import contextvars
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fastft.kernels.accumulate import LIBRARY

try:
    import triton
except ImportError:  # CPU builds of PyTorch come without Triton
    triton = None

# Kernels compiled at once. Threads of an executor end before the interpreter does, which waits for them; a daemon thread that comes
# back from C++ later would abort the process. They start with the first kernel: CUDA is in use then, and no child of a fork can use it.
THREADS = 4
_pool = concurrent.futures.ThreadPoolExecutor(THREADS, "fastft-compile")

# Triton parses the kernels' source. Before Python 3.11.8 a thread that does so can break the parsing of another, Dynamo's too (cpython issue 106905).
SAFE = sys.version_info >= (3, 11, 8)

# What launches an op's kernels: called with the op's arguments, tensors fake.
IMPLEMENTATIONS: dict[torch._ops.OpOverload, Callable] = {}

_preparing = contextvars.ContextVar("preparing", default=False)  # of this thread: others launch meanwhile
_pending: dict[tuple, concurrent.futures.Future] = {}


def register(name: str, cpu: Callable, cuda: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Implements `fastft::name`, whose schema is defined; `cuda` launches its kernels by `launch`."""
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"fastft::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.fastft, name).default
    IMPLEMENTATIONS[op] = cuda
    return op


def preparing() -> bool:
    """True inside of `prepare`: tensors are fake, nothing is launched, and an error is nobody's to see."""
    return _preparing.get()


def address(x: Tensor) -> int:
    """`x.data_ptr()`; of a fake tensor what is known of it, as allocations start at multiples of 512 bytes."""
    return x.storage_offset() * x.itemsize if preparing() else x.data_ptr()


def launch(kernel, grid: tuple[int, ...], *args, **kwargs) -> None:
    """`kernel[grid](*args, **kwargs)`; inside of `prepare` it is compiled, and not launched."""
    if _preparing.get():
        _submit(kernel, grid, args, kwargs)
        return
    if _pending:
        _wait()
    kernel[grid](*args, **kwargs)


class _Pointer:
    """What Triton asks a tensor for."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self.at, self.size = x.dtype, address(x), x.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self.at

    def ptr_range(self) -> int:  # AMD: 32-bit offsets below 2 GiB
        return self.size


def _pointers(arg):
    if isinstance(arg, tuple):
        return tuple(map(_pointers, arg))
    return _Pointer(arg) if isinstance(arg, Tensor) else arg


def _submit(kernel, grid, args, kwargs) -> None:
    if not isinstance(kernel, triton.JITFunction):  # TRITON_INTERPRET=1
        return
    args, device = _pointers(args), triton.runtime.driver.active.get_current_device()
    # Triton 3.6 to 3.9: the last entry tells the signature of a call. Made here: two threads that make the entries lose one's kernels.
    _, signature, options = kernel.device_caches[device][-1](*args, **kwargs)
    key = (id(kernel), device, str(signature), str(options))
    if key not in _pending:
        _pending[key] = _pool.submit(_compile, kernel, grid, args, kwargs, device)


def _compile(kernel, grid, args, kwargs, device: int) -> None:
    with torch.cuda.device(device):
        # The latter makes the launcher, by gcc in Triton 3.6, and loads the binary; where that fails, the launch does it again.
        kernel.warmup(*args, grid=grid, **kwargs)._init_handles()


def _wait() -> None:
    found = dict(_pending)
    concurrent.futures.wait(found.values())
    for key in found:
        _pending.pop(key, None)


def prepare(graph: Graph) -> None:
    """Starts compiling what the nodes of a post-grad graph will launch, where their sizes are known. Never raises."""
    seen = set()
    for node in graph.nodes if SAFE else ():
        if node.target in IMPLEMENTATIONS:
            with contextlib.suppress(Exception):
                call = (node.target, str(map_arg((node.args, node.kwargs), _description)))
                if call not in seen and all(map(_static, node.all_input_nodes)):
                    seen.add(call)
                    _run_fake(node)


def _description(node: Node) -> str:
    value = node.meta["val"]
    return f"{value.dtype} {value.device} {value.shape} {value.stride()} {value.storage_offset()}"


def _static(node: Node) -> bool:
    value = node.meta["val"]
    return value.is_cuda and all(isinstance(number, int) for number in (*value.shape, *value.stride(), value.storage_offset()))


def _run_fake(node: Node) -> None:
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    fake = node.all_input_nodes[0].meta["val"]
    token = _preparing.set(True)
    try:
        with torch.cuda.device_of(fake), fake.fake_mode:
            IMPLEMENTATIONS[node.target](*args, **kwargs)
    finally:
        _preparing.reset(token)
