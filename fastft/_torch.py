"""Every private PyTorch name fastft uses, in one place, with what differs between the supported releases (2.11 to 2.15).

| name | 2.11 | 2.13 | 2.15 |
|---|---|---|---|
| `CustomGraphPass` in `post_grad_custom_*_pass` | one object | one object or a list | one object or a list |
| `CustomPartitionerFn` | `__call__(gm, joint_inputs, **kw)`, `uuid()` | same | same |
| `min_cut_rematerialization_partition` | networkx | networkx | own solver, same signature |
| `torch.compile(isolate_recompiles=)` | missing | there | there |
| `higher_order.flex_attention` | returns (out, log2-sum-exp, maxima) | same | same |
| `BlockMask.as_tuple()` | 13 entries | 17 | 17 |
| `graph_break_reasons` | a list of `GraphCompileReason` in `_dynamo.utils` | same | same |
| `dynamo.config.ignore_logging_functions` | there, or as `ignore_logger_methods` | there | there |
| `insert_deferred_runtime_asserts` | walks all modules of the graph for every node | no more | no more |
"""

import functools
import inspect
import logging
import math
from collections.abc import Callable

import torch
from torch._dynamo import output_graph

# A backend may ask Dynamo to trace its frame again by raising this; any other exception counts as a failed compile.
from torch._dynamo.exc import RestartAnalysis as AnyRestart
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.exc import TensorifyScalarRestartAnalysis as RestartAnalysis
from torch._dynamo.utils import counters, graph_break_reasons
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn
from torch.autograd.graph import _engine_run_backward
from torch.nn.attention.flex_attention import BlockMask, _apply_kernel_options
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as no_dispatch_modes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

no_torch_function = torch._C.DisableTorchFunctionSubclass
enable_torch_function = torch._C._EnableTorchFunction


def without_module_walks(insert: Callable) -> Callable:
    """`insert_deferred_runtime_asserts` of torch 2.11 in linear time; what it inserts is the same.

    For every node it enters `_set_node_metadata_hook`, which walks `gm.modules()` to register a hook and again to take it
    back, as if nodes could be made in any module's graph. They are made in `gm.graph` alone, and a graph calls the hooks of
    its owner, so meanwhile `gm` names no module but itself. bitsandbytes puts two modules into Dynamo's graph for every
    linear: 9 of the 114 s that Llama-8B's first step took in NF4. torch 2.13 enters the hook only where it makes a node.
    """

    @functools.wraps(insert)
    def inserting(gm: torch.fx.GraphModule, *args, **kwargs):
        if gm.graph.owning_module is not gm:
            return insert(gm, *args, **kwargs)
        vars(gm)["modules"] = lambda: iter((gm,))  # the object's own: neither other modules nor other threads see it
        try:
            return insert(gm, *args, **kwargs)
        finally:
            del vars(gm)["modules"]

    return inserting


# Dynamo runs it before it calls a backend, but after looking the backend up, which imports this.
if torch.__version__ < (2, 13):
    output_graph.insert_deferred_runtime_asserts = without_module_walks(output_graph.insert_deferred_runtime_asserts)


def trace_past_log_once() -> None:
    """Lets Dynamo trace past `logger.warning_once` and `info_once`, which transformers adds to `logging.Logger`, without running them.

    Each is a graph break otherwise: models whose class names no loss (GPT-2, BERT) have one between lm_head and loss, gradient checkpointing with
    `use_cache=True`, transformers' default, has one in every layer. PyTorch's own setting for that; it holds for the process.
    """
    config = torch._dynamo.config
    ignored = config.ignore_logging_functions if hasattr(config, "ignore_logging_functions") else config.ignore_logger_methods
    ignored |= {method for name in ("warning_once", "info_once") if (method := getattr(logging.Logger, name, None))}


def run_backward(loss: torch.Tensor) -> None:
    """`loss.backward()` of a scalar that no TorchFunctionMode sees: a mode is off within the calls that it sees."""
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def flex_attention(q, k, v, score_mod, mask_mod, blocks, block_size, scale, reads):
    """FlexAttention's operator as Dynamo would put it into a graph: `(out, log-sum-exp)`; the public function compiles itself when called from Python.

    `blocks`: the eight lists of a BlockMask. `reads`: tensors that `mask_mod(b, h, q, kv, *reads)` indexes.
    """
    known = BlockMask((q.shape[2], k.shape[2]), *blocks, BLOCK_SIZE=(block_size, block_size), mask_mod=mask_mod).as_tuple()
    options = _apply_kernel_options(q, k, v, True, None)  # True: write the log-sum-exp
    out, lse, *_ = torch.ops.higher_order.flex_attention(q, k, v, score_mod, (*known[:-1], mask_mod), scale, options, (), reads)
    return out, lse * math.log(2)


class _Names(TorchDispatchMode):
    """Notes the operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


_sdpa_backends: dict[str, str] = {}


def sdpa_backend(q, k, v, **options) -> str:
    """What `scaled_dot_product_attention` takes for these fake tensors: "cudnn", "flash", "efficient" or "math"."""
    allowed = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("cudnn", "flash", "mem_efficient", "math")]
    key = str([(x.shape, x.stride(), x.dtype, x.device) for x in (q, k, v)] + [options, allowed])  # layers repeat: 1.6 ms each otherwise
    if key not in _sdpa_backends:
        with q.fake_mode, torch.enable_grad(), _Names() as seen:
            fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device, requires_grad=True) for x in (q, k, v)]
            torch.nn.functional.scaled_dot_product_attention(*fakes, **options)
        found = [kind for kind in ("cudnn", "flash", "efficient") for name in seen.names if f"_product_{kind}_attention" in name]
        _sdpa_backends[key] = found[0] if found else "math"
    return _sdpa_backends[key]


def is_quantized(tensor: object) -> bool:
    """True for tensors of single bytes, and for subclasses made of such: torchao's int8, fp8 and 4-bit weights."""
    if not is_traceable_wrapper_subclass(tensor):
        return isinstance(tensor, torch.Tensor) and tensor.itemsize == 1
    return any(is_quantized(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def calls_triton(gm: torch.fx.GraphModule) -> bool:
    """True where Dynamo captured a launch of a Triton kernel, in the graph or in a body."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, torch.fx.GraphModule)]
    return any(node.target is triton_kernel_wrapper_mutation for graph in graphs for node in graph.nodes)


class OptionError(ShortenTraceback, ValueError):
    """A ValueError that Dynamo hands on as it is; others that a backend raises come out as BackendCompilerFailed."""


def isolated_compile(model: Callable, backend: Callable) -> Callable:
    """`torch.compile` whose graphs count towards no one else's recompile limit where torch can tell them apart."""
    known = inspect.signature(torch.compile).parameters
    return torch.compile(model, backend=backend, **({"isolate_recompiles": True} if "isolate_recompiles" in known else {}))


__all__ = [
    "AnyRestart",
    "CUSTOM_EXTERN_KERNEL_CODEGEN",
    "CustomCodegen",
    "CustomGraphPass",
    "CustomPartitionerFn",
    "OptionError",
    "RestartAnalysis",
    "calls_triton",
    "compile_fx",
    "counters",
    "enable_torch_function",
    "flex_attention",
    "graph_break_reasons",
    "inductor_config",
    "is_quantized",
    "isolated_compile",
    "list_mode_options",
    "min_cut_rematerialization_partition",
    "no_dispatch_modes",
    "no_torch_function",
    "run_backward",
    "sdpa_backend",
    "trace_past_log_once",
    "tree_map",
    "without_module_walks",
]
