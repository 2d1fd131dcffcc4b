"""Kernels are compiled ahead of their first launch: for a GPU that is not there, by Triton itself, with what loads and launches replaced."""

import collections
import concurrent.futures
import contextlib
import threading
import time
import warnings
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses import FakeTensorMode, fake_tensor  # noqa: E402
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastft.hooks import PassManager  # noqa: E402
from fastft.kernels import (  # noqa: E402
    cross_entropy,
    dequantize,
    dequantize_after,
    gated,
    linear_cross_entropy,
    lora_grads,
    low_rank,
    low_rank_dropout,
    quantize_fp8,
    warmup,
)
from fastft.options import Options  # noqa: E402

CUDA = torch.device("cuda", 0)
BF16, F32, I32, I64, U8 = torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.uint8
ROWS = 256

KERNELS = [
    value
    for module in (cross_entropy, dequantize, gated, lora_grads, low_rank, low_rank_dropout, quantize_fp8)
    for value in vars(module).values()
    if isinstance(value, JITFunction)
]

pytestmark = pytest.mark.skipif(not KERNELS, reason="TRITON_INTERPRET=1")


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Log:
    """Kernels that were compiled, loaded and launched, by name, and the cache keys of the compiled."""

    def __init__(self) -> None:
        self.compiled, self.loaded, self.launched, self.keys = [], [], [], []


@pytest.fixture
def log(monkeypatch, tmp_path) -> Log:
    log, compile_ = Log(), JITFunction._do_compile

    def do_compile(self, key, *args, **kwargs):
        log.compiled.append(self.__name__)
        log.keys.append(key)
        return compile_(self, key, *args, **kwargs)

    def init_handles(self) -> None:
        if self.module is None:
            log.loaded.append(self.name)
            self.module, self._run = True, lambda *args: log.launched.append(self.name)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    monkeypatch.setattr(CompiledKernel, "_init_handles", init_handles)
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "device_caches", collections.defaultdict(kernel.create_binder))
    monkeypatch.setattr(warmup, "_pending", {})
    if not warmup.SAFE:  # one thread, while this one waits
        monkeypatch.setattr(warmup, "SAFE", True)
        monkeypatch.setattr(warmup, "_pool", concurrent.futures.ThreadPoolExecutor(1))
    properties = SimpleNamespace(
        multi_processor_count=132, L2_cache_size=50 << 20, max_threads_per_multi_processor=2048, shared_memory_per_block_optin=227 << 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *args: properties)
    for name in ("device", "device_of"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    index = Tensor.__getitem__
    monkeypatch.setattr(Tensor, "__getitem__", lambda self, at: sliced(self, at) if isinstance(self, fake_tensor.FakeTensor) else index(self, at))
    for cached in (cross_entropy.programs, lora_grads.config_for):
        cached.cache_clear()
    yield log
    finish()
    for cached in (cross_entropy.programs, lora_grads.config_for):
        cached.cache_clear()


def sliced(x: Tensor, at) -> Tensor:
    """Indexing from Python wants a CUDA build."""
    for dim, part in enumerate(at if isinstance(at, tuple) else (at,)):
        x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop)
    return x


def finish() -> list:
    """Waits for the threads; what they raised."""
    concurrent.futures.wait(warmup._pending.values())
    return [future.exception() for future in warmup._pending.values() if future.exception()]


def fake(shape, dtype=BF16, offset=0, stride=None, mode=FakeTensorMode()) -> Tensor:  # noqa: B008
    return fake_tensor.FakeTensor(mode, tensor("meta", shape, dtype, offset, stride), CUDA)


def real(shape, dtype=BF16, offset=0, stride=None) -> Tensor:
    return tensor("cpu", shape, dtype, offset, stride)


def tensor(device, shape, dtype=BF16, offset=0, stride=None) -> Tensor:
    """Zeros that begin `offset` elements behind an allocation."""
    stride = stride or torch.empty(shape, device="meta").stride()
    return torch.zeros(offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1, dtype=dtype, device=device).as_strided(
        shape, stride, offset
    )


def packed(make, n, k, offset=0):
    blocks = n * k // 64
    statistics = make((-(-blocks // 256),), F32), make((blocks,), U8), make((256,), F32), make((), F32)
    return [make((n * k // 2, 1), U8, offset), *statistics, 64, "nf4", [n, k], BF16]


def siblings(make, widths, rank=16, offset=0):
    return [make((ROWS, rank * len(widths)), BF16, offset), [make((rank, n), BF16, 0, (1, rank)) for n in widths], [None] * len(widths)]


def grads(make, widths, rank=16, offset=0):
    return [[make((ROWS, n), BF16, offset) for n in widths], make((ROWS, rank * len(widths))), [make((n, rank)) for n in widths]]


def gate(make):
    factors = [make((64, 4)), make((64, 12))]
    return [make((ROWS, 64)), make((ROWS, 8)), make((8, 64)), make((ROWS, 64)), make((ROWS, 64)), make((ROWS, 16)), *factors, "silu"]


def loss(make, offset=0, vocabulary=1000):
    rest = [None, None, None, make((ROWS,), I64), make((), I64), 1.0, 0.0, 0.0, 0.0, [True, False, False, False, False]]
    return [make((ROWS, 64)), make((vocabulary, 64)), None, make((ROWS,), I64, offset), *rest]


def chunk(hidden, weight, bias, labels, *rest):
    logits = cross_entropy.buffer(len(hidden), len(weight), hidden)
    cross_entropy.launch(logits, labels, None, 1, 0, 0, 0, True, cross_entropy.CONFIG, 132)


def dropped(make, first, second):
    return [make(first), make(second), make((2, ROWS), I32), make((first[1],) if first[0] == ROWS else (second[1],), I32), [16, 64, 64], [0.05, 0.1, 0.1]]


def transposes(make, first):
    return [[make((first, 128)), make((64, 128))], [make((first,), F32), make((64,), F32)], make((8, 8))]


MM, GRAD, GROUP = low_rank_dropout.dropped_mm, low_rank_dropout.dropped_grad, low_rank.low_rank_mms
# name: the op, its arguments made by `fake` or `real`, and what launches for the real ones.
CASES = {
    "nf4": (dequantize.dequantize_4bit, lambda make: packed(make, 128, 64), lambda *args: dequantize.launch(*args)),
    "nf4 at 2 bytes": (dequantize.dequantize_4bit, lambda make: packed(make, 128, 64, 2), lambda *args: dequantize.launch(*args)),
    "nf4 later": (dequantize_after.dequantize_after, lambda make: [*packed(make, 128, 64), make((8,))], lambda *args: dequantize.launch(*args[:-1])),
    "low rank": (low_rank.low_rank_mm, lambda make: [make((ROWS, 16)), make((16, 64)), make((64,))], lambda s, b, bias: low_rank.launch(s, [b], [bias])),
    "group": (GROUP, lambda make: siblings(make, (64, 40, 40)), lambda *args: low_rank.launch(*args)),
    "group at 8 bytes": (GROUP, lambda make: siblings(make, (64, 40), offset=4), lambda *args: low_rank.launch(*args)),
    "lora_grads": (lora_grads.lora_grads, lambda make: grads(make, (64, 40), offset=1), lambda *args: lora_grads.launch(*args, lora_grads.config_for(0, 16))),
    "gated": (gated.gated, lambda make: gate(make)[3:], lambda *args: gated.launch(*args)),
    "gated_backward": (gated.gated_backward, lambda make: gate(make), lambda *args: gated.launch_backward(*args)),
    "loss": (linear_cross_entropy.chunks, loss, chunk),
    "loss at 8 bytes": (linear_cross_entropy.chunks, lambda make: loss(make, 1), chunk),
    "loss, rows picked": (linear_cross_entropy.chunks, lambda make: loss(make, int(make is fake)), chunk),
    "dropped_mm": (MM, lambda make: dropped(make, (ROWS, 128), (144, 128)), lambda *args: low_rank_dropout.launch_mm(*args)),
    "dropped_grad": (GRAD, lambda make: dropped(make, (ROWS, 144), (ROWS, 128)), lambda *args: low_rank_dropout.launch_grad(*args)),
    "fp8": (quantize_fp8.quantize_weight, lambda make: [make((32, 128)), make((8, 8))], lambda weight, after: quantize_fp8.launch(weight)),
    "fp8 transposed": (quantize_fp8.quantize_weights_t, lambda make: transposes(make, 24), lambda w, scales, after: quantize_fp8.launch_t(w, scales)),
}


def graph_of(*calls) -> torch.fx.Graph:
    graph = torch.fx.Graph()

    def node(value):
        if isinstance(value, list):
            return [node(entry) for entry in value]
        if not isinstance(value, Tensor):
            return value
        found = graph.placeholder(f"x{len(graph.nodes)}")
        found.meta["val"] = value
        return found

    for op, args in calls:
        graph.call_function(op, tuple(map(node, args)))
    graph.output(())
    return graph


def case(name: str):
    op, arguments, _ = CASES[name]
    return op, arguments(fake)


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="TRITON_")  # Triton 3.9 tells of a default that will change
        yield


@pytest.mark.parametrize("name", CASES)
def test_a_real_launch_finds_its_kernel(log, name):
    _, arguments, launch = CASES[name]
    with no_warnings():  # torch's own: the address of a fake tensor
        warmup.prepare(graph_of(case(name)))
    assert finish() == [] and log.compiled and sorted(log.loaded) == sorted(log.compiled) and not log.launched
    ahead = list(log.keys)
    launch(*arguments(real))
    assert log.launched and log.keys == ahead and len(log.loaded) == len(ahead), "compiled or loaded again"
    assert not warmup._pending


def test_each_distinct_kernel_is_compiled_once(log):
    """Two layers; siblings of other widths, weights of another size and the later dequantization have the kernels of the first."""
    layer = [
        case("nf4"),
        case("group"),
        case("lora_grads"),
        (GROUP, siblings(fake, (128, 24, 24))),
        (dequantize.dequantize_4bit, packed(fake, 256, 64)),
        case("nf4 later"),
    ]
    warmup.prepare(graph_of(*layer, *layer))
    assert finish() == [] and len(warmup._pending) == 3
    assert sorted(log.compiled) == ["dequantize_kernel", "lora_grads_kernel", "low_rank_kernel"]


def test_equal_calls_are_looked_at_once(log, monkeypatch):
    seen = []
    monkeypatch.setitem(warmup.IMPLEMENTATIONS, GROUP, lambda *args: seen.append(args))
    wider = (GROUP, siblings(fake, (64, 40, 48)))
    warmup.prepare(graph_of(case("group"), case("group"), wider, case("group")))
    assert [[b.shape[1] for b in args[1]] for args in seen] == [[64, 40, 40], [64, 40, 48]]


def test_a_launch_waits_for_its_kernel_under_way(log, monkeypatch):
    under_way, go_on, compile_ = threading.Event(), threading.Event(), JITFunction._do_compile

    def slow(self, *args, **kwargs):
        under_way.set()
        assert go_on.wait(20)
        return compile_(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", slow)
    warmup.prepare(graph_of(case("low rank")))
    assert under_way.wait(20)
    launching = threading.Thread(target=lambda: CASES["low rank"][2](*CASES["low rank"][1](real)))
    launching.start()
    time.sleep(0.2)
    assert launching.is_alive() and not log.launched
    go_on.set()
    launching.join(20)
    assert log.compiled == ["low_rank_kernel"] and log.launched == ["low_rank_kernel"]


def boom(*args, **kwargs):
    raise RuntimeError("boom")


@pytest.mark.parametrize("where", ["implementation", "compile", "load"])
def test_what_fails_leaves_nothing_behind(log, monkeypatch, where):
    """The next kernel is prepared, and the launch meets no trace of the failure."""
    from fastft import runner

    monkeypatch.setattr(runner, "_failed_kernels", set())
    monkeypatch.setattr(runner, "_strict_kernels", False)
    with no_warnings(), monkeypatch.context() as patch:
        if where == "implementation":
            patch.setattr(low_rank, "launch", boom)
        elif where == "compile":
            compile_ = JITFunction._do_compile
            patch.setattr(JITFunction, "_do_compile", lambda self, *args: boom() if self is low_rank.low_rank_kernel else compile_(self, *args))
        else:
            load = CompiledKernel._init_handles
            patch.setattr(CompiledKernel, "_init_handles", lambda self: boom() if self.name == "low_rank_kernel" else load(self))
        warmup.prepare(graph_of(case("low rank"), case("nf4")))
        assert [str(error) for error in finish()] == ["boom"] * (where != "implementation")
        CASES["nf4"][2](*CASES["nf4"][1](real))
    assert not runner._failed_kernels and not warmup.preparing() and log.compiled.count("dequantize_kernel") == 1
    CASES["low rank"][2](*CASES["low rank"][1](real))
    assert log.launched == log.loaded == ["dequantize_kernel", "low_rank_kernel"]


def test_other_threads_launch_meanwhile(log, monkeypatch):
    def implementation(*args):
        thread = threading.Thread(target=lambda: CASES["low rank"][2](*CASES["low rank"][1](real)))
        thread.start()
        thread.join()

    monkeypatch.setitem(warmup.IMPLEMENTATIONS, GROUP, implementation)
    warmup.prepare(graph_of(case("group")))
    assert log.launched == ["low_rank_kernel"] and not warmup._pending


def test_symbolic_sizes_are_skipped(log, monkeypatch):
    """And not asked for their values, which would bind the compiled graph to them."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    rows = mode.from_tensor(torch.empty(ROWS, 16), symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])).shape[0]
    symbolic = fake_tensor.FakeTensor(mode, torch.empty(rows, 16, device="meta"), CUDA)
    seen = []
    monkeypatch.setitem(warmup.IMPLEMENTATIONS, low_rank.low_rank_mm, lambda *args: seen.append(args))
    warmup.prepare(graph_of((low_rank.low_rank_mm, [symbolic, fake((16, 64)), None]), case("nf4")))
    assert finish() == [] and log.compiled == ["dequantize_kernel"] and not seen and not mode.shape_env.guards


def test_cpu_tensors(log):
    on_cpu = packed(lambda *args: fake_tensor.FakeTensor(FakeTensorMode(), tensor("meta", *args), torch.device("cpu")), 128, 64)
    warmup.prepare(graph_of((dequantize.dequantize_4bit, on_cpu)))
    assert not warmup._pending


def test_machines_without_a_gpu(log, monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_device=boom))
    warmup.prepare(graph_of(case("group")))
    assert not warmup._pending


def test_where_python_cannot_parse_in_two_threads(log, monkeypatch):
    monkeypatch.setattr(warmup, "SAFE", False)
    warmup.prepare(graph_of(case("low rank")))
    assert not warmup._pending


def test_post_grad_passes_end_with_it(log):
    PassManager([], Options())(graph_of(case("low rank")))
    assert finish() == [] and log.compiled == ["low_rank_kernel"]
