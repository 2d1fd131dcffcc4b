"""`_torch.without_module_walks`: what Dynamo's `insert_deferred_runtime_asserts` inserts is the same, in time linear in the graph."""

import pytest
import torch
from torch._dynamo import output_graph
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fastft import _torch

INSTALLED = output_graph.insert_deferred_runtime_asserts
ORIGINAL = getattr(INSTALLED, "__wrapped__", INSTALLED)


class Doubled(torch.autograd.Function):
    """Two modules in Dynamo's graph, as for each of bitsandbytes' linears."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def data_dependent(x, sizes):
    """Assertions, sizes to be read again and sizes made from others."""
    rows, columns = sizes.tolist()
    torch._check(rows >= 2)
    torch._check(rows <= 32)
    torch._check(columns + rows < 64)
    found = torch.nonzero(x[:, 0] > 0)
    torch._check(found.shape[0] != rows + 1)
    made = x.new_ones(rows, columns) * rows
    grown = torch.cat([x, x]).repeat(1, 2)
    return Doubled.apply(x).sum() + made.sum() + grown.shape[0] * grown.shape[1] + found.shape[0] + rows + columns


def in_a_body(x, sizes):
    return checkpoint(data_dependent, Doubled.apply(x), sizes, use_reentrant=False) + x.shape[0]


def capture(function, *args, **options) -> GraphModule:
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, **options)(*args)
    return graphs[0]


def contents(gm: GraphModule) -> list[str]:
    """Every node of every graph with all its metadata but for the number of its checkpoint, which counts on from compile to compile."""
    found = []
    for path, module in gm.named_modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            meta = {key: value for key, value in node.meta.items() if key != "ac_graph_id"}
            found.append(f"{path}: {node.format_node()} {node.args} {node.kwargs} {meta}")
    return found


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [data_dependent, in_a_body])
def test_inserts_the_same(function, dynamic, monkeypatch):
    args = torch.randn(4, 3, requires_grad=True), torch.tensor([3, 5])
    found = []
    for insert in (ORIGINAL, _torch.without_module_walks(ORIGINAL)):
        monkeypatch.setattr(output_graph, "insert_deferred_runtime_asserts", insert)
        with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
            found.append(contents(capture(function, *args, dynamic=dynamic)))
    assert found[0] == found[1]
    inserted = [line for line in found[0] if "Runtime assertion failed for expression u" in line]
    assert len(inserted) > 5 and all("stack_trace" in line for line in inserted)
    assert any(not line.startswith(":") for line in inserted) == (function is in_a_body)


def test_linear_in_the_graph(monkeypatch):
    """2.11 registers its hook in every module for every node."""

    def registered(layers: int) -> int:
        calls = []
        register = GraphModule._register_create_node_hook
        with monkeypatch.context() as patch:
            patch.setattr(GraphModule, "_register_create_node_hook", lambda self, hook: calls.append(self) or register(self, hook))
            gm = capture(lambda x: [x := Doubled.apply(x) for _ in range(layers)][-1], torch.randn(4, 3, requires_grad=True))
        assert len(list(gm.modules())) > 2 * layers
        return len(calls)

    assert registered(12) <= 2 * registered(6)


def test_installed_where_needed():
    assert (INSTALLED is not ORIGINAL) == (torch.__version__ < (2, 13))


def test_taken_back_after_an_error():
    def insert(gm, *args):
        assert list(gm.modules()) == [gm]
        raise ZeroDivisionError

    gm = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ZeroDivisionError):
        _torch.without_module_walks(insert)(gm, None)
    assert "modules" not in vars(gm) and len(list(gm.modules())) > 1


def test_a_graph_of_another_module_is_left_to_pytorch():
    """Its owner, which may be one of the modules, has the hooks that count."""
    gm = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    GraphModule(gm, gm.graph)
    assert len(_torch.without_module_walks(lambda gm: list(gm.modules()))(gm)) > 1
