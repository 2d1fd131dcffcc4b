"""One attention of Llama-8B's shape (32 query heads, 8 key heads of 128, bf16), forward and backward, beside the best kernels called by hand.

| variant | what |
|---|---|
| fastft, inductor | what a transformers model traces: its mask function, then `sdpa_attention_forward` with k and v not repeated |
| sdpa cudnn, sdpa flash | `scaled_dot_product_attention(is_causal=True, enable_gqa=True)` held to one backend |
| varlen | `varlen_attn` over the documents; a padded row is two, what it holds and the padding |
| flex | compiled `flex_attention` with a block mask of the same documents or window |
| dense | `scaled_dot_product_attention` with the whole mask: on a CPU only |

The variants of a case run interleaved. fastft and inductor make their mask (or what replaces it) within the timed forward, which a model does once
for all layers; a kernel called by hand finds its `cu_seqlens` or block mask ready. The gradient that comes in is zero where there is padding, as in
training, and padding is left out of the comparisons. Inductor is left out at 32768, where its mask alone takes gigabytes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_batch import packed_documents, padded_lengths, padding_mask, positions
from bench_models import import_fastft
from bench_ops import figures
from bench_profile import attention_backend, profile
from bench_systems import Clock, fastft_reports, gemm_probe
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

SIZES = ((4, 2048), (1, 8192), (1, 32768))
LONG, FEW = 32768, 12  # from this length on: so many repetitions, and no variant with a mask of length x length
PADDING = 0.3
HEAD_START = 4_000_000  # cycles, about 2 ms: the device waits until the host has launched a step, so that only the device's time is measured
COMPILED = ("fastft", "inductor")

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v and the result are [batch, seq, heads, head_dim]
COLUMNS = "case|tokens|variant|fwd ms|bwd ms|total ms|best by hand|ratio|peak MiB|max diff out|dq|dk|dv|grad norm|attention".split("|")


@dataclasses.dataclass(frozen=True)
class Shape:
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of documents: a token sees those before it in its own document, at most `window` with itself."""

    name: str
    documents: list[list[int]]
    window: int | None = None
    inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # what the model would pass: attention_mask or position_ids

    @property
    def batch(self) -> int:
        return len(self.documents)

    @property
    def seq(self) -> int:
        return sum(self.documents[0])

    def visible(self, device: str) -> tuple[Callable[..., Tensor], bool]:
        """flex_attention's mask_mod, and whether it looks at the batch index."""
        if all(len(lengths) == 1 for lengths in self.documents):
            window = self.window or self.seq
            return lambda b, h, q, kv: (q >= kv) & (q - kv < window), False
        ids = torch.stack([torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in self.documents]).to(device)
        return lambda b, h, q, kv: (q >= kv) & (ids[b, q] == ids[b, kv]), True


def make_cases(batch: int, seq: int, window: int, seed: int, device: str) -> list[Case]:
    full = [[seq]] * batch
    lengths = padded_lengths(batch, seq, PADDING, seed)
    packed = packed_documents(batch, seq, seed)
    return [
        Case("causal", full),
        Case("causal+padding", [[length, seq - length] for length in lengths], inputs={"attention_mask": padding_mask(lengths, seq, device)}),
        Case("window", full, window),
        Case("packed", packed, inputs={"position_ids": positions(packed, device)}),
    ]


class Attention(torch.nn.Module):
    """The attention of a transformers model between its projections, and the mask that the model makes for it."""

    def __init__(self, shape: Shape, case: Case) -> None:
        from transformers import LlamaConfig, MistralConfig, masking_utils
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        super().__init__()
        sizes = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
        sizes["hidden_size"] = shape.heads * shape.head_dim
        self.config = MistralConfig(**sizes, sliding_window=case.window) if case.window else LlamaConfig(**sizes)
        self.config._attn_implementation = "sdpa"
        self.make_mask = masking_utils.create_sliding_window_causal_mask if case.window else masking_utils.create_causal_mask
        self.attend = sdpa_attention_forward
        self.num_key_value_groups = shape.heads // shape.kv_heads
        self.is_causal = True
        self.scaling = shape.head_dim**-0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:  # as the model does
            position_ids = torch.arange(q.shape[1], device=q.device).unsqueeze(0)
        mask = self.make_mask(config=self.config, inputs_embeds=q.flatten(2), attention_mask=attention_mask, past_key_values=None, position_ids=position_ids)
        return self.attend(self, *heads_first(q, k, v), mask, dropout=0.0, scaling=self.scaling)[0]


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def build_compiled(backend: str, options: dict[str, Any] | None, shape: Shape, case: Case, device: str) -> Kernel:
    module = Attention(shape, case).train()
    return functools.partial(torch.compile(module, backend=backend, options=options, dynamic=False), **case.inputs)


def build_sdpa(backend: SDPBackend, shape: Shape, case: Case, device: str) -> Kernel:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads_first(q, k, v), is_causal=True, enable_gqa=True).transpose(1, 2)

    return call


def build_dense(shape: Shape, case: Case, device: str) -> Kernel:
    at = torch.arange(case.seq, device=device)
    mask = case.visible(device)[0](torch.arange(case.batch, device=device)[:, None, None], None, at[:, None], at).expand(case.batch, -1, -1)[:, None]
    return lambda q, k, v: F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=mask, enable_gqa=True).transpose(1, 2)


def build_flex(shape: Shape, case: Case, device: str) -> Kernel:
    visible, by_row = case.visible(device)
    mask = torch.compile(create_block_mask, dynamic=False)(visible, case.batch if by_row else None, None, case.seq, case.seq, device=device)
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: flex(*heads_first(q, k, v), block_mask=mask, enable_gqa=True).transpose(1, 2)


def build_varlen(shape: Shape, case: Case, device: str) -> Kernel:
    """`varlen_attn` as the installed torch takes it: causal by `is_causal`, then by `window_size`; `enable_gqa` was not always there to ask for."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = torch.tensor([length for row in case.documents for length in row if length], device=device)
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    offered = {"is_causal": True, "window_size": ((case.window or 0) - 1, 0), "enable_gqa": True}
    taken = inspect.signature(varlen_attn).parameters
    if case.window and "window_size" not in taken:
        raise NotImplementedError("this torch's varlen_attn takes no window")
    wanted = {name: value for name, value in offered.items() if name in taken}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, ends, longest, longest, **wanted).view_as(q)

    return call


def builders(case: Case, options: dict[str, Any] | None, device: str) -> dict[str, Callable[[Shape, Case, str], Kernel]]:
    """The variants of a case; those called by hand come last."""
    found: dict[str, Callable[[Shape, Case, str], Kernel]] = {"fastft": functools.partial(build_compiled, "fastft", options)}
    if case.seq < LONG:
        found["inductor"] = functools.partial(build_compiled, "inductor", None)
    if device != "cuda":
        return found | {"dense": build_dense}
    if case.name == "causal":
        cudnn, flash = (functools.partial(build_sdpa, backend) for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION))
        return found | {"sdpa cudnn": cudnn, "sdpa flash": flash}
    return found | {"varlen": build_varlen, "flex": build_flex}


def step(kernel: Kernel, leaves: list[Tensor], upstream: Tensor, clock: Clock | None = None) -> list[Tensor]:
    """Forward and backward from no gradients: the result and the gradients of q, k and v."""
    for leaf in leaves:
        leaf.grad = None
    if clock:
        if clock.cuda:
            torch.cuda._sleep(HEAD_START)
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
    shape: Shape, case: Case, repeat: int, warmup: int, seed: int, options: dict[str, Any] | None, device: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every variant of one case; one that fails is an error string, the others go on."""
    torch._dynamo.reset()
    reports = len(fastft_reports())
    generator = torch.Generator(device=device).manual_seed(seed)

    def random(heads: int) -> Tensor:
        return torch.empty((case.batch, case.seq, heads, shape.head_dim), device=device, dtype=torch.bfloat16).normal_(generator=generator)

    leaves = [random(heads).requires_grad_() for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    upstream, valid = random(shape.heads), case.inputs.get("attention_mask", torch.ones(case.batch, case.seq, device=device)).bool()
    upstream *= valid[..., None, None]
    rows: dict[str, dict[str, Any]] = {}
    kernels: dict[str, Kernel] = {}
    results: dict[str, list[Tensor]] = {}
    clocks: dict[str, list[Clock]] = {}
    for name, build in builders(case, options, device).items():
        rows[name] = row = {"case": case.name, "batch": case.batch, "seq": case.seq, "variant": name}
        say(f"{case.name} {case.batch}x{case.seq}: compiling {name}")
        try:
            kernel = build(shape, case, device)
            for _ in range(warmup + 1):
                results[name] = step(kernel, leaves, upstream)
            if device == "cuda":
                row["peak_mib"] = peak_mib(functools.partial(step, kernel, leaves, upstream))
            kernels[name], clocks[name] = kernel, []
        except Exception as error:  # a torch without this kernel must not take the others' figures away
            row["error"] = f"{type(error).__name__}: {error}"[:500]
            results.pop(name, None)
    for _ in range(min(repeat, FEW) if case.seq >= LONG else repeat):
        for name, kernel in kernels.items():
            clocks[name].append(Clock(device))
            step(kernel, leaves, upstream, clocks[name][-1])
    for name in kernels:
        rows[name] |= figures(clocks[name])
        rows[name]["grad_norm"] = sum(float(x[valid].double().norm()) ** 2 for x in results[name][1:]) ** 0.5
    best = min((name for name in kernels if name not in COMPILED), key=lambda name: rows[name]["ms"], default=None)
    for name in kernels if best else ():
        rows[name] |= {"best_by_hand": best, "best_by_hand_ms": rows[best]["ms"], "ratio": rows[name]["ms"] / rows[best]["ms"]}
        for what, own, other in zip(("out", "dq", "dk", "dv"), results[name], results[best], strict=True):
            rows[name][f"difference_{what}"] = float((own.float() - other.float())[valid].abs().max())
    if "fastft" in kernels:
        rows["fastft"]["reports"] = fastft_reports()[reports:]
    if "fastft" in kernels and device == "cuda":
        try:
            prof = profile(functools.partial(step, kernels["fastft"], leaves, upstream), steps=1)
            rows["fastft"] |= {"attention": attention_backend(prof), "attention_kernels": prof["attention_kernels"]}
            say(f"{case.name} {case.batch}x{case.seq}: fastft ran {', '.join(prof['attention_kernels']) or 'no attention kernel'}")
        except Exception as error:  # the figures above stand without it
            rows["fastft"]["profile_error"] = f"{type(error).__name__}: {error}"[:500]
    return list(rows.values())


def bench_attention(
    sizes: list[tuple[int, int]] | None,
    repeat: int,
    warmup: int,
    seed: int,
    small: bool,
    options: dict[str, Any] | None,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """All cases of all sizes; `keep` gets what there is after each case."""
    import_fastft()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(heads=2, kv_heads=1, head_dim=16, window=16) if small else Shape()
    result: dict[str, Any] = {"op": "attention", "shape": dataclasses.asdict(shape), "device": device, "gemm_probe_ms": [gemm_probe(device, small)], "rows": []}
    for batch, seq in [(2, 64)] if small else sizes or SIZES:
        for case in make_cases(batch, seq, shape.window, seed, device):
            result["rows"] += measure(shape, case, repeat, warmup, seed, options, device, say)
            keep(result)
    result["gemm_probe_ms"].append(gemm_probe(device, small))
    keep(result)
    return result


def attention_table(result: dict[str, Any], gpu: str) -> Table:
    shape = ", ".join(f"{key} {value}" for key, value in result["shape"].items())
    table = Table(title=f"attention: {shape}, {gpu}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("case", "variant", "best by hand", "attention") else "right")
    for row in result["rows"]:
        numbers = [f"{row[key]:.3f}" if key in row else "" for key in ("forward_ms", "backward_ms", "ms")]
        best = f"{row['best_by_hand']} {row['best_by_hand_ms']:.3f}" if "best_by_hand" in row else ""
        more = ["ratio", "peak_mib", "difference_out", "difference_dq", "difference_dk", "difference_dv", "grad_norm"]
        last = escape(row.get("error", row.get("attention", ""))[:60])
        table.add_row(
            row["case"], f"{row['batch']}x{row['seq']}", row["variant"], *numbers, best, *(f"{row[key]:.4g}" if key in row else "" for key in more), last
        )
    return table
