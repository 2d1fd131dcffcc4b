"""The benchmark's documents: their lengths come from where they should, padded and packed hold the same ones, and the tables keep the mixes apart."""

import json

import bench
import pytest
import results_table
import torch
from bench_batch import make_batch, one_per_row, packed_documents, topic_lengths

TOPICS = [58, 405, 2000, 15017]


@pytest.mark.parametrize("lengths", [None, TOPICS])
def test_padded(lengths):
    """One document a row, from the packed batch. 606 tokens of the Zipf mix: what tools/results/2026-11-22-llama1b-padded.json was measured with."""
    padded, packed = (make_batch(1000, 4, 2048, 0, "cpu", None, form, lengths) for form in ("padded", "packed"))
    real = padded["attention_mask"].sum(1).tolist()
    assert real == [length for _, _, length in one_per_row(packed_documents(4, 2048, 0, lengths))] and (lengths or sum(real) == 606)
    assert torch.equal(padded["labels"] != -100, padded["attention_mask"] == 1)
    text = bytes(packed["input_ids"].view(torch.uint8).flatten().tolist())
    assert all(bytes(row[:length].view(torch.uint8).tolist()) in text for row, length in zip(padded["input_ids"], real, strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch, seq", [(4, 2048), (2, 64), (16, 512)])
def test_documents_are_those_given(batch, seq, seed):
    rows = packed_documents(batch, seq, seed, TOPICS)
    cut = [min(length, seq) for length in TOPICS]
    assert len(rows) == batch and all(sum(row) == seq for row in rows)
    assert all(length in cut for row in rows for length in row[:-1]) and all(row[-1] in cut or row[-1] < min(cut) for row in rows)
    starts = make_batch(1000, batch, seq, seed, "cpu", None, "packed", TOPICS)["position_ids"] == 0
    assert starts.sum() == sum(map(len, rows)) and len(one_per_row(rows)) == batch
    assert rows == packed_documents(batch, seq, seed, TOPICS)


def test_every_length_before_any_comes_again():
    (row,) = packed_documents(1, 40, 0, [1, 2, 3, 4])
    assert [sorted(row[i : i + 4]) for i in range(0, 16, 4)] == [[1, 2, 3, 4]] * 4
    assert len({tuple(packed_documents(1, 40, seed, [1, 2, 3, 4])[0]) for seed in range(5)}) > 1


def test_topics():
    """As many tokens as the demo's own rows hold."""
    lengths = topic_lengths()
    from common import blocks, topics, train_tokenizer

    known, held_back = topics()
    tokenizer = train_tokenizer(known, 4096)
    assert len(lengths) == len(known) + len(held_back)
    assert sum(lengths) == blocks(tokenizer, [*known, *held_back], 1).numel()


def test_lengths_need_documents(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "--lengths", "topics"])
    with pytest.raises(SystemExit):
        bench.parse()
    assert "--lengths is of --documents" in capsys.readouterr().err


def test_tables_keep_the_mixes_apart(tmp_path):
    """A file from before `lengths` was a setting is one of the Zipf mix."""
    row = {"system": "fastft", "ms": 1.0, "tokens_per_s": 1.0, "peak_gib": 1.0, "weights_gib": 1.0, "first_step_s": 1.0}
    spec = {"config": {"num_hidden_layers": 1}, "batch": 4, "seq": 2048, "rank": 16, "adapter_dtype": "bf16", "dropout": 0, "checkpointing": False}
    for day, more in enumerate([{}, {"lengths": None}, {"lengths": TOPICS}], 1):
        document = {"gpu": "H200", "date": f"2026-11-0{day}", "arguments": {"preset": "llama1b"}, "versions": {}, "command": "", "systems": [row]}
        (tmp_path / f"{day}.json").write_text(json.dumps(document | {"spec": spec | {"documents": "packed"} | more}))
    loaded = results_table.load(tmp_path)
    assert [path.name for path, _ in loaded] == ["2.json", "3.json"]
    zipf, topics = (results_table.heading(document) for _, document in loaded)
    assert "documents packed, LoRA" in zipf and "documents packed, as long as the topics of `make demo`, LoRA" in topics
