"""Packed sequences: a packed batch gives the loss and gradients of its documents run alone, and no document sees another."""

from collections.abc import Callable, Iterable

import hypothesis
import pytest
import tiny
import torch
from conftest import Rewriter
from graph.test_attention import take_flex
from hypothesis import strategies as st
from torch import Tensor, nn

from fastft import data

ARCHS = ["llama", "qwen3", "gemma3_text", "mistral", "phi3", "olmo2"]
LENGTH = 40  # of a row: longer than the windows of mistral and gemma3, 16
DOCUMENTS = (7, 1, 21, 10, 39, 25, 14)  # three rows; one is filled up


@pytest.fixture(params=["cpu", "flex"])
def provider(request, monkeypatch) -> str:
    if request.param == "flex":
        take_flex(monkeypatch)
    return request.param


def tiny_model(arch: str = "llama", layers: int = 2, seq: int = LENGTH) -> nn.Module:
    """Plain model, training mode. As trainers do: no cache, else transformers does not look at position_ids."""
    model = tiny.tiny_model(arch, layers=layers, seq=seq).train()
    model.config.use_cache = False
    return model


def documents(lengths: Iterable[int], seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(*tiny.TOKENS, (length,), generator=generator)} for length in lengths]


def packed(found: list[dict], length: int = LENGTH) -> dict[str, Tensor]:
    return data.PackedCollator(pad_to=length)(data.pack(found, length))


def taken(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss and the gradients that are there."""
    result = {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return result


def together(model: nn.Module, run: Callable, batch: dict) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = run(**batch).loss
    loss.backward()
    return taken(model, loss)


def alone(model: nn.Module, found: list[dict]) -> dict[str, Tensor]:
    """Eager, document by document: each weighs as many tokens as it predicts."""
    model.zero_grad(set_to_none=True)
    total, sizes = 0.0, [len(one["input_ids"]) - 1 for one in found]
    for one, size in zip(found, sizes, strict=True):
        if size:
            ids = torch.as_tensor(one["input_ids"])[None]
            loss = model(input_ids=ids, labels=ids).loss * (size / sum(sizes))
            loss.backward()
            total = total + loss.detach()
    return taken(model, total)


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Relative to the norm of each: float32's own error is below 2e-6, one token seen too many or too few is 1e-3 and more."""
    assert found.keys() == wanted.keys()
    errors = {name: ((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


@pytest.mark.parametrize("arch", ARCHS)
def test_packed_is_each_document_alone(arch, provider):
    model, rewriter, found = tiny_model(arch), Rewriter(of="attention"), documents(DOCUMENTS)
    batch = packed(found)
    assert batch["input_ids"].shape == (3, LENGTH)
    assert_close(together(model, rewriter.compile(model), batch), alone(model, found))
    assert all("documents" in row and row.startswith("mask" if provider == "cpu" else "flex") for row in rewriter.providers)
    assert sum(rewriter.providers.values()) == 2 and not rewriter.misses


@pytest.mark.parametrize("arch", ARCHS)
def test_no_document_sees_another(arch, provider):
    """Other tokens in one document: the logits of all others are the same, bit by bit."""
    model, rewriter = tiny_model(arch), Rewriter(of="attention")
    compiled = rewriter.compile(model)
    batch = packed(documents(DOCUMENTS))
    number = (batch["position_ids"] == 0).cumsum(-1)
    with torch.no_grad():
        before = compiled(**batch).logits
        for row, document in ((0, 1), (1, 1), (1, 2), (2, 1), (2, int(number[2, -1]))):
            mine = torch.zeros_like(number, dtype=torch.bool)
            mine[row] = number[row] == document
            ids = torch.where(mine, (batch["input_ids"] - 15) % 170 + 16, batch["input_ids"])
            after = compiled(**batch | {"input_ids": ids}).logits
            assert torch.equal(after[~mine], before[~mine])
            assert (after[mine] != before[mine]).any(-1).all()
    assert len(rewriter.graphs) == 1


# Where documents end, in two rows of 160: around the edge of FlexAttention's tiles more often than not.
ENDS = st.sets(st.sampled_from([1, 2, 127, 128, 129, 159]) | st.integers(1, 159), max_size=12)


@pytest.mark.parametrize("block", [0, 128, 16])
def test_any_lengths(block, monkeypatch):
    """One graph for all batches of one shape."""
    if block:
        take_flex(monkeypatch, block)
    model, rewriter, seq = tiny_model(layers=1, seq=160), Rewriter(of="attention"), 160
    compiled = rewriter.compile(model)

    @hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
    @hypothesis.given(st.tuples(ENDS, ENDS))
    @hypothesis.example(({128}, set()))
    @hypothesis.example(({127, 129}, set(range(1, 160))))
    def check(ends):
        edges = [[0, *sorted(row), seq] for row in ends]
        lengths = [[b - a for a, b in zip(row, row[1:], strict=False)] for row in edges]
        hypothesis.assume(max(map(max, lengths)) > 1)
        found = [documents(row, seed) for seed, row in enumerate(lengths)]
        rows = [{"input_ids": torch.cat([one["input_ids"] for one in row]), "seq_lengths": sizes} for row, sizes in zip(found, lengths, strict=True)]
        assert_close(together(model, compiled, data.PackedCollator()(rows)), alone(model, sum(found, [])))

    check()
    assert len(rewriter.graphs) == 1


def collator(name: str) -> Callable[[list[dict]], dict]:
    if name == "fastft":
        return packed
    if name == "transformers":
        return pytest.importorskip("transformers").DataCollatorWithFlattening()
    return pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=LENGTH)


@pytest.mark.parametrize("name", ["fastft", "trl", "transformers"])
def test_collators(name, provider):
    """Lengths that change from batch to batch, in a row of the same length: nothing is compiled again."""
    model, rewriter, collate = tiny_model(layers=1), Rewriter(of="attention"), collator(name)
    compiled = rewriter.compile(model)
    for seed, lengths in enumerate([(7, 1, 21, 11), (40,), (1, 1, 2, 36), (13, 14, 13)]):
        found = documents(lengths, seed)
        batch = collate([{"input_ids": one["input_ids"].tolist()} for one in found])
        assert batch["input_ids"].shape == (1, LENGTH) and "attention_mask" not in batch
        assert_close(together(model, compiled, batch), alone(model, found))
    assert len(rewriter.graphs) == 1 and sum(rewriter.providers.values()) == 1 and not rewriter.misses


@pytest.mark.parametrize("name, provider", [("trl", "flex"), ("transformers", "cpu")], indirect=["provider"])
def test_totals_that_change(name, provider):
    """A graph for the first total, one for all others."""
    model, rewriter, collate = tiny_model("mistral", layers=1), Rewriter(of="attention"), collator(name)
    if name == "trl":
        collate.pad_to_multiple_of = None
    compiled = rewriter.compile(model)
    for seed, lengths in enumerate([(7, 1, 21), (33,), (2, 1, 30, 5), (20, 19)]):
        found = documents(lengths, seed)
        assert_close(together(model, compiled, collate([{"input_ids": one["input_ids"].tolist()} for one in found])), alone(model, found))
    assert len(rewriter.graphs) == 2 and not rewriter.misses
