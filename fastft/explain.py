"""`fastft.explain(model, **inputs)`: what fastft would rewrite in a model, what not and why, without compiling anything.

    print(fastft.explain(model, input_ids=ids, labels=ids))

Dynamo captures the model, the stage 1 passes rewrite a copy of every graph, and the captured graphs run as they are, so that
what stands behind a graph break is seen too. One forward pass in the mode the model is in; nothing is kept for a backward.
"""

import contextlib
import dataclasses
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fastft import _torch, passes
from fastft.options import Options
from fastft.report import Report
from fastft.runner import Snapshot, run_passes


@dataclasses.dataclass
class Explanation:
    """What `explain` found.

    Attributes:
        graphs: one report for each graph, as `fastft.reports()` would give it; `compile_seconds` is that of the rewriting.
        graph_breaks: `reason (file:line)` for each place where Dynamo had to leave the graph.
        capture_seconds: the whole call.
    """

    graphs: list[Report]
    graph_breaks: list[str]
    capture_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The keys `graphs` and `graph_breaks` of the JSON contract that `tools/inspect_graph.py --json` prints."""
        return {"graphs": [report.to_dict() for report in self.graphs], "graph_breaks": self.graph_breaks}

    def __str__(self) -> str:
        lines = [f"{_count(len(self.graphs), 'graph')}, {_count(len(self.graph_breaks), 'graph break')}, {self.capture_seconds:.1f} s"]
        lines += [f"  break   {reason}" for reason in self.graph_breaks]
        for number, report in enumerate(self.graphs):
            lines += ["", f"graph {number}: {report.nodes_before} nodes, {report.nodes_after} after rewriting"]
            for run in report.passes:
                diff = ", ".join(f"{change:+d} {op}" for op, change in run.op_diff.items())
                lines.append(f"  pass    {run.name} {1e3 * run.seconds:.0f} ms: {diff or 'no change'}")
            for row in report.rewrites:
                lines.append(f"  rewrite {row.op} <- {', '.join(row.fqn)}  [{row.provider}]  {row.source}")
            for row in report.misses:
                lines.append(f"  miss    {row.pass_name}: {row.reason}: {', '.join(row.fqn)}  {row.source}")
            for name, error in report.dropped:
                lines.append(f"  dropped {name}: {error}")
        return "\n".join(lines)


def explain(model: nn.Module | Callable, *args: Any, options: Mapping[str, Any] | None = None, **inputs: Any) -> Explanation:
    """Says what `torch.compile(model, backend="fastft", options=options)` would rewrite on these inputs.

    The model's parameters, gradients, buffers and random state stay as they are, and so do `fastft.reports()` and what has
    been compiled before. A cache passed in the inputs is filled, as by any call.

    Raises:
        ValueError: a bad option, as from `torch.compile`.
    """
    checked = Options.parse(options, None, passes.NAMES)
    model = getattr(model, "_orig_mod", model)
    reports: list[Report] = []

    def capture(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        row = Report()
        original = Snapshot(gm)
        original.restore()  # the passes change that one: `gm` runs
        run_passes(original, passes.STAGE_1, checked, row)
        row.compile_seconds = time.perf_counter() - start
        reports.append(row)
        return _keeping_nothing(gm.forward)

    _torch.trace_past_log_once()  # as where the backend is looked up
    start = time.perf_counter()
    with _untouched(model), graph_breaks() as breaks:
        _torch.isolated_compile(model, capture)(*args, **inputs)
    return Explanation(reports, breaks, time.perf_counter() - start)


@contextlib.contextmanager
def graph_breaks() -> Iterator[list[str]]:
    """Fills the list it yields with the graph breaks that Dynamo meets inside."""
    found: list[str] = []
    start, before = len(_torch.graph_break_reasons), dict(_torch.counters["unimplemented"])
    try:
        yield found
    finally:
        for item in _torch.graph_break_reasons[start:]:
            found.append(_reason(str(item.reason), item.user_stack))
        # A break where Dynamo cannot resume, in a loop or under a context manager: the whole function runs in eager.
        skipped = [_skipped(str(text)) for text, count in _torch.counters["unimplemented"].items() if count > before.get(text, 0)]
        found += [text for text in skipped if not any(text != other and text in other for other in skipped)]


def _skipped(text: str) -> str:
    context = [line.partition("debug context: ")[2] for line in text.splitlines() if "debug context: " in line]
    return "; ".join([f"function not compiled: {_reason(text, [])}", *context])


def _reason(text: str, stack: list) -> str:
    """The first line of Dynamo's message, and where it happened."""
    place = f" ({stack[-1].filename.rpartition('/site-packages/')[2]}:{stack[-1].lineno})" if stack else ""
    return text.splitlines()[0] + place


def _keeping_nothing(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` without the tensors that autograd would keep for a backward; its outputs require gradients all the same."""

    def refuse(_: None) -> torch.Tensor:
        raise RuntimeError("fastft.explain keeps nothing for a backward")

    def call(*args: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, refuse):
            return run(*args)

    return call


@contextlib.contextmanager
def _untouched(model: nn.Module | Callable) -> Iterator[None]:
    """Puts back what a forward pass and Dynamo change: buffers, random state, Dynamo's counters, `model.compile()`."""
    module = isinstance(model, nn.Module)
    tensors = [*model.parameters(), *model.buffers()] if module else []
    gpus = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    buffers = [(buffer, buffer.detach().clone()) for buffer in (model.buffers() if module else ())]
    compiled = getattr(model, "_compiled_call_impl", None)
    counters = {name: counter.copy() for name, counter in _torch.counters.items()}
    if compiled is not None:
        model._compiled_call_impl = None
    try:
        with torch.random.fork_rng(sorted(gpus)):
            yield
    finally:
        if compiled is not None:
            model._compiled_call_impl = compiled
        _torch.counters.clear()
        _torch.counters.update(counters)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class _Callable(types.ModuleType):
    """Importing this file makes `fastft.explain` the name of a module: calling that works like calling the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Explanation:
        return explain(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
