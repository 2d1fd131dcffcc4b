#!/usr/bin/env python3
"""What fastft does to a model: rewrites, misses and why, graph breaks, compile time, cache hits.

    python tools/inspect_graph.py --arch llama --lora                    # tiny and random: compiles, one forward and backward
    python tools/inspect_graph.py --arch qwen3 --lora --no-compile       # seconds: captures and rewrites only
    python tools/inspect_graph.py --model ./my-model --lora q_proj,v_proj --seq 512 --dtype bfloat16
    python tools/inspect_graph.py --arch llama --lora --quant nf4 --json | jq '.graphs[].misses'

`--lora` alone puts adapters on every nn.Linear and Conv1D but the output head and routers. Experts kept as 3-D parameters are
not modules, so for mixtral and qwen3_moe that means the attention linears. `--lora attention` takes those of any type,
`--lora all-linear` is peft's own notion, and `--lora q_proj,v_proj` names them.

With --json stdout holds one JSON object, warnings and progress go to stderr:
`{"schema": 1, "torch": ..., "graphs": [...], "graph_breaks": [...], "compile_s": ..., "cache": {...}}`. `compile_s` sums the backend
calls (rewriting, AOTAutograd, Inductor); with --no-compile it and the cache counters are 0.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import tiny  # noqa: E402
import tiny_tasks  # noqa: E402
import torch  # noqa: E402
from rich.console import Console, Group  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402
from torch import nn  # noqa: E402

import fastft  # noqa: E402
from fastft import _torch, passes  # noqa: E402
from fastft.explain import explain, graph_breaks  # noqa: E402
from fastft.options import Options  # noqa: E402
from fastft.report import Report  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHES = (
    ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass"),
    (
        "fxgraph_cache_hit",
        "fxgraph_cache_miss",
        "fxgraph_cache_bypass",
    ),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--arch", metavar="TYPE", help="a type that transformers registers, tiny and random: llama, qwen3_moe, ...")
    source.add_argument("--model", metavar="PATH", help="a saved transformers model")
    add("--task", choices=tiny_tasks.TASKS, default="causal-lm", help="what the model is for (default: %(default)s)")
    add("--lora", nargs="?", const="linear", metavar="TARGETS", help="linear (the default), attention, all-linear, or module names")
    add("--rank", type=int, default=4)
    add("--dropout", type=float, default=0.0, help="LoRA dropout (default: %(default)s)")
    add("--quant", choices=("nf4", "fp4", "int8"), help="base linears quantized by bitsandbytes, as QLoRA")
    add("--attn", choices=("sdpa", "eager"), help="attention implementation (default: the type's own)")
    add("--layers", type=int, help="default: 2 with --arch, all with --model")
    add("--seq", type=int, default=64)
    add("--batch", type=int, default=2)
    add("--dtype", choices=DTYPES, help="default: float32 with --arch (bfloat16 with --quant), the saved one with --model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--options", type=json.loads, default={}, metavar="JSON", help='options of the backend, e.g. \'{"disable": ["lora_linear"]}\'')
    add("--no-compile", action="store_true", help="capture and rewrite only, compile nothing")
    add("--json", action="store_true", help="print the JSON object instead of the tables")
    add("--html", type=Path, metavar="FILE", help="write the tables to FILE too")
    args = parser.parse_args()
    types = list(tiny_tasks.registered(args.task))
    if args.arch and args.arch not in types:
        near = difflib.get_close_matches(args.arch, types, n=3)
        parser.error(f"unknown type {args.arch!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    if args.model and not Path(args.model).is_dir():
        parser.error(f"{args.model} is not a folder")
    if not isinstance(args.options, dict):
        parser.error("--options takes a JSON object")
    try:
        Options.parse(args.options, None, passes.NAMES)
    except ValueError as error:
        parser.error(str(error))
    return args


def build(args: argparse.Namespace) -> nn.Module:
    """The model as the flags say, in training mode."""
    dtype = DTYPES.get(args.dtype)
    if args.arch:
        dtype = dtype or (torch.bfloat16 if args.quant else torch.float32)
        model = tiny.tiny_model(args.arch, task=args.task, layers=args.layers or 2, dtype=dtype, attn_implementation=args.attn, seq=args.seq)
    else:
        model = load(args.model, dtype, args.attn, args.layers)
    model = model.to(args.device)
    targets: Any = args.lora
    if targets and targets not in ("linear", "attention", "all-linear"):
        targets = targets.split(",")
    if args.quant:
        tiny.quantize(model, args.quant)
    if targets:
        model = tiny.add_lora(model, r=args.rank, alpha=2 * args.rank, dropout=args.dropout, targets=targets)
    return model.train()


def load(path: str, dtype: torch.dtype | None, attention: str | None, layers: int | None) -> nn.Module:
    """A saved model, cut to its first `layers` layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    if layers:
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == config.num_hidden_layers:
                setattr(config, name, value[:layers])
        config.num_hidden_layers = layers
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype or "auto", attn_implementation=attention)


def inspect(model: nn.Module, batch: dict[str, torch.Tensor], args: argparse.Namespace) -> tuple[list[Report], list[str], dict, float]:
    """`(reports, graph breaks, cache counters, seconds of the first step)`."""
    if args.no_compile:
        found = explain(model, options=args.options, **batch)
        return found.graphs, found.graph_breaks, counters(), found.capture_seconds
    fastft.reset()
    start = time.perf_counter()
    with graph_breaks() as breaks:
        loss = torch.compile(model, backend="fastft", options=args.options)(**batch).loss
        if loss.requires_grad:
            loss.backward()
    return fastft.reports(), breaks, counters(), time.perf_counter() - start


def counters() -> dict[str, int]:
    """Hits, misses and bypasses of AOTAutograd's cache and of Inductor's."""
    autograd, fx = CACHES
    found = {name: _torch.counters["aot_autograd"][name] for name in autograd}
    return found | {name: _torch.counters["inductor"][name] for name in fx}


def document(reports: list[Report], breaks: list[str], cache: dict[str, int], compiled: bool) -> dict[str, Any]:
    """The JSON contract: schema 1."""
    return {
        "schema": 1,
        "torch": torch.__version__,
        "graphs": [report.to_dict() for report in reports],
        "graph_breaks": breaks,
        "compile_s": round(sum(report.compile_seconds for report in reports), 3) if compiled else 0.0,
        "cache": cache,
    }


def table(title: str, *columns: str) -> Table:
    result = Table(title=title, title_justify="left", title_style="bold", expand=False)
    for column in columns:
        result.add_column(column, justify="right" if column in ("seconds", "before", "after", "count") else "left", overflow="fold")
    return result


def render(reports: list[Report], breaks: list[str], cache: dict[str, int], seconds: float, compiled: bool) -> Group:
    """The tables: for each graph what was rewritten, what was missed and what each pass changed; then the whole."""
    parts: list[Any] = []
    for number, report in enumerate(reports):
        name = f"graph {number} ({report.nodes_before} nodes, {report.nodes_after} after)"
        if report.rewrites:
            rows = table(f"{name}: rewritten", "op", "modules", "source", "provider")
            for row in report.rewrites:
                rows.add_row(row.op, "\n".join(row.fqn), row.source, row.provider)
            parts.append(rows)
        missed = report.to_dict()["misses"]
        if missed:
            rows = table(f"{name}: missed", "pass", "reason", "modules", "source")
            for row in missed:
                rows.add_row(row["pass"], Text(row["reason"], "yellow"), "\n".join(row["fqn"]), row["source"])
            parts.append(rows)
        rows = table(f"{name}: passes", "pass", "seconds", "operations")
        for run in report.passes:
            rows.add_row(run.name, f"{run.seconds:.3f}", ", ".join(f"{change:+d} {op}" for op, change in run.op_diff.items()) or "no change")
        parts.append(rows)
    if breaks:
        rows = table("graph breaks", "reason")
        for reason in breaks:
            rows.add_row(Text(reason, "yellow"))
        parts.append(rows)
    rewritten = sum(max(len(row.fqn), 1) for report in reports for row in report.rewrites)  # plain parameters have no path
    missed = sum(len(report.misses) + len(report.dropped) for report in reports)
    rewriting = sum(report.rewrite_seconds for report in reports)
    summary = table("summary", "what", "count")
    summary.add_row("graphs, graph breaks", f"{len(reports)}, {len(breaks)}")
    summary.add_row("modules rewritten, missed", f"{rewritten}, {missed}")
    summary.add_row("seconds of rewriting", f"{rewriting:.2f}")
    if compiled:
        summary.add_row("seconds of compiling", f"{sum(report.compile_seconds for report in reports):.1f}")
        for name, count in cache.items():
            summary.add_row(name.replace("_", " "), str(count))
    summary.add_row("seconds of the first step" if compiled else "seconds of the capture", f"{seconds:.1f}")
    return Group(*parts, summary)


def main() -> None:
    args = parse()
    with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints
        model = build(args)
        batch = tiny_tasks.batch(model.config, args.task, tiny.tiny_batch(model.config, batch=args.batch, seq=args.seq))
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        reports, breaks, cache, seconds = inspect(model, batch, args)
    if args.json:
        print(json.dumps(document(reports, breaks, cache, not args.no_compile), indent=1))
    tables = render(reports, breaks, cache, seconds, not args.no_compile)
    if not args.json:
        Console(width=None if sys.stdout.isatty() else 160).print(tables)
    if args.html:
        console = Console(record=True, width=200, file=io.StringIO())
        console.print(tables)
        console.save_html(str(args.html))


if __name__ == "__main__":
    main()
