#!/usr/bin/env python3
"""All benchmarks that the README's tables of speed and memory are drawn from, in the fewest minutes on one GPU.

    python tools/measure.py --out tools/results            # all groups, one after the other
    python tools/measure.py nf4 documents --out tools/results && python tools/results_table.py --write

The benchmarks of a group compile side by side and are timed in turn (bench_turns.py), so what is compared within a group ran on the same machine in the same
minutes. A group holds what fits side by side in 139 GiB of GPU memory and 16 cores: at most four models of 8 B parameters in bf16. Files are named after the
date and the benchmark. Exit status 1 where a benchmark failed, or where a loss or gradient norm is not the reference system's to 1 % (bench.py says which).
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import bench  # noqa: E402
import bench_turns  # noqa: E402

#: group -> name of the file -> arguments of bench.py
GROUPS: dict[str, dict[str, str]] = {
    "bf16": {"llama8b": "--preset llama8b --systems inductor,unsloth,fastft --profile"},
    "nf4": {
        "llama8b-nf4": "--preset llama8b --quant nf4 --systems inductor,unsloth,fastft --steps 8 --warmup 2",
        "llama8b-beside-nf4": "--preset llama8b --systems fastft --steps 8 --warmup 2",
    },
    "documents": {
        "llama8b-packed": "--preset llama8b --documents packed --lengths topics --systems unsloth,fastft --steps 8 --warmup 2",
        "llama8b-padded": "--preset llama8b --documents padded --lengths topics --systems fastft --steps 8 --warmup 2",
    },
    "long": {
        "llama8b-1x8192": "--preset llama8b --batch 1 --seq 8192 --systems eager,fastft --steps 8 --warmup 2",
        "llama1b-4x2048": "--preset llama1b --batch 4 --seq 2048 --systems inductor,fastft --steps 20 --profile",
        "llama1b-4x2048-dropout": "--preset llama1b --batch 4 --seq 2048 --dropout 0.05 --systems fastft --steps 20",
    },
    "small": {
        "llama1b-2x1024": "--preset llama1b --systems inductor,fastft --steps 40 --warmup 5",
        "llama1b-packed": "--preset llama1b --batch 4 --seq 2048 --documents packed --systems fastft,unsloth --steps 15 --warmup 2",
        "llama1b-padded": "--preset llama1b --batch 4 --seq 2048 --documents padded --systems fastft --steps 12 --warmup 2",
    },
    "fp8": {
        "llama8b-fp8": "--preset llama8b --systems fastft,fastft-fp8 --steps 8 --warmup 2 --profile",
        "llama8b-padding": "--preset llama8b --padding 0.3 --systems fastft --steps 8 --warmup 2",
    },
    "loss": {"op-linear_cross_entropy": "--op linear_cross_entropy --steps 6 --warmup 2"},
    "operations": {
        "op-lora_linear-4096": "--op lora_linear --hidden 4096 --steps 20",
        "op-lora_linear-2048": "--op lora_linear --hidden 2048 --steps 20",
        "op-attention": "--op attention --batch 4 --seq 2048 --steps 4",
        "op-dequantize": "--op dequantize",
    },
    "attention": {"op-attention-long": "--op attention --overlap"},
}


def processes(arguments: str) -> int:
    """How many processes of a benchmark take a turn."""
    args = bench.parse(shlex.split(arguments))
    if args.op:
        return 1
    cuda = bench.machine()["gpu"] != "no GPU"
    return sum(bench.unavailable(system, args, cuda) is None for system in args.systems.split(","))


def measure(group: str, out: Path, extra: list[str]) -> bool:
    """Runs a group; True where all of it went well."""
    runs = {name: shlex.join([*shlex.split(arguments), *extra]) for name, arguments in GROUPS[group].items()}
    with tempfile.TemporaryDirectory(prefix="fastft-measure-") as scratch:
        env, running = dict(os.environ), []
        if len(runs) > 1:  # one alone knows its own number
            env[bench_turns.VARIABLE] = f"{scratch}/turns:{sum(map(processes, runs.values()))}"
        for name, arguments in runs.items():
            file = out / f"{datetime.date.today():%Y-%m-%d}-{name}.json"
            overlap = [] if "--op" in arguments else ["--overlap"]
            command = [sys.executable, str(HERE / "bench.py"), *shlex.split(arguments), *overlap, "--out", str(file)]
            running.append((name, subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)))
        failed = []
        for name, process in running:
            text, _ = process.communicate()
            print(f"== {group}: {name}\n{text}", flush=True)
            failed += [name] if process.returncode else []
    if failed:
        print(f"== {group}: failed, or not the reference's loss: {', '.join(failed)}", flush=True)
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)} (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    args, extra = parser.parse_known_args()
    if unknown := set(args.groups) - set(GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}; choose from {', '.join(GROUPS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    return 0 if all([measure(group, args.out, extra) for group in args.groups or GROUPS]) else 1


if __name__ == "__main__":
    sys.exit(main())
