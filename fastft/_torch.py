"""Every private PyTorch name fastft uses, in one place, with what differs between the supported releases (2.11 to 2.15).

| name | 2.11 | 2.13 | 2.15 |
|---|---|---|---|
| `CustomGraphPass` in `post_grad_custom_*_pass` | one object | one object or a list | one object or a list |
| `CustomPartitionerFn` | `__call__(gm, joint_inputs, **kw)`, `uuid()` | same | same |
| `min_cut_rematerialization_partition` | networkx | networkx | own solver, same signature |
"""

from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn

__all__ = [
    "CustomGraphPass",
    "CustomPartitionerFn",
    "compile_fx",
    "counters",
    "inductor_config",
    "list_mode_options",
    "min_cut_rematerialization_partition",
]
