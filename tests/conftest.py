"""What the tests share: the rewrite-only backend, tiny models with LoRA, gradients and the numerics contract.

Most tests run the rewritten graph without Inductor: `Rewriter` applies the stage 1 passes and calls the graph as it is, so the
canonical ops run eagerly, forward and backward, within milliseconds. The few tests that compile say so.
"""

import collections
import contextlib
import copy
import logging
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# `python -m pytest` puts the repository's root first, where kernels/ would stand in for the package of that name.
sys.path[:] = [str(ROOT / "tools"), str(ROOT / "tests/ops"), *(entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != ROOT)]

import tiny  # noqa: E402
import torch  # noqa: E402

with contextlib.suppress(ImportError):
    import transformers  # noqa: E402, F401 - before the backend, as in a user's script
from torch import nn  # noqa: E402

import fastft.backend  # noqa: E402
from fastft import contract, match, passes  # noqa: E402
from fastft.deferred import PLANS, defer  # noqa: E402
from fastft.hooks import Partitioner, PassManager  # noqa: E402
from fastft.kernels import dequantize, lora_linear  # noqa: E402
from fastft.options import Options  # noqa: E402
from fastft.report import Report  # noqa: E402
from fastft.runner import Snapshot, run_passes  # noqa: E402


class Rewriter:
    """A Dynamo backend: the passes of stage 1, strictly, and then the graph as it is.

    Attributes:
        reports, graphs: one entry for each captured graph. of: the pass that `groups`, `modules`, `providers` and `misses` tell of.
    """

    def __init__(self, only: list[Callable] | None = None, of: str = "lora_linear", **options: Any) -> None:
        self.of = of
        self.passes = passes.STAGE_1 if only is None else only
        self.options = Options(strict=True, **options)
        self.reports: list[Report] = []
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list) -> Callable:
        report = Report()
        gm = run_passes(Snapshot(gm), self.passes, self.options, report)
        self.reports.append(report)
        self.graphs.append(gm)
        return defer(gm.forward, gm.meta.get(PLANS, []))

    @property
    def groups(self) -> list[list[str]]:
        """The module paths of every rewrite, one list a canonical op, in graph order."""
        return [rewrite.fqn for report in self.reports for rewrite in report.rewrites if rewrite.pass_name == self.of]

    @property
    def providers(self) -> dict[str, int]:
        """How often each provider was chosen."""
        return dict(collections.Counter(row.provider for report in self.reports for row in report.rewrites if row.pass_name == self.of))

    @property
    def sizes(self) -> list[int]:
        """How many linears each `fastft::lora_linear` replaces, in graph order, checkpointed bodies last."""
        graphs = [module.graph for gm in self.graphs for module in match.graph_modules(gm)]
        return [len(node.args[1]) for graph in graphs for node in graph.nodes if node.target is lora_linear.op]

    @property
    def modules(self) -> list[str]:
        return sorted(path for group in self.groups for path in group)

    @property
    def misses(self) -> dict[str, int]:
        """How often each reason was given."""
        return dict(collections.Counter(row.reason for report in self.reports for row in report.misses if row.pass_name == self.of))

    def compile(self, model: nn.Module, **options: Any) -> Callable:
        return torch.compile(model, backend=self, **options)


def lower(gm: torch.fx.GraphModule, example_inputs: list, config_patches: Mapping[str, Any], aten: list | None = None) -> Callable:
    """What `compile_fx` does without Inductor: AOTAutograd, fastft's partitioner and post-grad passes, then the ATen graphs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        config_patches["post_grad_custom_post_pass"](graph.graph)
        graph.recompile()
        if aten is not None:
            aten.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, partition_fn=config_patches["custom_partitioner_fn"])(gm, example_inputs)


class Lowered(Rewriter):
    """A Rewriter whose graphs go on through AOTAutograd, fastft's partitioner and its post-grad passes, not through Inductor.

    Attributes:
        aten: the forward and backward graphs, in the order in which they were lowered.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.aten: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list) -> Callable:
        super().__call__(gm, example_inputs)
        patches = {"post_grad_custom_post_pass": PassManager(passes.POST_GRAD, self.options), "custom_partitioner_fn": Partitioner(self.options)}
        return lower(self.graphs[-1], example_inputs, patches, self.aten)


torch.set_num_threads(1)  # `make test` runs two processes on two cores
# Thousands of empty records in the report of a failing test otherwise.
logging.getLogger("torch.__trace").addFilter(lambda record: False)


@pytest.fixture(autouse=True)
def fresh():
    """No graph and no report of another test."""
    torch._dynamo.reset()
    fastft.reset()
    torch.manual_seed(0)


@pytest.fixture
def rewriter() -> Rewriter:
    return Rewriter()


@pytest.fixture
def lowered() -> Lowered:
    return Lowered()


def with_lora(model: nn.Module, *, autocast_adapter_dtype: bool = True, seed: int = 0, **config: Any) -> nn.Module:
    """peft's LoRA with `LoraConfig(**config)` on all linears but the head, B random as after some training."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    model = get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=autocast_adapter_dtype)
    return random_b(model, seed)


def random_b(model: nn.Module, seed: int = 0) -> nn.Module:
    """LoRA starts with B = 0, which hides half of the gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_lora(arch: str = "llama", *, layers: int = 1, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """A tiny model with LoRA, in training mode. The embedding is trained too: the first layer's input needs a gradient."""
    model = with_lora(tiny.tiny_model(arch, layers=layers, dtype=dtype, seq=16), **config).train()
    model.get_input_embeddings().requires_grad_(True)
    return model


def tiny_qlora(arch: str = "llama", *, layers: int = 1, dtype: torch.dtype = torch.float32, quant: dict[str, Any] | None = None, **config: Any) -> nn.Module:
    """As `tiny_lora`, the base quantized by `tiny.quantize(**quant)`."""
    base = tiny.quantize(tiny.tiny_model(arch, layers=layers, dtype=dtype, seq=16), **(quant or {}))
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # an evaluation in training would put weights into another layout for good
    model = with_lora(base, **config).train()
    model.get_input_embeddings().requires_grad_(True)
    return model


class Dequantized(nn.Module):
    """What bitsandbytes' Linear4bit computes, on a weight dequantized once: a model that can be widened to float64."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        state, nested = linear.weight.quant_state, linear.weight.quant_state.state2
        statistics = (nested.absmax, state.absmax, nested.code, state.offset) if nested else (state.absmax, None, None, None)
        made = dequantize.reference(linear.weight.data, *statistics, state.blocksize, state.quant_type, list(state.shape), linear.compute_dtype)
        self.weight, self.bias = nn.Parameter(made, requires_grad=False), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def dequantized(model: nn.Module) -> nn.Module:
    """A copy with `Dequantized` linears; parameters keep their names."""
    from bitsandbytes.nn import Linear4bit

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is Linear4bit:
            model.set_submodule(name, Dequantized(module))
    return model


def batch_for(model: nn.Module, *, batch: int = 2, seq: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    return tiny.tiny_batch(model.config, batch=batch, seq=seq, seed=seed)


class Autocast(nn.Module):
    """`inner`, which is `model` or compiled from it, under autocast to bf16; parameters are those of `model`."""

    def __init__(self, model: nn.Module, inner: Callable | None = None) -> None:
        super().__init__()
        self.__dict__["inner"], self.model = model if inner is None else inner, model

    def forward(self, **given: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(**given)


def lora_modules(model: nn.Module) -> list[str]:
    """The paths of all modules that hold adapters of a linear, as reports give them."""
    found = [name for name, module in model.named_modules() if getattr(module, "lora_A", None)]
    return sorted(name.removeprefix("base_model.model.") for name in found)


def assert_same(model: nn.Module, compiled: Callable, batch: Mapping[str, Any], **options: Any) -> None:
    """The numerics contract, for the loss and every gradient."""
    contract.assert_contract(model, compiled, batch, **options)
