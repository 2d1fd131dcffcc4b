"""`--overlap`: systems build and compile at the same time, and are timed one after the other, each with the machine to itself.

Compiling keeps one core busy for minutes and the GPU idle. Every process goes through its first and its warm-up steps, waits until all others have too, and
then takes its turn. First-step seconds mean nothing then, and all systems' memory must fit side by side.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")

VARIABLE = "FASTFT_BENCH_TURNS"  # FOLDER:PROCESSES, the same for all; set by bench.py, or by hand for several bench.py at once


def _turns(value: str | None = None) -> tuple[Path, int] | None:
    folder, _, processes = (os.environ.get(VARIABLE, "") if value is None else value).rpartition(":")
    return (Path(folder), int(processes)) if folder else None


def ready(value: str | None = None, pid: int | None = None) -> None:
    """This process, or another one whose VARIABLE had `value`, keeps no other one waiting any longer."""
    if turns := _turns(value):
        turns[0].mkdir(parents=True, exist_ok=True)
        (turns[0] / f"ready-{pid or os.getpid()}").touch()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Waits for all processes to be ready, and then for this one's turn."""
    if not (turns := _turns()):
        yield
        return
    ready()
    folder, processes = turns
    while len(list(folder.glob("ready-*"))) < processes:
        time.sleep(0.2)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def shuffled(variants: Iterable[Item], turn: int) -> list[Item]:
    """The variants of one process in another order each turn: the GPU is cooler after some of them than after others, and each must follow each.

    In a fixed order the bare GEMMs of `--op linear_cross_entropy` ran on a card that a slow peer had let cool, and fastft took 1.15 of their time instead of 1.08.
    """
    items = list(variants)
    return random.Random(turn).sample(items, len(items))


def one_size_each(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The same command once for each size, compiling at once and timed in turn; the results in one."""
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as scratch:
        env = dict(os.environ, **{VARIABLE: f"{scratch}/turns:{len(sizes)}"})
        outs = [Path(scratch, f"{batch}x{seq}.json") for batch, seq in sizes]
        runs = [
            subprocess.Popen([sys.executable, *sys.argv, "--batch", str(batch), "--seq", str(seq), "--out", str(out)], env=env)
            for (batch, seq), out in zip(sizes, outs, strict=True)
        ]
        for run in runs:
            run.wait()
        results = [json.loads(out.read_text()) for out in outs]
    return {**results[0], "rows": [row for result in results for row in result["rows"]]}
