"""GPU time by kernel class, from a torch.profiler trace.

A kernel is classified by the operation that launched it (with its input shapes) and by its own name:

| class | what |
|---|---|
| large GEMM | a matrix product whose M, N and K are all above 256 |
| skinny GEMM | one of M, N, K is at most 256: the LoRA products |
| GEMM, shape unknown | a GEMM kernel that no ATen product launched (a fused op's own Triton kernel) |
| attention | scaled_dot_product_attention, whichever backend, varlen_attn, flex_attention, and the kernels around them |
| (de)quantization | kernels that unpack 4-bit weights and their statistics, or quantize weights to fp8 |
| loss | softmax, cross entropy and their backward; the lm_head product counts as a large GEMM |
| element-wise, norm | everything that reads and writes activations once: ATen, Inductor's and hand-written Triton |
| optimizer | fused AdamW, clip_grad_norm_ |
| copies | casts, concatenations, memcpy, memset, fills |
| other | the rest |
| gaps | time inside the profiled steps in which no kernel ran |
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SKINNY = 256
CLASSES = "large GEMM|skinny GEMM|GEMM, shape unknown|attention|(de)quantization|element-wise, norm|loss|optimizer|copies|other|gaps".split("|")

_PRODUCT = re.compile(r"^aten::(mm|addmm|bmm|baddbmm|_grouped_mm|_scaled_mm|addmm_)(\.|$)")
_GEMM = re.compile(r"nvjet|gemm|gemv|xmma|cutlass|splitk|_tem_fused|(^|_)(mm|bmm|matmul)(_|$)", re.I)
_INDUCTOR = re.compile(r"triton_(poi|red|per|for|mix|unk)_")
_LORA = re.compile(r"lora|skinny|low_rank|dropped_(mm|grad)", re.I)
_ATTENTION = re.compile(r"scaled_?dot_?product|sdpa|fmha|flash|cudnn_(generated|attention)|attention_(forward|backward)|dot_do_o|_attn_|varlen_attn", re.I)
_FLEX = re.compile(r"flex_attention|triton_tem_fused(?!.*(mm|matmul|conv))", re.I)  # templates are GEMMs, convolutions and flex attention
_LOSS = re.compile(r"cross_entropy|nll_loss|log_?softmax|softmax_?(fwd|bwd|forward|backward)|_ce_", re.I)
_QUANTIZE = re.compile(r"quantize", re.I)
_OPTIMIZER = re.compile(r"multi_tensor|fused_?adam|_foreach|lpnorm|clip_grad|Optimizer\.", re.I)
_COPY = re.compile(r"memcpy|memset|copy|CatArray|aten::(cat|clone|contiguous|_to_copy|to|fill_|zero_|zeros|copy_)$|FillFunctor", re.I)
_ELEMENTWISE = re.compile(r"triton|elementwise|reduce|norm|rope|rotary|swiglu|silu|geglu|gated|softmax|index|gather|scatter|embedding|cumsum|dropout", re.I)

Event = dict[str, Any]


def _short(name: str) -> str:
    """The kernel's name without return type, template arguments and parameters; generic kernels keep what they apply."""
    name = re.sub(r"^(void|static) ", "", name).replace("(anonymous namespace)::", "")
    base, _, template = name.partition("(")[0].partition("<")
    base = base.split("::")[-1]
    applied = [word for word in re.findall(r"\w*Functor\w*|\w+_kernel_cuda|cutlass_\w+", template)]
    return f"{base}<{applied[0]}>" if applied else base.strip() or name


def _ancestors(ops: Iterable[Event]) -> dict[int, list[Event]]:
    """External id -> the op and the ops around it on its thread, innermost first."""
    chains: dict[int, list[Event]] = {}
    threads: dict[Any, list[Event]] = defaultdict(list)
    for op in ops:
        threads[op["tid"]].append(op)
    for thread in threads.values():
        stack: list[Event] = []
        for op in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= op["ts"]:
                stack.pop()
            stack.append(op)
            external = op.get("args", {}).get("External id")
            if external is not None:
                chains[external] = stack[::-1]
    return chains


def _product_dims(op: Event) -> tuple[int, ...] | None:
    """(M, N, K) of an ATen product, with the batch in front where there is one."""
    dims = [d for d in op.get("args", {}).get("Input Dims", []) if isinstance(d, list)]
    first = 1 if "addmm" in op["name"] or "baddbmm" in op["name"] else 0
    if len(dims) < first + 2:
        return None
    a, b = dims[first], dims[first + 1]
    if len(a) == 2 and len(b) == 2:
        return a[0], b[1], a[1]
    if len(a) == 3 and len(b) == 3:
        return a[0], a[1], b[2], a[2]
    return None


def classify(name: str, chain: list[Event]) -> tuple[str, tuple[int, ...] | None]:
    """The class of a kernel launched under `chain`, and its (M, N, K) where it is a product."""
    ops = [op["name"] for op in chain]
    if _FLEX.search(name):
        return "attention", None
    if _INDUCTOR.match(name):
        return ("loss" if _LOSS.search(name) else "element-wise, norm"), None
    if _QUANTIZE.search(name):
        return "(de)quantization", None
    if _ATTENTION.search(name) or any(_ATTENTION.search(op) for op in ops):
        return "attention", None
    product = next((op for op in chain if _PRODUCT.match(op["name"])), None)
    if product is not None and (chain[0] is product or _GEMM.search(name)):
        dims = _product_dims(product)
        if dims is None:
            return "GEMM, shape unknown", None
        return ("skinny GEMM" if min(dims[-3:]) <= SKINNY else "large GEMM"), dims
    if _LOSS.search(name) or any(_LOSS.search(op) for op in ops[:3]):
        return "loss", None
    if _GEMM.search(name) or (ops and _LORA.search(ops[0])) or _LORA.search(name):
        return ("skinny GEMM" if _LORA.search(name) else "GEMM, shape unknown"), None
    if _OPTIMIZER.search(name) or any(_OPTIMIZER.search(op) for op in ops):
        return "optimizer", None
    if _COPY.search(name) or (ops and _COPY.search(ops[0])):
        return "copies", None
    return ("element-wise, norm" if _ELEMENTWISE.search(name) else "other"), None


def _busy(kernels: Iterable[Event]) -> float:
    """Time in which at least one kernel ran, in the trace's microseconds."""
    busy, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda e: e["ts"]):
        start, stop = max(kernel["ts"], end), kernel["ts"] + kernel["dur"]
        if stop > start:
            busy, end = busy + stop - start, stop
    return busy


def _complete(events: list[Event], *categories: str) -> Iterator[Event]:
    return (e for e in events if e.get("ph") == "X" and e.get("cat") in categories)


def summarise(trace: dict[str, Any], steps: int, top: int = 25) -> dict[str, Any]:
    """Milliseconds a step by class, the attention kernels, and the `top` kernels of a Chrome trace."""
    events = trace["traceEvents"]
    chains = _ancestors(_complete(events, "cpu_op"))
    kernels = list(_complete(events, "kernel", "gpu_memcpy", "gpu_memset"))
    classes: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    rows: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for kernel in kernels:
        cls, dims = classify(kernel["name"], chains.get(kernel.get("args", {}).get("External id"), []))
        classes[cls] += kernel["dur"]
        rows[_short(kernel["name"]), cls, "x".join(map(str, dims or ()))].append(kernel["dur"])
    busy = _busy(kernels)
    span = max((e["ts"] + e["dur"] for e in kernels), default=0.0) - min((e["ts"] for e in kernels), default=0.0)
    classes["gaps"] = span - busy
    per_step = 1e-3 / steps
    ranked = sorted(rows.items(), key=lambda row: -sum(row[1]))
    return {
        "step_ms": span * per_step,
        "kernels": len(kernels) / steps,
        "classes": {name: us * per_step for name, us in classes.items()},
        "attention_kernels": sorted({name for (name, cls, _), _ in ranked if cls == "attention"}),
        "top": [{"kernel": name, "class": cls, "shape": shape, "calls": len(us) / steps, "ms": sum(us) * per_step} for (name, cls, shape), us in ranked[:top]],
    }


def attention_backend(prof: dict[str, Any]) -> str:
    """Which implementation of attention a profile holds: the one that is meant must really be the one that ran."""
    names = " ".join(prof["attention_kernels"]).lower()
    known = {"cuDNN": "cudnn", "flash": "flash_fwd|flash_bwd|pytorch_flash", "flex": "flex|triton_tem", "efficient": "fmha_cutlass", "math": "softmax"}
    return ", ".join(label for label, pattern in known.items() if re.search(pattern, names)) or ("other" if names else "none seen")


def profile(step: Callable[[], object], steps: int = 2, top: int = 25) -> dict[str, Any]:
    """Run `step` under the profiler and summarise."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, record_shapes=True) as prof:
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        prof.export_chrome_trace(str(path))
        return summarise(json.loads(path.read_text(errors="replace")), steps, top)


def attention_by_hand(config: dict[str, Any], batch: int, seq: int) -> float:
    """Milliseconds of `scaled_dot_product_attention(is_causal=True, enable_gqa=True)`, forward and backward of all layers, called by hand.

    Between large GEMMs that take as many times longer as in a training step: the card is at its power limit there, and slower than in a benchmark
    of attention alone.
    """
    import torch

    heads, kv_heads, dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    q, k, v, dy = (torch.randn(batch, n, seq, dim, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads, heads))
    a, b = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16), torch.randn(4096, 14336, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def layer() -> None:
        for _ in range(8):
            torch.mm(a, b)
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, leaves, dy)

    for _ in range(20):
        layer()
    return profile(layer, steps=20)["classes"]["attention"] * config["num_hidden_layers"]


def print_profiles(console: Console, profiles: dict[str, dict[str, Any]], top: int) -> None:
    """Classes side by side, then each one's most expensive kernels."""
    if not profiles:
        return
    table = Table(title="GPU ms a step by kernel class (2 profiled steps)", title_justify="left")
    table.add_column("class")
    for name in profiles:
        table.add_column(name, justify="right")
    for cls in CLASSES:
        table.add_row(cls, *(f"{p['classes'][cls]:.2f}" for p in profiles.values()))
    table.add_row("profiled step", *(f"{p['step_ms']:.2f}" for p in profiles.values()))
    table.add_row("kernels", *(f"{p['kernels']:.0f}" for p in profiles.values()))
    console.print(table)
    for name, prof in profiles.items():
        kernels = Table(title=f"{name}: top {top} kernels; attention: {', '.join(prof['attention_kernels'][:3]) or 'none'}", title_justify="left")
        for column in ("kernel", "class", "shape", "calls", "ms"):
            kernels.add_column(column, justify="right" if column in ("calls", "ms") else "left", no_wrap=True)
        for row in prof["top"][:top]:
            kernels.add_row(row["kernel"][:90], row["class"], row["shape"], f"{row['calls']:g}", f"{row['ms']:.3f}")
        console.print(kernels)
