#!/usr/bin/env python3
"""fastft beside eager, Inductor, Liger and Unsloth, on the same model, batch and adapters.

    python tools/bench.py --preset llama8b --profile                          # a whole training step, every system installed
    python tools/bench.py --preset llama1b --batch 4 --seq 2048 --systems inductor,fastft
    python tools/bench.py --systems inductor,fastft --padding 0.3             # 30 % of the batch is padding, with an attention mask
    python tools/bench.py --systems inductor,fastft --documents packed        # documents packed into the rows, with position_ids
    python tools/bench.py --systems inductor,fastft --documents padded        # the same mix of documents, padded one to a row
    python tools/bench.py --documents packed --lengths topics                 # documents as long as those of `make demo`
    python tools/bench.py --quant nf4 --systems inductor,unsloth,fastft       # QLoRA: every linear but lm_head in NF4
    python tools/bench.py --op lora_linear --hidden 2048 --profile            # one decoder layer, variants interleaved
    python tools/bench.py --op attention                                      # one attention beside the best kernel called by hand
    python tools/bench.py --op linear_cross_entropy                           # lm_head and the loss beside bare GEMMs and peers
    python tools/bench.py --op dequantize                                     # 4-bit weights beside bitsandbytes and a copy
    python tools/bench.py --systems fastft,fastft-fp8                         # options={"base_compute": "fp8"} beside the same in 16 bits
    python tools/bench.py --tiny --systems eager,inductor                     # a smoke test, on a CPU in seconds

A step is forward, backward, clip_grad_norm_, fused AdamW and zero_grad; nothing in it waits for the device. Weights are random, bf16, made on
the device, and the same in every system (each parameter is drawn from the seed and its name; `--quant` then quantizes it), so the loss and the
gradient norm of the first step must agree with the first system's to 1 %: the table says where they do not. Adapters are bf16 by default
(`--adapter-dtype fp32` is peft's own default; Unsloth always keeps its adapters in fp32). Each system runs in its own process with
compile caches of its own, so the first step is a cold one; with `--rounds 2` the second round shows a warm one. "gemm probe" is one fixed
8192x4096x14336 product before and after: where it drifts, the machine did. Peak memory is `max_memory_allocated` over the timed steps.
tokens/s counts batch x seq whatever they hold; useful tokens/s (with `--padding` or `--documents`, see bench_batch.py) leaves padding out.

fastft is found where it is installed. From a bare checkout it works too: `passes/` and `kernels/` are mapped to `fastft.passes` and
`fastft.kernels` here as `pyproject.toml` maps them. On a lent machine run `eval "$(bash tools/device_setup.sh)"` first (see there). Unsloth wants versions
of its own packages: put them into a folder and name it with `--unsloth-path`; only Unsloth's process sees it, and the last rows of `--op linear_cross_entropy`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import bench_turns  # noqa: E402
from bench_batch import SHORTEST, topic_lengths  # noqa: E402
from bench_models import BUILDERS, PRESETS, SYSTEMS, tiny  # noqa: E402
from bench_profile import print_profiles  # noqa: E402
from bench_results import header, machine, out_path, write  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

COLUMNS = "system|ms/step|x inductor|tokens/s|peak GiB|weights|resident|first step s|loss|grad norm|attention|gemm probe ms|check".split("|")
#: --op -> its module, with `bench(args, say, keep) -> {"rows": [...], ...}` and `table(result, gpu)`
OPS = {"lora_linear": "bench_ops", "attention": "bench_attention", "linear_cross_entropy": "bench_loss", "dequantize": "bench_dequantize"}
TOLERANCE = 0.01  # of the first step's loss and gradient norm against the reference system
console = Console(width=None if sys.stdout.isatty() else 190)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="llama8b")
    add("--systems", default=",".join(SYSTEMS), help="comma-separated, run in this order (default: %(default)s)")
    add("--batch", type=int)
    add("--seq", type=int)
    add("--layers", type=int, help="cut the model to this many layers")
    add("--steps", type=int, default=10, help="timed steps or, with --op, 4 x as many repetitions (default: %(default)s)")
    add("--warmup", type=int, default=3, help="untimed steps after the first (default: %(default)s)")
    add("--rounds", type=int, default=1, help="run the whole list of systems this many times")
    add("--rank", type=int, default=16)
    add("--alpha", type=int, default=32)
    add("--dropout", type=float, default=0.0, help="LoRA dropout")
    add("--adapter-dtype", choices=("bf16", "fp32"), default="bf16", help="fp32 is peft's own default; Unsloth ignores this")
    add("--quant", choices=("nf4",), help="base linears in 4 bits, as transformers loads them with BitsAndBytesConfig: nested statistics, blocks of 64")
    add("--padding", type=float, metavar="FRACTION", help="rows of 0.4 to 1 of --seq, this share of the batch being padding on the right (0 to 0.6)")
    add("--documents", choices=("packed", "padded"), help="documents of mixed lengths: packed into full rows, or one to a row")
    add("--lengths", choices=("zipf", "topics"), default="zipf", help="of --documents: a Zipf mix, or those of the topics that `make demo` trains on")
    add("--autocast", action="store_true", help="forward under torch.autocast(bf16), as Trainer(bf16=True) does")
    add("--checkpointing", action="store_true", help="recompute every layer (Unsloth: its own offloaded form)")
    add("--options", type=json.loads, metavar="JSON", help="options for fastft, e.g. '{\"pack_weights\": true}'")
    add("--profile", action="store_true", help="GPU time by kernel class (bench_profile.py says which)")
    add("--unsloth-path", metavar="DIR", default=os.environ.get("FASTFT_UNSLOTH_PATH"), help="put first on Unsloth's PYTHONPATH; has cut_cross_entropy too")
    add("--timeout", type=float, default=420, help="seconds for one system (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--overlap", action="store_true", help="compile all systems at once, time them in turn (bench_turns.py)")
    add("--tiny", action="store_true", help="tiny shapes: a smoke test")
    add("--out", type=Path, help="default: tools/results/<date>-<preset>.json")
    add("--op", choices=OPS, help="one operation instead of a whole model")
    add("--hidden", type=int, choices=(4096, 2048), default=4096, help="with --op lora_linear or linear_cross_entropy: as in Llama-8B or Llama-1B")
    add("--tokens", type=int, default=8192, help="with the same (default: %(default)s; lora_linear: in sequences of --seq or 2048)")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.systems.split(",") if name not in BUILDERS]
    if unknown:
        parser.error(f"unknown systems {unknown}: choose from {', '.join(BUILDERS)}")
    if args.padding is not None and args.documents:
        parser.error("--padding and --documents exclude each other")
    if args.lengths != "zipf" and not args.documents:
        parser.error("--lengths is of --documents")
    if not 0 <= (args.padding or 0) <= 1 - SHORTEST:
        parser.error(f"--padding takes 0 to {1 - SHORTEST:g}: rows are at least {SHORTEST:g} of --seq")
    return args


def unavailable(system: str, args: argparse.Namespace, cuda: bool) -> str | None:
    """Why a system cannot run here, or None."""
    if system == "unsloth":
        if not (args.unsloth_path and Path(args.unsloth_path, "unsloth").is_dir()) and find_spec("unsloth") is None:
            return "not installed (--unsloth-path)"
        return None if cuda else "needs a GPU"
    if system == "liger":
        if find_spec("liger_kernel") is None:
            return "not installed"
        return None if cuda else "needs a GPU"
    if system.startswith("fastft") and find_spec("fastft") is None and not Path(HERE.parent, "fastft", "__init__.py").is_file():
        return "not installed"
    return None


def run_system(system: str, args: argparse.Namespace, spec: dict[str, Any], scratch: Path, turns: str) -> dict[str, Any]:
    """One system in its own process, with its own compile caches and working directory; `turns` as bench_turns.VARIABLE has it."""
    folder = scratch / system
    folder.mkdir(exist_ok=True)
    env = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    if not args.tiny:
        env["TORCHINDUCTOR_CACHE_DIR"], env["TRITON_CACHE_DIR"] = str(folder / "inductor"), str(folder / "triton")
    if args.overlap:
        env.setdefault(bench_turns.VARIABLE, turns)
    if system == "unsloth":
        env.update(UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_COMPILE_LOCATION=str(folder / "compiled"))
        if args.unsloth_path:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.abspath(args.unsloth_path), env.get("PYTHONPATH")]))
    spec_file, result_file, log = folder / "spec.json", folder / "result.json", folder / "log"
    spec_file.write_text(json.dumps({"system": system, **spec}))
    result_file.unlink(missing_ok=True)
    started, stopped = time.perf_counter(), None
    with log.open("w") as out:
        command = [sys.executable, str(HERE / "bench_systems.py"), str(spec_file), str(result_file)]
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        try:
            code = process.wait(args.timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            code, stopped = process.wait(), f"stopped after {args.timeout:.0f} s"
    bench_turns.ready(env.get(bench_turns.VARIABLE, ""), process.pid)  # it may have died before its turn
    if result_file.is_file():
        result = json.loads(result_file.read_text())
    else:
        result = {"error": stopped or f"exit status {code}"}
    if "error" in result:
        result["log"] = log.read_text(errors="replace").splitlines()[-40:]
    result["wall_s"] = time.perf_counter() - started
    return result


def check(row: dict[str, Any], reference: dict[str, Any] | None) -> list[str]:
    """What is wrong with a row's first step."""
    flags = [
        f"{name} {row[name]:.4g}, expected {reference[name]:.4g}"
        for name in ("loss_first", "grad_norm_first")
        if reference and _off(row[name], reference[name])
    ]
    dead = set(row["dead_gradients"]) - set(reference["dead_gradients"] if reference else ())
    if dead:
        flags.append(f"{len(dead)} parameters without a usable gradient, first {min(dead)}")
    return flags


def _off(value: float, expected: float) -> bool:
    return not abs(value - expected) <= TOLERANCE * abs(expected)


def main_table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    useful = any("useful_tokens_per_s" in row for row in rows)
    for column in [*COLUMNS[:4], *["useful tokens/s"] * useful, *COLUMNS[4:]]:
        table.add_column(column, justify="left" if column in ("system", "check") else "right")
    base = next((row["ms"] for row in rows if row["system"] == "inductor" and "ms" in row), None)
    for row in rows:
        if "ms" not in row:
            table.add_row(row["name"], *[""] * (11 + useful), f"[red]{' '.join((row.get('error') or row['skipped']).split())[:100]}[/red]")
            continue
        table.add_row(
            row["name"],
            f"{row['ms']:.1f}",
            f"{base / row['ms']:.3f}" if base else "",
            f"{row['tokens_per_s']:,.0f}",
            *[f"{row.get('useful_tokens_per_s', 0):,.0f}"] * useful,
            f"{row['peak_gib']:.2f}",
            f"{row['weights_gib']:.2f}",
            f"{row['resident_gib']:.2f}",
            f"{row['first_step_s']:.1f}",
            f"{row['loss_first']:.4f} → {row['loss_last']:.4f}",
            f"{row['grad_norm_first']:.4g} → {row['grad_norm_last']:.4g}",
            row.get("attention", row.get("profile_error", ""))[:20],
            " → ".join(f"{ms:.3f}" for ms in row["gemm_probe_ms"]),
            "[red]" + "; ".join(row["flags"]) + "[/red]" if row["flags"] else "ok",
        )
    return table


def bench_models(args: argparse.Namespace) -> bool:
    preset = tiny(PRESETS[args.preset]) if args.tiny else PRESETS[args.preset]
    config = dict(preset.config, **({"num_hidden_layers": args.layers} if args.layers else {}))
    spec = {"arch": preset.arch, "config": config, "batch": args.batch or preset.batch, "seq": args.seq or preset.seq}
    spec |= {key: getattr(args, key) for key in ("steps", "warmup", "rank", "alpha", "dropout", "adapter_dtype", "checkpointing", "autocast")}
    spec |= {key: getattr(args, key) for key in ("quant", "padding", "documents", "options", "seed", "profile", "tiny")}
    spec["lengths"] = topic_lengths() if args.lengths == "topics" else None
    host = machine()
    what = "-".join(filter(None, [args.preset, args.quant]))
    batch = f"batch {spec['batch']} x {spec['seq']}"
    if args.documents or args.padding is not None:
        what += f"-{args.documents or 'padding'}" + "-topics" * bool(spec["lengths"])
        batch += f", documents {args.documents} ({args.lengths})" if args.documents else f", {args.padding:.0%} padding"
    path = out_path(args, what)
    document = header(args, host) | {"spec": spec, "systems": []}
    rows: list[dict[str, Any]] = document["systems"]
    reference: dict[str, Any] | None = None
    title = f"{what}, {config['num_hidden_layers']} layers, {batch}, LoRA r={args.rank} {args.adapter_dtype}, {host['gpu']}"
    with tempfile.TemporaryDirectory(prefix="fastft-bench-", ignore_cleanup_errors=True) as scratch:
        systems = args.systems.split(",")
        missing = {name: why for name in systems if (why := unavailable(name, args, host["gpu"] != "no GPU"))}
        for number in range(args.rounds):
            pool = ThreadPoolExecutor(len(systems) if args.overlap else 1)
            turns = f"{scratch}/turns-{number}:{len(systems) - len(missing)}"
            ran = {name: pool.submit(run_system, name, args, spec, Path(scratch), turns) for name in systems if name not in missing}
            for system in systems:
                row: dict[str, Any] = {"system": system, "round": number, "name": system + (f" #{number + 1}" if number else "")}
                row |= ran[system].result() if system in ran else {"skipped": missing[system]}
                if "ms" in row:
                    row["flags"] = check(row, None if args.dropout else reference)
                    reference = reference or row
                    console.print(f"{row['name']}: {row['ms']:.1f} ms, {row['peak_gib']:.2f} GiB ({row['wall_s']:.0f} s in all)", highlight=False)
                else:
                    console.print(f"{row['name']}: {row.get('error') or row['skipped']}", highlight=False, markup=False)
                    console.print("\n".join([*row.get("traceback", "").splitlines()[-12:], *row.get("log", [])[-12:]]), highlight=False, markup=False)
                rows.append(row)
                write(path, document)  # after each system: a run cut short keeps what it had
    if args.profile:
        print_profiles(console, {row["name"]: row["profile"] for row in rows if "profile" in row}, top=12)
    console.print(main_table(rows, title))
    console.print(f"written to {path}", highlight=False)
    return all("error" not in row and not row.get("flags") for row in rows)


def bench_op(args: argparse.Namespace) -> bool:
    module, host = importlib.import_module(OPS[args.op]), machine()
    path = out_path(args, f"op-{args.op}" + (f"-{args.hidden}" if args.op == "lora_linear" else ""))
    head = header(args, host)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    try:
        result = module.bench(args, say, lambda result: write(path, head | result))
    finally:
        bench_turns.ready()  # also where it failed: others may be waiting
    write(path, head | result | head)
    print_profiles(console, {row["variant"]: row["profile"] for row in result["rows"] if "profile" in row}, top=25)
    console.print(module.table(result, host["gpu"]))
    console.print(f"written to {path}", highlight=False)
    return all("error" not in row for row in result["rows"])


def main() -> int:
    args = parse()
    return 0 if (bench_op(args) if args.op else bench_models(args)) else 1


if __name__ == "__main__":
    sys.exit(main())
