"""What a survey's rows say: totals, and for each type what is missing and why, as tables and as Markdown."""

from __future__ import annotations

from collections import Counter
from typing import Any


def gap(row: dict[str, Any]) -> tuple[str, str] | None:
    """(what is missing, why) of a row, None where nothing is."""
    if not row.get("trains_eager"):
        return "does not train in eager", row["error"] or ""
    if not row.get("trains_fastft") or not row.get("contract_ok"):
        return "does not train compiled" if not row.get("trains_fastft") else "gradients outside the contract", row["error"] or "not finite"
    if row.get("missed"):
        reasons = Counter(m["reason"] for m in row["missed"])
        return f"{len(row['missed'])} of {row['lora_linears']} LoRA linears not rewritten", "; ".join(f"{r} ({n})" for r, n in reasons.most_common())
    return None


def summary(rows: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """(what, count, out of)."""
    eager = [r for r in rows if r.get("trains_eager")]
    linears = sum(r["lora_linears"] for r in eager)
    return [
        ("types built", sum(bool(r.get("built")) for r in rows), len(rows)),
        ("types that train in eager", len(eager), len(rows)),
        ("of those, train compiled", sum(bool(r.get("trains_fastft")) for r in eager), len(eager)),
        ("of those, with every gradient in the contract", sum(bool(r.get("contract_ok")) for r in eager), len(eager)),
        ("of those, as one graph", sum(r.get("graphs") == 1 for r in eager), len(eager)),
        ("LoRA linears rewritten", sum(r["rewritten"] for r in eager), linears),
        ("types with every LoRA linear rewritten", sum(r["rewritten"] == r["lora_linears"] for r in eager), len(eager)),
    ]


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    totals, gaps = (
        Table("", "count", "of", "%", title=f"survey, {sum(r['seconds'] for r in rows) / max(len(rows), 1):.1f} s a type"),
        Table("type", "missing", "why"),
    )
    for what, count, total in summary(rows):
        totals.add_row(what, str(count), str(total), f"{100 * count / max(total, 1):.1f}")
    for row in rows:
        if found := gap(row):
            gaps.add_row(row["type"], *found)
    console = Console(markup=False)
    console.print(totals)
    console.print(gaps)


def markdown(rows: list[dict[str, Any]]) -> str:
    """What is missing, with reasons."""
    lines = ["| | count | of | % |", "|---|---|---|---|"]
    lines += [f"| {what} | {count} | {total} | {100 * count / max(total, 1):.1f} |" for what, count, total in summary(rows)]
    lines += ["", "| type | missing | why |", "|---|---|---|"]
    lines += [f"| {row['type']} | {found[0]} | {found[1].replace('|', '/')} |" for row in rows if (found := gap(row))]
    breaks = [f"| {row['type']} | {row['graphs']} | {'; '.join(row['graph_breaks']).replace('|', '/')} |" for row in rows if row.get("graphs", 1) > 1]
    return "\n".join(lines + ["", "| type | graphs | breaks |", "|---|---|---|"] + breaks) + "\n"
