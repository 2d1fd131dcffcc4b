"""Every kernel of the first step has been compiled while Inductor lowered."""

import collections
import sys
import threading

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import tiny
from torch._inductor.utils import fresh_cache
from triton.runtime.jit import JITFunction

from fastft.kernels import warmup


@pytest.mark.skipif(not warmup.SAFE, reason="not before Python 3.11.8")
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("quantized", [False, True], ids=["bf16", "nf4"])
def test_the_first_step_compiles_nothing(monkeypatch, quantized, dropout):
    """4096 rows, so that every kernel is used."""
    ahead, late, compile_ = [], [], JITFunction._do_compile

    def do_compile(self, *args, **kwargs):
        if self.__module__.startswith("fastft."):
            (ahead if threading.current_thread().name.startswith("fastft-compile") else late).append(self.__name__)
        return compile_(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    kernels = {
        value
        for name, module in list(sys.modules.items())
        if name.startswith("fastft.kernels.")
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }
    for kernel in kernels:  # nothing of tests before
        monkeypatch.setattr(kernel, "device_caches", collections.defaultdict(kernel.create_binder))
    model = tiny.tiny_model("llama", dtype=torch.bfloat16, seq=1024)
    model = tiny.add_lora(tiny.quantize(model) if quantized else model, r=8, alpha=16, dropout=dropout).cuda().train()
    batch = {name: tensor.cuda() for name, tensor in tiny.tiny_batch(model.config, batch=4, seq=1024).items()}
    with fresh_cache():  # a hit leaves out the passes, and Triton's own cache is warm then
        torch.compile(model, backend="fastft", options={"strict": True})(**batch).loss.backward()
        torch.cuda.synchronize()
    gradients = "dropped_grad_kernel" if dropout else "low_rank_kernel"
    assert {"lora_grads_kernel", gradients, "gated_kernel", "gated_backward_kernel"} <= set(ahead) and not late, (ahead, late)
