"""A second process compiles nothing: AOTAutograd's cache hits, the report is the same. Changed options and sources miss.

Three Inductor compiles of a small model, and one of a quantized one: bitsandbytes' functions alone keep the cache from being used.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fastft import hooks, kernels, passes

SCRIPT = """
import json, sys
import torch
from torch import nn
from torch.nn import functional as F

import fastft
from fastft import _torch, hooks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for name, shape in {"W": (64, 64), "A": (4, 64), "B": (64, 4)}.items():
            for number in range(3):
                self.register_parameter(f"{name}{number}", nn.Parameter(torch.randn(shape) / 8))

    def linear(self, number, x):
        W, A, B = (getattr(self, f"{name}{number}") for name in "WAB")
        return F.linear(x, W) + F.linear(F.linear(x, A), B) * 2

    def forward(self, x):
        for number in range(3):
            x = F.gelu(self.linear(number, F.layer_norm(x, (64,)))) + x
        return x.softmax(-1).square().sum()


class Quantized(Block):
    def __init__(self):
        from bitsandbytes.nn import Linear4bit, Params4bit

        super().__init__()
        self.base = nn.ModuleList(Linear4bit(64, 64, False, torch.float32, quant_type="nf4", device="meta") for _ in range(3))
        for number, base in enumerate(self.base):
            base.weight = Params4bit(getattr(self, f"W{number}").data, quant_type="nf4", module=base)
            delattr(self, f"W{number}")
        self.base.to("cpu")

    def linear(self, number, x):
        return self.base[number](x) + F.linear(F.linear(x, getattr(self, f"A{number}")), getattr(self, f"B{number}")) * 2


def step(name, **options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    fastft.reset()
    _torch.counters.clear()
    model = Quantized() if name.startswith("quantized") else Block()
    loss = torch.compile(model, backend="fastft", options=options)(torch.randn(8, 64))
    loss.backward()
    (report,) = fastft.reports()
    cache = {key: _torch.counters["aot_autograd"][f"autograd_cache_{key}"] for key in ("hit", "miss", "bypass")}
    gradient = sum(parameter.grad.abs().sum() for parameter in model.parameters() if parameter.requires_grad)
    found = {"cache": cache, "graph": report.to_dict(), "seconds": report.compile_seconds, "gradient": gradient.item()}
    print(json.dumps({name: found}))


for name in sys.argv[1:]:
    if name == "source":
        hooks.source_hash = lambda: "another"
    step(name, **({"disable": ["accumulate_inplace"]} if name == "option" else {}))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each compile found: `cold` in one process, the others after one another in a second one."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")), "OMP_NUM_THREADS": "1"}
    found = {}
    for names in (["cold", "quantized cold"], ["warm", "quantized warm", "option", "source"]):
        run = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, timeout=500, env=env)
        assert run.returncode == 0, run.stderr[-3000:]
        for line in run.stdout.splitlines():
            found |= json.loads(line)
    return found


@pytest.mark.parametrize("model", ["", "quantized "])
def test_second_process_hits(model, runs):
    assert runs[f"{model}cold"]["cache"] == {"hit": 0, "miss": 1, "bypass": 0}
    assert runs[f"{model}warm"]["cache"] == {"hit": 1, "miss": 0, "bypass": 0}


@pytest.mark.parametrize("model, passes", [("", ["lora_linear"] * 3), ("quantized ", ["quant_linear"] * 3 + ["lora_linear"] * 3)])
def test_report_is_the_same(model, passes, runs):
    cold, warm = runs[f"{model}cold"], runs[f"{model}warm"]
    assert warm["graph"] == cold["graph"]
    assert [row["pass"] for row in warm["graph"]["rewrites"]] == passes and not warm["graph"]["misses"]
    assert warm["gradient"] == cold["gradient"]


def test_warm_is_three_times_faster(runs):
    assert runs["cold"]["seconds"] > 3 * runs["warm"]["seconds"], (runs["cold"]["seconds"], runs["warm"]["seconds"])


@pytest.mark.parametrize("change", ["option", "source"])
def test_changes_miss(change, runs):
    assert runs[change]["cache"] == {"hit": 0, "miss": 1, "bypass": 0}


def test_source_hash_covers_every_file(monkeypatch):
    """A changed pass, kernel or lowering changes the hash."""
    read, opened, changed = pathlib.Path.read_bytes, set(), b""

    def read_bytes(path):
        opened.add(path.resolve())
        return read(path) + (changed if path.parts[-2:] == ("kernels", "lora_linear.py") else b"")

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    first = hooks.source_hash.__wrapped__()
    changed = b"# another line"
    assert hooks.source_hash.__wrapped__() != first
    folders = {pathlib.Path(module.__file__).resolve().parent for module in (hooks, kernels, passes)}
    assert opened == {file for folder in folders for file in folder.glob("*.py")}
