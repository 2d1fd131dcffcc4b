"""What fastft did to each compiled graph: rewrites applied, candidates missed and why.

One `Report` is made for each graph that `torch.compile` hands to the backend, on a warm start too.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Rewrite:
    """One canonical op put into the graph: the module paths it replaces and where the model calls them."""

    pass_name: str
    op: str
    provider: str
    fqn: list[str]
    source: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "pass": self.pass_name,
            "op": self.op,
            "provider": self.provider,
            "fqn": self.fqn,
            "source": self.source,
        }


@dataclasses.dataclass
class MissRow:
    """One candidate left as it was, with a short fixed reason."""

    pass_name: str
    reason: str
    fqn: list[str]
    source: str

    def to_dict(self) -> dict[str, Any]:
        return {"pass": self.pass_name, "reason": self.reason, "fqn": self.fqn, "source": self.source}


@dataclasses.dataclass
class PassRun:
    """One run of a pass: its time and the operations it added (+) or removed (-)."""

    name: str
    seconds: float
    op_diff: dict[str, int]


@dataclasses.dataclass
class Report:
    """The rewrites of one compiled graph.

    Attributes:
        nodes_before, nodes_after: nodes of the graph and its subgraphs.
        rewrites, misses: what the passes did and what they left, in graph order.
        passes: every pass with its seconds and its change in operation counts.
        rewrite_seconds: the graph passes, with keeping the graph for the case that one fails and with the new code.
        compile_seconds: the whole backend call: rewriting, AOTAutograd and Inductor.
        dropped: rewrites taken back because a pass, a lowering or a kernel raised: `(name, error)`.
        logits: "deferred", "materialized: why" where they must not be, or None where no logits of this graph could be.
        memory_plan: what the memory planner chose, or None where it did not run.
    """

    nodes_before: int = 0
    nodes_after: int = 0
    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    misses: list[MissRow] = dataclasses.field(default_factory=list)
    passes: list[PassRun] = dataclasses.field(default_factory=list)
    rewrite_seconds: float = 0.0
    compile_seconds: float = 0.0
    dropped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    logits: str | None = None
    memory_plan: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The graph entry of the JSON contract that `tools/inspect_graph.py --json` prints."""
        dropped = [MissRow(name, f"dropped: {error}", [], "") for name, error in self.dropped]
        return {
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "rewrites": [row.to_dict() for row in self.rewrites],
            "misses": [row.to_dict() for row in self.misses + dropped],
            "logits": self.logits,
            "memory_plan": self.memory_plan,
        }


_reports: list[Report] = []


def reports() -> list[Report]:
    """The reports of all graphs compiled in this process since the last `reset`, oldest first."""
    return list(_reports)


def reset() -> None:
    """Forgets all reports. Compiled graphs stay as they are."""
    _reports.clear()


def record(report: Report) -> None:
    """Appends a report; called by the backend."""
    _reports.append(report)
