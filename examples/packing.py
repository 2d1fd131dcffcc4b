"""LoRA fine-tuning on short texts: padded batches against packed ones, both through the backend.

Every paragraph of Python's documentation is a document of its own, between a few and some hundred tokens. A padded batch is as long as
the longest document in it and so has another shape at every step; packed rows (`fastft.data.pack`) all have one length, and little fill.

    python examples/packing.py --tiny
    python examples/packing.py --model PATH_OR_NAME
"""

import argparse
import os
import statistics
import time
from collections import Counter

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait sleep: read when torch is imported

import torch  # noqa: E402
from common import batches, quiet, small_llama, topics, train_tokenizer  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import fastft  # noqa: E402
from fastft.data import PackedCollator, pack  # noqa: E402

WARMUP = 2  # steps left out of the timing: padded batches compile twice, for the first length and then for any
CPU = dict(vocab=512, hidden=256, layers=4, length=256, batch=4, steps=30)
GPU = dict(vocab=4096, hidden=1024, layers=16, length=1024, batch=16, steps=50)
TINY = dict(vocab=512, hidden=64, layers=1, length=128, batch=2, steps=8)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
console = Console()


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """The usual batch: as long as its longest document, with an attention mask."""
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.int64) for row in rows], batch_first=True)
    return dict(input_ids=ids, labels=ids.masked_fill(mask == 0, -100), attention_mask=mask)


def train(model, rows: list[dict], collate, args, size: dict, label: str) -> dict:
    """`size["steps"]` steps of AdamW on compiled `model`; the table's figures and the reports of the compiled graphs."""
    torch._dynamo.reset()
    fastft.reset()
    compiled = torch.compile(model, backend=args.backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens, useful, seconds = [], [], []
    columns = [TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}")]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=size["steps"], note="compiling")
        for chosen in batches(torch.arange(len(rows)), size["batch"], size["steps"]):
            chosen = [rows[i] for i in chosen.tolist()]
            batch = {name: value.to(DEVICE) for name, value in collate(chosen).items()}
            start = time.perf_counter()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                loss = compiled(**batch, use_cache=False).loss  # with a cache transformers does not look for packed documents
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            last = loss.item()  # waits for the device
            seconds.append(time.perf_counter() - start)
            tokens.append(batch["input_ids"].numel())
            useful.append(sum(len(row["input_ids"]) for row in chosen))
            progress.update(task, advance=1, note=f"loss {last:.3f}")
    rates = [count / second for count, second in zip(useful, seconds, strict=True)]
    return dict(
        rows=f"{len(rows):,}",
        tokens=f"{statistics.mean(tokens):,.0f}",
        padding=f"{1 - sum(useful) / sum(tokens):.1%}",
        rate=f"{statistics.median(rates[WARMUP:] or rates):,.0f}",
        graphs=str(len(fastft.reports())),
        loss=f"{last:.4f}",
        reports=fastft.reports(),
    )


def site(rewrite) -> tuple[str, str, str]:
    """(pass, provider, modules), the modules without the layer that they are in."""
    return rewrite.pass_name, rewrite.provider, ", ".join(path.rsplit(".", 1)[-1] for path in rewrite.fqn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a saved transformers model; without it, a small Llama with random weights")
    parser.add_argument("--backend", default="fastft")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tiny", action="store_true", help="a few steps of a very small model")
    args = parser.parse_args()
    quiet()
    size = TINY if args.tiny else GPU if DEVICE.type == "cuda" else CPU
    size |= dict(steps=args.steps or size["steps"])
    known, texts = topics()
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else train_tokenizer(known, size["vocab"])

    def load():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(args.model) if args.model else small_llama(tokenizer, size["hidden"], size["layers"])
        return get_peft_model(base.to(DEVICE, DTYPE), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")).train()

    paragraphs = [paragraph + (tokenizer.eos_token or "") for text in texts for paragraph in text.split("\n\n")]
    documents = [{"input_ids": ids[: size["length"]]} for ids in tokenizer(paragraphs).input_ids]
    packed = pack(documents, size["length"])
    runs = dict(padded=train(load(), documents, pad, args, size, "padded"))
    runs["packed"] = train(load(), packed, PackedCollator(pad_to=size["length"]), args, size, "packed")

    table = Table(title=f"LoRA on {DEVICE.type}, {args.backend}, {size['batch']} rows of at most {size['length']} tokens a step", title_justify="left")
    names = {"rows": "rows", "tokens": "tokens/batch", "padding": "padding", "rate": "useful tokens/s", "graphs": "graphs", "loss": "last loss"}
    table.add_column("")
    for name in names.values():
        table.add_column(name, justify="right")
    for label, run in runs.items():
        table.add_row(label, *(run[name] for name in names))
    console.print(table)
    console.print(
        f"{len(documents):,} documents. Useful tokens are those that are no padding, in the median step; losses are of different documents.", style="dim"
    )

    table = Table(title="Rewrites (fastft.reports()) and how often, in all graphs", title_justify="left")
    for column in ("pass", "provider", "modules", *runs):
        table.add_column(column, justify="right" if column in runs else "left")
    sites = {label: Counter(site(rewrite) for report in run["reports"] for rewrite in report.rewrites) for label, run in runs.items()}
    for row in dict.fromkeys(row for found in sites.values() for row in found):
        table.add_row(*row, *(str(found[row]) for found in sites.values()))
    console.print(table if table.row_count else f"No rewrites reported by the backend {args.backend}.")


if __name__ == "__main__":
    main()
