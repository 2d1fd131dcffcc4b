"""What passes/attention_mask.py says of a mask, held against the mask itself: wherever it understands, its text gives the very tensor."""

import inspect
import itertools
import operator

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import LlamaConfig, masking_utils

from fastft.kernels import mask as masks
from fastft.passes.attention_mask import FROM_MEMORY, HEADS, VALUES, WRITTEN, Mask, understand
from fastft.passes.mask_reader import Reader

S, INF, LEAST = 20, float("-inf"), torch.finfo(torch.float32).min
PAD = torch.ones(4, S, dtype=torch.bool)
PAD[1, 13:], PAD[2, :6], PAD[3, ::3] = False, False, False
# Documents that restart at 0; positions that repeat, go on and jump; that fall; and any.
POS = torch.stack([torch.arange(S) % 7, torch.cat([torch.arange(5), torch.arange(9) + 4, torch.arange(6) + 40]), -torch.arange(S), torch.arange(S) * 5 % 11])
INPUTS = {
    "pad": PAD,
    "ints": PAD.long(),
    "pos": POS,
    "other": POS.flip(1).contiguous(),
    "seg": torch.tensor([3, 3, 3, 3, 1, 1, 1, 1, 1, 1, 0, 0, 3, 3, 3, 3, 2, 2, 2, 2]) + torch.arange(4)[:, None] * (torch.arange(S) > 9),
    "lengths": torch.tensor([20, 13, 0, 1]),
    "number": torch.tensor(5),
    "bytes": torch.tensor([0, 1, 127, 128, 255] * 4, dtype=torch.uint8).expand(4, S).contiguous(),
    "memory": torch.rand(4, 1, S, S) < 0.5,
}


def meaning(build, dynamic=False, **inputs) -> Mask | str:
    """`understand` for what `build(inputs by name)` returns; fails where the text is not exactly that."""
    args, found = [(INPUTS | inputs)[name] for name in inspect.signature(build).parameters], []

    def backend(gm, example_inputs):
        def run(*args):
            interpreter = torch.fx.Interpreter(gm, garbage_collect_values=False)
            out = interpreter.run(*args)
            found.append((gm.graph.output_node().args[0][0], interpreter.env))  # the values after all writes
            return out

        return run

    torch._dynamo.reset()
    if dynamic:
        args = [arg.clone() for arg in args]  # the mark stays
        torch._dynamo.mark_dynamic(args[0], 1)
    torch.compile(build, backend=backend, fullgraph=True)(*args)
    ((node, values),) = found
    mask, real = understand(Reader(), node, node.meta["example_value"].shape[-1]), values[node]
    if isinstance(mask, Mask):
        allowed = real if real.dtype == torch.bool else real == 0
        batch = max(allowed.shape[0] if allowed.dim() == 4 else 1, 4 if mask.per_row else 1)
        text = masks.dense(mask.allowed or "q <= q", [values[read] for read in mask.reads], batch, *real.shape[-2:], real.device)
        wrong = int((text != allowed).sum())
        assert not wrong, mask
        assert not mask.per_row or mask.reads
        assert mask.rows_of < 0 or mask.per_row and values[mask.reads[mask.rows_of]].shape[0] == real.shape[0]
        assert mask.may_be_empty or bool(allowed.any(-1).all())
    return mask


def described(mask: Mask) -> str:
    return " ".join([mask.kind] + [f"+{word}" for word in ("additive", "may_be_empty", "per_row") if getattr(mask, word)])


# The blocks that the masks below are built of, each a part of the graph.
ar = lambda start=0: torch.arange(start, start + S)  # noqa: E731
q = lambda: torch.arange(S).view(-1, 1)  # noqa: E731
causal = lambda: torch.arange(S)[None, :] <= torch.arange(S)[:, None]  # noqa: E731
ones = lambda: torch.ones(S, S, dtype=torch.bool)  # noqa: E731
rows = lambda x: x[:, None, :, None]  # noqa: E731
keys = lambda x: x[:, None, None, :]  # noqa: E731
least = lambda truth: torch.where(truth, 0.0, LEAST)  # noqa: E731
documents = lambda pos: torch.cumsum(torch.diff(pos, prepend=pos[:, :1] - 1, dim=-1) != 1, -1)  # noqa: E731
equal = lambda x: rows(x) == keys(x)  # noqa: E731
same = lambda pos: equal(documents(pos))  # noqa: E731

PADDING, ADDED = "padding +may_be_empty +per_row", "padding +additive +may_be_empty +per_row"
SPELLINGS = [
    ("causal", lambda: torch.tril(ones())),
    ("causal", lambda: ~torch.triu(ones(), diagonal=1)),
    ("causal", lambda: ar()[None, None] < ar(1)[None, :, None]),
    ("causal", lambda: q() - ar() >= 0),
    ("causal", lambda: ar().expand(S, S).transpose(0, 1) >= ar().unsqueeze(0)),
    ("causal", lambda pad: (q() + pad.shape[1] >= ar(S)).expand(4, 1, S, S)),
    ("causal +additive", lambda: torch.triu(torch.full((S, S), INF), diagonal=1)),
    ("causal +additive", lambda: torch.triu(torch.ones(S, S), 1) * LEAST),
    ("causal +additive", lambda: torch.full((S, S), LEAST).masked_fill(ar() < (ar() + 1).view(S, 1), 0)),  # the first of transformers
    ("causal +additive", lambda: torch.where(causal(), torch.tensor(0.0), torch.tensor(LEAST)).expand(4, 1, S, S)),
    ("causal +additive", lambda: (1.0 - causal().float()) * LEAST),
    ("causal, window 4", lambda: causal() & (ar() > q() - 4)),
    ("causal, window 4", lambda: torch.tril(ones()) & torch.triu(ones(), diagonal=-3)),
    ("causal, window 4", lambda: (ar() <= q()) & (q() - ar() < 4)),
    ("causal, window 4 +additive", lambda: torch.where(torch.tril(ones(), -4), LEAST, torch.triu(torch.full((S, S), LEAST), 1))),  # Gemma 2's first
    ("causal, window 4 +additive", lambda: torch.full((S, S), INF).triu(1) + torch.full((S, S), INF).tril(-4)),
    ("window 4", lambda: ar() > q() - 4),
    ("window 4, ahead 3", lambda: (ar() > q() - 4) & (ar() < q() + 4)),
    ("causal, chunk 6", lambda: causal() & (q() // 6 == ar() // 6)),
    ("chunk 6", lambda: torch.floor_divide(ar()[None], 6) == ar()[:, None] // 6),
    ("other +may_be_empty", lambda: ar() // 3 <= q() // 3),
    ("other +may_be_empty", lambda: ar() // 3 != q() // 3),
    ("full", lambda: torch.ones(1, 1, S, S, dtype=torch.bool)),
    (PADDING, lambda pad: pad.unsqueeze(1).unsqueeze(2) & ones()),
    (PADDING, lambda ints: (ints == 1).view(4, 1, 1, S).expand(4, 1, S, S)),
    (PADDING, lambda ints: ((1 - keys(ints)) < 1) & ones()),
    (PADDING, lambda pad: (1 - keys(pad).float()).bool() & ones()),  # the padding, not the tokens: odd, but so be it
    (PADDING, lambda pad: (1.0 - keys(pad).half() != 1) & ones()),
    (PADDING, lambda bytes: (keys(bytes) < 255) & ones()),
    (PADDING, lambda lengths: (ar() < lengths[:, None, None, None]) & ones()),
    ("padding +may_be_empty", lambda number: (ar() < number) & ones()),
    (ADDED, lambda pad: (1.0 - keys(pad).to(torch.float32)) * LEAST + torch.zeros(S, S)),
    ("causal, " + PADDING, lambda pad: torch.logical_and(keys(pad), causal())),
    ("causal, " + PADDING, lambda pad: causal()[None, None].masked_fill(~keys(pad), 0)),
    ("causal, " + ADDED, lambda pad: (1.0 - keys(pad).float()) * LEAST + torch.triu(torch.full((S, S), LEAST), 1)),
    ("causal, " + ADDED, lambda ints: torch.triu(torch.full((S, S), LEAST), 1).masked_fill(keys(ints) == 0, LEAST)),
    ("window 5, ahead 4", lambda: abs(q() - ar()) <= 4),  # ModernBERT
    ("causal, window 4", lambda: (torch.abs(ar() - q()) < 4) & causal()),
    ("window 5, ahead 4, " + PADDING, lambda pad: ~((ar() - q()).abs() > 4) & keys(pad)),
    ("full", lambda: (q() - ar()).abs() < S),
    (PADDING, lambda pad: (q() >= 0) & keys(pad)),  # transformers' bidirectional masks
    ("full", lambda: (q() >= 0) & ones()),
    ("other +may_be_empty", lambda: (q() >= 1) & ones()),
    ("documents +per_row", lambda seg: equal(seg)),
    ("causal, documents +per_row", lambda seg: (torch.eq(seg[:, :, None], seg[:, None, :]) & torch.tril(ones()))[:, None]),
    ("causal, documents", lambda seg: causal() & (seg[0] == seg[0][:, None])),
    ("causal, documents +per_row", lambda pos: same(pos) & (keys(pos) <= rows(pos))),
    ("causal, window 4, documents +per_row", lambda pos: same(pos) & (rows(pos) - keys(pos) < 4) & causal()),
    ("causal, documents, " + PADDING, lambda seg, pad: causal() & equal(seg) & keys(pad)),
    ("causal", lambda: causal() & same(ar()[None])),
    ("other +may_be_empty +per_row", lambda lengths: causal() | (ar() < lengths[:, None])[:, None, None]),  # a prefix that all see
    ("other +may_be_empty +per_row", lambda seg: causal() | ((rows(seg) == 3) & (keys(seg) == 3))),
    ("causal, other +may_be_empty +per_row", lambda pad: causal() & rows(pad)),
]


@pytest.mark.parametrize("words, build", SPELLINGS)
def test_spelling(words, build):
    assert described(meaning(build)) == words


def test_text():
    assert meaning(causal) == Mask("causal", "kv <= q", ())
    found = meaning(lambda pad: causal() & (ar() > q() - 4) & keys(pad))
    assert found.allowed == "(kv <= q) & (q <= kv + 3) & (t0[b, kv])" and [read.op for read in found.reads] == ["placeholder"]
    assert found.rows_of == 0 and meaning(lambda seg, pad: equal(seg[:1]) & keys(pad)).rows_of == 1
    assert meaning(lambda: ar() > q() - S).allowed == "" and meaning(lambda: causal() & (ar() >= q() - S + 1)).allowed == "kv <= q"
    assert meaning(lambda: causal() & (ar() >= q() - S + 2)).kind == f"causal, window {S - 1}"


LEFT = [
    (FROM_MEMORY, lambda memory: memory),
    (FROM_MEMORY, lambda memory: least(memory & causal())),
    (FROM_MEMORY, lambda ints: (ints[:, :, None] * ints[:, None, :])[:, None].bool()),
    (FROM_MEMORY, lambda: (ar() - q()).float()),
    (HEADS, lambda: q() - ar() < torch.arange(3, 7)[:, None, None]),
    (HEADS, lambda lengths: (ar() < lengths[:, None, None]) & causal()),
    (VALUES, lambda: (causal().float() - 1) * 5),
    (VALUES, lambda: torch.where(causal(), 0.0, -100.0)),
    (VALUES, lambda: torch.where(causal(), 0.0, 1e9)),
]


@pytest.mark.parametrize("reason, build", LEFT)
def test_left_alone(reason, build):
    assert meaning(build) == reason


WRITES = {
    "masked_fill_": lambda m, pad: m.masked_fill_(~pad[:1], False),
    "out": lambda m, pad: torch.logical_not(m, out=m),
    "diagonal": lambda m, pad: m.diagonal().fill_(False),
    "T": lambda m, pad: m.T[0].fill_(False),
    "transpose": lambda m, pad: torch.transpose(m, 0, 1)[0].fill_(False),
    "to": lambda m, pad: m.to(torch.bool)[0].fill_(False),
    "detach": lambda m, pad: m.detach()[0].fill_(False),
    "chunk": lambda m, pad: m.chunk(2)[0].fill_(False),
}


@pytest.mark.parametrize("write", WRITES)
def test_written(write):
    def build(pad):
        mask = causal()
        mask[1, 1:] = True
        return mask & keys(pad)

    def build_view(pad):
        mask = causal()
        WRITES[write](mask, pad)
        return mask & keys(pad)

    assert meaning(build) == meaning(build_view) == WRITTEN


# Understood or not, but never for something else; `meaning` compares.
EXACT = {
    "nothing": lambda: torch.zeros(S, S, dtype=torch.bool),
    "zeros": lambda: torch.zeros(S, S),
    "and, by keyword": lambda pad: torch.logical_and(causal(), other=keys(pad)),
    "le, by keyword": lambda: torch.le(ar(), other=q()),
    "masked_fill, by keyword": lambda pad: (causal() & (keys(pad) | True)).masked_fill(~keys(pad), value=False),
    "arange(3, end=)": lambda: torch.arange(3, end=S + 3) <= q(),
    "// by keyword": lambda: torch.floor_divide(ar(), other=3) == q() // 3,
    "alpha": lambda: torch.sub(ar(), q(), alpha=2) <= 0,
    "a sum of truths, 2": lambda pad: (causal().float() + keys(pad).float()) == 2.0,
    "a sum of truths, 1": lambda pad: (causal().float() + keys(pad).float()) == 1.0,
    "a sum of ints": lambda pad: (causal().int() + keys(pad).int()) > 1,
    "a sum of least": lambda pad: (torch.where(causal(), 0.0, -1e9) + torch.where(keys(pad), 0.0, -1e9)) == -1e9,
    "a sum scaled": lambda pad: (1 - (causal().float() + keys(pad).float())) * -1e9,
    "rows by a list": lambda pos: ar()[None].expand(S, S) < pos[[1, 0]][0][:, None],
    "counted from the end": lambda: ar()[ar() - 1] <= q(),
    "a wrapped byte": lambda: (ar() + 240).to(torch.uint8) <= q(),
    "bytes below 0": lambda bytes: ((keys(bytes) - 1) < 0) & ones(),
    "distance": lambda: (q() - ar()).abs() < 3,
    "bits": lambda: (causal().float() - 1).view(torch.int32) < 0,
    "iand": lambda pad: operator.iand(causal()[None, None] | ~keys(pad), keys(pad)),
    # "Same document" beside other things than a difference of the positions it was made of.
    "first of a document": lambda pos: same(pos) & (keys(pos) < 2),
    "difference or first": lambda pos: same(pos) & ((keys(pos) <= rows(pos) - 2) | (keys(pos) < 1)),
    "chunks of a document": lambda pos: same(pos) & (keys(pos) // 3 == rows(pos) // 3),
    "sum of positions": lambda pos: same(pos) & (keys(pos) + rows(pos) <= 4),
    "one twice": lambda pos: same(pos) & (2 * keys(pos) <= rows(pos)),
    "both twice": lambda pos: same(pos) & (2 * keys(pos) <= 2 * rows(pos)) & (keys(pos) * 3 >= rows(pos) * 3 - 7),
    "documents of twice": lambda pos: same(2 * pos) & (keys(pos) <= rows(pos)),
    "another tensor": lambda pos, other: same(other) & (keys(pos) <= rows(pos)),
    "as an index": lambda seg, lengths: same(seg % 4) & (lengths[keys(seg % 4)] <= lengths[rows(seg % 4)]),
    "another row": lambda pos: (lambda d: rows(d) == keys(d[:1]))(documents(pos)) & (keys(pos[:1]) <= rows(pos)),
    "same or": lambda pos: same(pos) | (keys(pos) <= rows(pos)),
    "of another diff": lambda pos: equal(torch.cumsum(torch.diff(pos, append=pos[:, :1]) != 1, -1)) & (keys(pos) <= rows(pos)),
    "ne, by keyword": lambda pos: equal(torch.cumsum(torch.ne(torch.diff(pos, prepend=pos[:, :1] - 1), other=1), -1)) & (keys(pos) <= rows(pos)),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    meaning(EXACT[name])


def test_dynamic_length():
    """The sequence's length is a symbol: the same meanings, and no window is too long to count."""
    n = lambda pad: torch.arange(pad.shape[1])  # noqa: E731
    assert meaning(lambda pad: (n(pad)[None] <= n(pad)[:, None]) & keys(pad), dynamic=True).kind == "causal, padding"
    assert meaning(lambda pad: n(pad).view(1, pad.shape[1]) > n(pad).view(pad.shape[1], 1) - 100, dynamic=True).kind == "window 100"
    assert meaning(lambda seg: equal(seg) & (n(seg) <= n(seg)[:, None]), dynamic=True).kind == "causal, documents"
    for build in (lambda pad: n(pad) > n(pad)[:, None] - pad.shape[1], lambda pad: n(pad)[pad.shape[1] // 2 :] <= n(pad)[:, None]):
        meaning(build, dynamic=True)


@pytest.mark.parametrize("given", ["nothing", "right padding", "left padding", "positions", "one row of positions"])
@pytest.mark.parametrize("form, kind", [("causal", ""), ("sliding_window_causal", ", window 6"), ("chunked_causal", ", chunk 6")])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers(attention, form, kind, given):
    config = LlamaConfig(hidden_size=8, num_attention_heads=1, attn_implementation=attention, sliding_window=6, attention_chunk_size=6)
    mask = PAD[[0, 1, 0, 2] if "left" in given else [0, 1, 1, 0]].long() if "padding" in given else None
    pos = POS[: 1 if "one" in given else 4] if "positions" in given else None

    def build(x, mask, pos):
        return getattr(masking_utils, f"create_{form}_mask")(config, x, mask, None, pos, allow_is_causal_skip=False)

    found = meaning(build, x=torch.zeros(4, S, 8), mask=mask, pos=pos)
    assert isinstance(found, Mask) and found.additive == (attention == "eager")
    if "chunk" not in kind or given == "nothing":  # padding shifts the chunks, positions restart them
        assert found.kind == "causal" + kind + (", documents" if "positions" in given else ", padding" if "padding" in given else "")
        assert found.may_be_empty == ("padding" in given)


HALVES = [
    "q()",
    "ar()",
    "q() // 3",
    "ar() // 3",
    "rows(pos)",
    "keys(pos)",
    "rows(pos) // 2",
    "keys(pos) // 2",
    "rows(seg)",
    "keys(seg)",
    "keys(lengths[:, None])",
]
PAIRS, SIGNS = list(itertools.permutations(HALVES, 2)), ["<=", "<", ">", ">=", "==", "!="]
COMPARED = st.builds("({0} * {1[0]} {2} {1[1]} + {3})".format, *map(st.sampled_from, ([1, 1, 2, -1], PAIRS, SIGNS, range(-3, 4))))
TRUTHS = st.recursive(
    COMPARED | st.sampled_from(["keys(pad)", "rows(pad)", "same(pos)", "equal(seg)", "causal()"]),
    lambda part: (
        st.builds("({} {} {})".format, part, st.sampled_from("&|"), part)
        | st.builds("~{}".format, part)
        | st.builds("torch.where({}, {}, {})".format, part, part, part)
    ),
    max_leaves=5,
)
FORMS = st.sampled_from(["{0} & {1}", "least({0} & {1})", "(1.0 - ({0} & {1}).float()) * LEAST", "torch.zeros(4, 1, S, S).masked_fill(~({0} & {1}), INF)"])


@hypothesis.given(st.builds(str.format, FORMS, TRUTHS, st.just("ones()")))
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True, report_multiple_bugs=False)
def test_compositions(text):
    """Whatever is composed of parts that are known is understood."""
    assert isinstance(meaning(eval(f"lambda pad, pos, seg, lengths: {text}")), Mask)
