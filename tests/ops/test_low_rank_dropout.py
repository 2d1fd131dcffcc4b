"""The products that read x once under dropout: kernels in Triton's interpreter, resources on every target GPU, and `lora_linear` on them."""

import collections
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from conftest import batch_for, tiny_lora
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastft import contract
from fastft.kernels import dropout as masks
from fastft.kernels import gated, lora_linear, low_rank_dropout

from .test_lora_linear import arguments, fused, run

TESTS = str(pathlib.Path(__file__).parents[1])
pytest.importorskip("triton")

from .targets import TARGETS, resources  # noqa: E402

# (rows, columns, ranks, dropout)
CASES = [
    (130, 300, (16, 8, 1), (0.1, 0.0, 0.5)),
    (5, 64, (3,), (0.3,)),
    (64, 129, (33, 7), (0.05, 0.05)),
    (97, 520, (5,) * 5, (0.0, 0.2, 0.0, 0.0, 0.4)),  # two launches
    (33, 70, (64, 9, 64, 64), (0.1, 0.0, 0.5, 0.9)),
    (1, 1, (2, 2), (0.0, 0.5)),
]

INTERPRETED = """
import torch
from fastft.kernels import dropout as masks, low_rank_dropout as ops
half = torch.float16
torch.manual_seed(0)
for m, k, ranks, dropout in CASES:
    total = sum(ranks)
    # slices, as the graph hands them over
    x, ds = torch.randn(m, k + 5, dtype=half)[:, :k], torch.randn(m, total + 3, dtype=half)[:, 1 : total + 1]
    a = torch.randn(total, k, dtype=half)
    seeds = torch.randint(-(2**31), 2**31 - 1, ((len(ranks) + 1) // 2, m), dtype=torch.int32)
    rest = (seeds, masks.columns(k, x.device), ranks, dropout)
    for configs, spans, rows in [(ops.MM_CONFIGS, ops.SPANS, 512), ([(192, (32, 32, 4, 2))], 2, 64)]:
        got = ops.launch_mm(x, a, *rest, configs, spans)
        assert got.shape == (ops.column_spans(k, spans)[0], m, total)
        want = ops.reference_mm(x.double(), a.double(), *rest)[0]
        assert (got.sum(0) - want).norm() <= 1e-5 * want.norm(), ("dropped_mm", m, k, ranks)
        got = ops.launch_grad(ds, x, *rest, ops.GRAD_CONFIGS if rows == 512 else configs, rows)
        assert got.shape == (-(-m // rows), total, k)
        want = ops.reference_grad(ds.double(), x.double(), *rest)[0]
        assert (got.sum(0) - want).norm() <= 1e-5 * want.norm(), ("dropped_grad", m, k, ranks)
    x, a = torch.ones(m, k, dtype=half), torch.eye(k, dtype=half)[: min(k, 64)]  # s is the mask itself
    got = ops.launch_mm(x, torch.cat([a, a]), seeds, rest[1], (len(a),) * 2, (0.3, 0.3)).sum(0)
    for j, part in enumerate(got.split(len(a), 1)):
        assert torch.equal(part != 0, masks.keep_mask(seeds, j, 0.3, k)[:, : len(a)]), "the masks differ from keep_mask's"
"""


def interpreted(code: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = f"import sys; sys.path[:0] = {[TESTS, *sys.path]!r}\nCASES = {CASES!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]


def test_interpreted_kernels_equal_the_references():
    interpreted(INTERPRETED)


def test_spans_depend_on_columns_alone():
    for k in (1, 127, 128, 1000, 2048, 4096, 8192, 14336):
        for spans in (1, 2, 4, 8):
            count, span = low_rank_dropout.column_spans(k, spans)
            assert count <= spans and (count - 1) * span < k <= count * span and span % low_rank_dropout.SPAN_STEP == 0
    assert {low_rank_dropout.column_spans(k)[0] for k in (2048, 4096, 8192, 14336)} == {low_rank_dropout.SPANS}


@pytest.mark.parametrize("capability, memory", TARGETS)
@pytest.mark.parametrize("ranks", [(16,), (16, 16, 16), (8, 64, 33), (64, 64, 64), (32, 32, 32, 32)], ids=str)
def test_compiles_without_spills_within_shared_memory(ranks, capability, memory):
    names = ("M", "K", "R", "stride_x", "stride_a", "stride_ds", "span")
    types = dict.fromkeys(("x_ptr", "a_ptr", "ds_ptr"), "*bf16") | dict.fromkeys(("seeds_ptr", "columns_ptr"), "*i32") | {"out_ptr": "*fp32"}
    types |= dict.fromkeys(names, "i32")
    for kernel, configs in (
        (low_rank_dropout.dropped_mm_kernel, low_rank_dropout.MM_CONFIGS),
        (low_rank_dropout.dropped_grad_kernel, low_rank_dropout.GRAD_CONFIGS),
    ):
        for _, constants, (block_m, block_k, warps, stages) in low_rank_dropout._launches(configs, ranks, (0.05,) * len(ranks)):
            taken = {name: types[name] for name in kernel.arg_names if name in types}
            constants |= {"BLOCK_M": block_m, "BLOCK_K": block_k}
            needs = resources(kernel, taken, constants, capability, num_warps=warps, num_stages=stages)
            assert needs["spilled"] == 0 and needs["shared"] <= memory, (kernel.__name__, needs)


def group(**more):
    """Three linears on one input, the second with two adapters."""
    return arguments([3, 11], 40, [24, 16, 8], [4, 7, 2, 5], [0, 1, 1, 2], dropout=[0.2, 0.0, 0.5, 0.1], bias=[True, False, True], **more)


@pytest.mark.parametrize("forward", ["outer", "accumulate", "k_extended"])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_lora_linear_on_the_ops(forward, frozen, monkeypatch):
    """Forward and all gradients are those of the plain form under the same seeds."""
    args = group(base=torch.float32, adapters=torch.float32)
    if frozen is not None:
        args[3][frozen].requires_grad_(False)
        args[0].requires_grad_(frozen == 1)
    plain, called = run(fused(), args), []
    monkeypatch.setattr(low_rank_dropout, "serves", lambda x, ranks: called.append(ranks) or True)
    found = run(fused(forward, "one_read"), args)
    assert called == [(4, 7, 2, 5)] * 2, "once forward, once backward"
    for name, want in plain.items():
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


INTEGRATION = """
import torch
from fastft import contract
from fastft.kernels import low_rank_dropout as kernels
from ops.test_lora_linear import formula, fused, run
from ops.test_low_rank_dropout import group
torch.manual_seed(0)
args, count = group(base=torch.float16, adapters=torch.float32), []
exact, eager, plain = run(formula, args, to=torch.float64), run(formula, args, to=torch.float16), run(fused(), args)
kernels.serves = lambda x, ranks: True
kernels.dropped_mm = lambda *rest: count.append("mm") or kernels.launch_mm(*rest)
kernels.dropped_grad = lambda *rest: count.append("grad") or kernels.launch_grad(*rest)
found = run(fused("outer", "one_read"), args)
assert count == ["mm", "grad"]
result = contract.compare(found, eager, exact, torch.float16)
assert result.ok, str(result)
for name, want in plain.items():
    assert found[name].dtype == want.dtype
    torch.testing.assert_close(found[name], want, rtol=0, atol=4e-3 * want.abs().max().item())
"""


def test_lora_linear_on_interpreted_kernels():
    """float16 within the contract, and close to the plain form."""
    interpreted(INTEGRATION)


def test_a_graph_saves_seeds_and_what_it_saves_without_dropout(lowered, monkeypatch):
    """No masks, masked inputs or partial sums; the columns' part of the hash is made once for every width. Down's gradient comes out of `gated_backward`."""
    monkeypatch.setattr(lora_linear, "choose", lambda x, dtype, ranks: ("outer", "one_read"))
    monkeypatch.setattr(low_rank_dropout, "serves", lambda x, ranks: True)
    saved = []
    for dropout in (0.0, 0.3):
        torch._dynamo.reset()
        lowered.aten.clear()
        model = tiny_lora(layers=2, lora_dropout=dropout)
        contract.gradients(lowered.compile(model), batch_for(model), seed=5)
        forward, backward = lowered.aten
        (out,) = forward.graph.find_nodes(op="output")
        values = [node.meta["val"] for node in out.args[0] if isinstance(node, torch.fx.Node)]
        saved.append(collections.Counter((value.dtype, tuple(value.shape)) for value in values))
    more = saved[1] - saved[0]
    assert more.total() == 2 * 4 and {dtype for dtype, _ in more} == {torch.int32} and not saved[0] - saved[1]
    mm, grad = low_rank_dropout.dropped_mm, low_rank_dropout.dropped_grad
    for graph, groups, expected in ((forward, 4, {mm}), (backward, 3, {grad, gated.gated_backward})):
        calls = [node for node in graph.graph.nodes if node.target in (mm, grad, gated.gated_backward)]
        assert {node.target for node in calls} == expected
        assert [node.target in (mm, grad) for node in calls].count(True) == 2 * groups and len(calls) == 2 * 4
        columns = {node.args[10 if node.target is gated.gated_backward else 3] for node in calls}
        assert len(columns) == 2, "one for the hidden width, one for the MLP's"


def test_schemas_and_fakes():
    rest = (torch.ones(1, 6, dtype=torch.int32), masks.columns(5, torch.device("cpu")), [1, 2], [0.5, 0.0])
    for op, first, second in ((low_rank_dropout.dropped_mm, (6, 5), (3, 5)), (low_rank_dropout.dropped_grad, (6, 3), (6, 5))):
        torch.library.opcheck(op, (torch.randn(first), torch.randn(second), *rest), test_utils=("test_schema", "test_faketensor"))


def test_shapes_on_a_gpu_follow_the_rows():
    """The number of rows may be symbolic: spans are a function of K, row blocks of both."""
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True):
        m = shapes.create_unbacked_symint()
        x, a, ds = (torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, 2048), (48, 2048), (m, 48)))
        seeds, columns = torch.empty(2, m, device="cuda", dtype=torch.int32), torch.empty(2048, device="cuda", dtype=torch.int32)
        rest = (seeds, columns, [16] * 3, [0.05] * 3)
        assert low_rank_dropout.dropped_mm(x, a, *rest).shape == (4, m, 48)
        assert low_rank_dropout.dropped_grad(ds, x, *rest).shape == ((m + 511) // 512, 48, 2048)
