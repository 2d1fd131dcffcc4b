#!/usr/bin/env python3
"""The tables of README.md, from the whole-model results that tools/bench.py writes.

    python tools/results_table.py            # print
    python tools/results_table.py --write    # put them between the markers in README.md
    python tools/results_table.py --check    # exit status 1 where README.md is out of date

One table for each setup (model, batch, quantization, adapters, recomputation, fastft's options, GPU) and choice of systems, from the newest file that measured it.
Smoke tests (--tiny), runs without a GPU, single operations (--op) and other JSON files are left out. A system measured in several rounds stands
there with the median of its rounds and the first step of its first round, the cold one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
EMPTY = "No measurements yet."
#: what of `spec` makes a setup
SETUP = "arch|config|batch|seq|quant|rank|alpha|dropout|adapter_dtype|autocast|checkpointing|options|padding|documents|lengths".split("|")


def load(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The newest whole-model result of each setup, in order of model name and setup."""
    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or "systems" not in document or "spec" not in document:
            continue
        if document["spec"].get("tiny") or document.get("gpu", "no GPU") == "no GPU":
            continue
        if not any("ms" in row for row in document["systems"]):
            continue
        systems = sorted({row["system"] for row in document["systems"]})
        setup = json.dumps([document["gpu"], systems, *(document["spec"].get(key) for key in SETUP)], sort_keys=True)
        if setup not in newest or document["date"] > newest[setup][1]["date"]:
            newest[setup] = path, document
    return sorted(newest.values(), key=lambda item: (item[1]["arguments"]["preset"], item[1]["date"]))


def merge(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """system -> its rounds as one row, in the order of the first."""
    merged: dict[str, dict[str, Any]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        rounds = [row for row in rows if row["system"] == system]
        timed = [row for row in rounds if "ms" in row]
        if not timed:
            merged[system] = {"missing": rounds[0].get("skipped") or "failed: " + str(rounds[0].get("error"))}
            continue
        merged[system] = {key: statistics.median(row[key] for row in timed) for key in ("ms", "tokens_per_s", "peak_gib", "weights_gib")}
        merged[system] |= {
            "first_step_s": timed[0]["first_step_s"],
            "rounds": len(timed),
            "flags": [flag for row in timed for flag in row.get("flags", ())],
        }
    return merged


def table(path: Path, document: dict[str, Any]) -> str:
    return "\n\n".join([heading(document), rows_table(document), footnotes(path, document)])


def heading(document: dict[str, Any]) -> str:
    spec = document["spec"]
    dropout = f", dropout {spec['dropout']:g}" if spec["dropout"] else ""
    facts = [
        f"**{document['arguments']['preset']}**",
        f"{spec['config']['num_hidden_layers']} layers",
        f"batch {spec['batch']} x {spec['seq']}{batch_form(spec)}",
        f"LoRA r={spec['rank']} ({spec['adapter_dtype']}{dropout})" + (f" on {spec['quant'].upper()}" if spec.get("quant") else ""),
        "every layer recomputed" if spec["checkpointing"] else "nothing recomputed",
    ]
    if spec.get("autocast"):
        facts.append("autocast")
    if spec.get("options"):
        facts.append(f"fastft with `options={spec['options']!r}`")
    return ", ".join(facts)


def batch_form(spec: dict[str, Any]) -> str:
    if spec.get("documents"):
        return f", documents {spec['documents']}" + ", as long as the topics of `make demo`" * bool(spec.get("lengths"))
    return "" if spec.get("padding") is None else f", {spec['padding']:.0%} padding"


def rows_table(document: dict[str, Any]) -> str:
    systems = merge(document["systems"])
    base = systems.get("inductor", {}).get("ms")
    lines = ["| system | ms/step | tokens/s | against Inductor | peak GiB (weights) | first step, s |", "|---|---|---|---|---|---|"]
    for system, row in systems.items():
        if "missing" in row:
            lines.append(f"| {system} | {cell(row['missing'])} | | | | |")
            continue
        name = f"{system} (see below)" if row["flags"] else system
        ratio = f"{base / row['ms']:.2f} x" if base else ""
        memory = f"{row['peak_gib']:.1f} ({row['weights_gib']:.1f})"
        first = "" if document["arguments"].get("overlap") else f"{row['first_step_s']:.0f}"
        lines.append(f"| {name} | {row['ms']:.1f} | {row['tokens_per_s']:,.0f} | {ratio} | {memory} | {first} |")
    return "\n".join(lines)


def footnotes(path: Path, document: dict[str, Any]) -> str:
    systems = merge(document["systems"])
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    lines = [f"{document['gpu']}, driver {document.get('driver', '?')}, {document['date'][:10]}; {versions}."]
    rounds = max(row.get("rounds", 1) for row in systems.values())
    if rounds > 1:
        lines.append(f"Median of {rounds} rounds.")
    for system, row in systems.items():
        if row.get("flags"):
            lines.append(f"{system}, first step: {cell('; '.join(dict.fromkeys(row['flags'])))}.")
    if document["arguments"].get("overlap"):
        lines.append("Compiled side by side, so first steps are not shown; timed one after the other.")
    lines.append(f"`{document['command']}`, in [tools/results/{path.name}](tools/results/{path.name})")
    return "\n".join(lines)


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:200]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "tools" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    body = "\n\n".join(table(path, document) for path, document in load(args.results)) or EMPTY
    if not (args.write or args.check):
        print(body)
        return 0
    text = args.readme.read_text()
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    new = f"{before}{BEGIN}\n{body}\n{END}{after}"
    if args.write:
        args.readme.write_text(new)
    elif new != text:
        print(f"{args.readme.name} does not show what {args.results} holds: run tools/results_table.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
