"""Compiles a Triton kernel for GPUs that are not there and reads what it needs."""

import pathlib
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Compute capability and the shared memory that one block may use.
TARGETS = [(80, 163 << 10), (86, 99 << 10), (89, 99 << 10), (90, 227 << 10), (100, 227 << 10), (120, 99 << 10)]


def resources(kernel, types: dict[str, str | tuple[str, ...]], constants: dict, capability: int, **options) -> dict[str, int]:
    """Registers, spilled bytes and shared memory of `kernel`, all pointers and sizes taken as multiples of 16.

    Args:
        types: the Triton type of every argument that is not a constant, "*bf16" or "i32"; of a tuple a tuple.
        options: num_warps, num_stages.
    """
    places = {name: (kernel.arg_names.index(name),) for name in types}
    paths = [place + at for name, place in places.items() for at in ([()] if isinstance(types[name], str) else [(i,) for i in range(len(types[name]))])]
    aligned = {path: [["tt.divisibility", 16]] for path in paths}
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    # cuobjdump comes with Triton
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", out)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spilled": stack + local, "shared": compiled.metadata.shared}
