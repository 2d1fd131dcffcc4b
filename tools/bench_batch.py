"""The batches that `bench.py` measures with: full rows, padded rows, and documents packed into rows or padded one to a row."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

SHORTEST = 0.4  # of a padded row


def padded_lengths(batch: int, seq: int, fraction: float, seed: int) -> list[int]:
    """Row lengths between 0.4 and 1 of `seq`: drawn, then moved so that `fraction` of the batch is padding, to the token."""
    import torch

    low, total = SHORTEST * seq, (1 - fraction) * batch * seq
    drawn = low + (seq - low) * torch.rand(batch, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    above, below = drawn - low, seq - drawn
    surplus = float(drawn.sum()) - total
    moved = drawn - surplus * (above / above.sum() if surplus > 0 else below / below.sum())
    ends = [round(end) for end in accumulate(moved.tolist())]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def topic_lengths() -> list[int]:
    """The tokens of each topic that `make demo` trains on, all of them, by its tokenizer on a GPU (4096 tokens), the end token included.

    79 topics with Python 3.11: 58 to 15017 tokens, median 405, mean 1426. Called once for all systems (2 s): their versions of `tokenizers` may differ.
    """
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    from common import END, topics, train_tokenizer

    known, held_back = topics()
    tokenizer = train_tokenizer(known, 4096).backend_tokenizer
    return [len(tokenizer.encode(text + END).ids) for text in (*known, *held_back)]


def _drawn(seq: int, seed: int, lengths: list[int] | None) -> Iterator[int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    scale = min(64, seq // 8)
    while True:
        if lengths:
            yield from (min(lengths[i], seq) for i in torch.randperm(len(lengths), generator=generator).tolist())
        else:
            u = 1 - float(torch.rand((), dtype=torch.float64, generator=generator))
            yield min(max(round(scale * u**-0.8), 16), seq)


def packed_documents(batch: int, seq: int, seed: int, lengths: list[int] | None = None) -> list[list[int]]:
    """The lengths of the documents in each row.

    Drawn from `lengths`, each cut to `seq`, all of them in a random order before any comes again. Without them a Zipf mix: clip(round(64 * u**-0.8), 16, seq)
    tokens, u uniform in (0, 1]: many short ones, few long ones (at 2048 the mean is 212, the median 112); below seq 512 it is seq/8 instead of 64.
    Each document goes into the first row with room for it; one that fits into none is passed over. When no row has room for the shortest, the rest of
    each row is a last document.
    """
    rows: list[list[int]] = [[] for _ in range(batch)]
    room = [seq] * batch
    shortest = min(*lengths, seq) if lengths else max(16, min(64, seq // 8))
    drawn = _drawn(seq, seed, lengths)
    while max(room) >= shortest:
        length = next(drawn)
        row = next((row for row, free in enumerate(room) if free >= length), None)
        if row is not None:
            rows[row].append(length)
            room[row] -= length
    return [[*row, free] if free else row for row, free in zip(rows, room, strict=True)]


def positions(rows: list[list[int]], device: str) -> Any:
    """int64 [batch, seq], from 0 in each document."""
    import torch

    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows]).to(device)


def padding_mask(lengths: list[int], seq: int, device: str) -> Any:
    """int64 [batch, seq], 1 for a row's first `length` tokens."""
    import torch

    return (torch.arange(seq, device=device) < torch.tensor(lengths, device=device)[:, None]).long()


def one_per_row(rows: list[list[int]]) -> list[tuple[int, int, int]]:
    """(row, start, length) of as many documents as there are rows: the neighbours whose mean length is nearest to that of all."""
    places = [(row, end - length, length) for row, lengths in enumerate(rows) for length, end in zip(lengths, accumulate(lengths), strict=True)]
    sums = [0, *accumulate(length for _, _, length in places)]
    first = min(range(len(places) - len(rows) + 1), key=lambda i: abs((sums[i + len(rows)] - sums[i]) / len(rows) - sums[-1] / len(places)))
    return places[first : first + len(rows)]


def make_batch(
    vocab: int, batch: int, seq: int, seed: int, device: str, padding: float | None, documents: str | None, drawn_from: list[int] | None = None
) -> dict[str, Any]:
    """What the model is called with. Padding is on the right, token 0, label -100; so is the label of a packed document's first token.

    drawn_from: the `lengths` of packed_documents.
    """
    import torch

    ids = torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed)).to(device)
    if padding is None and documents is None:
        return {"input_ids": ids, "labels": ids}
    rows = packed_documents(batch, seq, seed, drawn_from)
    if documents == "packed":
        position_ids = positions(rows, device)
        return {"input_ids": ids, "labels": ids.masked_fill(position_ids == 0, -100), "position_ids": position_ids}
    if documents == "padded":
        places = one_per_row(rows)
        lengths = [length for _, _, length in places]
        ids = torch.stack([ids[row].roll(-start) for row, start, _ in places])
    else:
        lengths = padded_lengths(batch, seq, padding or 0.0, seed)
    mask = padding_mask(lengths, seq, device)
    return {"input_ids": ids * mask, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
