"""documents: what does not know that a row holds several documents.

Attention over packed sequences keeps documents apart (`documents` in its mask). Convolutions, recurrences and linear attention of the same model run on across
their boundaries, in eager as here: a document sees the end of the one before it. The graph stays as it is; each such module is a Miss that says so.
"""

import re

from torch.fx import GraphModule

from fastft import match
from fastft.kernels import attention as kernel
from fastft.match import value
from fastft.passes.token_mixing import mixing
from fastft.result import Match, Miss

LEAK = "packed documents see each other here: a convolution, recurrence or linear attention"

_DOCUMENTS = re.compile(r"(t\d+\[[^][]*)\bkv\] == \1q\]|(t\d+\[[^][]*)\bq\] == \2kv\]")


def documents(gm: GraphModule) -> list[Match | Miss]:
    if match.calls(gm):  # bodies are handled with the graph around them
        return []
    calls = [node for body in match.graph_modules(gm) for node in body.graph.nodes if node.target is kernel.op]
    calls = [node for node in calls if _DOCUMENTS.search(kernel.get(node, "allowed"))]
    if not calls:
        return []
    shape = value(kernel.get(calls[0], "q")).shape
    found = {match.module_path(node): node for node in reversed(list(mixing(gm, (shape[0], shape[2]))))}
    return [Miss(LEAK, node) for node in reversed(found.values())]
