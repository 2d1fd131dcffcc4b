"""The objects fastft hands to Inductor: one for each hook, with a uuid over the version, all sources and the options.

PyTorch's caches do not notice a changed pass, a changed lowering or a changed backward by themselves (pytorch issue
144344): the uuid makes them miss.
"""

import copy
import functools
import hashlib
import pathlib
from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

import fastft.kernels
import fastft.passes
from fastft import _torch
from fastft.kernels import warmup
from fastft.kernels.dequantize import dequantize_4bit
from fastft.kernels.lora_adapters import RECOMPUTE, SAVE
from fastft.options import Options
from fastft.report import Report
from fastft.runner import warn_dropped
from fastft.saved import give_own_memory


@functools.cache
def source_hash() -> str:
    """SHA-256 over the version and every Python source of fastft, its passes and its kernels."""
    digest = hashlib.sha256(fastft.__version__.encode())
    for package in (fastft, fastft.passes, fastft.kernels):
        folder = pathlib.Path(package.__file__).parent
        for file in sorted(folder.glob("*.py")):
            digest.update(f"{package.__name__}/{file.name}".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def uuid(options: Options) -> str:
    return f"fastft-{source_hash()}-{options!r}"


class PassManager(_torch.CustomGraphPass):
    """Stages 4 and 5: fastft's passes on Inductor's forward and backward graphs."""

    def __init__(self, passes: list[Callable[[Graph], int]], options: Options, report: Report | None = None) -> None:
        self.passes = [run for run in passes if run.__name__ not in options.disable]
        self.options = options
        self.report = report
        self.failed: set[str] = set()

    def __call__(self, graph: Graph) -> None:
        runs = list(self.passes)
        # On a copy first: a pass that raises halfway leaves the graph as it was. One copy for all: one for each took 1.6 s of 32 layers' 106, this 0.8.
        while (failed := self._trial(copy.deepcopy(graph), runs)) is not None:
            runs.remove(failed)
        for run in runs:
            run(graph)
        warmup.prepare(graph)

    def _trial(self, graph: Graph, runs: list[Callable[[Graph], int]]) -> Callable[[Graph], int] | None:
        """Applies `runs` to `graph`; the first one that raised, or None."""
        for run in runs:
            try:
                run(graph)
                graph.lint()
            except Exception as error:
                if self.options.strict:
                    raise
                if run.__name__ not in self.failed:  # forward and backward graph: one warning, one row
                    self.failed.add(run.__name__)
                    text = warn_dropped(f"pass {run.__name__}", error)
                    if self.report is not None:
                        self.report.dropped.append((run.__name__, text))
                return run
        return None

    def uuid(self) -> str:
        return uuid(self.options)


# PyTorch saves whatever a GEMM of the backward reads; without that rule its min-cut also makes element-wise products again
# from what is saved anyway: the inputs of LoRA's dA, which are a norm's output and SwiGLU's product. Saved in a layer of
# Llama-8B, 8192 tokens: 736 MiB instead of 1088.
MIN_CUT = {"ban_recompute_materialized_backward": False}


class Partitioner(_torch.CustomPartitionerFn):
    """Stage 3: where the memory planner tags what is saved, recomputed or offloaded, before PyTorch's min-cut.

    Today it tags what the ops ask for: their seeds of dropout masks are saved, never drawn again, also inside checkpointed
    regions; what they mark as recomputed is made again in the backward, and so are dequantized weights; what they mark as
    saved is, but for checkpointed regions. The min-cut may make again what is element-wise.
    """

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, gm: GraphModule, joint_inputs, **kwargs) -> tuple[GraphModule, GraphModule]:
        late: set[Node] = set()  # what depends on the loss; PyTorch copies the marks of the forward there too
        for node in gm.graph.nodes:
            if node.op == "placeholder" and "tangents" in node.name or not late.isdisjoint(node.all_input_nodes):
                late.add(node)
            marks = {} if node in late else node.meta.get("custom") or {}
            if node.target in (torch.ops.aten.randint.low, torch.ops.prims.inductor_randint.default):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            elif RECOMPUTE in marks or node.target is dequantize_4bit:
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            elif SAVE in marks and "recompute" not in node.meta and any(SAVE not in (user.meta.get("custom") or {}) for user in node.users):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        with torch._functorch.config.patch(MIN_CUT):
            forward, backward = _torch.min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        give_own_memory(forward, backward, kwargs["num_fwd_outputs"])
        return forward, backward

    def uuid(self) -> str:
        return uuid(self.options)
