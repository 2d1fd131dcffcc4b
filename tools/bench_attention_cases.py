"""The cases of `bench.py --op attention` and their variants: what a transformers model traces, and the kernels called by hand (see bench_attention.py)."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_batch import packed_documents, padded_lengths, padding_mask, positions
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

LONG = 32768  # from this length on no variant with a mask of length x length
PADDING = 0.3
CLASSES = 16  # of the loss behind the padded case
COMPILED = ("fastft", "inductor")

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v and the result are [batch, seq, heads, head_dim]; with a loss the result is that


@dataclasses.dataclass(frozen=True)
class Shape:
    """Llama-8B's."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 1024


GPT_OSS = Shape(heads=64, kv_heads=8, head_dim=64, window=128)


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of documents: a token sees those before it in its own document, at most `window` with itself."""

    name: str
    shape: Shape
    documents: list[list[int]]
    window: int | None = None
    inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # what the model would pass: attention_mask or position_ids
    labels: Tensor | None = None  # a loss follows, which does not read the padding
    sinks: Tensor | None = None

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
        if self.labels is None:
            return lambda b, h, q, kv: (q >= kv) & (ids[b, q] == ids[b, kv]), True
        # padding: its queries are not read, so they need no keys
        return lambda b, h, q, kv: (q >= kv) & (ids[b, q] == 0) & (ids[b, kv] == 0), True


def make_cases(batch: int, seq: int, small: bool, seed: int, device: str) -> list[Case]:
    shape, gpt_oss = (Shape(2, 1, 16, 16),) * 2 if small else (Shape(), GPT_OSS)
    full = [[seq]] * batch
    lengths = padded_lengths(batch, seq, PADDING, seed)
    mask = padding_mask(lengths, seq, device)
    labels = torch.randint(0, CLASSES, (batch, seq), generator=torch.Generator().manual_seed(seed)).to(device).masked_fill(mask == 0, -100)
    packed = packed_documents(batch, seq, seed)
    sinks = torch.zeros(gpt_oss.heads, device=device, dtype=torch.bfloat16).requires_grad_()
    return [
        Case("causal", shape, full),
        Case("causal+padding", shape, [[length, seq - length] for length in lengths], inputs={"attention_mask": mask}, labels=labels),
        Case("window", shape, full, shape.window),
        Case("packed", shape, packed, inputs={"position_ids": positions(packed, device)}),
        Case("sinks", gpt_oss, full, sinks=sinks),
        Case("sinks+window", gpt_oss, full, gpt_oss.window, sinks=sinks),
    ]


def loss(out: Tensor, labels: Tensor) -> Tensor:
    """The least that reads some tokens and not others: the first outputs of each as the scores of `CLASSES` classes."""
    return F.cross_entropy(out.flatten(2)[..., :CLASSES].float().view(-1, CLASSES), labels.view(-1))


class Attention(torch.nn.Module):
    """The attention of a transformers model between its projections, and the mask that the model makes for it."""

    def __init__(self, case: Case) -> None:
        from transformers import LlamaConfig, MistralConfig, masking_utils
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

        super().__init__()
        shape = case.shape
        sizes = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
        sizes["hidden_size"] = shape.heads * shape.head_dim
        self.config = MistralConfig(**sizes, sliding_window=case.window) if case.window else LlamaConfig(**sizes)
        self.config._attn_implementation = "sdpa" if case.sinks is None else "eager"
        self.make_mask = masking_utils.create_sliding_window_causal_mask if case.window else masking_utils.create_causal_mask
        self.attend = sdpa_attention_forward if case.sinks is None else eager_attention_forward
        self.num_key_value_groups = shape.heads // shape.kv_heads
        self.is_causal = True
        self.scaling = shape.head_dim**-0.5
        self.sinks = case.sinks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask=None, position_ids=None, labels=None) -> Tensor:
        if position_ids is None:  # as the model does
            position_ids = torch.arange(q.shape[1], device=q.device).unsqueeze(0)
        mask = self.make_mask(config=self.config, inputs_embeds=q.flatten(2), attention_mask=attention_mask, past_key_values=None, position_ids=position_ids)
        out = self.attend(self, *heads_first(q, k, v), mask, dropout=0.0, scaling=self.scaling)[0]
        return out if labels is None else loss(out, labels)


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def build_compiled(backend: str, options: dict[str, Any] | None, case: Case, device: str) -> Kernel:
    module = Attention(case).train()
    inputs = case.inputs if case.labels is None else case.inputs | {"labels": case.labels}
    return functools.partial(torch.compile(module, backend=backend, options=options, dynamic=False), **inputs)


def build_without_sinks(options: dict[str, Any] | None, case: Case, device: str) -> Kernel:
    return build_compiled("fastft", options, dataclasses.replace(case, sinks=None), device)


def build_sdpa(backend: SDPBackend, case: Case, device: str) -> Kernel:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads_first(q, k, v), is_causal=True, enable_gqa=True).transpose(1, 2)

    return call


def build_dense(case: Case, device: str) -> Kernel:
    at = torch.arange(case.seq, device=device)
    mask = case.visible(device)[0](torch.arange(case.batch, device=device)[:, None, None], None, at[:, None], at).expand(case.batch, -1, -1)[:, None]
    return with_loss(case, lambda q, k, v: F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=mask, enable_gqa=True).transpose(1, 2))


def build_flex(case: Case, device: str) -> Kernel:
    visible, by_row = case.visible(device)
    mask = torch.compile(create_block_mask, dynamic=False)(visible, case.batch if by_row else None, None, case.seq, case.seq, device=device)
    if case.labels is None:
        flex = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: flex(*heads_first(q, k, v), block_mask=mask, enable_gqa=True).transpose(1, 2)
    return with_loss(case, lambda q, k, v: flex_attention(*heads_first(q, k, v), block_mask=mask, enable_gqa=True).transpose(1, 2))


def build_varlen(case: Case, device: str) -> Kernel:
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

    return with_loss(case, call)


def with_loss(case: Case, kernel: Kernel) -> Kernel:
    """The kernel and the case's loss behind it, compiled together as they are in a model."""
    if case.labels is None:
        return kernel
    return torch.compile(lambda q, k, v: loss(kernel(q, k, v), case.labels), dynamic=False)


def builders(case: Case, options: dict[str, Any] | None, device: str) -> dict[str, Callable[[Case, str], Kernel]]:
    """The variants of a case; those called by hand, or what sinks are measured against, come last."""
    found: dict[str, Callable[[Case, str], Kernel]] = {"fastft": functools.partial(build_compiled, "fastft", options)}
    if case.seq < LONG:
        found["inductor"] = functools.partial(build_compiled, "inductor", None)
    if case.sinks is not None:
        return found | {"without sinks": functools.partial(build_without_sinks, options)}
    if device != "cuda":
        return found | {"dense": build_dense}
    if case.name == "causal":
        cudnn, flash = (functools.partial(build_sdpa, backend) for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION))
        return found | {"sdpa cudnn": cudnn, "sdpa flash": flash}
    return found | {"varlen": build_varlen, "flex": build_flex}
