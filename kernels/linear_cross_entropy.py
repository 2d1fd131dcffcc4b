"""`fastft::linear_cross_entropy`: lm_head and its cross-entropy without the logits.

    logits = hidden W^T (+ bias) (+ low_rank B^T), in the model's dtype; y = logits * scale [softcapped], in float32 from here on
    loss_i = (1 - e) (lse_i - y_i,label) + e (lse_i - mean y_i) + z lse_i^2, 0 where the label is ignored     e: label smoothing, z: z-loss
    "none": loss_i; "sum": their sum; "mean": their sum over the number of labels that are not ignored

    forward     rows that are not ignored, in chunks: logits by cuBLAS into one buffer; `softmax_step` (kernels/cross_entropy.py) makes the
                losses and turns the logits into their gradient; then dH = dlogits W, dW += dlogits^T H, ... of those that are needed
    backward    multiplies what the forward made by the upstream gradient, on the device
    saves       dH (and dW, dbias, d_low_rank, d_lora_b); nothing of rows x V

LoRA on lm_head: low_rank = hidden A^T is the caller's, which gives hidden and A their gradients; B is `lora_b`, its scaling folded into either.

Gradients are made for an upstream gradient of 1 a row: 16-bit gradients of a mean over 8192 tokens would lose their small entries in
float16. "none" has an upstream gradient a row: dH and d_low_rank are scaled row by row, but sums over rows (dW, dbias, d_lora_b) are not
known before it is; where one is needed the forward makes losses alone and the backward the logits once more.

The op decomposes while AOTAutograd traces, into ATen around one opaque op, `linear_cross_entropy_chunks`, which earns it: its loop depends
on the number of valid rows, known on the host only when it runs (kernels/valid_rows.py).

Differs from eager: a NaN in a row whose label is ignored stays there (eager's softmax gradient spreads it), and logits beyond 2.3e38 count
as infinite.

Sources: gradients in the forward, chunk by chunk: Liger (arXiv 2410.10989); ignored rows left out: Cut Cross-Entropy (arXiv 2411.09009);
`torch.nn.functional.cross_entropy` for what mean, smoothing and ignored labels mean. Chunks come from a byte budget and not from V / K as
Liger's do: 128-row GEMMs take twice the time (research of peers: Liger 121 ms, eager 56 ms at 4096 x 4096 -> 128256 on an A100).
"""

import dataclasses
import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastft.kernels import cross_entropy, warmup
from fastft.kernels.accumulate import LIBRARY
from fastft.kernels.lora_adapters import RECOMPUTE
from fastft.kernels.low_rank import arithmetic
from fastft.kernels.valid_rows import TAGS, rows_on_host, valid_rows

# Bytes of logits that exist at once: 4096 rows of 128k in 16 bits. Both GEMMs of 8192 rows take 23.2 ms at once and 24.2 in two chunks (H200); all of the
# op 25.7 ms with 1 GiB, 26.3 with 0.5, 26.6 with 0.75, 28.6 with 2. The target is 1.4 GiB of extra peak memory in all.
CHUNK_BYTES = 1 << 30

# Rows of a chunk are a multiple of this, and at least this many: whole tiles of cuBLAS's largest kernels (256 x 128).
ROWS = 256

LIBRARY.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? low_rank, Tensor? lora_b, Tensor? order, Tensor? count, "
    "int ignore_index, str reduction, float scale, float softcap, float label_smoothing, float z_loss) -> Tensor[]"
)
LIBRARY.define(
    "linear_cross_entropy_chunks(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? low_rank, Tensor? lora_b, Tensor? row_scale, "
    "Tensor order, Tensor count, float scale, float softcap, float label_smoothing, float z_loss, bool[] needs) -> Tensor[]",
    tags=TAGS,
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What of a call is not a tensor. `needs`: a gradient for hidden, weight, bias, low_rank, lora_b."""

    reduction: str
    numbers: tuple[float, float, float, float]  # scale, softcap, label_smoothing, z_loss
    dtype: torch.dtype
    needs: tuple[bool, ...]

    @property
    def later(self) -> bool:
        """The gradients are made in the backward: sums over rows that have an upstream gradient each."""
        _, weight, bias, _, lora_b = self.needs
        return self.reduction == "none" and (weight or bias or lora_b)


def linear_cross_entropy(
    hidden, weight, bias, labels, low_rank, lora_b, order, count, ignore_index, reduction, scale, softcap, label_smoothing, z_loss
) -> list[Tensor]:
    """See the module's docstring.

    Args:
        hidden: [..., K]. weight: [V, K]. bias: [V] or None. labels: int64 [...].
        low_rank: [..., R] and lora_b: [V, R], or None.
        order, count: of `fastft::valid_rows(labels.reshape(-1), ignore_index)`; None: made here, and the host waits for the GPU.
        reduction: "mean", "sum" or "none". scale: > 0, 1 for none. softcap: 0 for none. label_smoothing: 0 to 1.
    Returns:
        [loss]: float32 (float64 for float64), [...] for "none" and [] otherwise.
    Raises:
        RuntimeError: shapes or options that do not fit together.
        IndexError: a label that is neither ignored nor in 0 .. V - 1, on the CPU; on GPUs an assertion on the device, as eager's.
    """
    _check(hidden, weight, labels, low_rank, lora_b, reduction, scale, label_smoothing)
    inputs = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, None if low_rank is None else low_rank.reshape(-1, low_rank.shape[-1]), lora_b)
    needs = tuple(tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in inputs)
    flat = labels.reshape(-1)
    if order is None or count is None:
        order, count = valid_rows(flat, ignore_index)
    spec = Spec(reduction, (scale, softcap, label_smoothing, z_loss), arithmetic(hidden), needs)
    with torch.autocast(hidden.device.type, enabled=False):
        loss = _LinearCrossEntropy.apply(spec, flat, order, count, *inputs)
    return [loss.view(labels.shape) if reduction == "none" else loss]


def _check(hidden, weight, labels, low_rank, lora_b, reduction: str, scale: float, label_smoothing: float) -> None:
    torch._check(reduction in ("mean", "sum", "none"), lambda: f"linear_cross_entropy: reduction {reduction!r}")
    torch._check(labels.dtype == torch.int64, lambda: f"linear_cross_entropy: labels are {labels.dtype}, not int64")
    torch._check(hidden.shape[:-1] == labels.shape, lambda: f"linear_cross_entropy: hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}")
    torch._check(weight.shape[1] == hidden.shape[-1], lambda: f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}")
    torch._check((low_rank is None) == (lora_b is None), lambda: "linear_cross_entropy: low_rank and lora_b go together")
    torch._check(scale > 0, lambda: f"linear_cross_entropy: scale {scale}")
    torch._check(0 <= label_smoothing <= 1, lambda: f"linear_cross_entropy: label_smoothing {label_smoothing}")


LIBRARY.impl("linear_cross_entropy", linear_cross_entropy, "CompositeImplicitAutograd")
op = torch.ops.fastft.linear_cross_entropy.default


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec: Spec, labels, order, count, *inputs):
        needs = [need and not spec.later for need in spec.needs]
        losses, *grads = chunks(*_arguments(spec, labels, order, count, inputs, None), needs)
        ctx.spec, ctx.dtypes = spec, [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*((labels, order, count, *inputs) if spec.later else (count, *grads)))
        if spec.reduction == "none":
            return losses
        return losses.sum() if spec.reduction == "sum" else losses.sum() / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        spec = ctx.spec
        with torch.autocast(grad.device.type, enabled=False):
            if spec.later:
                labels, order, count, *inputs = ctx.saved_tensors
                _, *grads = chunks(*_arguments(spec, labels, order, count, inputs, grad), list(spec.needs))
            else:
                count, *grads = ctx.saved_tensors
                if spec.reduction == "mean":
                    grad = grad / count.clamp(min=1)  # no valid row: the loss is nan, its gradient 0, as eager's
                factor = grad.unsqueeze(1) if spec.reduction == "none" else grad
                grads = [tensor.to(factor.dtype) * factor for tensor in grads]
            made = iter(grads)
            return None, None, None, None, *(next(made).to(dtype) if need else None for need, dtype in zip(spec.needs, ctx.dtypes, strict=True))


def _arguments(spec: Spec, labels, order, count, inputs, row_scale: Tensor | None) -> tuple:
    hidden, weight, bias, low_rank, lora_b = inputs
    with torch.fx.traceback.annotate({RECOMPUTE: True}):  # casts of parameters under autocast: made again rather than saved
        weight, bias, lora_b = (None if tensor is None else tensor.to(spec.dtype) for tensor in (weight, bias, lora_b))
    low_rank = None if low_rank is None else low_rank.to(spec.dtype)
    return hidden.to(spec.dtype), weight, bias, labels, low_rank, lora_b, row_scale, order, count, *spec.numbers


def chunk_rows(rows: int, vocabulary: int, itemsize: int) -> int:
    """Rows of a chunk: chunks of equal size, multiples of ROWS, as few as CHUNK_BYTES allow."""
    most = max(1, CHUNK_BYTES // (cross_entropy.padded(vocabulary) * itemsize * ROWS)) * ROWS
    count = math.ceil(rows / most)
    return min(rows, math.ceil(rows / (count * ROWS)) * ROWS)


def _chunks(hidden, weight, bias, labels, low_rank, lora_b, row_scale, order, count, scale, softcap, label_smoothing, z_loss, needs) -> list[Tensor]:
    """Losses and gradients of all rows that are not ignored.

    Args:
        hidden: [M, K], weight: [V, K], bias: [V], low_rank: [M, R], lora_b: [V, R], all of one dtype. labels: [M].
        row_scale: [M], the upstream gradient of every loss; None for 1. order, count: see `valid_rows`.
        needs: a gradient for hidden, weight, bias, low_rank, lora_b.
    Returns:
        losses [M], then the gradients that are needed: of hidden and low_rank in their dtype, of the others in float32 (float64 for float64).
    """
    total, valid = hidden.shape[0], rows_on_host(count)
    rows = order[:valid] if valid < total else None
    pick = (lambda tensor: tensor) if rows is None else (lambda tensor: tensor.index_select(0, rows))
    targets, scales = pick(labels), None if row_scale is None else pick(row_scale)
    _check_labels(targets, weight.shape[0])
    grads = _Gradients(hidden, weight, bias, low_rank, lora_b, needs)
    losses = hidden.new_zeros(total, dtype=grads.wide)
    size = chunk_rows(valid, weight.shape[0], weight.element_size()) if valid else 1
    buffer = cross_entropy.buffer(min(size, valid), weight.shape[0], hidden)
    for start in range(0, valid, size):
        part = slice(start, min(start + size, valid))
        here = part if rows is None else rows[part]
        h, s = hidden[here], None if low_rank is None else low_rank[here]
        logits = buffer[: part.stop - start]
        _project(h, weight, bias, s, lora_b, logits)
        scale_here = None if scales is None else scales[part]
        losses[here] = cross_entropy.softmax_step(logits, targets[part], scale_here, scale, softcap, label_smoothing, z_loss, any(needs))
        grads.add(here, logits, h, s)
    return [losses, *grads.made()]


def _project(h, weight, bias, s, lora_b, logits: Tensor) -> None:
    """Writes the chunk's logits: rounded once, from the GEMM's accumulator (twice with LoRA, as eager)."""
    if s is not None:
        torch.mm(s, lora_b.t(), out=logits) if bias is None else torch.addmm(bias, s, lora_b.t(), out=logits)
        torch.addmm(logits, h, weight.t(), out=logits)
    elif bias is not None:
        torch.addmm(bias, h, weight.t(), out=logits)
    else:
        torch.mm(h, weight.t(), out=logits)


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    wrong = (labels < 0) | (labels >= vocabulary)
    if labels.is_cuda:
        torch._assert_async(~wrong.any(), "linear_cross_entropy: a label is out of bounds")
    elif wrong.any():
        raise IndexError(f"Target {labels[wrong][0].item()} is out of bounds.")


class _Gradients:
    """The sums over chunks; what is not needed is not made."""

    def __init__(self, hidden, weight, bias, low_rank, lora_b, needs) -> None:
        self.needs, self.weight, self.lora_b = needs, weight, lora_b
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        # Rows of ignored labels stay zero.
        dtypes = (hidden.dtype, self.wide, self.wide, hidden.dtype, self.wide)
        inputs = (hidden, weight, bias, low_rank, lora_b)
        self.sums = [t.new_zeros(t.shape, dtype=dtype) if need else None for t, dtype, need in zip(inputs, dtypes, needs, strict=True)]

    def add(self, here, d: Tensor, h: Tensor, s: Tensor | None) -> None:
        """`here`: the rows of the chunk, a slice or indices. d: gradient of their logits."""
        d_hidden, d_weight, d_bias, d_low_rank, d_lora_b = self.sums
        for grad, matrix in ((d_hidden, self.weight), (d_low_rank, self.lora_b)):
            if grad is not None and isinstance(here, slice):
                torch.mm(d, matrix, out=grad[here])
            elif grad is not None:
                grad.index_copy_(0, here, d @ matrix)
        for grad, matrix in ((d_weight, h), (d_lora_b, s)):
            if grad is not None:
                accumulate(grad, d.t(), matrix)
        if d_bias is not None:
            d_bias += d.sum(0, dtype=self.wide)

    def made(self) -> list[Tensor]:
        return [grad for grad in self.sums if grad is not None]


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than a and b: added inside the GEMM, which sums in float32 anyway.

    ROCm's GEMMs give no float32 for 16-bit operands: there each chunk's product is rounded once before it is added.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif not a.is_cuda:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    elif torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _fake(hidden, weight, bias, labels, low_rank, lora_b, row_scale, order, count, scale, softcap, label_smoothing, z_loss, needs) -> list[Tensor]:
    grads = _Gradients(hidden, weight, bias, low_rank, lora_b, needs)
    return [hidden.new_empty(hidden.shape[:1], dtype=grads.wide), *grads.made()]


LIBRARY.impl("linear_cross_entropy_chunks", _chunks, "CPU")
LIBRARY.impl("linear_cross_entropy_chunks", _chunks, "CUDA")
torch.library.register_fake("fastft::linear_cross_entropy_chunks", _fake, lib=LIBRARY)
chunks = torch.ops.fastft.linear_cross_entropy_chunks.default


def _launches(hidden, weight, bias, labels, low_rank, lora_b, row_scale, order, count, *rest) -> None:
    """The kernel of a chunk alone: how many chunks there are is in `count`. `rest`: the numbers and `needs`."""
    logits = cross_entropy.buffer(hidden.shape[0], weight.shape[0], hidden)
    for targets in (labels, labels.clone()):  # as they are, or picked
        cross_entropy.softmax_step(logits, targets, row_scale, *rest[:-1], any(rest[-1]))


warmup.IMPLEMENTATIONS[chunks] = _launches


@register_flop_formula(torch.ops.fastft.linear_cross_entropy_chunks)
def _flops(hidden, weight, bias, labels, low_rank, lora_b, *rest, out_shape=None, **kwargs) -> int:
    """As if no label were ignored. `rest` ends with `needs`."""
    need_hidden, need_weight, _, need_low_rank, need_lora_b = rest[-1]
    base = 2 * hidden[0] * hidden[1] * weight[0] * (1 + need_hidden + need_weight)
    return base if low_rank is None else base + 2 * hidden[0] * low_rank[1] * weight[0] * (1 + need_low_rank + need_lora_b)
