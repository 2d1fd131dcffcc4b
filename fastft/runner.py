"""Runs the passes: in order, one after the other, all again without one that raises; lints, times, counts and reports.

Passes know nothing of this. Contracts: docs/design.md, "Never worse" and "Report".
"""

import collections
import copy
import operator
import time
import warnings
from collections.abc import Callable, Collection

from torch.fx import Graph, GraphModule

from fastft import match
from fastft.deferred import LOGITS, PLANS
from fastft.options import Options
from fastft.report import MissRow, PassRun, Report, Rewrite, reports
from fastft.result import Match, Miss


def warn_dropped(what: str, error: BaseException) -> str:
    """The one warning for something that failed and was dropped; returns the error as the report's row gives it."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    warnings.warn(
        f'fastft: {what} failed and was dropped; the model runs without it ({text}). options={{"strict": True}} raises instead.',
        stacklevel=3,
    )
    return text


_failed_kernels: set[str] = set()
_strict_kernels = False


def set_strict_kernels() -> None:
    """From now on a failing kernel raises: some graph of this process was compiled with `strict`."""
    global _strict_kernels
    _strict_kernels = True


def kernel_failed(name: str, error: Exception) -> bool:
    """Warns the first time kernel `name` fails; True: the caller goes on with its reference, False: it raises."""
    if _strict_kernels:
        return False
    if name not in _failed_kernels:
        _failed_kernels.add(name)
        text = warn_dropped(f"kernel {name}", error)
        for row in reports():
            row.dropped.append((name, text))
    return True


def operations(gm: GraphModule) -> collections.Counter:
    """How often each function and method is called in the graph and its subgraphs."""
    counts: collections.Counter = collections.Counter()
    for module in match.graph_modules(gm):
        for node in module.graph.nodes:
            if node.op in ("call_function", "call_method"):
                counts[node.target if isinstance(node.target, str) else _name(node.target)] += 1
    return counts


def _name(target) -> str:
    return str(target) if "." in str(target) and " " not in str(target) else getattr(target, "__name__", str(target))


def node_count(gm: GraphModule) -> int:
    return sum(len(module.graph.nodes) for module in match.graph_modules(gm))


class Snapshot:
    """A graph module and its bodies as they are before any pass, which can be had back as often as needed.

    One for a whole compile: copying graph and code before each of nine passes took 2.5 s on a model of 32 layers (3,900 nodes).

    Attributes:
        gm: what passes may change: the module given at first, then what `restore` made.
        seconds: how long keeping it took.
    """

    def __init__(self, gm: GraphModule) -> None:
        start = time.perf_counter()
        self.gm = gm
        self._graph, self._meta = _copy(gm.graph), _copy_lists(gm.meta)
        names = {node.target for node in gm.graph.nodes if node.op in ("get_attr", "call_module")}
        self._attributes = {name: operator.attrgetter(name)(gm) for name in names}
        self._bodies = {name: Snapshot(value) for name, value in self._attributes.items() if isinstance(value, GraphModule)}
        self.seconds = time.perf_counter() - start

    def restore(self) -> GraphModule:
        """Another module with the kept graphs; parameters, other meta values and attributes are shared."""
        bodies = {name: body.restore() for name, body in self._bodies.items()}
        self.gm = GraphModule(self._attributes | bodies, _copy(self._graph))
        self.gm.meta = _copy_lists(self._meta)
        return self.gm


def _copy(graph: Graph) -> Graph:
    """With what Dynamo notes about its inputs beside `meta`: it looks there after the compile, and passes do before."""
    twin = copy.deepcopy(graph)
    for node, copied in zip(graph.nodes, twin.nodes, strict=True):
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
    return twin


def _copy_lists(meta: dict) -> dict:
    return {name: list(value) if type(value) is list else value for name, value in meta.items()}


def copy_graph(gm: GraphModule) -> GraphModule:
    """A graph module with its own nodes, bodies and lists in `meta`."""
    return Snapshot(gm).restore()


def run_passes(original: Snapshot, passes: list[Callable], options: Options, report: Report, without: Collection[str] = ()) -> GraphModule:
    """Applies `passes` to the snapshot's module and its bodies in place and fills `report`; returns the module to compile.

    When a pass raises, all start again without it.
    """
    start = time.perf_counter()
    skipped = {*options.disable, *without}
    if options.base_compute != "fp8":
        skipped.add("fp8_compute")
    why = options.why_materialized()
    report.nodes_before = node_count(original.gm)
    while True:
        gm = original.gm
        gm.meta[LOGITS] = "materialize" if why else "deferred"
        failed = _run_all(gm, [run for run in passes if run.__name__ not in skipped], options, report)
        if failed is None:
            break
        skipped.add(failed)
        original.restore()
    for module in match.graph_modules(gm):
        module.recompile()
    report.nodes_after = node_count(gm)
    report.logits = f"materialized: {why}" if why else "deferred" if gm.meta.get(PLANS) else None
    report.rewrite_seconds = original.seconds + time.perf_counter() - start
    return gm


def _run_all(gm: GraphModule, passes: list[Callable], options: Options, report: Report) -> str | None:
    """Runs `passes` in order; the name of the first one that raised, or None."""
    report.rewrites, report.misses, report.passes = [], [], []
    before = operations(gm)
    for run in passes:
        name, start = run.__name__, time.perf_counter()
        try:
            for module in match.graph_modules(gm):
                for result in run(module):
                    _add_row(name, result, report)
                module.graph.lint()
        except Exception as error:
            if options.strict:
                raise
            report.dropped.append((name, warn_dropped(f"pass {name}", error)))
            return name
        after = operations(gm)
        diff = {op: after[op] - before[op] for op in sorted({*before, *after}) if after[op] != before[op]}
        report.passes.append(PassRun(name, time.perf_counter() - start, diff))
        before = after
    return None


def _add_row(name: str, result: Match | Miss, report: Report) -> None:
    if isinstance(result, Match):
        paths = [path for node in result.nodes if (path := match.module_path(node))]
        report.rewrites.append(Rewrite(name, result.op, result.provider, paths, match.source_line(result.nodes[0])))
    else:
        path, source = match.module_path(result.node), match.source_line(result.node)
        report.misses.append(MissRow(name, result.reason, [path] if path else [], source))
