"""The models that `bench.py` measures: their shapes, their seeded weights, and how each system builds them.

Every parameter is drawn from a seed and its own canonical name, so all systems train the same model.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_batch import packed_documents

SYSTEMS = ("eager", "inductor", "liger", "unsloth", "fastft")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model's shape and the batch it is measured with."""

    arch: str  # llama or qwen3
    config: dict[str, Any]
    batch: int
    seq: int


def _shape(layers: int, hidden: int, mlp: int, heads: int, kv: int, head_dim: int, vocab: int, tied: bool = False) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "use_cache": False,
    }


PRESETS = {
    "llama8b": Preset("llama", _shape(32, 4096, 14336, 32, 8, 128, 128256), 4, 2048),
    "llama1b": Preset("llama", _shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True), 2, 1024),
    "qwen3_8b": Preset("qwen3", _shape(36, 4096, 12288, 32, 8, 128, 151936), 4, 2048),
}


def tiny(preset: Preset) -> Preset:
    """The same architecture, small enough for a CPU: a smoke test, its times say nothing."""
    return Preset(preset.arch, _shape(2, 64, 128, 4, 2, 16, 512, tied=preset.config["tie_word_embeddings"]), 2, 32)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one process measures."""

    system: str
    arch: str
    config: dict[str, Any]
    batch: int
    seq: int
    steps: int = 10
    warmup: int = 3
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    adapter_dtype: str = "bf16"
    checkpointing: bool = False
    autocast: bool = False
    quant: str | None = None  # of the base linears: nf4
    padding: float | None = None
    documents: str | None = None
    lengths: list[int] | None = None  # of the documents; None: a Zipf mix
    options: dict[str, Any] | None = None
    seed: int = 0
    lr: float = 1e-4
    profile: bool = False
    tiny: bool = False


def canonical(name: str) -> str:
    """A parameter's name without what peft and torch.compile put around it."""
    name = name.removeprefix("_orig_mod.").removeprefix("base_model.model.")
    return name.replace("._orig_mod", "").replace(".base_layer.", ".").replace(".default.", ".")


def seed_parameters(model: Any, seed: int) -> None:
    """Draw every parameter from the seed and its own name, on its own device, rounded to bf16 whatever its dtype, and quantized where it is."""
    import torch

    with torch.no_grad():
        for full, param in model.named_parameters():
            name = canonical(full)
            generator = torch.Generator(device=param.device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            state = getattr(param, "quant_state", None)
            shape = param.shape if state is None else state.shape
            std, mean = 0.02, 0.0
            if "lora_A" in name:
                std = shape[-1] ** -0.5
            elif "lora_B" in name:
                std = 0.01
            elif len(shape) == 1:
                mean = 0.0 if name.endswith("bias") else 1.0
            values = torch.empty(shape, device=param.device, dtype=torch.float32).normal_(mean, std, generator=generator).to(torch.bfloat16)
            if state is None:
                param.copy_(values)
            else:
                _quantize_into(param, state, values)


def _quantize_into(param: Any, state: Any, values: Any) -> None:
    """In place, because a compiled call or another module may hold any of these tensors."""
    from bitsandbytes.functional import quantize_4bit

    packed, made = quantize_4bit(values, blocksize=state.blocksize, compress_statistics=state.nested, quant_type=state.quant_type, quant_storage=param.dtype)
    param.data.copy_(packed.view(param.shape))
    state.absmax.copy_(made.absmax)
    if state.nested:
        state.offset.copy_(made.offset)
        state.state2.absmax.copy_(made.state2.absmax)


def model_config(spec: Spec) -> Any:
    from transformers import LlamaConfig, Qwen3Config

    make = {"llama": LlamaConfig, "qwen3": Qwen3Config}[spec.arch]
    return make(**spec.config, max_position_embeddings=max(8192, spec.seq), bos_token_id=1, eos_token_id=2, pad_token_id=None)


def _peft_model(spec: Spec, device: str) -> Any:
    """transformers + peft with bf16 weights made on the device itself."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tiny import quantize
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config(spec), dtype=torch.bfloat16, attn_implementation="sdpa")
        if spec.quant:
            quantize(model, spec.quant)
        lora = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec.adapter_dtype]
    for param in model.parameters():
        if param.requires_grad:
            param.data = param.data.to(dtype)
    if spec.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def build_eager(spec: Spec, device: str) -> tuple[Any, Any]:
    model = _peft_model(spec, device)
    return model, model


def build_inductor(spec: Spec, device: str) -> tuple[Any, Any]:
    import torch

    model = _peft_model(spec, device)
    return torch.compile(model, backend="inductor"), model


def build_liger(spec: Spec, device: str) -> tuple[Any, Any]:
    from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen3

    {"llama": apply_liger_kernel_to_llama, "qwen3": apply_liger_kernel_to_qwen3}[spec.arch](fused_linear_cross_entropy=True, cross_entropy=False)
    return build_eager(spec, device)


def build_fastft(spec: Spec, device: str) -> tuple[Any, Any]:
    import torch

    import_fastft()
    model = _peft_model(spec, device)
    return torch.compile(model, backend="fastft", options=spec.options), model


def build_fastft_fp8(spec: Spec, device: str) -> tuple[Any, Any]:
    return build_fastft(dataclasses.replace(spec, options={**(spec.options or {}), "base_compute": "fp8"}), device)


def build_unsloth(spec: Spec, device: str) -> tuple[Any, Any]:
    """Unsloth loads (and quantizes) from a folder: one with the right names and shapes and no bytes behind them, then the seeded weights."""
    from unsloth import FastLanguageModel  # isort: skip  # before transformers, or its patches come too late
    import torch
    from bench_checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(model_config(spec), folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=spec.seq,
            dtype=torch.bfloat16,
            load_in_4bit=spec.quant == "nf4",  # with BitsAndBytesConfig's values that `quantize` has too
            use_gradient_checkpointing="unsloth" if spec.checkpointing else False,
            offload_embedding=False,
            local_files_only=True,
        )
    model = FastLanguageModel.get_peft_model(
        model,
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=TARGETS,
        bias="none",
        use_gradient_checkpointing="unsloth" if spec.checkpointing else False,
        random_state=spec.seed,
    )
    model.config.use_cache = False
    call = FastLanguageModel.for_training(model, use_gradient_checkpointing="unsloth" if spec.checkpointing else False) or model
    return _one_packed_row(call, spec, device) if spec.documents == "packed" else call, model


def _one_packed_row(model: Any, spec: Spec, device: str) -> Callable[..., Any]:
    """Unsloth's form of a packed batch: one row, and `packed_seq_lengths`. With torch's kernels it packs a single row only; more make a dense mask."""
    import torch

    lengths = sum(packed_documents(spec.batch, spec.seq, spec.seed, spec.lengths), [])
    packed_seq_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)  # one object for all steps: Unsloth's cache goes by identity
    return lambda **batch: model(**{name: x.reshape(1, -1) for name, x in batch.items()}, packed_seq_lengths=packed_seq_lengths)


def import_fastft() -> Any:
    """fastft as installed, else from this checkout, where `passes/` and `kernels/` stand beside the package."""
    spec = importlib.util.find_spec("fastft")
    if "fastft" not in sys.modules and (spec is None or spec.origin == str(ROOT / "fastft" / "__init__.py")):
        sys.meta_path.insert(0, _Checkout())
    import torch

    import fastft

    if "fastft" not in torch.compiler.list_backends(exclude_tags=()):  # no entry point: not installed
        from fastft.backend import fastft as backend

        torch._dynamo.register_backend(backend, name="fastft")
    return fastft


class _Checkout:
    """Finds fastft in the checkout as `[tool.setuptools.package-dir]` maps it, without showing others its top-level `kernels`."""

    FOLDERS = {"fastft": "fastft", "fastft.passes": "passes", "fastft.kernels": "kernels"}

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in cls.FOLDERS:
            return None
        folder = ROOT / cls.FOLDERS[name]
        return importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


BUILDERS: dict[str, Callable[[Spec, str], tuple[Any, Any]]] = {
    "eager": build_eager,
    "inductor": build_inductor,
    "liger": build_liger,
    "unsloth": build_unsloth,
    "fastft": build_fastft,
    "fastft-fp8": build_fastft_fp8,  # only where it is named: it changes numerics
}
