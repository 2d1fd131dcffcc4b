"""Packing: every token once and in order, rows that are full and not too full, and batches that mean what unpacked documents mean."""

import datasets
import pytest
import torch
from conftest import Rewriter, assert_same, tiny, tiny_lora
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data import IGNORED, PackedCollator, pack

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)
fast = settings(max_examples=100, deadline=None, derandomize=True)


def documents(sizes, labels=True):
    """Documents of these sizes, whose tokens are 0, 1, 2, ... through all of them; every third label is masked."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    examples = [{"input_ids": list(range(end - size, end))} for size, end in zip(sizes, ends, strict=True)]
    return [example | {"labels": [label(token) for token in example["input_ids"]]} for example in examples] if labels else examples


def label(token):
    return IGNORED if token % 3 == 1 else token + 1000


def split(row):
    """The documents of a row, as lists of tokens."""
    return [piece.tolist() for piece in torch.as_tensor(row["input_ids"]).split(torch.as_tensor(row["seq_lengths"]).tolist())]


@fast
@given(sizes, st.integers(2, 30), st.booleans())
def test_every_token_is_kept_once_in_order_and_no_loss_crosses_a_boundary(sizes, length, labels):
    examples = documents(sizes, labels)
    rows = pack(examples, length)
    expected = [
        list(range(i, min(i + length, end))) for end, size in zip(torch.tensor(sizes).cumsum(0).tolist(), sizes) for i in range(end - size, end, length)
    ]
    assert sorted(piece for row in rows for piece in split(row)) == expected
    for row in rows:
        assert list(row) == ["input_ids", "labels", "position_ids", "seq_lengths"] and {value.dtype for value in row.values()} == {torch.int64}
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) == sum(row["seq_lengths"]) <= length
        assert row["position_ids"].tolist() == [i for piece in split(row) for i in range(len(piece))]
        assert row["labels"].tolist() == [IGNORED if not i else label(t) if labels else t for piece in split(row) for i, t in enumerate(piece)]
        assert split(row) == sorted(split(row))  # in the order of the dataset
    assert rows[0]["input_ids"][0] == 0 and examples == documents(sizes, labels)


@fast
@given(sizes, st.integers(2, 30))
def test_rows_are_filled_as_best_fit_decreasing_fills_them(sizes, length):
    rooms = []  # the rule itself, in quadratic time: the fullest row that has room
    for size in sorted((piece for size in sizes for piece in [length] * (size // length) + [size % length]), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if not fitting:
            rooms.append(length)
        best = min(fitting, key=rooms.__getitem__, default=-1)
        rooms[best] -= size
    filled = sorted(len(row["input_ids"]) for row in pack(documents(sizes), length))
    assert filled == sorted(length - room for room in rooms if room < length)
    # No two rows would fit in one, so that all rows together are more than half full.
    assert len(filled) == 1 or filled[0] + filled[1] > length and len(filled) <= 2 * sum(sizes) / (length + 1)


def test_best_fit_fills_rows_that_the_first_or_the_emptiest_fit_would_not():
    """Both of those need a third row."""
    rows = pack(documents([8, 7, 3, 14, 5, 3]), 20)
    assert sorted(sorted(row["seq_lengths"].tolist()) for row in rows) == [[3, 3, 14], [5, 7, 8]]


def test_many_documents():
    """100,000 of them; looking at every row for every document would take minutes."""
    sizes = [min(512, int(size) + 1) for size in torch.randn(100_000).add(2).exp()]
    ids = torch.arange(sum(sizes))
    rows = pack(({"input_ids": piece} for piece in ids.split(sizes)), 512)
    assert len(ids) / 512 <= len(rows) <= 1.001 * len(ids) / 512
    assert torch.equal(torch.cat([row["input_ids"] for row in rows]).sort().values, ids)


def as_dataset(examples):
    """With int64 columns, which numpy reads without a copy, and others that are not packed."""
    integers = datasets.List(datasets.Value("int64"))
    features = datasets.Features({"text": datasets.Value("string")} | dict.fromkeys([*examples[0], "attention_mask"], integers))
    return datasets.Dataset.from_list([example | {"attention_mask": [1] * len(example["input_ids"]), "text": "?"} for example in examples], features=features)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", [True, False])
@settings(fast, max_examples=20)
@given(sizes=sizes)
def test_a_dataset_gives_the_same_rows(labels, sizes):
    examples = documents(sizes, labels)
    expected = [{name: value.tolist() for name, value in row.items()} for row in pack(examples, 16)]
    dataset = as_dataset(examples)
    for source in (dataset, dataset.with_format("torch"), datasets.concatenate_datasets([dataset, dataset]).select(range(len(dataset)))):
        packed = pack(source, 16)
        assert isinstance(packed, datasets.Dataset) and packed.to_list() == expected


@pytest.mark.parametrize("kind", [torch.tensor, lambda ids: torch.tensor(ids).numpy(), lambda ids: torch.tensor(ids, dtype=torch.int32), tuple])
def test_what_holds_the_tokens_does_not_matter(kind):
    examples = documents([5, 3, 9, 1])
    expected = pack(examples, 8)
    for given_ in (
        [{name: kind(ids) for name, ids in row.items()} for row in examples],
        iter(examples),
        datasets.IterableDataset.from_generator(lambda: iter(examples)),
    ):
        for row, other in zip(pack(given_, 8), expected, strict=True):
            assert all(torch.equal(row[name], other[name]) for name in other)


@fast
@given(sizes, st.booleans())
def test_the_fill_of_a_batch_is_one_more_document(sizes, fixed):
    rows = pack(documents(sizes), 24)
    batch = PackedCollator(pad_token_id=7, pad_to=32 if fixed else None)(rows)
    width = 32 if fixed else max(len(row["input_ids"]) for row in rows)
    assert list(batch) == ["input_ids", "labels", "position_ids"]
    for name, fill in ("input_ids", lambda n: [7] * n), ("labels", lambda n: [IGNORED] * n), ("position_ids", lambda n: list(range(n))):
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == [row[name].tolist() + fill(width - len(row[name])) for row in rows]


def test_rows_of_a_dataset_and_rows_as_trl_keeps_them_make_the_same_batch():
    """trl's SFTTrainer drops the positions of `pack`'s rows and keeps their lengths; its `pack_dataset` makes no more than that."""
    examples = documents([5, 3, 9, 1, 12])
    rows, collate = pack(examples, 12), PackedCollator(pad_to=12)
    bare = [
        {"input_ids": row["input_ids"].tolist(), "labels": [label(i) for i in row["input_ids"]], "seq_lengths": row["seq_lengths"].tolist()} for row in rows
    ]
    expected = collate(rows)
    for found in collate(bare), collate(pack(as_dataset(examples), 12).to_list()):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_packed_documents_compute_what_each_computes_alone():
    """Logits and loss of a Llama that is given positions, no mask and no cache: the documents do not see each other, nor the fill."""
    model = tiny.tiny_model("llama", seq=64).eval()
    texts = [torch.randint(*tiny.TOKENS, (n,)) for n in (9, 20, 1, 14, 12, 33)]
    rows = pack([{"input_ids": ids} for ids in texts], 36)
    batch = PackedCollator(pad_to=40)(rows)
    with torch.no_grad():
        packed = model(**batch, use_cache=False)
        alone = {tuple(ids.tolist()): model(input_ids=ids[None], labels=ids[None]) for ids in texts}
        blind = model(batch["input_ids"], use_cache=False)
    assert sorted(len(row["seq_lengths"]) for row in rows) == [1, 2, 3]
    for row, found, mixed in zip(rows, packed.logits, blind.logits, strict=True):
        at = 0
        for ids in split(row):
            place, expected = slice(at, at + len(ids)), alone[tuple(ids)].logits[0]
            torch.testing.assert_close(found[place], expected, atol=1e-5, rtol=0)
            assert at == 0 or (mixed[place] - expected).abs().max() > 0.1  # without positions it sees the one before
            at += len(ids)
    losses = [(len(ids) - 1) * out.loss for ids, out in alone.items() if len(ids) > 1]
    torch.testing.assert_close(packed.loss, sum(losses) / sum(len(ids) - 1 for ids in texts))


def test_other_documents_in_the_rows_compile_nothing_again():
    model, rewriter, collate = tiny_lora(), Rewriter(), PackedCollator(pad_to=16)
    compiled = rewriter.compile(model)
    for sizes in ([9, 20, 1, 3], [16, 8, 8], [2, 2]):
        texts = [{"input_ids": torch.randint(*tiny.TOKENS, (n,))} for n in sizes]
        rows = pack(texts, 16)[:2]
        assert_same(model, compiled, collate(rows + rows[: 2 - len(rows)]) | {"use_cache": False})
    assert len(rewriter.reports) == 1 and rewriter.modules


@pytest.mark.parametrize(
    "examples, length, message",
    [
        ([], 8, "nothing to pack"),
        ([{"input_ids": []}], 8, "nothing to pack"),
        ([{"input_ids": [1, 2]}], 1, "2 or more"),
        ([{"input_ids": [1]}, {"text": "a", "label": 1}], 8, r"example 1 has no input_ids \(but text, label\): tokenise"),
        (datasets.Dataset.from_dict({"text": ["a"]}), 8, r"example 0 has no input_ids \(but text\)"),
        (datasets.DatasetDict({"train": as_dataset(documents([3]))}), 8, "of a DatasetDict one split"),
        ([{"input_ids": [1, 2], "labels": [1]}], 8, "example 0 has 1 labels for 2 input_ids"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], 8, "example 0 is padded"),
        (datasets.Dataset.from_dict({"input_ids": [[1, 2]], "attention_mask": [[1, 0]]}), 8, "example 0 is padded"),
        ([{"input_ids": [[1, 2]]}], 8, "input_ids of example 0 must be a flat list of integers"),
        ([{"input_ids": [1.5]}], 8, "input_ids of example 0 must be a flat list"),
        ([{"input_ids": [1, 2], "labels": [1, None]}], 8, "labels of example 0 must be a flat list"),
    ],
)
def test_errors_of_pack_say_what_to_do(examples, length, message):
    with pytest.raises(ValueError, match=f"fastft: .*{message}"):
        pack(examples, length)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "at least one row"),
        ([{"labels": [1]}], "row 0 of the batch has no input_ids"),
        ([{"input_ids": [1, 2]}], "neither position_ids nor seq_lengths: make the rows with fastft.data.pack"),
        ([{"input_ids": [1, 2], "position_ids": [0]}], "1 positions for 2 input_ids"),
        ([{"input_ids": [1, 2], "seq_lengths": [1, 2]}], "3 positions for 2 input_ids"),
        ([{"input_ids": [1] * 9, "seq_lengths": [9]}], "9 tokens does not fit pad_to=8"),
    ],
)
def test_errors_of_the_collator_say_what_to_do(rows, message):
    with pytest.raises(ValueError, match=f"fastft: .*{message}"):
        PackedCollator(pad_to=8)(rows)
