"""Packing: several documents in one row, so that no step is spent on padding.

    rows = fastft.data.pack(dataset, 2048)
    batch = fastft.data.PackedCollator(pad_to=2048)(rows[:4])
    loss = model(**batch, use_cache=False).loss

`position_ids` start again at 0 with each document. transformers makes the attention mask from that: no token sees another document.
It does so only without an `attention_mask` (so the collator returns none) and without a cache. Most configurations switch the cache on:
pass `use_cache=False`, as transformers' and trl's trainers do. With a cache the documents of a row see each other, and nothing says so.
"""

import bisect
import collections
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

IGNORED = -100  # the label that no loss is computed for


def pack(dataset: Any, length: int) -> Any:
    """Packs tokenised documents by best fit, the longest first, into rows of at most `length` tokens.

    A document longer than `length` is split into pieces of `length`, and the rest; each piece is a document of its own. To lose the end
    of long documents instead, cut them before. Empty documents are left out, and so is every column that is not named here.

    Args:
        dataset: a `datasets.Dataset`, or any iterable of dicts, with `input_ids` and, if some tokens are to have no loss, `labels`:
            lists, arrays or 1-D tensors of integers, without padding.
        length: tokens in a row, 2 or more.

    Returns:
        A `datasets.Dataset` (lists of integers) if `dataset` is one, else a list of dicts (1-D int64 tensors). Each row has
        `input_ids`; `labels`, by default the same, -100 at the first token of each document, so that no loss crosses a boundary;
        `position_ids`, which start again at 0 with each document; `seq_lengths`, the length of each document.
        Inside a row the documents keep their order. Rows with long documents tend to come last: shuffle them.

    Raises:
        ValueError: `length` is below 2; there is no token; an example has no `input_ids`, is padded, has labels of another length than
            its `input_ids`, or values that are not flat lists of integers.
    """
    if length < 2:
        raise ValueError(f"fastft: rows of {length} tokens cannot be trained on: length must be 2 or more")
    pieces = []
    for number, example in enumerate(_examples(dataset)):
        ids, labels = _document(example, f"example {number}")
        if len(ids):
            pieces += zip(ids.split(length), labels.split(length), strict=True)
    if not pieces:
        raise ValueError("fastft: nothing to pack: the dataset holds no tokens")
    rows = [_row([pieces[i] for i in members]) for members in _best_fit([len(ids) for ids, _ in pieces], length)]
    if _is_dataset(dataset):
        return sys.modules["datasets"].Dataset.from_dict({name: [row[name].numpy() for row in rows] for name in rows[0]})
    return rows


@dataclasses.dataclass
class PackedCollator:
    """Makes one batch of rows from `pack`, or from trl's `pack_dataset`: all rows are filled up to one length.

    The fill is one more document: `pad_token_id`, labels -100, positions from 0. So the batch needs no attention mask, and has none.

    Attributes:
        pad_token_id: the token of the fill; it never reaches the loss.
        pad_to: the length of every batch; without it, that of the longest row. torch.compile wants it: with one length nothing is
            compiled twice.
    """

    pad_token_id: int = 0
    pad_to: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch: `input_ids`, `labels` and `position_ids`, each int64 [rows, length].

        Raises:
            ValueError: no rows, a row longer than `pad_to`, without `position_ids` and `seq_lengths`, or whose columns differ in length.
        """
        if not rows:
            raise ValueError("fastft: a batch needs at least one row")
        columns = [_columns(row, f"row {number} of the batch") for number, row in enumerate(rows)]
        width = self.pad_to or max(len(ids) for ids, _, _ in columns)
        batch = collections.defaultdict(list)
        for ids, labels, positions in columns:
            fill = width - len(ids)
            if fill < 0:
                raise ValueError(f"fastft: a row of {len(ids)} tokens does not fit pad_to={width}: use the length that the rows were packed to")
            batch["input_ids"].append(torch.cat([ids, ids.new_full([fill], self.pad_token_id)]))
            batch["labels"].append(torch.cat([labels.masked_fill(positions == 0, IGNORED), labels.new_full([fill], IGNORED)]))
            batch["position_ids"].append(torch.cat([positions, torch.arange(fill)]))
        return {name: torch.stack(values) for name, values in batch.items()}


def _is_dataset(dataset: Any) -> bool:
    """Whether this is a `datasets.Dataset`; whoever has one has imported the module."""
    return isinstance(dataset, getattr(sys.modules.get("datasets"), "Dataset", ()))


def _examples(dataset: Any) -> Iterator[Any]:
    if not _is_dataset(dataset) or "input_ids" not in dataset.column_names:
        yield from dataset
        return
    names = [name for name in ("input_ids", "labels", "attention_mask") if name in dataset.column_names]
    for batch in dataset.with_format("numpy", columns=names).iter(1000):  # eight times as fast as row by row
        yield from ({name: batch[name][i] for name in names} for i in range(len(batch["input_ids"])))


def _columns(row: Mapping[str, Any], name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, labels, position_ids), int64, of equal length."""
    ids, labels = _document(row, name)
    if "position_ids" in row:
        positions = _integers(row["position_ids"], f"position_ids of {name}")
    elif "seq_lengths" in row:  # trl's rows; its SFTTrainer keeps no other column of ours
        positions = _positions(row["seq_lengths"])
    else:
        raise ValueError(f"fastft: {name} has neither position_ids nor seq_lengths: make the rows with fastft.data.pack")
    if len(positions) != len(ids):
        raise ValueError(f"fastft: {name} has {len(positions)} positions for {len(ids)} input_ids")
    return ids, labels, positions


def _document(example: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, labels), int64, of equal length."""
    if not isinstance(example, Mapping):
        raise ValueError(
            f"fastft: {name} is a {type(example).__name__}, not a dict with input_ids: pass a datasets.Dataset (of a DatasetDict one split) or a list of dicts"
        )
    if "input_ids" not in example:
        raise ValueError(f"fastft: {name} has no input_ids (but {', '.join(map(str, example)) or 'nothing'}): tokenise the dataset first")
    ids = _integers(example["input_ids"], f"input_ids of {name}")
    labels = _integers(example["labels"], f"labels of {name}") if "labels" in example else ids
    if len(labels) != len(ids):
        raise ValueError(f"fastft: {name} has {len(labels)} labels for {len(ids)} input_ids: labels are not shifted and not cut, one for each token")
    if "attention_mask" in example and not _integers(example["attention_mask"], f"attention_mask of {name}").all():
        raise ValueError(f"fastft: {name} is padded (its attention_mask has zeros): tokenise with padding=False")
    return ids, labels


def _integers(values: Any, name: str) -> torch.Tensor:
    """`values` as a 1-D int64 tensor."""
    try:
        tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"fastft: {name} must be a flat list of integers: {error}") from error
    if tensor.ndim != 1 or (tensor.is_floating_point() and len(tensor)):  # an empty list becomes a float tensor
        raise ValueError(f"fastft: {name} must be a flat list of integers, not {tensor.dtype} of shape {list(tensor.shape)}")
    return tensor.long()


def _positions(lengths: Iterable[int]) -> torch.Tensor:
    return torch.cat([torch.arange(int(n)) for n in lengths])


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Best fit decreasing: for each row the indices of its documents in order, rows in the order of their first documents.

    Each document goes, the largest first, into the row that it leaves the least room in. The rooms that occur are kept sorted:
    n log n comparisons, a second for 100,000 documents.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # sorted, each once
    having: dict[int, list[list[int]]] = collections.defaultdict(list)  # room -> the rows that have just that left
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, sizes[index])
        if at == len(rooms):
            row, room = [], length
            rows.append(row)
        else:
            room = rooms[at]
            row = having[room].pop()
            if not having[room]:
                del rooms[at]
        row.append(index)
        room -= sizes[index]
        if room:
            if not having[room]:
                bisect.insort(rooms, room)
            having[room].append(row)
    return sorted(sorted(row) for row in rows)


def _row(pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids, labels = (torch.cat(columns) for columns in zip(*pieces, strict=True))
    lengths = [len(piece) for piece, _ in pieces]
    positions = _positions(lengths)
    return {"input_ids": ids, "labels": labels.masked_fill(positions == 0, IGNORED), "position_ids": positions, "seq_lengths": torch.tensor(lengths)}
