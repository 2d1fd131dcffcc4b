"""Runs the passes: in order, one after the other, each undone when it raises; lints, times, counts and reports.

Passes know nothing of this. Contracts: docs/design.md, "Never worse" and "Report".
"""

import collections
import copy
import time
import warnings
from collections.abc import Callable, Collection

from torch.fx import GraphModule

from fastft import match
from fastft.deferred import LOGITS, PLANS
from fastft.options import Options
from fastft.report import MissRow, PassRun, Report, Rewrite, reports
from fastft.result import Match


# What saves a tensor that is made early in the forward: see `hooks.MIN_CUT`.
NOT_UNDER_CUDA_GRAPHS = {"rope_tables"}


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


def copy_graph(gm: GraphModule) -> GraphModule:
    """A graph module with its own nodes, subgraphs and lists in `meta`; parameters, other meta values and attributes are shared."""
    twin = GraphModule(gm, copy.deepcopy(gm.graph))
    twin.meta = {name: list(value) if type(value) is list else value for name, value in gm.meta.items()}
    for name, child in gm.named_children():
        if isinstance(child, GraphModule):
            setattr(twin, name, copy_graph(child))
    return twin


def run_passes(gm: GraphModule, passes: list[Callable], options: Options, report: Report, without: Collection[str] = ()) -> GraphModule:
    """Applies `passes` to `gm` and its bodies in place and fills `report`; returns the graph module to compile."""
    report.nodes_before = node_count(gm)
    why = options.why_materialized()
    gm.meta[LOGITS] = "materialize" if why else "deferred"
    for run in passes:
        name = run.__name__
        if name in options.disable or name in without or (options.cuda_graphs and name in NOT_UNDER_CUDA_GRAPHS):
            continue
        kept = copy_graph(gm)
        before, start = operations(gm), time.perf_counter()
        rewrites, misses = [], []
        try:
            for module in match.graph_modules(gm):
                for result in run(module):
                    if isinstance(result, Match):
                        paths = [path for node in result.nodes if (path := match.module_path(node))]
                        source = match.source_line(result.nodes[0])
                        rewrites.append(Rewrite(name, result.op, result.provider, paths, source))
                    else:
                        path, source = match.module_path(result.node), match.source_line(result.node)
                        misses.append(MissRow(name, result.reason, [path] if path else [], source))
                module.graph.lint()
        except Exception as error:
            if options.strict:
                raise
            report.dropped.append((name, warn_dropped(f"pass {name}", error)))
            gm = kept
            continue
        report.rewrites += rewrites
        report.misses += misses
        after = operations(gm)
        diff = {op: after[op] - before[op] for op in sorted({*before, *after}) if after[op] != before[op]}
        report.passes.append(PassRun(name, time.perf_counter() - start, diff))
    for module in match.graph_modules(gm):
        module.recompile()
    report.nodes_after = node_count(gm)
    report.logits = f"materialized: {why}" if why else "deferred" if gm.meta.get(PLANS) else None
    return gm
