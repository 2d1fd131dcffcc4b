"""One system, one process: build the model, train it for some steps, return the figures.

`bench.py` starts `python bench_systems.py SPEC.json RESULT.json` for each system, so that no system's patches, compiled
code or memory reach another.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import sys
import time
import traceback
import zlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench_batch import make_batch
from bench_models import BUILDERS, ROOT, TARGETS, Spec, canonical, seed_parameters
from bench_turns import alone, ready

GiB = 2.0**30
HEAD_START = 4_000_000  # cycles, about 2 ms: more than the host takes to launch one operation, forward and backward
PACKAGES = ("torch", "triton", "transformers", "peft", "liger_kernel", "unsloth", "unsloth_zoo", "bitsandbytes", "fastft")


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def source_hash() -> str:
    """Names the fastft that was measured without git: a checksum over its sources in this checkout."""
    crc = 0
    for path in sorted(p for folder in ("fastft", "passes", "kernels") for p in (ROOT / folder).rglob("*.py")):
        crc = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.relative_to(ROOT)).encode(), crc))
    return f"{crc:08x}"


def gemm_probe(device: str, tiny_shape: bool = False, repeat: int = 20) -> float:
    """Median milliseconds of one fixed bf16 product: how fast the machine itself is right now."""
    import torch

    m, k, n = (64, 64, 64) if tiny_shape else (8192, 4096, 14336)
    a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    b = torch.randn(k, n, device=device, dtype=torch.bfloat16)
    clock = Clock(device)
    for _ in range(5):
        a @ b
    clock.mark()
    for _ in range(repeat):
        a @ b
        clock.mark()
    return statistics.median(clock.intervals())


class Clock:
    """Marks in the device's own order (CUDA events, so nothing waits), or of the host's clock without a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[Any] = []

    def head_start(self) -> None:
        """The device waits until the host has launched what follows, so that only the device's time is measured."""
        import torch

        if self.cuda:
            torch.cuda._sleep(HEAD_START)

    def mark(self) -> None:
        import torch

        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Milliseconds between consecutive marks."""
        import torch

        if not self.cuda:
            return [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False)]


def allocated(device: str, peak: bool = False) -> float:
    import torch

    if device != "cuda":
        return 0.0
    return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / GiB


def dead_gradients(params: dict[str, Any]) -> list[str]:
    """Trained parameters without a gradient, with an all-zero one, or with one that is not finite."""
    return [name for name, p in params.items() if p.grad is None or not bool(p.grad.isfinite().all()) or not bool(p.grad.any())]


def measure(spec: Spec, device: str) -> dict[str, Any]:
    """Build the system, train, and return every figure of its row."""
    import torch

    result: dict[str, Any] = {"gemm_probe_ms": [gemm_probe(device, spec.tiny)]}
    torch.manual_seed(spec.seed)
    call, model = BUILDERS[spec.system](spec, device)
    quantized = sum(getattr(p, "quant_state", None) is not None for p in model.parameters())
    if quantized != (len(TARGETS) * spec.config["num_hidden_layers"] if spec.quant else 0):  # Unsloth drops a quantization that it cannot use
        raise ValueError(f"{quantized} linears are quantized")
    seed_parameters(model, spec.seed)
    model.train()
    params = {canonical(name): p for name, p in model.named_parameters() if p.requires_grad}
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result["weights_gib"] = allocated(device)
    result["trainable"] = sum(p.numel() for p in params.values())
    result["adapter_dtype"] = sorted({str(p.dtype).removeprefix("torch.") for p in params.values()})
    optimizer = torch.optim.AdamW(params.values(), lr=spec.lr, fused=True)
    batch = make_batch(spec.config["vocab_size"], spec.batch, spec.seq, spec.seed, device, spec.padding, spec.documents, spec.lengths)
    losses: list[Any] = []
    norms: list[Any] = []

    def step() -> None:
        with torch.autocast(device, torch.bfloat16) if spec.autocast else contextlib.nullcontext():
            loss = call(**batch).loss
        loss.backward()
        if not losses:
            result["dead_gradients"] = dead_gradients(params)
            result["grad_norm_first"] = sum(float(p.grad.double().norm()) ** 2 for p in params.values() if p.grad is not None) ** 0.5
        norms.append(torch.nn.utils.clip_grad_norm_(params.values(), 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    started = time.perf_counter()
    step()
    result["loss_first"] = float(losses[0])  # waits for the device
    if device == "cuda":
        torch.cuda.synchronize()
    result["first_step_s"] = time.perf_counter() - started
    result["compile_s"] = compile_seconds()
    for _ in range(spec.warmup):
        step()
    result["resident_gib"] = allocated(device)
    result["peak_warmup_gib"] = allocated(device, peak=True)
    if device == "cuda":
        torch.cuda.empty_cache()  # systems that are built at the same time need the room while this one waits
    with alone():
        step()  # allocates again
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        clock = Clock(device)
        clock.mark()
        for _ in range(spec.steps):
            step()
            clock.mark()
        result["step_ms"] = clock.intervals()
        result["ms"] = statistics.median(result["step_ms"])
        result["tokens_per_s"] = spec.batch * spec.seq / result["ms"] * 1e3
        if spec.padding is not None or spec.documents:
            useful = int(batch["attention_mask"].sum()) if "attention_mask" in batch else spec.batch * spec.seq
            result["useful_tokens"], result["useful_tokens_per_s"] = useful, useful / result["ms"] * 1e3
        result["peak_gib"] = allocated(device, peak=True)
        result["gemm_probe_ms"].append(gemm_probe(device, spec.tiny))
        result["loss_last"], result["grad_norm_last"] = float(losses[-1]), float(norms[-1])
        result["dynamo"] = dynamo_counters()
        result["versions"] = versions()
        if spec.system.startswith("fastft"):
            result["fastft"] = fastft_reports()
        if device == "cuda":
            from bench_profile import attention_backend, attention_by_hand, profile

            try:
                prof = profile(step, steps=2 if spec.profile else 1)
                result["attention"] = attention_backend(prof)
                if spec.profile:
                    result["profile"] = prof
                    result["attention_by_hand_ms"] = attention_by_hand(spec.config, spec.batch, spec.seq)
            except Exception as error:  # the figures above stand without it
                result["profile_error"] = f"{type(error).__name__}: {error}"[:500]
    return result


def compile_seconds(least: float = 0.5) -> dict[str, float]:
    """Dynamo's and Inductor's own timers, longest first, those of `least` seconds and more; they contain each other."""
    utils = sys.modules.get("torch._dynamo.utils")
    sums = {name: round(sum(times), 2) for name, times in getattr(utils, "compilation_time_metrics", {}).items()}
    return dict(sorted(((name, total) for name, total in sums.items() if total >= least), key=lambda item: -item[1]))


def dynamo_counters() -> dict[str, Any]:
    """Graphs and graph breaks, where something was compiled."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return {}
    return {"graphs": utils.counters["stats"].get("unique_graphs", 0), "graph_breaks": dict(utils.counters["graph_break"])}


def fastft_reports() -> list[Any]:
    """What fastft rewrote, as counts by pass and provider."""
    import fastft

    rows = []
    for report in fastft.reports():
        entry = report.to_dict()
        counts: dict[str, int] = {}
        for rewrite in entry.get("rewrites", []):
            key = f"{rewrite['pass']}: {rewrite['provider']}"
            counts[key] = counts.get(key, 0) + 1
        misses: dict[str, int] = {}
        for miss in entry.get("misses", []):
            key = f"{miss['pass']}: {miss['reason']}"
            misses[key] = misses.get(key, 0) + 1
        rows.append({"nodes": [entry.get("nodes_before"), entry.get("nodes_after")], "rewrites": counts, "misses": misses})
    return rows


def main() -> None:
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        if spec.system == "unsloth":
            import unsloth  # noqa: F401  # first of all, as it asks for
        import torch

        result = measure(spec, "cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:  # a system that fails is a row that says so
        result = {"error": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()[-4000:]}
    ready()  # a system that failed before its turn
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
