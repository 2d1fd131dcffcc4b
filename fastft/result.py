"""What a pass returns: for each candidate either a `Match` or a `Miss`, never nothing."""

import dataclasses

from torch.fx import Node


@dataclasses.dataclass(frozen=True)
class Match:
    """A canonical op put into the graph for `nodes` (one a module replaced)."""

    op: str
    provider: str
    nodes: list[Node]


@dataclasses.dataclass(frozen=True)
class Miss:
    """A candidate left as it was; `reason` is one of the pass's fixed strings."""

    reason: str
    node: Node
