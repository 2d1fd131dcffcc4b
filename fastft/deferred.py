"""Deferred logits: an output of the model that computes itself the first time something reads it.

    before   return loss, linear(held, weight)
    after    return loss, held                       held [.., hidden] instead of logits [.., vocabulary]; `defer` makes a DeferredTensor of it

A DeferredTensor is a tensor for autograd and for whoever asks for its shape, dtype, device, history or hooks. It has no data: the first time something
else is done with it (`__torch_function__`, and `__torch_dispatch__` for what gets past that, such as `Function.apply`), the recipe runs over the whole hidden
state, once, and from then on the values are kept. What reads them gets a plain tensor that is a view of the DeferredTensor, so in-place writes, hooks and
gradients come out as autograd says. `detach`, `clone` and casts of a tensor that has not been read are deferred too.

Gradients that reach it run the recipe once more, with autograd, over the live weights: nothing is kept for a backward that may never come.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastft import _torch, match

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a graph's output is made when it is read; passes put a list of these into `gm.meta[PLANS]`.

    output: position in the graph's output tuple, where the pass has put `held` (the hidden state) in place of the logits.
    recipe: `recipe(held, *(args[i] for i in inputs))` gives the logits, in plain operations that autograd follows.
        It ends in `detach` where the model's logits have no gradient although what they are made of has.
    inputs: positions among the graph's inputs (its placeholders) of what else the recipe reads: weights (as they are packed), biases, adapters.
    vocabulary: size of the logits' last dimension; the others are held's. dtype: of the logits.
    """

    output: int
    recipe: GraphModule
    inputs: tuple[int, ...]
    vocabulary: int
    dtype: torch.dtype


PLANS = "fastft_deferred"
LOGITS = "fastft_logits"  # `gm.meta[LOGITS]`: "deferred" or "materialize", what passes may do

_computed = 0
_optimizer_steps = 0


def computed() -> int:
    """How often a recipe has run in this process: for values, and again for each backward through them."""
    return _computed


def defer(compiled: Callable[..., Any], plans: list[Plan]) -> Callable[..., Any]:
    """`compiled` (a graph), with a DeferredTensor for each output that has a plan."""
    if not plans:
        return compiled
    _watch_optimizers()

    def run(*args: Any) -> tuple:
        outputs = list(compiled(*args))
        for plan in plans:
            inputs = (outputs[plan.output], *(args[i] for i in plan.inputs))
            outputs[plan.output] = _Defer.apply(_Source(plan, inputs), *inputs)
        return tuple(outputs)

    return run


@functools.cache
def _watch_optimizers() -> None:
    """Counts optimizer steps: fused ones (transformers' default) and bitsandbytes' write parameters without raising `_version`."""

    def count(*_: Any) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)


def stamp(tensor: Any) -> tuple | None:
    """Changes when `tensor` is written, moved, or trained by a step of an optimizer (any: some hold copies of the parameters)."""
    if not isinstance(tensor, torch.Tensor):
        return None
    version = None if tensor.is_inference() else tensor._version
    address = None if hasattr(tensor, "__tensor_flatten__") else tensor.data_ptr()
    return version, address, _optimizer_steps if tensor.is_leaf and tensor.requires_grad else None


class _Source:
    """What makes logits: the recipe, its inputs, and the state that the forward ran in."""

    def __init__(self, plan: Plan, inputs: tuple) -> None:
        self.plan, self.inputs, self.stamps = plan, inputs, [stamp(tensor) for tensor in inputs]
        self.shape = (*inputs[0].shape[:-1], plan.vocabulary)
        device = inputs[0].device.type
        on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.autocast = {"device_type": device, "dtype": dtype, "enabled": on, "cache_enabled": False}
        self.inference = torch.is_inference_mode_enabled()

    def run(self, inputs: Iterable[Any], gradients: bool) -> torch.Tensor:
        global _computed
        if [stamp(tensor) for tensor in self.inputs] != self.stamps:
            raise RuntimeError(
                "fastft: these logits are computed when they are read, and what they are computed from (the weights of the head, or the hidden state) has been "
                'changed since the forward, by an optimizer step for instance. Read them before that, or compile with options={"logits": "materialize"}.'
            )
        _computed += 1
        # inference_mode switches gradients too, so it stands first
        with _torch.enable_torch_function(), torch.inference_mode(self.inference), torch.set_grad_enabled(gradients), torch.autocast(**self.autocast):
            logits = self.plan.recipe(*inputs)
        if logits.shape != self.shape or logits.dtype != self.plan.dtype:
            raise RuntimeError(f"fastft: a recipe made {logits.dtype} {tuple(logits.shape)} for logits of {self.plan.dtype} {self.shape}")
        return logits

    def values(self) -> torch.Tensor:
        logits = self.run(self.inputs, gradients=False).contiguous()
        return logits if logits.storage_offset() == 0 else logits.clone()

    def gradients(self, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradients of `inputs`."""
        wanted = {i: tensor for i, tensor in enumerate(self.inputs) if isinstance(tensor, torch.Tensor) and tensor.requires_grad}
        with torch.enable_grad():  # views: what a weight contributed to the hidden state (a tied head) must not be counted here
            wanted = {i: tensor.view_as(tensor) for i, tensor in wanted.items()}
        logits = self.run([wanted.get(i, tensor) for i, tensor in enumerate(self.inputs)], gradients=True)
        found = torch.autograd.grad(logits, list(wanted.values()), gradient, create_graph=torch.is_grad_enabled(), allow_unused=True)
        by_input = dict(zip(wanted, found, strict=True))
        return [by_input.get(i) for i in range(len(self.inputs))]


class _Values:
    """Data that is made when it is asked for; one object for a tensor and what `detach` makes of it."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self.make = make
        self.known: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        if self.known is None:
            with _torch.no_dispatch_modes():
                self.known = self.make()
        return self.known


class _Defer(torch.autograd.Function):
    """Makes a DeferredTensor and its place in autograd."""

    @staticmethod
    def forward(ctx, source: _Source, held: torch.Tensor, *inputs: Any) -> torch.Tensor:
        ctx.source = source
        logits = DeferredTensor(source.shape, source.plan.dtype, held.device, _Values(source.values))
        (result,) = source.plan.recipe.graph.find_nodes(op="output")[0].all_input_nodes
        if match.is_method(result, "detach"):
            ctx.mark_non_differentiable(logits)
        return logits

    @staticmethod
    @torch.compiler.disable
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return None, *ctx.source.gradients(gradient)


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.data_ptr()


class DeferredTensor(torch.Tensor):
    """A tensor whose values are computed when something reads them. See the module's docstring."""

    _values: _Values

    @staticmethod
    def __new__(cls, shape: Iterable[int], dtype: torch.dtype, device: torch.device, values: _Values) -> "DeferredTensor":
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        tensor._values = values
        return tensor

    def _real(self) -> torch.Tensor:
        """A plain tensor with the values, a view of this one for autograd."""
        self._values.get()
        with _torch.no_torch_function(), _torch.no_dispatch_modes():
            return aten.alias.default(self)

    def _cast(self, dtype: torch.dtype) -> "DeferredTensor":
        """A deferred copy with the values that this one has now."""
        values, version = self._values, self._version

        def make() -> torch.Tensor:
            # Not values.get(): mostly nobody else wants them any more. Written since: the copy is of what was there before.
            source = values.known if values.known is not None and self._version == version else values.make()
            return source.to(dtype, copy=True)

        return DeferredTensor(self.shape, dtype, self.device, _Values(make))

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _NOT_READING:
            with _torch.no_torch_function():
                return func(*args, **kwargs)
        return _on_plain(func, args, kwargs, DeferredTensor._real)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.detach.default:
            with torch.inference_mode(args[0].is_inference()):
                return cls(args[0].shape, args[0].dtype, args[0].device, args[0]._values)
        if func is aten.alias.default:
            return func(args[0]._values.get())
        if func in (aten._to_copy.default, aten.clone.default) and _stays_deferred(args[0], **kwargs):
            return args[0]._cast(kwargs.get("dtype") or args[0].dtype)
        return _on_plain(func, args, kwargs, lambda tensor: tensor._values.get())

    def __repr__(self, **kwargs: Any) -> str:
        if self._values.known is not None:
            return self._real().__repr__(**kwargs)
        kind = f"shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', requires_grad={self.requires_grad}"
        return f"DeferredTensor({kind}, not computed yet)"


def _on_plain(func: Callable, args: tuple, kwargs: dict, plain: Callable[[DeferredTensor], torch.Tensor]) -> Any:
    """`func` on plain tensors in place of deferred ones."""
    given: list[tuple[torch.Tensor, tuple, DeferredTensor]] = []

    def replace(x: Any) -> Any:
        if not isinstance(x, DeferredTensor):
            return x
        tensor = plain(x)
        given.append((tensor, _place(tensor), x))
        return tensor

    args, kwargs = _torch.tree_map(replace, (args, kwargs))
    result = func(*args, **kwargs)
    for tensor, place, deferred in given:
        if _place(tensor) != place:
            what = f"{getattr(func, '__name__', func)} changes the shape or the storage of deferred logits in place"
            raise RuntimeError(f'fastft: {what}; compile with options={{"logits": "materialize"}}')
        if result is tensor:  # what an in-place operation was given it returns
            return deferred
    return result


def _stays_deferred(tensor: DeferredTensor, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None) -> bool:
    """Whether a copy of `tensor` can wait: it has not been read, only the dtype changes, and a later write to `tensor` would be noticed."""
    if tensor._values.known is not None or tensor.is_inference() or torch.is_inference_mode_enabled():
        return False
    here = device is None or torch.device(device) == tensor.device
    return here and layout in (None, torch.strided) and not pin_memory and memory_format in (None, torch.preserve_format, torch.contiguous_format)


# What a DeferredTensor answers itself, as a tensor without data but with a history; every other function reads it.
_METHODS = """
    size stride dim ndimension numel nelement __len__ element_size storage_offset get_device is_contiguous is_floating_point is_complex is_signed is_conj is_neg
    is_inference dim_order _is_view requires_grad_ retain_grad register_hook register_post_accumulate_grad_hook
    detach clone contiguous to type type_as float half bfloat16 double cpu cuda
"""
_PROPERTIES = """
    shape ndim dtype device layout nbytes itemsize requires_grad grad grad_fn is_leaf output_nr retains_grad _base _version _backward_hooks
    _post_accumulate_grad_hooks is_cpu is_cuda is_xpu is_mps is_meta is_mtia is_maia is_ipu is_ort is_vulkan is_sparse is_sparse_csr is_quantized is_mkldnn
    is_nested
"""
_NOT_READING = {torch.autograd.grad}
_NOT_READING |= {getattr(torch, name) for name in "numel clone detach is_floating_point is_complex is_conj is_neg is_inference".split()}
_NOT_READING |= {getattr(torch.Tensor, name) for name in _METHODS.split()}
_NOT_READING |= {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(torch.Tensor, name)}
_NOT_READING |= {getattr(torch.Tensor, name).__set__ for name in ("requires_grad", "grad", "_backward_hooks", "_post_accumulate_grad_hooks")}
_NOT_READING.add(torch.Tensor.grad.__delete__)
