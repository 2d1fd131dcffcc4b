"""Where a benchmark's figures go: what every JSON file begins with, and how it is named."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_systems import source_hash, versions

FOLDER = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        name, driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {"gpu": "no GPU"}
    return {"gpu": name, "driver": driver}


def out_path(args: argparse.Namespace, what: str) -> Path:
    """`--out`, or a name under tools/results/ that is still free."""
    if args.out:
        return args.out
    stem = f"{datetime.date.today()}-{'tiny-' if args.tiny else ''}{what}"
    free = (FOLDER / f"{stem}{suffix}.json" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(path for path in free if not path.exists())


def header(args: argparse.Namespace, host: dict[str, str]) -> dict[str, Any]:
    return {
        "schema": 1,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        **host,
        "versions": {"python": sys.version.split()[0], **versions()},
        "fastft_sources": source_hash(),
        "arguments": {key: value for key, value in vars(args).items() if key != "out"},
    }


def write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
