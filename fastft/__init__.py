"""fastft: a `torch.compile` backend that makes fine-tuning transformers faster and smaller.

    model = torch.compile(model, backend="fastft")

Nothing has to be imported for that: PyTorch finds the backend through the `torch_dynamo_backends` entry point.
`fastft.reports()` tells what was rewritten, `fastft.explain(model, **inputs)` why something was not.
"""

__version__ = "0.1.0"

from fastft.report import Report, reports, reset

__all__ = ["Report", "__version__", "explain", "fastft", "reports", "reset"]


def __getattr__(name: str):
    # The backend imports Inductor (about a second): only where it is used.
    if name == "fastft":
        from fastft.backend import fastft

        return fastft
    if name == "explain":
        from fastft.explain import explain

        return explain
    raise AttributeError(f"module 'fastft' has no attribute {name!r}")
