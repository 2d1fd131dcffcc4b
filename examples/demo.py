"""`make demo`: pre-train a small language model, then fine-tune it with LoRA, in eager mode and with fastft.

1. A Llama with random weights (3.5 M parameters on a CPU) is trained on four fifths of Python's language reference,
   through the backend: full training, no adapters.
2. From the result, LoRA adapters are trained on the other fifth, once in eager mode and once through the backend:
   the same start, the same batches, each in a process of its own so that neither sees the other's memory.
   With --quant (`make demo QUANT=nf4`) the linears of the base are in 4 bits.

Written to --out: loss.png, summary.json, the base model, the tokenizer and the trained adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

# Threads that wait for work sleep instead of spinning: on two cores that something else uses too, a step took 0.47 s
# instead of 3.5 s. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from common import batches, blocks, load_4bit, quiet, small_llama, topics, train_tokenizer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

WARMUP = 2  # steps left out of the timing: the first compiles, the second may still allocate
LIMIT_S = 60  # a busy machine ends pre-training and the eager run here; the compiled run takes as many steps as the eager one
CPU = dict(vocab=2048, hidden=256, layers=4, length=128, batch=4, pretrain=400, steps=100, lr=2e-3)
GPU = dict(vocab=4096, hidden=1024, layers=16, length=512, batch=16, pretrain=400, steps=100, lr=5e-4)
TINY = dict(vocab=512, hidden=64, layers=2, length=64, batch=4, pretrain=15, steps=10, lr=2e-3)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
console = Console()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="LoRA steps (pre-training takes four times as many)")
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    parser.add_argument("--backend", default="fastft", help="any torch.compile backend, to compare")
    parser.add_argument("--options", type=json.loads, metavar="JSON", help='options of the backend for the fine-tuning, e.g. \'{"base_compute": "fp8"}\'')
    parser.add_argument("--quant", choices=["nf4", "fp4"], help="fine-tune on a base whose linears bitsandbytes has quantized (QLoRA)")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a very small model")
    parser.add_argument("--worker", choices=["eager", "compiled"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.backend not in torch.compiler.list_backends(exclude_tags=()):
        parser.error(f"no torch.compile backend is called {args.backend!r}; is the package installed (`make venv`)?")
    args.size = dict(TINY if args.tiny else GPU if DEVICE.type == "cuda" else CPU)
    if args.steps:
        args.size |= dict(steps=args.steps, pretrain=args.steps * 4)
    return args


# ---------------------------------------------------------------- training


def train(call, model, rows, size: dict, steps: int, label: str, seed: int, stop: int | None = None) -> dict:
    """`steps` steps of AdamW on `call` (the model itself, or what torch.compile made of it); `stop` ends earlier, at that step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=size["lr"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 10, 1 - 0.9 * i / steps))
    bf16 = torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")
    losses, seconds = [], []
    columns = [TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}")]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=steps, note="" if call is model else "compiling")
        for i, batch in enumerate(batches(rows, size["batch"], steps, seed)):
            batch = batch.to(DEVICE)
            if i == WARMUP:
                reset_peak()
            start = time.perf_counter()
            with bf16:
                loss = call(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())  # waits for the device
            seconds.append(time.perf_counter() - start)
            progress.update(task, advance=1, note=f"loss {losses[-1]:.3f}")
            if len(losses) == stop or (stop is None and sum(seconds[1:]) > LIMIT_S):
                break
    step = statistics.median(seconds[WARMUP:] or seconds)
    return dict(
        losses=losses,
        first_step_s=seconds[0],
        median_step_ms=step * 1e3,
        tokens_per_s=size["batch"] * size["length"] / step,
        peak_gib=peak_gib(),
    )


def reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak (VmHWM) to what is resident now


def peak_gib() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) / 2**20
    except (OSError, KeyError):  # not Linux: the peak since the process began, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


MEMORY = {
    "cuda": "Peak memory: torch.cuda.max_memory_allocated during the steps after the second.",
    "cpu": "Peak memory: the highest resident set of the whole process during the steps after the second. It holds Python, the "
    "libraries and what the compiler left behind, and at this size says little about activations; a GPU run measures those.",
}


def pretrain(args) -> dict:
    known, held_back = topics()
    tokenizer = train_tokenizer(known, args.size["vocab"])
    model = small_llama(tokenizer, args.size["hidden"], args.size["layers"]).to(DEVICE, dtype())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"Llama, {args.size['layers']} layers, {millions:.1f} M parameters, {dtype()}, {DEVICE}; {args.size['batch']} x {args.size['length']} tokens a step"
    )
    rows = blocks(tokenizer, known, args.size["length"])
    result = train(torch.compile(model, backend=args.backend), model, rows, args.size, args.size["pretrain"], f"pre-training, {args.backend}", seed=1)
    model.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    torch.save(blocks(tokenizer, held_back, args.size["length"]), args.out / "held_back.pt")
    return result


def finetune(args) -> dict:
    """Runs in a process of its own: LoRA on the saved base model, eager or compiled."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.quant:
        model = load_4bit(args.out / "base", args.quant, dtype(), DEVICE)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.out / "base", dtype=dtype()).to(DEVICE)
    torch.manual_seed(2)  # the adapters' initial weights
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(args.out / "base")
    rows = torch.load(args.out / "held_back.pt")
    name = "eager" if args.worker == "eager" else args.backend
    call = model if args.worker == "eager" else torch.compile(model, backend=args.backend, options=args.options)
    before = sample(model, tokenizer, rows)
    stop = len(json.loads((args.out / "eager.json").read_text())["losses"]) if args.worker == "compiled" else None
    result = train(call, model, rows, args.size, args.size["steps"], f"LoRA fine-tuning, {name}", seed=3, stop=stop)
    result |= dict(name=name, before=before, after=sample(model, tokenizer, rows), reports=[])
    if args.worker == "compiled":
        model.save_pretrained(args.out / "adapter")
        if args.backend == "fastft":
            import fastft

            result["reports"] = [report.to_dict() for report in fastft.reports()]
    return result


def sample(model, tokenizer, rows) -> str:
    torch.manual_seed(4)
    model.eval()
    prompt = rows[:1, :12].to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
    model.train()
    return tokenizer.decode(ids[0])


def dtype() -> torch.dtype:
    return torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


# ---------------------------------------------------------------- the result


def plot(runs: list[dict], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained")
    for run, style, colour in zip(runs, ("-", "--"), ("C0", "C1"), strict=True):
        mean = [statistics.mean(run["losses"][max(0, i - 9) : i + 1]) for i in range(len(run["losses"]))]
        top.plot(range(1, len(mean) + 1), run["losses"], style, color=colour, alpha=0.35)
        top.plot(range(1, len(mean) + 1), mean, style, color=colour, lw=2, label=f"{run['name']} (mean of 10), {run['tokens_per_s']:,.0f} tokens/s")
    difference = [abs(a - b) for a, b in zip(runs[0]["losses"], runs[1]["losses"], strict=True)]
    bottom.semilogy(range(1, len(difference) + 1), [max(d, 1e-9) for d in difference], color="grey")
    top.set(title=title, ylabel="loss")
    top.legend()
    bottom.set(xlabel="LoRA step", ylabel="|difference|\n(0 as 1e-9)")
    figure.savefig(path, dpi=120)


def leaves(paths: list[str]) -> str:
    """model.layers.0.self_attn.q_proj, ... -> q_proj, ..."""
    return ", ".join(path.rsplit(".", 1)[-1] for path in paths)


def show(args, pretraining: dict, runs: list[dict], seconds: float) -> None:
    eager, fast = runs
    base = f" on a base in {args.quant}" if args.quant else ""
    table = Table(title=f"LoRA fine-tuning{base}, same start and same batches", title_justify="left")
    for column in ("", "first step, s", "ms/step (median)", "tokens/s", "peak, GiB", "last loss"):
        table.add_column(column, justify="right" if column else "left")
    for run in runs:
        table.add_row(
            run["name"],
            f"{run['first_step_s']:.1f}",
            f"{run['median_step_ms']:.1f}",
            f"{run['tokens_per_s']:,.0f}",
            f"{run['peak_gib']:.2f}",
            f"{run['losses'][-1]:.4f}",
        )
    console.print(table)
    console.print(MEMORY[DEVICE.type], style="dim", highlight=False)
    difference = max(abs(a - b) for a, b in zip(eager["losses"], fast["losses"], strict=True))
    relative = max(abs(a - b) / a for a, b in zip(eager["losses"], fast["losses"], strict=True))
    console.print(
        f"Largest difference of the two loss curves: {difference:.2e} ({relative:.2%}). Tokens/s: {fast['tokens_per_s'] / eager['tokens_per_s']:.2f} x eager."
    )
    console.print(
        f"Pre-training through {args.backend}: loss {pretraining['losses'][0]:.2f} -> {pretraining['losses'][-1]:.2f}, {pretraining['tokens_per_s']:,.0f} tokens/s\n"
    )

    rewrites = Counter((r["pass"], r["op"], r["provider"], leaves(r["fqn"])) for report in fast["reports"] for r in report["rewrites"])
    misses = Counter((m["pass"], m["reason"], leaves(m["fqn"])) for report in fast["reports"] for m in report["misses"])
    table = Table(title="Rewrites (fastft.reports())", title_justify="left")
    for column in ("pass", "op", "provider", "modules", "sites"):
        table.add_column(column, justify="right" if column == "sites" else "left", no_wrap=column == "op")
    for row, count in rewrites.items():
        table.add_row(*map(str, row), str(count))
    for (name, reason, modules), count in misses.items():
        table.add_row(name, f"not rewritten: {reason}", "", modules, str(count), style="dim")
    console.print(table if table.row_count else f"No rewrites reported by the backend {args.backend}.")

    for label, text in (("Before", fast["before"]), ("After", fast["after"])):
        console.rule(f"{label} fine-tuning", align="left")
        console.print(text, markup=False, highlight=False)
    console.rule()
    summary = dict(
        device=str(DEVICE),
        torch=torch.__version__,
        size=args.size,
        max_loss_difference=difference,
        max_relative_loss_difference=relative,
        pretraining=pretraining,
        runs=runs,
        seconds=seconds,
    )
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    plot(runs, args.out / "loss.png", f"LoRA fine-tuning on {DEVICE.type}")
    console.print(f"{args.out}/loss.png, summary.json, base/, adapter/ written; {seconds:.0f} s in all.")


def main() -> None:
    args, start = arguments(), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    quiet()
    if args.worker:
        (args.out / f"{args.worker}.json").write_text(json.dumps(finetune(args)))
        return
    pretraining = pretrain(args)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    runs = []
    for worker in ("eager", "compiled"):
        subprocess.run([sys.executable, *sys.argv, "--worker", worker], check=True)
        runs.append(json.loads((args.out / f"{worker}.json").read_text()))
    show(args, pretraining, runs, time.perf_counter() - start)


if __name__ == "__main__":
    main()
