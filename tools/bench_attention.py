"""One attention, forward and backward, beside the best kernels called by hand: Llama-8B's shape (32 query heads, 8 key heads of 128), gpt-oss's for sinks
(64 query heads, 8 key heads of 64); bf16.

| variant | what |
|---|---|
| fastft, inductor | what a transformers model traces: its mask function, then `sdpa_attention_forward` with k and v not repeated, or gpt-oss's own attention |
| sdpa cudnn, sdpa flash | `scaled_dot_product_attention(is_causal=True, enable_gqa=True)` held to one backend |
| varlen | `varlen_attn` over the documents; a padded row is two, what it holds and the padding |
| flex | compiled `flex_attention` with a block mask of the same documents or window, padded queries left out |
| without sinks | fastft on the same attention without sinks, what one with sinks is measured against |
| dense | `scaled_dot_product_attention` with the whole mask: on a CPU only |

The variants of a case run interleaved. fastft and inductor make their mask (or what replaces it) within the timed forward, which a model does once
for all layers; a kernel called by hand finds its `cu_seqlens` or block mask ready. In the padded case a small loss that ignores the padding follows, the
same for all variants, because what nothing reads need not be computed. Inductor is left out at 32768, where its mask alone takes gigabytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_attention_cases import COMPILED, GPT_OSS, LONG, Case, Kernel, Shape, builders, make_cases
from bench_models import import_fastft
from bench_ops import figures
from bench_profile import attention_backend, profile
from bench_systems import Clock, fastft_reports, gemm_probe
from bench_turns import alone, one_size_each, shuffled
from rich.markup import escape
from rich.table import Table
from torch import Tensor

SIZES = ((4, 2048), (1, 8192), (1, 32768))
FEW = 12  # repetitions at 32768
COLUMNS = "case|tokens|variant|fwd ms|bwd ms|total ms|best by hand|ratio|peak MiB|max diff out|dq|dk|dv|grad norm|attention".split("|")


def step(kernel: Kernel, leaves: list[Tensor], upstream: Tensor, clock: Clock | None = None) -> list[Tensor]:
    """Forward and backward from no gradients: the result and the gradients of q, k and v."""
    for leaf in leaves:
        leaf.grad = None
    if clock:
        clock.head_start()
        clock.mark()
    out = kernel(*leaves)
    if clock:
        clock.mark()
    out.backward(upstream)
    if clock:
        clock.mark()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def peak_mib(run: Callable[[], object]) -> float:
    """How far the allocated memory rises above what is there before: activations, mask, result and gradients."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(
    case: Case, repeat: int, warmup: int, seed: int, options: dict[str, Any] | None, device: str, say: Callable[[str], None]
) -> Iterator[list[dict[str, Any]]]:
    """Every variant of one case; one that fails is an error string, the others go on. Gives nothing when all are compiled, then the timed rows."""
    reports = len(fastft_reports())
    generator = torch.Generator(device=device).manual_seed(seed)

    def random(heads: int) -> Tensor:
        return torch.empty((case.batch, case.seq, heads, case.shape.head_dim), device=device, dtype=torch.bfloat16).normal_(generator=generator)

    leaves = [random(heads).requires_grad_() for heads in (case.shape.heads, case.shape.kv_heads, case.shape.kv_heads)]
    upstream = random(case.shape.heads) if case.labels is None else torch.ones((), device=device)
    valid = case.inputs.get("attention_mask", torch.ones(case.batch, case.seq, device=device)).bool()
    rows: dict[str, dict[str, Any]] = {}
    kernels: dict[str, Kernel] = {}
    results: dict[str, list[Tensor]] = {}
    clocks: dict[str, list[Clock]] = {}
    for name, build in builders(case, options, device).items():
        rows[name] = row = {"case": case.name, "batch": case.batch, "seq": case.seq, "variant": name}
        say(f"{case.name} {case.batch}x{case.seq}: compiling {name}")
        try:
            kernel = build(case, device)
            for _ in range(warmup + 1):
                results[name] = step(kernel, leaves, upstream)
            if device == "cuda":
                row["peak_mib"] = peak_mib(functools.partial(step, kernel, leaves, upstream))
            kernels[name], clocks[name] = kernel, []
        except Exception as error:  # a torch without this kernel must not take the others' figures away
            row["error"] = f"{type(error).__name__}: {error}"[:500]
            results.pop(name, None)
    compiled = fastft_reports()[reports:]
    yield []
    for turn in range(min(repeat, FEW) if case.seq >= LONG else repeat):
        for name, kernel in shuffled(kernels.items(), turn):
            clocks[name].append(Clock(device))
            step(kernel, leaves, upstream, clocks[name][-1])
    for name in kernels:
        rows[name] |= figures(clocks[name])
        rows[name]["grad_norm"] = sum(float(x[valid].double().norm()) ** 2 for x in results[name][1:]) ** 0.5
    best = min((name for name in kernels if name not in COMPILED), key=lambda name: rows[name]["ms"], default=None)
    for name in kernels if best else ():
        rows[name] |= {"best_by_hand": best, "best_by_hand_ms": rows[best]["ms"], "ratio": rows[name]["ms"] / rows[best]["ms"]}
        for what, own, other in zip(("out", "dq", "dk", "dv"), results[name], results[best], strict=True):
            difference = (own.float() - other.float()).abs()
            rows[name][f"difference_{what}"] = float((difference[valid] if difference.dim() else difference).max())
    if "fastft" in kernels:
        rows["fastft"]["reports"] = compiled
    if "fastft" in kernels and device == "cuda":
        try:
            prof = profile(functools.partial(step, kernels["fastft"], leaves, upstream), steps=1)
            rows["fastft"] |= {"attention": attention_backend(prof), "attention_kernels": prof["attention_kernels"]}
            say(f"{case.name} {case.batch}x{case.seq}: fastft ran {', '.join(prof['attention_kernels']) or 'no attention kernel'}")
        except Exception as error:  # the figures above stand without it
            rows["fastft"]["profile_error"] = f"{type(error).__name__}: {error}"[:500]
    yield list(rows.values())


def bench(args: argparse.Namespace, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All cases of all sizes, compiled first and then timed; `keep` gets what there is after each case."""
    if args.overlap and not args.seq:
        return one_size_each(SIZES)
    import_fastft()
    torch._dynamo.config.recompile_limit = 64  # the cases share their code
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"shape": dataclasses.asdict(Shape()), "shape_sinks": dataclasses.asdict(GPT_OSS)}
    result: dict[str, Any] = {"op": args.op, **({} if args.tiny else shapes), "device": device, "gemm_probe_ms": [gemm_probe(device, args.tiny)], "rows": []}
    sizes = [(2, 64)] if args.tiny else [(args.batch or 1, args.seq)] if args.seq else SIZES
    cases = [case for batch, seq in sizes for case in make_cases(batch, seq, args.tiny, args.seed, device)]
    running = [measure(case, 4 * args.steps, args.warmup, args.seed, args.options, device, say) for case in cases]
    for case in running:
        next(case)
    with alone():
        for case in running:
            result["rows"] += next(case)
            keep(result)
    result["gemm_probe_ms"].append(gemm_probe(device, args.tiny))
    return result


def table(result: dict[str, Any], gpu: str) -> Table:
    made = Table(title=f"attention, {gpu}", title_justify="left")
    for column in COLUMNS:
        made.add_column(column, justify="left" if column in ("case", "variant", "best by hand", "attention") else "right")
    for row in result["rows"]:
        numbers = [f"{row[key]:.3f}" if key in row else "" for key in ("forward_ms", "backward_ms", "ms")]
        best = f"{row['best_by_hand']} {row['best_by_hand_ms']:.3f}" if "best_by_hand" in row else ""
        more = ["ratio", "peak_mib", "difference_out", "difference_dq", "difference_dk", "difference_dv", "grad_norm"]
        last = escape(row.get("error", row.get("attention", ""))[:60])
        made.add_row(
            row["case"], f"{row['batch']}x{row['seq']}", row["variant"], *numbers, best, *(f"{row[key]:.4g}" if key in row else "" for key in more), last
        )
    return made
