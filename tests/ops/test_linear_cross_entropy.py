"""`fastft::linear_cross_entropy` against autograd of lm_head and `torch.nn.functional.cross_entropy`; the chunks, the ignored rows."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastft import contract
from fastft.kernels import cross_entropy, valid_rows
from fastft.kernels import linear_cross_entropy as module
from fastft.kernels.linear_cross_entropy import chunk_rows, chunks

from .plain_loss import ALL, F64, LOW, NAMES, PLAIN, arguments, assert_equal, fused, plain, run


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 rows of up to 64 columns in float64."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 64 * 8)
    monkeypatch.setattr(module, "ROWS", 2)


@st.composite
def cases(draw):
    options = {name: draw(st.sampled_from([PLAIN[name], value])) for name, value in ALL.items()}
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    options["ignore_index"] = draw(st.sampled_from([-100, -1, 0]))
    rank, bias = draw(st.sampled_from([0, 1, 3])), draw(st.booleans())
    names = [name for name in NAMES if (rank or name not in ("low_rank", "lora_b")) and (bias or name != "bias")]
    shape = {
        "leading": draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)),
        "width": draw(st.integers(1, 9)),
        "vocabulary": draw(st.integers(1, 70)),
        "rank": rank,
        "bias": bias,
        "ignored": draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        "frozen": draw(st.sets(st.sampled_from(names), max_size=len(names) - 1)),
    }
    return shape, options


@hypothesis.given(cases(), st.booleans())
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_equals_the_formula(small_chunks, case, given):
    shape, options = case
    tensors, labels = arguments(**shape)
    labels = torch.where(labels == -100, options["ignore_index"], labels)

    def call(tensors, labels, ignore_index, *rest):
        order, count = valid_rows.valid_rows(labels.flatten(), ignore_index) if given else (None, None)
        return fused(tensors, labels, ignore_index, *rest, order=order, count=count)

    assert_equal(tensors, labels, options, call, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("vocabulary", [17, 129, 50257, 262144])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vocabularies(vocabulary, reduction):
    tensors, labels = arguments([2, 3], vocabulary=vocabulary, rank=2, dtype=torch.float32, ignored=0.3)
    options = ALL | {"reduction": reduction}
    reference, eager, found = (run(call, tensors, labels, options, to=to) for call, to in ((plain, F64), (plain, None), (fused, None)))
    result = contract.compare(found, eager, reference, torch.float32)
    assert result.ok, str(result)


@pytest.mark.parametrize("dtype, adapters", LOW)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("frozen", [(), ("weight", "lora_b")], ids=["trained", "frozen"])
def test_as_exact_as_the_plain_form(monkeypatch, dtype, adapters, reduction, options, frozen):
    monkeypatch.setattr(module, "ROWS", 16)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 12)  # 16 rows: six chunks
    shape = dict(leading=[2, 64], width=48, vocabulary=500, rank=4, dtype=dtype, adapters=adapters, spread=3.0, ignored=0.3, frozen=frozen)
    tensors, labels = arguments(**shape)
    if options:
        options = options | {"softcap": 8.0}
    options = options | {"reduction": reduction}
    reference, eager, found = (run(call, tensors, labels, options, to=to) for call, to in ((plain, F64), (plain, None), (fused, None)))
    assert {name: grad.dtype for name, grad in found.items()} == {name: grad.dtype for name, grad in eager.items()}
    result = contract.compare(found, eager, reference, dtype)
    assert result.ok, str(result)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e4])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_and_infinity_propagate(value, options, reduction):
    """One logit of each row by the bias, whole rows by hidden. The odd column is a label once."""
    for name, at in (("bias", 3), ("hidden", (1, 0))):
        tensors, labels = arguments([4], bias=True, dtype=torch.float32)
        labels[0] = 3
        with torch.no_grad():
            tensors[name][at] = value
        assert_equal(tensors, labels, options | {"reduction": reduction}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", [-1, 37, 1 << 40, -(1 << 40)])
def test_labels_out_of_range_raise(label):
    tensors, labels = arguments([6], ignored=0.3)
    labels[2] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        run(fused, tensors, labels, {})


@pytest.mark.parametrize("reduction, loss", [("mean", math.nan), ("sum", 0.0)])
@pytest.mark.parametrize("leading", [[0], [5]])
def test_without_a_valid_row_as_eager(reduction, loss, leading):
    tensors, labels = arguments(leading, rank=2, bias=True, ignored=1.0)
    for call in (plain, fused):
        found = run(call, tensors, labels, {"reduction": reduction})
        torch.testing.assert_close(found.pop("loss").item(), loss, equal_nan=True)
        assert not any(grad.any() for grad in found.values())


def test_nan_of_an_ignored_row_stays_there():
    tensors, labels = arguments([4])
    labels[1] = -100
    with torch.no_grad():
        tensors["hidden"][1] = math.nan
    found = run(fused, tensors, labels, {})
    assert all(value.isfinite().all() for value in found.values()) and not found["hidden"][1].any()


class Spy:
    """Counts what the opaque op makes."""

    def __init__(self, monkeypatch) -> None:
        self.steps, self.buffers, self.outputs = [], [], []
        for name, kept in (("softmax_step", self.steps), ("buffer", self.buffers)):
            monkeypatch.setattr(cross_entropy, name, self._watch(getattr(cross_entropy, name), kept))
        real = module.chunks
        monkeypatch.setattr(module, "chunks", lambda *args: self.outputs.append(real(*args)) or self.outputs[-1])

    def _watch(self, call, kept):
        def watched(*args):
            kept.append(args)
            return call(*args)

        return watched


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_is_made_that_nobody_needs(monkeypatch, reduction):
    spy = Spy(monkeypatch)
    tensors, labels = arguments([6], rank=2, bias=True)
    options = (PLAIN | {"reduction": reduction}).values()
    with torch.no_grad():
        fused(tensors, labels, *options)
    assert len(spy.outputs[-1]) == 1 and not any(step[-1] for step in spy.steps)
    for frozen, made in ((NAMES, 0), (("weight", "bias", "low_rank", "lora_b"), 1), (("weight", "bias", "lora_b"), 2)):
        for name, tensor in tensors.items():
            tensor.requires_grad_(name not in frozen)
        fused(tensors, labels, *options)
        assert len(spy.outputs[-1]) == 1 + made
    tensors["weight"].requires_grad_()
    loss = fused(tensors, labels, *options)
    assert len(spy.outputs[-1]) == (1 if reduction == "none" else 4)
    loss.sum().backward()
    assert len(spy.outputs[-1]) == 4 and tensors["bias"].grad is None


def test_one_buffer_of_a_chunk_and_ignored_rows_left_out(monkeypatch, small_chunks):
    spy = Spy(monkeypatch)
    tensors, labels = arguments([21], vocabulary=60)
    labels[::2] = -100  # 10 valid rows: 4, 4 and 2
    fused(tensors, labels, *PLAIN.values())
    assert [args[:2] for args in spy.buffers] == [(4, 60)]
    assert [args[0].shape[0] for args in spy.steps] == [4, 4, 2]


@hypothesis.given(st.integers(1, 1 << 17), st.integers(1, 300_000), st.sampled_from([2, 4]))
@hypothesis.settings(deadline=None, derandomize=True)
def test_chunks_are_equal_and_within_the_budget(rows, vocabulary, itemsize):
    size = chunk_rows(rows, vocabulary, itemsize)
    count = math.ceil(rows / size)
    assert size % module.ROWS == 0 or count == 1 and size == rows
    assert size * cross_entropy.padded(vocabulary) * itemsize <= module.CHUNK_BYTES or size <= module.ROWS
    assert count * size - rows < count * module.ROWS, "a chunk is much smaller than the others"


def test_chunk_of_a_large_vocabulary():
    assert chunk_rows(8192, 128256, 2) == 4096 and chunk_rows(5000, 128256, 2) == 2560 and chunk_rows(4100, 262144, 2) == 1536


@hypothesis.given(st.lists(st.sampled_from([-100, 3, 5]), max_size=40))
def test_valid_rows(labels):
    labels = torch.tensor(labels, dtype=torch.int64)
    order, count = valid_rows.valid_rows(labels, -100)
    kept, rest = (labels != -100).nonzero().flatten(), (labels == -100).nonzero().flatten()
    assert order.tolist() == torch.cat([kept, rest]).tolist() and valid_rows.rows_on_host(count) == len(kept)


def test_autocast_decides_the_dtype(monkeypatch):
    spy = Spy(monkeypatch)
    tensors, labels = arguments([32], width=16, rank=2, bias=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, eager = run(fused, tensors, labels, {}), run(plain, tensors, labels, {})
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert {args[0].dtype for args in spy.steps} == {torch.bfloat16}
    result = contract.compare(found, eager, run(plain, tensors, labels, {}, to=F64), torch.bfloat16)
    assert result.ok, str(result)
    tensors, labels = arguments([4])
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(tensors, labels, {})  # float64 is none of autocast's


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reduction": "max"}, "reduction 'max'"),
        ({"scale": 0.0}, "scale 0.0"),
        ({"label_smoothing": 1.5}, "label_smoothing 1.5"),
        ({"labels": torch.zeros(6)}, "labels are torch.float32"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels \\(5,\\)"),
        ({"low_rank": torch.zeros(6, 2)}, "go together"),
        ({"weight": torch.zeros(37, 7)}, "weight \\(37, 7\\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_raises(change, message):
    tensors, labels = arguments([6])
    for name in NAMES:
        tensors |= {name: change.pop(name)} if name in change else {}
    labels = change.pop("labels", labels)
    with pytest.raises(RuntimeError, match=message):
        fused(tensors, labels, *(PLAIN | change).values())


def test_gradcheck():
    tensors, labels = arguments([5], width=3, vocabulary=7, rank=2, bias=True, ignored=0.3)
    for reduction in ("mean", "none"):
        options = (PLAIN | ALL | {"reduction": reduction}).values()
        assert torch.autograd.gradcheck(lambda *values: fused(dict(zip(tensors, values, strict=True)), labels, *options), tuple(tensors.values()))


def under(op_under):
    if op_under is valid_rows.valid_rows:
        return torch.tensor([1, -100, 3]), -100
    tensors, labels = arguments([6], rank=2, bias=True, dtype=torch.float32)
    hidden, weight, bias, low_rank, lora_b = (tensors[name].detach() for name in NAMES)
    return hidden, weight, bias, labels, low_rank, lora_b, None, torch.arange(6), torch.tensor(4), 1.0, 0.0, 0.0, 0.0, [True, False, True, True, True]


@pytest.mark.parametrize("op_under", [chunks, valid_rows.valid_rows], ids=str)
def test_schemas_and_fakes(op_under):
    torch.library.opcheck(op_under, under(op_under), test_utils=("test_schema", "test_faketensor"))


def test_flops_are_those_of_the_gemms():
    tensors, labels = arguments([6], frozen=("weight",))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
        fused(tensors, labels, *PLAIN.values()).backward()
    assert flops.get_total_flops() == 2 * (2 * 6 * 8 * 37)
