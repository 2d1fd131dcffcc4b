"""One decoder layer, forward and backward, its variants interleaved in one loop of one process.

`lora_linear`: what the seven LoRA linears of a Llama layer cost beside the same layer frozen and without adapters.
Attention is called as the model calls it for a batch without padding (no mask, `is_causal`), so it is the same kernel in every variant.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

from bench_models import PRESETS, TARGETS, canonical, import_fastft, seed_parameters, tiny
from bench_systems import Clock, gemm_probe
from bench_turns import shuffled
from rich.table import Table

VARIANTS: dict[str, tuple[bool, str | None, dict[str, Any] | None]] = {  # adapters, backend, options
    "frozen_inductor": (False, "inductor", None),
    "lora_inductor": (True, "inductor", None),
    "lora_fastft": (True, "fastft", None),
    "lora_fastft_pack": (True, "fastft", {"pack_weights": True}),
    "lora_eager": (True, None, None),
}


class Variant:
    """One copy of the layer, its compiled call, and what it measured."""

    def __init__(self, layer: Any, adapters: bool, backend: str | None, options: dict[str, Any] | None, kwargs: dict[str, Any]) -> None:
        import torch

        self.layer, self.kwargs = layer, kwargs
        self.trained = {canonical(name): p for name, p in layer.named_parameters() if p.requires_grad}
        if adapters != bool(self.trained):
            raise ValueError("adapters and trained parameters disagree")
        self.call: Callable[..., Any] = layer if backend is None else torch.compile(layer, backend=backend, options=options)
        self.clocks: list[Clock] = []

    def step(self, x: Any, upstream: Any, clock: Clock | None = None) -> None:
        """Forward and backward from no gradients."""
        x.grad = None
        for param in self.trained.values():
            param.grad = None
        if clock:
            clock.mark()
        out = self.call(x, **self.kwargs)
        if clock:
            clock.mark()
        out.backward(upstream)
        if clock:
            clock.mark()
            self.clocks.append(clock)


def figures(clocks: list[Clock]) -> dict[str, float]:
    """Medians over clocks that each marked the start, the end of the forward and the end of the backward."""
    forward, backward = zip(*(clock.intervals() for clock in clocks), strict=True)
    total = [f + b for f, b in zip(forward, backward, strict=True)]
    return {"ms": statistics.median(total), "forward_ms": statistics.median(forward), "backward_ms": statistics.median(backward), "best_ms": min(total)}


def _layer(config: Any, adapters: bool, rank: int, alpha: int, dropout: float, device: str) -> Any:
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    with torch.device(device):
        layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
        layer.requires_grad_(False)
        if adapters:
            layer = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS), layer)
    for name, param in layer.named_parameters():
        param.requires_grad_("lora_" in name)
        param.data = param.data.to(torch.bfloat16)
    return layer.train()


def _norm(x: Any) -> float:
    return float(x.detach().double().norm())


def _gradients(variant: Variant, x: Any) -> dict[str, Any]:
    return {"input": x.grad.detach().clone(), **{name: p.grad.detach().clone() for name, p in variant.trained.items() if p.grad is not None}}


def bench(args: argparse.Namespace, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Time every variant; a variant that fails is an error string, the others go on."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    device = "cuda" if torch.cuda.is_available() else "cpu"
    preset, seq, tokens = PRESETS["llama1b" if args.hidden == 2048 else "llama8b"], args.seq or 2048, args.tokens
    if args.tiny:
        preset, seq, tokens = tiny(preset), 32, 64
    config = LlamaConfig(**preset.config, max_position_embeddings=max(8192, seq))
    config._attn_implementation = "sdpa"
    generator = torch.Generator(device=device).manual_seed(0)

    def random() -> Any:
        shape = (tokens // seq, seq, config.hidden_size)
        return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(generator=generator)

    x, upstream = random().requires_grad_(True), random()
    position_ids = torch.arange(seq, device=device)[None]
    with torch.device(device):
        cos_sin = LlamaRotaryEmbedding(config)(x.detach(), position_ids)
    kwargs = {"attention_mask": None, "position_ids": position_ids, "position_embeddings": cos_sin}
    probe = [gemm_probe(device, args.tiny)]

    layers = {adapters: _layer(config, adapters, args.rank, args.alpha, args.dropout, device) for adapters in (False, True)}
    for layer in layers.values():
        seed_parameters(layer, 0)
    rows: dict[str, dict[str, Any]] = {}
    variants: dict[str, Variant] = {}
    gradients: dict[str, dict[str, Any]] = {}
    for name, (adapters, backend, extra) in VARIANTS.items():
        say(f"compiling {name}")
        rows[name] = {"variant": name}
        try:
            if backend == "fastft":
                import_fastft()
            merged = {**(args.options or {}), **(extra or {})} if backend == "fastft" else None
            variant = Variant(copy.deepcopy(layers[adapters]), adapters, backend, merged or None, kwargs)
            for _ in range(args.warmup):
                variant.step(x, upstream)
            gradients[name] = _gradients(variant, x)
            variants[name] = variant
        except Exception as error:  # an unfinished backend must not take the others' figures away
            rows[name]["error"] = f"{type(error).__name__}: {error}"[:500]
    for turn in range(4 * args.steps):
        for variant in shuffled(variants.values(), turn):
            variant.step(x, upstream, Clock(device))
    probe.append(gemm_probe(device, args.tiny))

    reference = gradients.get("lora_eager", {})
    for name, variant in variants.items():
        own = gradients[name]
        rows[name] |= figures(variant.clocks)
        rows[name]["input_grad_norm"] = _norm(own["input"])
        rows[name]["adapter_grad_norm"] = sum(_norm(g) ** 2 for key, g in own.items() if key != "input") ** 0.5
        if variant.trained and reference and not args.dropout:
            rows[name]["worst_gradient_difference"] = max(
                _norm(own[key].double() - g.double()) / max(_norm(g), 1e-30) if key in own else float("inf") for key, g in reference.items()
            )
        if args.profile and device == "cuda":
            from bench_profile import profile

            rows[name]["profile"] = profile(lambda v=variant: v.step(x, upstream))
    base = rows["frozen_inductor"].get("ms")
    for row in rows.values():
        if base and "ms" in row:
            row["ratio"] = row["ms"] / base
    return {
        "op": "lora_linear",
        "shape": {"hidden": config.hidden_size, "tokens": tokens, "seq": seq, "rank": args.rank, "dropout": args.dropout},
        "device": device,
        "gemm_probe_ms": probe,
        "rows": list(rows.values()),
    }


def table(result: dict[str, Any], gpu: str) -> Table:
    columns = ("ms", "ratio", "forward_ms", "backward_ms", "best_ms", "input_grad_norm", "adapter_grad_norm", "worst_gradient_difference")
    shape = ", ".join(f"{key} {value}" for key, value in result["shape"].items())
    probe = " → ".join(f"{ms:.3f}" for ms in result["gemm_probe_ms"])
    made = Table(title=f"lora_linear: one Llama decoder layer, {shape}, {gpu}, gemm probe {probe} ms", title_justify="left")
    for column in ("variant", *columns):
        made.add_column(column.replace("_", " "), justify="left" if column == "variant" else "right")
    for row in result["rows"]:
        made.add_row(row["variant"], *(f"{row[column]:.4g}" if column in row else row.get("error", "")[:60] * (column == "ms") for column in columns))
    return made
