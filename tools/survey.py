"""Every type that transformers registers for a task under a `torch.compile` backend: does it train, are its gradients right, is LoRA rewritten?

    python tools/survey.py --out survey.jsonl [--task masked-lm] [--batch padded] [--only llama,qwen3] [--jobs 2] [--backend inductor] [--markdown gaps.md]

Each type is a tiny random model (tools/tiny.py) with LoRA on all its linears, trained for one step in fp32 on the CPU:
eager, float64 (fastft/contract.py), then compiled. One JSON line a type; types already in --out are skipped, so an
interrupted survey goes on where it stopped. Each type runs in its own process, forked from a parent that has imported
everything and compiled a toy (saves about 10 s a type), with a time limit and a memory limit.

`--codegen aten` (the default) sets Inductor's public option `fallback_by_default`: the whole compiler runs (Dynamo,
AOTAutograd, fastft's rewrites, partitioner, lowering, memory planning) but kernels are ATen calls instead of generated
C++, whose compilation is four fifths of the time (2-layer Llama, two cores: 12 s instead of 55 s). `--codegen cpp` tests the
generated kernels too and keeps compiled ones in `--cache` (26 for Llama, 1 more for Mistral: 22 to 37 s a type).
In torch 2.13 that option is itself wrong for some models (inkling2_text: every gradient, under plain Inductor too, with
generated C++ right), so a type that does not train or breaks the contract with `aten` is run again with `cpp`, which counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "HF_HUB_OFFLINE": "1"}

PREFIX = "base_model.model."


def survey_type(model_type: str, args: argparse.Namespace, save: Callable[[dict], Any]) -> dict[str, Any]:
    """The row of one type; whatever raises ends up in its `error`, with the stage in front. `save` gets it when eager is done."""
    import torch
    from fastft._torch import counters

    import tiny
    import tiny_tasks
    from fastft import contract

    row = {
        "type": model_type,
        "task": args.task,
        "batch": args.batch,
        "backend": args.backend,
        "built": False,
        "trains_eager": False,
        "trains_fastft": False,
        "graphs": 0,
    }
    row |= {"graph_breaks": [], "lora_linears": 0, "lora_unused": 0, "rewritten": 0, "missed": [], "worst": None, "contract_ok": False}
    row |= {"seconds": 0.0, "error": None}
    started, stage = time.time(), "build"
    try:
        model = tiny.add_lora(tiny.tiny_model(model_type, seq=args.seq, task=args.task)).train()
        batch = tiny_tasks.batch(model.config, args.task, tiny.tiny_batch(model.config, seq=args.seq))
        batch = getattr(tiny_tasks, args.batch)(batch) if args.batch in ("padded", "packed") else batch
        if args.batch == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        row["built"], stage = True, "eager"
        eager = contract.gradients(model, batch)
        if bad := [n for n, g in eager.items() if not g.isfinite().all()]:
            raise ValueError(f"not finite: {bad[0]} and {len(bad) - 1} more")
        row["trains_eager"], stage = True, "float64"
        owners = [n for n, m in model.named_modules() if len(getattr(m, "lora_A", ()))]
        linears = [n for n in owners if any(k.startswith(n + ".lora_A.") for k in eager)]  # the others are never called
        row |= {"lora_linears": len(linears), "lora_unused": len(owners) - len(linears)}
        reference = contract.float64_reference(model, batch)
        save(row)
        stage = "compile"
        counters.clear()
        candidate = contract.gradients(torch.compile(model, backend=args.backend), batch)
        row["trains_fastft"] = all(g.isfinite().all() for g in candidate.values())
        row |= {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sorted(_short(k) for k in counters["graph_break"])}
        row |= {} if args.backend != "fastft" else _rewrites([n.removeprefix(PREFIX) for n in linears])
        stage = "compare"
        result = contract.compare(candidate, eager, reference, torch.float32)
        for runs in (4, 16):  # as contract.check does: one eager run alone is no proof
            if all(r.why != "error" for r in result.rows):
                break
            spread = contract.eager_spread(model, batch, runs=runs)
            result = contract.compare(candidate, eager, reference, torch.float32, spread=spread)
        worst = result.worst
        row["worst"] = {"name": worst.name, "error": worst.error, "eager_error": worst.eager_error, "allowed": worst.allowed}
        row["contract_ok"] = result.ok
        if not result.ok:
            row["error"] = f"contract: {len(result.failures)} of {len(result.rows)} gradients: {worst}"
    except Exception as error:  # noqa: BLE001 - a survey reports every failure
        row["error"] = f"{stage}: {type(error).__name__}: {_short(str(error))}"
    row["seconds"] = round(time.time() - started, 1)
    return row


def _short(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3])[:300]


def _rewrites(linears: list[str]) -> dict[str, Any]:
    """What `fastft.reports()` says about these modules."""
    import fastft

    reports = [r.to_dict() for r in fastft.reports()]
    done = {f for r in reports for w in r["rewrites"] if "lora" in w["pass"] for f in w["fqn"]}
    reasons = {f: m["reason"] for r in reports for m in r["misses"] if "lora" in m["pass"] for f in m["fqn"]}
    other = "no graph" if not reports else "no candidate"
    # Where the graph breaks, a frame may start at an inner module, and its paths with it: `h.0.attn.q` for `transformer.h.0.attn.q`.
    tails = {f: [f.split(".", n)[-1] for n in range(f.count(".") + 1)] for f in linears}
    missed = [{"fqn": f, "reason": next((reasons[tail] for tail in tails[f] if tail in reasons), other)} for f in linears if not done.intersection(tails[f])]
    return {"rewritten": len(linears) - len(missed), "missed": missed}


def warm_up(backend: str, codegen: str) -> None:
    """Import everything and compile a toy, so that the forked children start warm."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import tiny  # noqa: F401
    from fastft import contract, reset  # noqa: F401
    from fastft._torch import inductor_config

    inductor_config.fallback_by_default = codegen == "aten"
    # compiled kernels are kept, but every graph goes through the whole compiler
    inductor_config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
    toy = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
    try:
        torch.compile(toy, backend=backend)(torch.randn(4, 8)).square().mean().backward()
    except Exception as error:  # noqa: BLE001
        print(f"warm-up: {type(error).__name__}: {_short(str(error))}", file=sys.stderr)
    torch._dynamo.reset()
    reset()


def _child(model_type: str, codegen: str, args: argparse.Namespace, answer: str, log: str) -> None:
    gc.disable()  # Dynamo allocates millions of small objects: a tenth of the time
    os.setsid()  # a group of its own, with the C++ compilers it starts
    Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_AS, (args.memory << 30, args.memory << 30))
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    from fastft._torch import inductor_config

    inductor_config.fallback_by_default = codegen == "aten"
    row = survey_type(model_type, args, lambda row: Path(answer + ".part").write_text(json.dumps(row)))
    Path(answer).write_text(json.dumps(row))
    os._exit(0)


def run_all(types: list[str], args: argparse.Namespace) -> None:
    """Children for `types`, at most --jobs at a time; a line to --out as each ends."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no threads in the parent: it forks
    context, running = get_context("fork"), {}
    scratch = Path(tempfile.mkdtemp(prefix="fastft-survey-"))
    waiting, bar = [(name, args.codegen) for name in types], tqdm(total=len(types), unit="type", smoothing=0)
    while waiting or running:
        while waiting and len(running) < args.jobs:
            name, codegen = waiting.pop(0)
            answer, log = scratch / f"{name}.json", scratch / f"{name}.log"
            process = context.Process(target=_child, args=(name, codegen, args, str(answer), str(log)))
            process.start()
            running[name] = (process, codegen, answer, log, time.time())
        time.sleep(0.2)
        for name, (process, codegen, answer, log, started) in list(running.items()):
            late = time.time() - started > args.timeout
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            del running[name]
            if answer.exists():
                row = json.loads(answer.read_text())
                answer.unlink()
            else:
                last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
                why = f"time limit of {args.timeout} s" if late else f"process ended with {process.exitcode}: {' '.join(last)[:200]}"
                part = Path(f"{answer}.part")  # there if eager went through
                row = json.loads(part.read_text()) if part.exists() else {"type": name, "task": args.task, "batch": args.batch, "backend": args.backend}
                row |= {"error": why, "seconds": round(time.time() - started, 1)}
            if codegen == "aten" and args.backend != "aot_eager" and row.get("trains_eager", True) and not row.get("contract_ok"):
                waiting.append((name, "cpp"))
                continue
            with open(args.out, "a") as out:
                out.write(json.dumps(row | {"codegen": codegen}) + "\n")
            bar.set_postfix_str(name)
            bar.update()
    bar.close()


def main() -> None:
    import survey_report
    import tiny_tasks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="survey.jsonl", help="JSON lines, appended to")
    parser.add_argument("--task", choices=tiny_tasks.TASKS, default="causal-lm")
    parser.add_argument("--batch", choices=("plain", "padded", "packed", "checkpointed"), default="plain", help="other tasks' texts are padded anyway")
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--redo", action="store_true", help="also types that --out already holds")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--backend", default="fastft", help="fastft, inductor, aot_eager, ...")
    parser.add_argument("--codegen", choices=("aten", "cpp"), default="aten")
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir()) / "fastft-survey-kernels"), help="compiled C++ kernels")
    parser.add_argument("--seq", type=int, default=32, help="tokens a row; Mamba's scan is unrolled over them")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a type")
    parser.add_argument("--memory", type=int, default=16, help="GiB of address space a type")
    parser.add_argument("--markdown", help="write what is missing, with reasons, to this file")
    parser.add_argument("--report", action="store_true", help="run nothing, report on --out")
    args = parser.parse_args()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = args.cache

    types = list(tiny_tasks.registered(args.task))
    wanted = args.only.split(",") if args.only else types
    if unknown := set(wanted) - set(types):
        parser.error(f"no type of {args.task}: {', '.join(sorted(unknown))}")
    if args.task != "causal-lm" and args.batch in ("padded", "packed"):
        parser.error("--batch padded and packed are of causal-lm: the texts of other tasks are padded anyway")
    have = {r["type"]: r for r in _read(args)}
    todo = [] if args.report else [t for t in wanted if args.redo or t not in have]
    if todo:
        warm_up(args.backend, args.codegen)
        run_all(todo, args)
    rows = [r for t, r in sorted({r["type"]: r for r in _read(args)}.items()) if t in wanted]
    survey_report.show(rows)
    if args.markdown:
        Path(args.markdown).write_text(survey_report.markdown(rows))


def _read(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of --out that are of this task and batch."""
    rows = [json.loads(line) for line in Path(args.out).read_text().splitlines()] if Path(args.out).exists() else []
    return [row for row in rows if (row["task"], row["batch"]) == (args.task, args.batch)]


if __name__ == "__main__":
    main()
