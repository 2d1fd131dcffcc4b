"""Every private PyTorch name fastft uses, in one place, with what differs between the supported releases (2.11 to 2.15).

| name | 2.11 | 2.13 | 2.15 |
|---|---|---|---|
| `CustomGraphPass` in `post_grad_custom_*_pass` | one object | one object or a list | one object or a list |
| `CustomPartitionerFn` | `__call__(gm, joint_inputs, **kw)`, `uuid()` | same | same |
| `min_cut_rematerialization_partition` | networkx | networkx | own solver, same signature |
| `torch.compile(isolate_recompiles=)` | missing | there | there |
| `graph_break_reasons` | a list of `GraphCompileReason` in `_dynamo.utils` | same | same |
"""

import inspect
from collections.abc import Callable

import torch

# A backend may ask Dynamo to trace its frame again by raising this; any other exception counts as a failed compile.
from torch._dynamo.exc import RestartAnalysis as AnyRestart
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.exc import TensorifyScalarRestartAnalysis as RestartAnalysis
from torch._dynamo.utils import counters, graph_break_reasons
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn


class OptionError(ShortenTraceback, ValueError):
    """A ValueError that Dynamo hands on as it is; others that a backend raises come out as BackendCompilerFailed."""


def isolated_compile(model: Callable, backend: Callable) -> Callable:
    """`torch.compile` whose graphs count towards no one else's recompile limit where torch can tell them apart."""
    known = inspect.signature(torch.compile).parameters
    return torch.compile(model, backend=backend, **({"isolate_recompiles": True} if "isolate_recompiles" in known else {}))


__all__ = [
    "AnyRestart",
    "CustomGraphPass",
    "CustomPartitionerFn",
    "OptionError",
    "RestartAnalysis",
    "compile_fx",
    "counters",
    "graph_break_reasons",
    "inductor_config",
    "isolated_compile",
    "list_mode_options",
    "min_cut_rematerialization_partition",
]
