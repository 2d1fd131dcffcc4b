"""Tiny, randomly initialised causal LMs of every type that transformers registers, with LoRA, from one recipe.

A config class tells its own field names: an instance with defaults is made, every numeric field whose name the
recipe (`SMALL`) knows is made small, per-layer lists are cut to `layers` entries that still hold every kind of layer,
special token ids are moved inside the small vocabulary, and all dropout is zero. `OVERRIDES` holds what a type needs
beyond that. Nothing is downloaded. Everything follows from the seed.

With transformers 5.23, 186 of 189 types build and train in fp32. Not: gemma3n (its vision tower needs timm; gemma3n_text
trains), gemma4_assistant and gemma4_unified_assistant (draft heads without a loss; their config validates only what its
`kv_sharing_modes` then refuses). In bf16 on the CPU inkling2_text, reformer, xlnet and xlstm mix dtypes and raise as well.

Sources: transformers `models/*/configuration_*.py` (field names and the constraints between them) and
`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`; peft `tuners_utils._check_lora_target_modules_mamba` (what peft refuses).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tiny_tasks
import torch
from tiny_quantize import quantize  # noqa: F401 - part of the recipe, in a file of its own
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 256
#: input ids are drawn from here: above the low special ids, below the ones moved to the end of the vocabulary
TOKENS = (16, 192)
HEADS = 4


def _table(**rows: str) -> dict[str, int]:
    """{field: 8, ...} out of _8="field ..."."""
    return {name: int(value[1:]) for value, names in rows.items() for name in names.split()}


#: field -> small value, applied where the default is a number
SMALL: dict[str, int] = _table(
    _256="vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab",
    _64="hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width dim_model"
    " attention_hidden_size input_embedding_size output_embedding_size local_attention_window_len backbone_hidden_size"
    " pronunciation_embed_dim shape_embed_dim router_hidden_size expert_ffn_hidden_size ple_embed_dim index_head_dim"
    " num_centroids mamba_d_ssm hidden_size_global adapter_in_dim adapter_out_dim adapter_input_size",
    _128="intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dff dim_ff n_inner ffn_hidden_size"
    " feed_forward_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size attention_chunk_size"
    " shared_expert_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size"
    " ngram_vocab_size_base",
    _4="num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads"
    " num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads mamba_num_heads"
    " linear_num_value_heads num_experts n_routed_experts num_local_experts moe_num_experts index_n_heads"
    " laurel_rank time_step_rank mamba_dt_rank d_rel linear_num_heads n_layers_per_attn_res_block",
    _2="num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok"
    " num_experts_per_token moe_topk moe_k moe_top_k topk_group n_group num_expert_group n_groups mamba_n_groups"
    " mamba_ngroups num_codebooks zero_expert_num num_dense_layers expert_layer_period attn_layer_period"
    " no_rope_layer_interval sliding_window_pattern _sliding_window_pattern o_groups num_random_blocks"
    " index_topk_blocks hc_mult hc_count heads_per_ngram split_ngram_parts mamba_expand expand",
    _16="head_dim attention_head_size d_head dim_head kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim"
    " swa_head_dim swa_v_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim sliding_window"
    " sliding_window_size window_size local_attention attention_window_size keep_window_size mamba_d_state state_size"
    " ssm_state_size chunk_size mamba_chunk_size q_lora_rank kv_lora_rank o_lora_rank block_size index_topk"
    " gated_norm_rank hc_lowrank rel_extent adapter_rank mamba_d_head mamba_head_dim rotary_dim"
    " centroid_intermediate_top_k index_block_size patch_size",
    _32="moe_intermediate_size qk_head_dim image_size mamba_headdim",
    _8="num_key_value_groups mamba_n_heads n_mamba_heads prompt_length prompt_mid_dim hidden_size_per_layer_input"
    " make_ngram_vocab_size_divisible_by block_multiple_of",
    _1="first_k_dense_replace num_shared_experts n_shared_experts attn_layer_offset expert_layer_offset num_nextn_predict_layers moe_layer_start_index",
)
#: fields that hold the depth or the context length
DEPTH = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_blocks "
    "num_decoder_layers max_window_layers num_layers_per_stack depth"
).split()
LENGTH = "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions".split()
#: probabilities of anything random in training
RANDOM = ("dropout", "pdrop", "layerdrop", "dropout_prob", "dropout_p", "dropout_rate", "jitter_noise", "jitter_eps", "drop_rate")
DECODERS = {"is_decoder": True, "use_cache": False}

#: fields that some configs leave at None although their model needs them
UNSET = {"head_dim": 16, "num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BOTH_ROPES = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16}
_QWEN4 = _INDEXER | {"indexer_compress_ratio": 4}
_SWA = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 32}
_DOTS3 = {f"swa_{k}": v for k, v in (_SWA | {"qk_nope_head_dim": 16, "v_head_dim": 16}).items()}
_GEMMA4 = {"global_head_dim": 32}
_ASSISTANT = _GEMMA4 | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "enable_moe_block": False}


def _cycle(*kinds: str) -> Callable[[int, int], list[str]]:
    return lambda layers, seq: [kinds[i % len(kinds)] for i in range(layers)]


#: what a type needs beyond the recipe; a function is called with (layers, seq); a dict where the field is a nested config
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": _BOTH_ROPES, "layer_types": _cycle("sliding_attention", "full_attention")},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    **dict.fromkeys(("gemma4", "gemma4_unified"), {"text_config": _GEMMA4}),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA4),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), {"text_config": _ASSISTANT}),
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0, "intermediate_size": 128}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 128},
    "gpt_neo": {"attention_types": lambda layers, seq: [[[kind], 1] for kind in _cycle("global", "local")(layers, seq)]},
    "hunyuan_v1_moe": {"moe_topk": 2, "num_experts": 4},
    "lfm2_moe": {"layer_types": _cycle("conv", "full_attention"), "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_shape": lambda layers, seq: [seq // 8, 8], "axial_pos_embds_dim": [16, 48], "hash_seed": 0, "num_buckets": 4}
    | {"local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "num_hidden_layers": lambda layers, seq: max(layers, 3)}  # ties two layers
    | {"layers_block_type": lambda layers, seq: ["linear_attention"] + ["hybrid"] * (max(layers, 3) - 1)},
}


def _cut(values: list, layers: int) -> list:
    """`layers` entries of a per-layer list, one of each kind first, in the order in which they appear."""
    keys = [repr(v) for v in values]
    chosen = [keys.index(k) for k in dict.fromkeys(keys)][:layers]
    chosen += [i for i in range(len(values)) if i not in chosen][: layers - len(chosen)]
    return [values[i] for i in sorted(chosen)]


def _small(cls: type, layers: int, seq: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make `cls` tiny."""
    overrides = {k: v(layers, seq) if callable(v) else v for k, v in overrides.items()}
    try:
        default = cls()
    except Exception:  # some defaults contradict each other
        default = cls(**overrides)
    subs = set(getattr(cls, "sub_configs", {}))
    depth = next((v for n in DEPTH if isinstance(v := vars(default).get(n), int)), None)
    out: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name, value = field.name, vars(default).get(field.name)  # no getattr: per-layer fields raise
        if name in subs:
            if value is not None:
                out[name] = type(value)(**_small(type(value), layers, seq, overrides.get(name, {})))
        elif isinstance(value, bool):
            if name in DECODERS:
                out[name] = DECODERS[name]
        elif isinstance(value, float) and name.endswith(RANDOM):
            out[name] = 0.0
        elif name in ("initializer_range", "init_std") and isinstance(value, float):
            out[name] = 0.1  # 1/sqrt(hidden): with 0.02 attention is uniform and q, k have no gradient to speak of
        elif isinstance(value, list) and depth and len(value) == depth:
            out[name] = _cut(value, layers)
        elif value is None and name in UNSET:
            out[name] = UNSET[name]
        elif not isinstance(value, int):
            continue
        elif name in DEPTH:
            out[name] = layers
        elif name in LENGTH:
            out[name] = max(2 * seq, 64)
        elif name in SMALL:
            out[name] = SMALL[name] if name == "vocab_size" else min(value, SMALL[name])
        elif name.endswith(("_token_id", "_token_index", "_index")) and value >= VOCAB:
            out[name] = VOCAB - 1 - (value % 32)
    if out.get("kv_lora_rank"):  # latent attention has no grouped heads
        out["num_key_value_heads"] = HEADS
    return out | {k: v for k, v in overrides.items() if k not in subs}


def tiny_config(model_type: str, *, layers: int = 2, seq: int = 64, attn_implementation: str | None = None, task: str = "causal-lm") -> PreTrainedConfig:
    """A config of `model_type` with the recipe's sizes, dropout off, no cache; Zamba and Nemotron-H need 3 and 4 layers at least."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    config = cls(**_small(cls, layers, seq, OVERRIDES.get(model_type, {})))
    wanted = tiny_tasks.model_class(model_type, task).config_class
    for name in config.sub_configs:  # the language model of a larger one
        if not isinstance(config, wanted) and isinstance(inner := getattr(config, name), wanted):
            config = inner
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    tiny_tasks.complete(config, task)
    return config


def tiny_model(model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, task: str = "causal-lm", **options) -> PreTrainedModel:
    """A tiny model of `model_type` with seeded random weights, in the mode its constructor leaves it in; options: tiny_config's."""
    config = tiny_config(model_type, task=task, **options)
    torch.manual_seed(seed)
    model = tiny_tasks.model_class(model_type, task)._from_config(config, dtype=dtype)
    with torch.no_grad():  # biases of 0, norms of 1, gates of 0 would hide terms of the forward and the backward
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float32).to(dtype))
    return model


def _linears(model: nn.Module) -> list[str]:
    """Names of every nn.Linear and Conv1D except the output head, routers and what peft refuses in Mamba models."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    from transformers.pytorch_utils import Conv1D

    def allowed(name: str) -> bool:
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, name.rsplit(".", 1)[-1])
        except ValueError:
            return False
        return True

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = set(head) if isinstance(head, nn.ModuleList) else {head}
    # nn.Linears that compute something else: routers that return tuples (Llama-4, Phi-MoE), block diagonals (DeepSeek-V4)
    plain = (nn.Linear.forward, Conv1D.forward)

    def computes_a_linear(module: nn.Module) -> bool:
        return type(module).forward in plain or type(module).__name__ in ("FalconLinear", "Linear4bit", "Linear8bitLt")

    linears = {name for name, module in model.named_modules() if computes_a_linear(module) and module not in heads}
    return sorted(name for name in linears if allowed(name))


def add_lora(
    model: nn.Module, *, r: int = 4, alpha: int = 8, dropout: float = 0.0, targets: str | list[str] = "linear", init_b: bool = True, seed: int = 0
) -> PeftModel:
    """peft LoRA on `targets`; `init_b` makes lora_B random, as after some training (zero B hides half the gradients).

    `targets`: "linear" = every nn.Linear and Conv1D but the output head; "attention" = those of them inside a module
    whose name or class says attention; "all-linear" = peft's own notion of it; a list = suffixes of module names.
    """
    from peft import LoraConfig, get_peft_model

    exact = targets in ("linear", "attention")
    if exact:
        names = _linears(model)
        if targets == "attention":
            attention = [n for n, m in model.named_modules() if "attention" in type(m).__name__.lower()]
            names = [n for n in names if any(n.startswith(a + ".") for a in attention if a)]
        targets = names
    torch.manual_seed(seed)
    # autocast_adapter_dtype=True is peft's default: adapters of a bf16 model are kept in fp32
    lora = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    config, model_type = model.config, model.config.model_type
    if exact:
        # peft 0.21 (`_convert_peft_config_moe`) takes "layers.0.mlp.gate_proj" of a model laid out as Qwen2-MoE for the
        # experts' gate_proj, adapts the 3-D expert parameters and leaves the named linear alone: hide the type from it
        config.model_type = "linears"
    try:
        model = get_peft_model(model, lora)
    finally:
        config.model_type = model_type
    if model_type == "reformer":  # its reversible layers have no gradient where the input has none
        model.enable_input_require_grads()
    if init_b:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_batch(config, *, batch: int = 2, seq: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random `input_ids` without special tokens, `labels` equal to them; codebooks and an image where a type needs them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(*TOKENS, (batch, seq), generator=generator)
    if config.model_type in ("musicgen_decoder", "musicgen_melody_decoder"):
        books = config.num_codebooks
        ids = torch.randint(*TOKENS, (batch, seq, books), generator=generator)
        return {"input_ids": ids.transpose(1, 2).reshape(batch * books, seq), "labels": ids}
    data = {"input_ids": ids, "labels": ids.clone()}
    if config.model_type == "git":  # shifts the logits by the number of image tokens even without an image
        side = config.vision_config.image_size
        data["pixel_values"] = torch.randn(batch, 3, side, side, generator=generator)
    return data
