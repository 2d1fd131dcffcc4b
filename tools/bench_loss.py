"""lm_head and the cross-entropy over it, forward and backward, beside bare GEMMs and peers; bf16.

| variant | what |
|---|---|
| floor | the GEMMs alone, all rows at once: logits and the gradient of hidden; with a trained head its gradient too |
| fastft, count ready | the number of rows with a label is on the host before the clock starts: a training step counts at its start |
| fastft, count right before | counted within the time, as by itself |
| liger | LigerFusedLinearCrossEntropyLoss |
| cce, cce unfiltered | Apple's cut-cross-entropy: its default leaves out blocks whose probabilities are all below 2.4e-4, `filter_eps=None` none |
| unsloth | unsloth_zoo's unsloth_fused_ce_loss |
| eager | `cross_entropy(linear(hidden, weight).float(), labels)` |

The variants run interleaved. Unsloth comes last: importing it sets environment variables and patches transformers, and everything else is warm by then.
Peak is what is allocated above inputs and labels, gradients included. Differences are relative to eager's gradients, in the same dtype.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from bench_models import PRESETS, import_fastft, tiny
from bench_systems import Clock, gemm_probe, versions
from bench_turns import alone, shuffled
from rich.markup import escape
from rich.table import Table
from torch import Tensor

IGNORED = -100
CHECKED = ((1000, torch.bfloat16), (50257, torch.bfloat16), (70000, torch.float32), (32000, torch.float16))  # vocabulary, dtype
COLUMNS = "head|labels|variant|ms|best|of floor|peak GiB|loss|dHidden differs|dHead differs|error".split("|")


@dataclasses.dataclass(frozen=True)
class Case:
    """A head that is frozen or trained, and labels of which all or half are read."""

    hidden: Tensor
    head: Tensor
    labels: Tensor
    names: dict[str, str]  # head, labels

    def gradients(self) -> list[Tensor]:
        return [x.grad for x in (self.hidden, self.head) if x.grad is not None]

    def clear(self) -> None:
        self.hidden.grad = self.head.grad = None


Run = Callable[[], Tensor | None]  # forward and backward: the loss
Build = Callable[[Case], tuple[Callable[[], None], Run]]  # what is done before the clock starts, and what is timed


def _nothing() -> None:
    pass


def floor(case: Case) -> tuple[Callable[[], None], Run]:
    hidden, head = case.hidden.detach(), case.head.detach()

    def run() -> None:
        logits = hidden @ head.t()
        case.hidden.grad = logits @ head
        if case.head.requires_grad:
            case.head.grad = logits.t() @ hidden

    return _nothing, run


def fastft(case: Case, ready: bool) -> tuple[Callable[[], None], Run]:
    from fastft.kernels.linear_cross_entropy import op
    from fastft.kernels.valid_rows import valid_rows

    made: list[Tensor] = []

    def count() -> None:
        made[:] = valid_rows(case.labels, IGNORED)

    def run() -> Tensor:
        if not ready:
            count()
        loss = op(case.hidden, case.head, None, case.labels, None, None, *made, IGNORED, "mean", 1.0, 0.0, 0.0, 0.0)[0]
        loss.backward()
        return loss

    return count if ready else _nothing, run


def peer(case: Case, make: Callable[[], Callable[[Case], Tensor]]) -> tuple[Callable[[], None], Run]:
    loss_of = make()

    def run() -> Tensor:
        loss = loss_of(case)
        loss.backward()
        return loss

    return _nothing, run


def eager_loss(case: Case) -> Tensor:
    return F.cross_entropy(F.linear(case.hidden, case.head).float(), case.labels)


def liger() -> Callable[[Case], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda case: loss(case.head, case.hidden, case.labels)


def cce(**options: Any) -> Callable[[Case], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda case: linear_cross_entropy(case.hidden, case.head, case.labels, shift=False, impl="cce", **options)


def unsloth() -> Callable[[Case], Tensor]:
    os.environ["UNSLOTH_IS_PRESENT"] = "1"  # unsloth_zoo alone: it asks whether unsloth was imported
    from unsloth_zoo.fused_losses.cross_entropy_loss import unsloth_fused_ce_loss

    return lambda case: unsloth_fused_ce_loss(None, case.hidden[None], case.head, None, case.labels[None], shift_labels=False)


BESIDE_UNSLOTH = ("cut_cross_entropy", "unsloth_zoo")  # in the folder of --unsloth-path
#: variant -> its package where it needs one and a GPU, and how it is built
VARIANTS: dict[str, tuple[str | None, Build]] = {
    "floor": (None, floor),
    "fastft, count ready": (None, functools.partial(fastft, ready=True)),
    "fastft, count right before": (None, functools.partial(fastft, ready=False)),
    "eager": (None, functools.partial(peer, make=lambda: eager_loss)),
    "liger": ("liger_kernel", functools.partial(peer, make=liger)),
    "cce": ("cut_cross_entropy", functools.partial(peer, make=cce)),
    "cce unfiltered": ("cut_cross_entropy", functools.partial(peer, make=lambda: cce(filter_eps=None))),
    "unsloth": ("unsloth_zoo", functools.partial(peer, make=unsloth)),
}


def make_cases(tokens: int, hidden: int, vocabulary: int, seed: int, device: str) -> list[Case]:
    generator = torch.Generator(device=device).manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, device=device).normal_(0, scale, generator=generator).to(torch.bfloat16)

    x, head = random(tokens, hidden).requires_grad_(), random(vocabulary, hidden, scale=0.02)
    labels = torch.randint(0, vocabulary, (tokens,), device=device, generator=generator)
    half = labels.masked_fill(torch.rand(tokens, device=device, generator=generator) < 0.5, IGNORED)
    trained = head.clone().requires_grad_()
    return [
        Case(x, head, labels, {"head": "frozen", "labels": "all"}),
        Case(x, head, half, {"head": "frozen", "labels": "half"}),
        Case(x, trained, labels, {"head": "trained", "labels": "all"}),
    ]


def warm_up(case: Case, name: str, warmup: int, reference: list[Tensor], device: str) -> tuple[dict[str, Any], tuple[Callable[[], None], Run] | None]:
    """A variant's row without its times, and what to time."""
    row: dict[str, Any] = {"variant": name, **case.names}
    package, build = VARIANTS[name]
    if package and (device != "cuda" or find_spec(package) is None):
        return row | {"skipped": "needs a GPU" if device != "cuda" else "not installed"}, None
    try:
        before, run = build(case)
        for _ in range(warmup + 1):
            before()
            run()
            case.clear()
        before()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
        loss = run()
        if device == "cuda":
            row["peak_gib"] = (torch.cuda.max_memory_allocated() - allocated) / 2**30
        if loss is not None:
            row["loss"] = float(loss.detach())
            pairs = zip(("hidden", "head"), case.gradients(), reference, strict=False)
            row |= {f"difference_{what}": float((own.float() - other.float()).norm() / other.float().norm()) for what, own, other in pairs}
        return row, (before, run)
    except Exception as error:  # a peer that fails is a row that says so
        return row | {"error": f"{type(error).__name__}: {error}"[:500]}, None
    finally:
        case.clear()


def check(say: Callable[[str], None], small: bool, device: str) -> list[dict[str, Any]]:
    """fastft's error against float64, over that of the plain form in the same dtype; every third label ignored."""
    from fastft.kernels.linear_cross_entropy import op

    found = []
    for vocabulary, dtype in CHECKED[:1] if small else CHECKED:
        h = torch.randn(700, 256, device=device).to(dtype)
        w = (torch.randn(vocabulary, 256, device=device) / 16).to(dtype)
        target = torch.randint(0, vocabulary, (700,), device=device)
        target[::3] = IGNORED
        results: dict[str, list[Tensor]] = {}
        for kind in ("exact", "plain", "fastft"):
            a, b = ((x.double() if kind == "exact" else x).detach().requires_grad_() for x in (h, w))
            if kind == "fastft":
                loss = op(a, b, None, target, None, None, None, None, IGNORED, "mean", 1.0, 0.0, 0.0, 0.0)[0]
            else:
                logits = F.linear(a, b)
                loss = F.cross_entropy(logits if kind == "exact" else logits.float(), target)
            results[kind] = [loss.detach(), *torch.autograd.grad(loss, (a, b))]
        row: dict[str, Any] = {"vocabulary": vocabulary, "dtype": str(dtype).removeprefix("torch.")}
        for what, exact, plain, own in zip(("loss", "dHidden", "dHead"), *results.values(), strict=True):
            row[what] = float((own.double() - exact).norm() / (plain.double() - exact).norm().clamp(min=1e-12))
        ratios = ", ".join(f"{what} {row[what]:.2f}" for what in ("loss", "dHidden", "dHead"))
        say(f"error of fastft over plain's, vocabulary {vocabulary}, {row['dtype']}: {ratios}")
        found.append(row)
    return found


def bench(args: argparse.Namespace, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All variants of all cases, warmed up one after the other and then timed interleaved."""
    import_fastft()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    preset, tokens = PRESETS["llama1b" if args.hidden == 2048 else "llama8b"], args.tokens
    if args.tiny:
        preset, tokens = tiny(preset), 64
    hidden, vocabulary = preset.config["hidden_size"], preset.config["vocab_size"]
    cases = make_cases(tokens, hidden, vocabulary, args.seed, device)
    shape = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}
    result: dict[str, Any] = {"op": args.op, "shape": shape, "device": device, "gemm_probe_ms": [gemm_probe(device, args.tiny)], "rows": []}
    result["check"] = check(say, args.tiny, device)
    running: list[tuple[dict[str, Any], Case, Callable[[], None], Run, list[float]]] = []
    references = []
    for case in cases:
        eager_loss(case).backward()
        references.append([x.clone() for x in case.gradients()])
        case.clear()
    for name, (package, _) in VARIANTS.items():
        if args.unsloth_path and package in BESIDE_UNSLOTH:
            sys.path.append(os.path.abspath(args.unsloth_path))  # last: nothing there replaces what is installed
        for case, reference in zip(cases, references, strict=True):
            if name == "floor" and case.names["labels"] != "all":
                continue  # the floor of all rows stands for both
            say(f"warming up {name}, {case.names['head']} head, {case.names['labels']} labels")
            row, runs = warm_up(case, name, args.warmup, reference, device)
            result["rows"].append(row)
            if runs:
                running.append((row, case, *runs, []))
    del references
    keep(result)
    with alone():
        for turn in range(4 * args.steps):
            order, clocks = shuffled(running, turn), []
            for _, case, before, run, _ in order:
                before()
                clocks.append(timed(run, device))
                case.clear()
            for (*_, times), clock in zip(order, clocks, strict=True):
                times += clock.intervals()
        result["gemm_probe_ms"].append(gemm_probe(device, args.tiny))
    for row, *_, times in running:
        row |= {"ms": statistics.median(times), "best_ms": min(times)}
    floors = {row["head"]: row["ms"] for row, *_ in running if row["variant"] == "floor"}
    for row, *_ in running:
        if row["head"] in floors:
            row["of_floor"] = row["ms"] / floors[row["head"]]
    result["peer_versions"] = versions(BESIDE_UNSLOTH)
    result["rows"].sort(key=lambda row: [row["head"], row["labels"]])
    return result


def timed(run: Run, device: str) -> Clock:
    clock = Clock(device)
    clock.head_start()
    clock.mark()
    run()
    clock.mark()
    return clock


def table(result: dict[str, Any], gpu: str) -> Table:
    shape = "{tokens} x {hidden} -> {vocabulary}".format(**result["shape"])
    probe = " → ".join(f"{ms:.3f}" for ms in result["gemm_probe_ms"])
    made = Table(title=f"lm_head and loss, {shape}, bf16, {gpu}, gemm probe {probe} ms", title_justify="left")
    for column in COLUMNS:
        made.add_column(column, justify="left" if column in ("head", "labels", "variant", "error") else "right")
    formats = {"ms": ".2f", "best_ms": ".2f", "of_floor": ".3f", "peak_gib": ".2f", "loss": ".4f", "difference_hidden": ".1e", "difference_head": ".1e"}
    for row in result["rows"]:
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in formats.items()]
        made.add_row(row["head"], row["labels"], row["variant"], *cells, escape(" ".join(row.get("error", row.get("skipped", "")).split())[:40]))
    return made
