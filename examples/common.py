"""What the examples share: text that ships with Python, a tokenizer trained on it, small models, batches.

Nothing is downloaded. The text is the language reference in `pydoc_data.topics` (about 460 kB, what `help("if")` prints).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # its hint to install a package that nothing here needs

END = "<|end|>"


def quiet() -> None:
    """No progress bars for small files, none of transformers' own deprecation warnings."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")


def topics() -> tuple[list[str], list[str]]:
    """(training texts, held-back texts): every fifth topic of Python's own documentation is held back."""
    from pydoc_data.topics import topics as texts

    ordered = [texts[name] for name in sorted(texts)]
    return [t for i, t in enumerate(ordered) if i % 5], ordered[::5]


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer, as a transformers tokenizer. Takes well under a second."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def blocks(tokenizer, texts: list[str], length: int) -> torch.Tensor:
    """All texts behind one another, an end token between them, cut into rows of `length` tokens."""
    ids = [token for text in texts for token in tokenizer.backend_tokenizer.encode(text + END).ids]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def batches(rows: torch.Tensor, size: int, steps: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """`steps` batches of `size` rows, shuffled anew every time the rows are used up; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        yield rows[order[:size]]
        order = order[size:]


def load_4bit(path: str, kind: str, dtype: torch.dtype, device: torch.device):
    """A saved model whose linears are quantized while it is read: "nf4" or "fp4", nested statistics, computed in `dtype`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config, device_map={"": device})
    for module in model.modules():
        # With AVX512-BF16, bitsandbytes 0.50 turns weights at the first evaluation into a layout for CPUs that has no backward.
        module.support_avx512bf16_for_cpu = False
    return model


def small_llama(tokenizer, hidden: int = 256, layers: int = 4, seed: int = 0):
    """A randomly initialised Llama with grouped-query attention and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    head = 64 if hidden >= 512 else 32
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // head,
            num_key_value_heads=hidden // head // 2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
