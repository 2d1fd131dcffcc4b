"""The tasks that transformers registers models for, beside causal language modelling: which types there are, their classes, and a batch for each.

    tiny.tiny_model("bert", task="masked-lm"), tiny_tasks.batch(model.config, "masked-lm")

Source: transformers `models/auto/modeling_auto.py` (`MODEL_FOR_*_MAPPING_NAMES`) and the `forward` of those classes (names and shapes of the labels).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: name -> as transformers' mappings call it
TASKS = {
    "causal-lm": "CAUSAL_LM",
    "masked-lm": "MASKED_LM",
    "seq2seq-lm": "SEQ_TO_SEQ_CAUSAL_LM",
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "question-answering": "QUESTION_ANSWERING",
    "image-classification": "IMAGE_CLASSIFICATION",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
}
END = 2  # the id of the token that ends a text, where a head looks for it


def registered(task: str) -> dict[str, str]:
    """{model type: name of its class} of a task, sorted by type."""
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, f"MODEL_FOR_{TASKS[task]}_MAPPING_NAMES")
    return {model_type: name if isinstance(name, str) else name[0] for model_type, name in sorted(names.items())}


def model_class(model_type: str, task: str) -> type:
    """The class that transformers registers: for a multimodal type it may be the language model alone."""
    import transformers

    return getattr(transformers, registered(task)[model_type])


def complete(config: PreTrainedConfig, task: str) -> None:
    """Sets the special tokens that a task's head or loss asks for and that some configs leave unset; an encoder is no decoder."""
    if task != "causal-lm" and hasattr(config, "is_decoder"):
        config.is_decoder = False
    if task == "sequence-classification":
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            if part is not None:
                part.pad_token_id, part.eos_token_id = 0, END
    if task == "seq2seq-lm" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id = 0


def padded(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with a last third of its last row padded: an `attention_mask`, no labels there."""
    ids, mask = data["input_ids"], torch.ones_like(data["input_ids"])
    mask[-1, -(ids.shape[1] // 3) :] = 0
    labels = data["labels"].masked_fill(mask == 0, -100) if data["labels"].shape == mask.shape else data["labels"]
    return data | {"attention_mask": mask, "labels": labels}


def packed(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch as three documents a row, one of them a single token: `position_ids` that restart."""
    rows, seq = data["input_ids"].shape
    first = seq // 3
    positions = torch.cat([torch.arange(first), torch.arange(1), torch.arange(seq - first - 1)])
    return data | {"position_ids": positions.expand(rows, -1).contiguous()}


def batch(config: PreTrainedConfig, task: str, data: dict[str, torch.Tensor], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """`data`, a batch of causal language modelling (tiny.tiny_batch), with a task's inputs and labels; texts are padded."""
    generator = torch.Generator().manual_seed(seed)
    rows, seq = data["labels"].shape[:2]
    classes = lambda *shape: torch.randint(0, config.num_labels, shape, generator=generator)  # noqa: E731
    if task == "image-classification":
        side = getattr(config, "image_size", 32)
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return {"pixel_values": torch.randn(rows, getattr(config, "num_channels", 3), height, width, generator=generator), "labels": classes(rows)}
    if task in ("causal-lm", "image-text-to-text"):
        return data
    data = padded(data)
    if task == "sequence-classification":
        end = data["attention_mask"].sum(1) - 1
        data["input_ids"] = data["input_ids"].index_put((torch.arange(rows), end), torch.tensor(END))  # BART's head reads its state
        data["labels"] = classes(rows)
    if task == "token-classification":
        data["labels"] = classes(rows, seq)
    if task == "question-answering":
        del data["labels"]
        data |= {"start_positions": torch.arange(rows) + 3, "end_positions": torch.arange(rows) + 6}
    if task == "masked-lm":
        data["labels"] = data["labels"].masked_fill(torch.rand(rows, seq, generator=generator) < 0.8, -100)
    return data
