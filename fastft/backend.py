"""The backend that `torch.compile(model, backend="fastft")` calls.

    Dynamo's graph -> passes (stage 1, 2) -> compile_fx [-> partitioner (3) -> post-grad passes (4, 5)] -> Inductor (6)

Rewriting happens here, before `compile_fx`: an op brings its own backward, the compile cache sees the rewritten graph,
and the report exists on a warm start too.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fastft import _torch, passes, report
from fastft.deferred import PLANS, defer
from fastft.hooks import Partitioner, PassManager
from fastft.kept import Recipe, keep_dequantized, with_kept
from fastft.options import Options
from fastft.packing import pack_weights
from fastft.runner import Snapshot, run_passes, set_strict_kernels, warn_dropped

_torch.trace_past_log_once()  # PyTorch imports this module where it looks the backend up: before it traces, mostly after transformers was imported


def fastft(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrites and compiles one graph.

    Args:
        gm, example_inputs: as Dynamo hands them to a backend.
        mode: an Inductor mode ("default", "reduce-overhead", "max-autotune", ...), passed on.
        options: see `fastft.options.Options`.
    Raises:
        ValueError: an unknown option, pass, mode or setting; the message names the nearest valid one.
    """
    try:
        checked = Options.parse(options, mode, passes.NAMES)
    except ValueError as error:
        raise _torch.OptionError(str(error), first_useful_frame=None) from None
    if checked.strict:
        set_strict_kernels()
    _torch.trace_past_log_once()
    start = time.perf_counter()
    original = Snapshot(gm)
    without: list[str] = []
    dropped: list[tuple[str, str]] = []
    while True:
        row = report.Report(dropped=list(dropped))
        rewritten = run_passes(original, passes.STAGE_1, checked, row, without)
        if checked.pack_weights:
            pack_weights(rewritten, example_inputs, row)
        try:
            plans = rewritten.meta.pop(PLANS, [])
            rewritten, kept = _keep(rewritten, example_inputs, checked, row)
            compiled = _compile(rewritten, [*example_inputs, *kept.values()], checked, row)
            compiled = defer(with_kept(compiled, kept), plans)
            break
        except _torch.AnyRestart:
            raise  # Inductor asks Dynamo to trace the frame again: no failure
        except Exception as error:
            # A lowering or a fake of ours may be what failed: take back the last rewrite that did something.
            applied = [rewrite.pass_name for rewrite in row.rewrites]
            if checked.strict or not applied:
                raise
            without.append(applied[-1])
            dropped.append((applied[-1], warn_dropped(f"rewrite {applied[-1]}", error)))
            original.restore()
    row.compile_seconds = time.perf_counter() - start
    report.record(row)
    return compiled


def _keep(gm: GraphModule, example_inputs: Sequence[Any], options: Options, row: report.Report) -> tuple[GraphModule, dict[Recipe, torch.Tensor]]:
    if not options.keep_dequantized:
        return gm, {}
    try:
        return keep_dequantized(gm, example_inputs, row)
    except MemoryError as error:
        if options.strict:
            raise
        row.dropped.append(("keep_dequantized", warn_dropped("option keep_dequantized", error)))
        return gm, {}


def _compile(gm: GraphModule, example_inputs: Sequence[Any], options: Options, row: report.Report) -> Callable[..., Any]:
    patches = dict(options.inductor)
    if not options.cuda_graphs:
        # Partitions serve CUDA graphs alone; working out what the only one reads takes up to 1.8 s of 16 layers' 45.
        patches.setdefault("graph_partition", False)
    patches["post_grad_custom_post_pass"] = PassManager(passes.POST_GRAD, options, row)
    patches["custom_partitioner_fn"] = Partitioner(options)
    if _torch.calls_triton(gm):
        # Inductor hands Python floats to a user's Triton kernel as float64, Triton itself as float32: TRL 1.15's loss, which
        # SFTTrainer puts into the model, does not compile then ("initial type fp32 but is re-assigned to fp64 in loop").
        patches.setdefault("_use_fp64_for_unbacked_floats", False)
    # The backward is lowered now rather than at the first backward call: an error in it can still be answered here.
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True), _no_full_collections():
        return _torch.compile_fx(gm, list(example_inputs), config_patches=patches)


@contextlib.contextmanager
def _no_full_collections() -> Iterator[None]:
    """Holds back Python's collections of all objects, which find next to nothing: what a compile makes lives until its end.

    32 layers of Llama-8B in NF4: 13 s of 106 before, 5 now, for 8 % more host memory. Younger objects are collected as always.
    """
    *young, old = gc.get_threshold()
    gc.set_threshold(*young, 1 << 30)
    try:
        yield
    finally:
        gc.set_threshold(*young, old)
