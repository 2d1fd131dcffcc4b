"""What the kernels for masks are made of, and how they are compiled; what they give is tested in test_attention.py."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastft.kernels import mask as masks

CPU = torch.device("cpu")


@pytest.mark.parametrize("text", ["t0[b, kv]", "(~(t0[b, kv])) & (t1[kv])"])
def test_keys_and_queries(text):
    """int32, which FlexAttention's kernels fetch ahead of their loops; the pairs that are equal are those of both masks."""
    padding, also, read = torch.rand(3, 40) < 0.5, torch.rand(40) < 0.5, torch.rand(3, 40) < 0.5
    keys, queries = masks.tokens_op([padding, also], text, 0, 40, read)
    allowed = padding if text == "t0[b, kv]" else ~padding & also
    assert keys.dtype == queries.dtype == torch.int32 and keys.is_contiguous() and queries.is_contiguous()
    assert torch.equal(keys[:, None, :] == queries[:, :, None], allowed[:, None, :] & (allowed | read)[:, :, None])


@pytest.mark.parametrize("tokens", [1, 300, 2048])
def test_numbers_behind_the_counted_ones(tokens):
    """FlexAttention's kernels load the first number of a row even where none counts: all must be tiles that exist."""
    for read in (torch.zeros(2, tokens), torch.ones(2, tokens)):
        lists = masks.op([read == 1], "(kv <= q) & (t0[b, kv])", 0, tokens, tokens, CPU)
        assert all(0 <= numbers.min() and numbers.max() < numbers.shape[-1] for numbers in lists[1::2])


def test_nothing_is_sorted_and_the_lists_lie_as_they_should():
    """At 128 tiles, 16384 tokens, ptxas was not done after two minutes with a sort that Inductor tries there."""
    graph = make_fx(lambda read: masks.op([read], "(kv <= q) & (t0[b, kv])", 0, 512, 512, CPU), decomposition_table={})(torch.ones(2, 512, dtype=torch.bool))
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    lists = [node for node in graph.graph.nodes if node.target is torch.ops.aten.as_strided.default]
    assert len(lists) == 8 and {node.args[0].target for node in lists} == {torch.ops.fastft.materialize.default}, "no layout of Inductor's choice"
    assert any("cumsum" in name for name in names) and not any("sort" in name or "topk" in name for name in names)


LIBRARY = torch.library.Library("fastft_test", "FRAGMENT")
LIBRARY.define("strides(Tensor[] tiles) -> Tensor", tags=(torch.Tag.flexible_layout,))
LIBRARY.impl("strides", lambda tiles: torch.tensor([[*x.stride(), *[0] * (4 - x.dim())] for x in tiles]), "CPU")
torch.library.register_fake("fastft_test::strides", lambda tiles: tiles[0].new_empty((len(tiles), 4), dtype=torch.int64), lib=LIBRARY)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("queries", [512, 384])
def test_strides_in_compiled_code(queries, dynamic):
    """FlexAttention's kernels take the stride of the one head for that from row to row of the batch, and 1 for that of the last dimension."""
    if dynamic and torch.__version__ < (2, 13):
        pytest.skip("torch 2.11 writes C++ for it that does not compile")

    def strides(padding: Tensor, x: Tensor) -> Tensor:
        tiles = masks.op([padding], "(kv <= q) & (t0[b, kv])", 0, x.shape[0], padding.shape[1], CPU)
        return torch.ops.fastft_test.strides(tiles)

    padding = torch.arange(512) < torch.tensor([[500], [300], [200]])
    with torch.compiler.config.patch(force_disable_caches=True):
        # vectorised, torch 2.13's check of an index against a symbol is no C++
        found = torch.compile(strides, dynamic=dynamic, options={"cpp.simdlen": 1})(padding, torch.empty(queries))
    rows, columns = queries // 128, 4
    counts, numbers = [rows, rows, 1, 0], [rows * columns, rows * columns, columns, 1]
    by_columns = [columns, columns, 1, 0], [rows * columns, rows * columns, rows, 1]
    assert found.tolist() == [counts, numbers, counts, numbers, *by_columns, *by_columns]
