"""`fastft::attention` against softmax written out in float64, for every provider, and `fastft::block_mask` against PyTorch's `create_block_mask`.

FlexAttention's operator runs on a CPU as plain math, which reads the mask's text; the tiles are only read by its kernels, so they are compared as such.
"""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from fastft.kernels import attention as kernel
from fastft.kernels import mask as masks
from fastft.kernels.attention import op

CPU, F32, F64 = torch.device("cpu"), torch.float32, torch.float64
EDGES = {"before": [127, 173], "at": [128, 172], "after": [129, 171], "around": [127, 1, 1, 127, 44], "ones": [1] * 3 + [297]}


def numbers(lengths: list[int]) -> torch.Tensor:
    """The number of the document that each position is in."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def padding(size: int) -> torch.Tensor:
    """[2, size]: a row with its last third missing, and one without the first quarter."""
    place = torch.arange(size)
    return torch.stack([place < max(1, size - size // 3), place >= size // 4])


def packed(size: int) -> torch.Tensor:
    place = torch.arange(size)
    return torch.stack([place // 100, (place > 3).long() + (place > size // 2)])


# name: the mask's text, the same as a function, and the tensors that both read for a length
MASKS = {
    "causal": ("kv <= q", lambda b, q, kv: kv <= q, lambda s: []),
    "window": ("(kv <= q) & (q <= kv + 49)", lambda b, q, kv: (kv <= q) & (q - kv < 50), lambda s: []),
    "chunk": ("(kv <= q) & ((kv) // 64 == (q) // 64)", lambda b, q, kv: (kv <= q) & (kv // 64 == q // 64), lambda s: []),
    "padding": ("(kv <= q) & (t0[b, kv])", lambda b, q, kv, p: (kv <= q) & p[b, kv], lambda s: [padding(s)]),
    "counted": ("~(t0[b, kv] == 0)", lambda b, q, kv, p: p[b, kv] > 0, lambda s: [padding(s).long()]),
    "documents": ("(kv <= q) & (t0[b, kv] == t0[b, q])", lambda b, q, kv, d: (kv <= q) & (d[b, q] == d[b, kv]), lambda s: [packed(s)]),
    "one row": ("t0[0 + 0 * b, kv] == t0[0 + 0 * b, q]", lambda b, q, kv, d: d[0, q] == d[0, kv], lambda s: [packed(s)[:1]]),
    "prefix": ("(kv <= q) | (kv + 1 <= t0[b])", lambda b, q, kv, n: (kv <= q) | (kv < n[b]), lambda s: [torch.tensor([s // 2, 0])]),
    "two": (
        "(kv <= q) & (t0[b, kv] == t0[b, q]) & (t1[b, kv])",
        lambda b, q, kv, d, p: (kv <= q) & (d[b, q] == d[b, kv]) & p[b, kv],
        lambda s: [packed(s), padding(s)],
    ),
    "all but one": ("~((q == 5) & (kv == 7))", lambda b, q, kv: (q != 5) | (kv != 7), lambda s: []),
    "nothing": ("q <= -1", lambda b, q, kv: (q < 0) & (kv < 0), lambda s: []),
}
EMPTY = ("padding", "counted", "two", "nothing")  # those with queries that no key is allowed for


def grid(allowed, queries: int, keys: int, reads=(), batch: int = 2) -> torch.Tensor:
    """bool [batch, 1, queries, keys] of a mask given as a function."""
    b, q, kv = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(queries).view(-1, 1), torch.arange(keys)
    return allowed(b, q, kv, *reads).expand(batch, 1, queries, keys)


def tensors(queries, keys=None, *, batch=2, heads=4, groups=2, width=8, value_width=8, dtype=F64):
    keys = queries if keys is None else keys
    shapes = ([batch, heads, queries, width], [batch, heads // groups, keys, width], [batch, heads // groups, keys, value_width])
    return [torch.randn(shape, dtype=F64).to(dtype).requires_grad_() for shape in shapes]


def formula(q, k, v, allowed, scale, softcap=0.0, sinks=None, even=False):
    """Row by row: softmax over the keys that are allowed and the sink. Without any key: zeros, or where `even` equal weights."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x[:, torch.arange(q.shape[1]) // (q.shape[1] // x.shape[1])] for x in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    allowed = allowed.expand(scores.shape)
    empty = ~allowed.any(-1, keepdim=True)
    scores = torch.where(empty, scores - scores.detach() if even else scores, scores.masked_fill(~allowed & ~empty, float("-inf")))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]]
    return torch.where(allowed | (empty & even), weights, 0.0) @ v


def flex(q, k, v, text, reads=(), scale=0.3, softcap=0.0, sinks=None, even=False):
    """The op as passes/attention.py calls it."""
    rows_of, lengths, reads = 0 if "[b" in text else -1, (q.shape[2], k.shape[2]), list(reads)
    tiles, empty, empty_tiles = masks.op(reads, text or "q >= 0", rows_of, *lengths, CPU), None, []
    if even:
        empty = masks.empty_op(reads, text, rows_of, *lengths, CPU)
        empty_tiles = masks.op([empty], "t0[b, q]", 0, *lengths, CPU)
    return op(q, k, v, None, reads, tiles, empty, empty_tiles, sinks, text, scale, softcap, 0.0, "flex")


def provided(provider, q, k, v, mask, text="", scale=0.3, softcap=0.0, sinks=None):
    return op(q, k, v, mask, [], [], None, [], sinks, text, scale, softcap, 0.0, provider)


def assert_same(found, expected, inputs, dtype=F64, **tolerance):
    """Outputs, and gradients of all inputs."""
    tolerance = tolerance or (dict(rtol=1e-12, atol=1e-12) if dtype == F64 else dict(rtol=1e-4, atol=1e-5))
    assert found.dtype == dtype and bool(found.isfinite().all())
    torch.testing.assert_close(found.double(), expected, **tolerance)
    weigh = torch.linspace(-1, 2, found.numel(), dtype=F64).view(found.shape)
    grads = torch.autograd.grad(found, inputs, weigh.to(dtype), materialize_grads=True)
    for mine, other in zip(grads, torch.autograd.grad(expected, inputs, weigh, materialize_grads=True), strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("name, extra", [(name, extra) for name in MASKS for extra in ("", "sinks", "even") if extra != "even" or name in EMPTY])
def test_flex(name, extra, softcap):
    text, allowed, read = MASKS[name]
    dtype = F64 if softcap else F32
    inputs = tensors(150, value_width=5, dtype=dtype)
    sinks = [torch.randn(4, dtype=dtype, requires_grad=True)] * (extra == "sinks")
    options = dict(scale=0.3, softcap=softcap, sinks=sinks[0] if sinks else None, even=extra == "even")
    expected = formula(*inputs, grid(allowed, 150, 150, read(150)), **options)
    assert_same(flex(*inputs, text, read(150), **options), expected, [*inputs, *sinks], dtype)


@pytest.mark.parametrize("groups, width, value_width", [(1, 8, 8), (4, 16, 8), (2, 3, 7)])
@pytest.mark.parametrize("queries, keys", [(1, 1), (2, 2), (127, 127), (129, 129), (5, 140), (140, 5)])
def test_shapes(queries, keys, groups, width, value_width):
    inputs = tensors(queries, keys, groups=groups, width=width, value_width=value_width)
    assert_same(flex(*inputs, "kv <= q"), formula(*inputs, grid(lambda b, q, kv: kv <= q, queries, keys), 0.3), inputs)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_everything_allowed(softcap):
    """The pass gives "" for that."""
    inputs, sinks = tensors(130), torch.randn(4, dtype=F64, requires_grad=True)
    expected = formula(*inputs, torch.tensor(True), 0.3, softcap, sinks)
    assert_same(flex(*inputs, "", softcap=softcap, sinks=sinks), expected, [*inputs, sinks])


@pytest.mark.parametrize("edge", EDGES)
def test_documents_at_the_edges_of_tiles(edge):
    """As if each document were alone."""
    inputs, document = tensors(300, batch=1), numbers(EDGES[edge])
    alone = [formula(*(x[:, :, document == i] for x in inputs), grid(lambda b, q, kv: kv <= q, n, n, batch=1), 0.3) for i, n in enumerate(EDGES[edge])]
    assert_same(flex(*inputs, MASKS["documents"][0], [document[None]]), torch.cat(alone, 2), inputs)


@hypothesis.given(st.lists(st.integers(1, 150), min_size=2, max_size=5), st.integers(0, 4), st.booleans())
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
def test_no_document_sees_another(lengths, changed, capped):
    document = numbers(lengths)[None]
    others = document[0] != changed % len(lengths)

    def run(inputs):
        out = flex(*inputs, MASKS["documents"][0], [document], softcap=1.5 * capped)
        return [x[:, :, others] for x in (out, *torch.autograd.grad(out.square().sum(), inputs))]

    torch.manual_seed(0)
    first, second = tensors(document.shape[1], batch=1), tensors(document.shape[1], batch=1)
    mixed = [torch.where(others[:, None], a, 100 * b).detach().requires_grad_() for a, b in zip(first, second, strict=True)]
    for a, b in zip(run(first), run(mixed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_queries_without_keys():
    """Zeros and no gradients under a boolean mask; the mean of all values, with gradients, where the model adds the least number."""
    reads, inputs = [padding(40)], tensors(40)
    gone = slice(0, 10)  # of the second row, which misses the first quarter
    out = flex(*inputs, "(kv <= q) & (t0[b, kv])", reads)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert not out[1, :, gone].any() and not any(grad[1, :, gone].any() for grad in grads)
    even = flex(*inputs, "(kv <= q) & (t0[b, kv])", reads, even=True)
    mean = inputs[2].mean(2, keepdim=True).repeat_interleave(2, 1)
    torch.testing.assert_close(even[1, :, gone], mean[1].expand(-1, 10, -1))
    assert all(grad[1, :, gone].any() for grad in torch.autograd.grad(even.square().sum(), inputs))


def test_queries_without_keys_in_every_row():
    """The mask is the same in the whole batch, and so are those queries: [1, Q]."""
    inputs, pad = tensors(40), padding(40)[1:]
    expected = formula(*inputs, grid(lambda b, q, kv: (kv <= q) & pad[0, kv], 40, 40), 0.3, even=True)
    assert_same(flex(*inputs, "(kv <= q) & (t0[0 + 0 * b, kv])", [pad], even=True), expected, inputs)


@pytest.mark.parametrize("provider, additive", [("math", True), ("mask", False), ("mask", True)])
@pytest.mark.parametrize("name", ["causal", "window", "two", "counted"])
def test_given_masks(name, provider, additive):
    """The model's own mask. Queries without keys are left out: there the model's own spelling decides."""
    allowed = grid(MASKS[name][1], 50, 50, MASKS[name][2](50)) | torch.eye(50, dtype=torch.bool)
    inputs, sinks = tensors(50), torch.randn(4, dtype=F64, requires_grad=True)
    mask = torch.where(allowed, 0.0, torch.finfo(F32).min) if additive else allowed
    assert_same(provided(provider, *inputs, mask, "not read"), formula(*inputs, allowed, 0.3), inputs)
    if provider == "math":
        expected = formula(*inputs, allowed, 0.3, 1.5, sinks)
        assert_same(provided(provider, *inputs, allowed, "not read", softcap=1.5, sinks=sinks), expected, [*inputs, sinks])


@pytest.mark.parametrize("provider", ["sdpa", "math"])
@pytest.mark.parametrize("text", ["", "kv <= q"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_plain_masks(dtype, text, provider):
    inputs = tensors(70, value_width=8, dtype=dtype)
    allowed = grid(lambda b, q, kv: (kv <= q) | (text == ""), 70, 70)
    assert_same(provided(provider, *inputs, None, text), formula(*inputs, allowed, 0.3), inputs, dtype)


LISTS = [f"{full}{side}_{what}" for side in ("kv", "q") for full in ("", "full_") for what in ("num_blocks", "indices")]


def assert_tiles(text, allowed, reads, queries, keys):
    batch = 2 if "[b" in text else None
    expected = create_block_mask(lambda b, h, q, kv: allowed(b, q, kv, *reads), batch, None, queries, keys, device="cpu")
    found = dict(zip(LISTS, masks.op(reads, text, 0 if batch else -1, queries, keys, CPU), strict=True))
    for name, tiles in found.items():
        other = getattr(expected, name)
        assert tiles.dtype == torch.int32 and tiles.is_contiguous() and tiles.shape == other.shape
        if "indices" in name:  # the first ones count
            counted = torch.arange(tiles.shape[-1]) < found[name.replace("indices", "num_blocks")][..., None]
            tiles, other = tiles[counted], other[counted]
        assert torch.equal(tiles, other)


@pytest.mark.parametrize("queries, keys", [(1, 1), (127, 127), (128, 128), (129, 129), (300, 300), (255, 384), (400, 127)])
@pytest.mark.parametrize("name", MASKS)
def test_tiles(name, queries, keys):
    text, allowed, read = MASKS[name]
    assert_tiles(text, allowed, read(max(queries, keys)), queries, keys)


@hypothesis.given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(1, 400))
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
def test_tiles_of_documents(lengths, window):
    document = torch.stack([numbers(lengths), numbers(lengths[::-1])])
    text = f"(kv <= q) & (q <= kv + {window - 1}) & (t0[b, kv] == t0[b, q])"
    allowed = lambda b, q, kv, document: (kv <= q) & (q - kv < window) & (document[b, q] == document[b, kv])  # noqa: E731
    assert_tiles(text, allowed, [document], document.shape[1], document.shape[1])


@pytest.mark.parametrize("name", MASKS)
def test_text(name):
    text, allowed, read = MASKS[name]
    expected = grid(allowed, 30, 40, read(40))
    assert torch.equal(masks.dense(text, read(40), 2, 30, 40, CPU).expand(2, -1, -1, -1), expected)
    rows = masks.empty_op(read(40), text, 0 if "[b" in text else -1, 30, 40, CPU)
    assert torch.equal(rows.expand(2, -1), ~expected[:, 0].any(-1))


def test_text_refuses_the_rest():
    for text in ("kv ** q", "print(q)", "q.shape", "kv if q else b", "secret"):
        with pytest.raises((KeyError, AttributeError)):
            masks.dense(text, [], 1, 2, 2, CPU)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    """Traced by AOTAutograd: forward, backward, and the tiles from lengths that are symbols."""
    text, allowed, read = MASKS["two"]

    def call(q, k, v, sinks, *reads):
        tiles = masks.op(list(reads), text, 0, q.shape[2], k.shape[2], q.device)
        return op(q, k, v, None, list(reads), tiles, None, [], sinks, text, 0.3, 1.5, 0.0, "flex")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for size in (150, 131) if dynamic else (150,):
        inputs = [*tensors(size, dtype=F32), torch.randn(4, requires_grad=True)]
        expected = formula(*inputs[:3], grid(allowed, size, size, read(size)), 0.3, 1.5, inputs[3])
        assert_same(compiled(*inputs, *read(size)), expected, inputs, F32)


@pytest.mark.parametrize("provider", ["flex", "sdpa", "math"])
def test_autocast_decides_the_dtype(provider):
    inputs = tensors(20, dtype=F32)
    with torch.autocast("cpu", torch.bfloat16):
        out = flex(*inputs, "kv <= q") if provider == "flex" else provided(provider, *inputs, None, "kv <= q")
    expected = formula(*inputs, grid(lambda b, q, kv: kv <= q, 20, 20), 0.3)
    assert_same(out, expected, inputs, torch.bfloat16, rtol=0.05, atol=0.1)


def test_gradcheck():
    pad, sinks = torch.tensor([[False, True, True]]), torch.randn(2, dtype=F64, requires_grad=True)
    inputs = tensors(3, batch=1, heads=2, width=2, value_width=1)
    call = lambda q, k, v, sinks: flex(q, k, v, "(kv <= q) & (t0[b, kv])", [pad], softcap=2.0, sinks=sinks)  # noqa: E731
    assert torch.autograd.gradcheck(call, (*inputs, sinks))
    assert torch.autograd.gradcheck(lambda *inputs: flex(*inputs, "(kv <= q) & (t0[b, kv])", [pad]), inputs)


def chosen(width=64, value_width=None, dtype=torch.bfloat16, device="cuda", plain=False, readable=True, special=False, dropout=0.0, even=False) -> str:
    with FakeTensorMode():
        q, v = (torch.empty(2, 4, 256, n, dtype=dtype, device=device) for n in (width, width if value_width is None else value_width))
    return kernel.choose(q, v, plain, readable, special, dropout, even)


def test_choice(monkeypatch):
    assert chosen(plain=True) == chosen(plain=True, device="cpu") == chosen(plain=True, dtype=F32) == "sdpa"
    monkeypatch.setattr(kernel, "triton", object())
    assert chosen() == chosen(plain=True, special=True) == chosen(even=True) == chosen(16, 256) == chosen(dtype=torch.float16) == "flex"
    left = [dict(width=8), dict(width=192, value_width=320), dict(dtype=F32), dict(device="cpu"), dict(readable=False), dict(dropout=0.1)]
    for options in left:
        assert [chosen(**options), chosen(**options, special=True), chosen(**options, even=True)] == ["mask", "math", "math"]
    monkeypatch.setattr(kernel, "triton", None)
    assert chosen() == "mask"
