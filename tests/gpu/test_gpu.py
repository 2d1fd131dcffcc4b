"""What only a GPU can show: the kernels as they run there, and whole models through Inductor's Triton code."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import tiny
from conftest import ROOT  # noqa: F401

import fastft
from fastft.kernels import dropout as masks
from fastft.kernels import gated, lora_grads, lora_linear, low_rank, low_rank_dropout

BF16 = torch.bfloat16


GROUPS = [
    (8192, (4096,), (16,)),
    (4097, (1000,), (5,)),
    (8192, (1024,), (64,)),
    (33, (64,), (1,)),
    (8192, (2048, 512, 512), (16, 16, 16)),
    (4097, (1000, 64), (8, 8)),
    (4096, (300, 4096, 128), (16, 32, 3)),
]


def operands(m, widths, ranks):
    dy = [torch.randn(m, n, device="cuda", dtype=BF16) for n in widths]
    b = [torch.randn(n, r, device="cuda", dtype=BF16) for n, r in zip(widths, ranks, strict=True)]
    return dy, torch.randn(m, sum(ranks) + 8, device="cuda", dtype=BF16)[:, : sum(ranks)], b


@pytest.mark.parametrize("m, widths, ranks", GROUPS)
def test_lora_grads(m, widths, ranks):
    dy, s, b = operands(m, widths, ranks)
    ds, db = (parts.sum(0) for parts in lora_grads.lora_grads(dy, s, b))
    db = db.split([matrix.numel() for matrix in b])
    for y, part, matrix, ds_i, db_i in zip(dy, s.split(ranks, 1), b, ds.split(ranks, 1), db, strict=True):
        for got, want in ((ds_i, y.double() @ matrix.double()), (db_i.view_as(matrix), y.double().t() @ part.double())):
            assert (got - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize("m, widths, ranks", GROUPS)
def test_siblings_are_what_they_are_alone(m, widths, ranks):
    """Bit by bit where the ranks are equal, so that the tiles are."""
    dy, s, b = operands(m, widths, ranks)
    biases = [torch.randn(n, device="cuda", dtype=BF16) if i % 2 else None for i, n in enumerate(widths)]
    outs = low_rank.low_rank_mms(s, [matrix.t() for matrix in b], biases)
    ds, db = lora_grads.lora_grads(dy, s, b)
    db = db.split([matrix.numel() for matrix in b], 1)
    for i, (y, part, matrix, bias) in enumerate(zip(dy, s.split(ranks, 1), b, biases, strict=True)):
        want = low_rank.reference(part.double(), matrix.t().double(), None if bias is None else bias.double())
        assert (outs[i] - want).norm() / want.norm() < 3e-3
        if len(set(ranks)) == 1:
            ds_alone, db_alone = lora_grads.lora_grads([y], part, [matrix])
            assert torch.equal(ds.split(ranks, 2)[i][: len(ds_alone)], ds_alone) and torch.equal(db[i], db_alone)
            assert torch.equal(outs[i], low_rank.low_rank_mms(part, [matrix.t()], [bias])[0])


@pytest.mark.parametrize("ranks, dropout", [((16,), (0.0,)), ((16, 16, 16), (0.05, 0.05, 0.05)), ((8, 33), (0.0, 0.5))])
def test_low_rank_mm(ranks, dropout):
    m, n, total = 4099, 4096, sum(ranks)
    s, b = torch.randn(m, total, device="cuda", dtype=BF16), torch.randn(n, total, device="cuda", dtype=BF16).t()
    seeds = torch.randint(-(2**31), 2**31 - 1, (2, m), dtype=torch.int32, device="cuda")
    want = low_rank.reference_dropout(s.double(), b.double(), seeds, list(ranks), list(dropout))
    got = low_rank.low_rank_mm_dropout(s, b, seeds, list(ranks), list(dropout))
    assert torch.equal(got == 0, want == 0)
    assert (got - want).norm() / want.norm() < 3e-3
    bias = torch.randn(n, device="cuda", dtype=BF16)
    want = s.double() @ b.double() + bias.double()
    assert (low_rank.low_rank_mm(s, b, bias) - want).norm() / want.norm() < 3e-3


@pytest.mark.parametrize("m, n, ranks", [(8192, 14336, (16, 16, 16)), (4097, 1000, (3, 16, 32)), (64, 128, (1, 1, 1)), (513, 136, (5, 3, 1))])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
def test_gated(m, n, ranks, activation, dropout):
    p, q, r = ranks
    rand = lambda *shape: torch.randn(shape, device="cuda").to(BF16)  # noqa: E731
    s = rand(m, q + r + 4) / 4
    args = (rand(m, n), rand(m, n), s[:, : q + r], rand(n, q) / 4, rand(r, n).t() / 4)
    full = (rand(m, n), rand(m, p) / 4, rand(p, n) / 4, *args)
    seeds = torch.randint(-(1 << 31), 1 << 31, (1, m), dtype=torch.int32, device="cuda")
    rest = (activation, seeds, masks.columns(n, seeds.device), dropout)
    *grads, da = gated.gated_backward(*full, *rest)
    got = [gated.gated(*args, activation), *grads, da.sum(0)[None]]
    exact = lambda tensors: [tensor.double() for tensor in tensors]  # noqa: E731
    want = [gated.reference(*exact(args), activation), *gated.reference_backward(*exact(full), *rest)]
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() / other.norm() < 3e-3


def step(model, call, batch):
    model.zero_grad()
    loss = call(**batch).loss
    loss.backward()
    return {"loss": loss.detach().double()} | {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options, dropout", [({}, 0.0), ({"disable": ["lora_mlp"]}, 0.0), ({"pack_weights": True, "disable": ["lora_mlp"]}, 0.0), ({}, 0.1)])
def test_llama_trains_right(options, dropout):
    """4096 rows, so that every kernel is used; against float32 on the same weights and, with dropout, against its own masks."""
    torch._dynamo.reset()
    fastft.reset()
    model = tiny.add_lora(tiny.tiny_model("llama", dtype=BF16, seq=1024), r=8, alpha=16, dropout=dropout).cuda().train()
    batch = {k: v.cuda() for k, v in tiny.tiny_batch(model.config, batch=4, seq=1024).items()}
    compiled = torch.compile(model, backend="fastft", options={"strict": True, **options})
    torch.manual_seed(0)
    got = step(model, compiled, batch)
    providers = {row.provider for report in fastft.reports() for row in report.rewrites}
    assert any("one_read" in name for name in providers)
    assert any("k_extended" in name for name in providers) == ("pack_weights" in options)
    assert any("gated" in name for name in providers) == (not options)
    torch.manual_seed(0)
    again = step(model, compiled, batch)
    # The same seed gives the same masks. Attention's backward adds in any order: Inductor alone differs by 1.7e-4 from run to run.
    assert all((got[n] - again[n]).norm() <= 2e-3 * got[n].norm() for n in got)
    if dropout:
        return
    eager = step(model, model, batch)
    exact = step(model.float(), model, batch)
    for name, want in exact.items():
        error, plain = (got[name] - want).norm(), (eager[name] - want).norm()
        assert error <= 1.5 * plain + 4e-3 * want.norm(), (name, error / want.norm(), plain / want.norm())


def padded(model, seq, side):
    batch = {k: v.cuda() for k, v in tiny.tiny_batch(model.config, batch=2, seq=seq).items()} | {"attention_mask": torch.ones(2, seq, dtype=torch.long)}
    batch["attention_mask"][1, slice(seq * 2 // 3, None) if side == "right" else slice(0, seq // 4)] = 0
    batch["attention_mask"] = batch["attention_mask"].cuda()
    return batch | {"labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)}


def packed(model, seq):
    positions = torch.cat([torch.arange(seq // 3), torch.arange(seq - seq // 3)])[None].expand(2, -1)
    batch = {k: v.cuda() for k, v in tiny.tiny_batch(model.config, batch=2, seq=seq).items() if k != "attention_mask"}
    return batch | {"position_ids": positions.contiguous().cuda()}


@pytest.mark.parametrize(
    "arch, attention, kind",
    [
        ("llama", "sdpa", "cudnn: causal" if torch.cuda.get_device_capability()[0] in (9, 10) else "causal"),
        ("llama", "sdpa", "flex: causal, padding"),
        ("llama", "eager", "flex: causal, padding"),
        ("llama", "sdpa", "flex: causal, documents"),
        ("mistral", "sdpa", "flex: causal, window 16"),
        ("gemma2", "eager", "flex: causal, padding, softcap"),
        ("gpt_oss", "eager", "flex: causal, window 16, sinks"),
    ],
)
def test_attention_trains_right(arch, attention, kind):
    """A length that is no multiple of a tile; the eager model in float32 on the same weights is the measure."""
    model = tiny.tiny_model(arch, dtype=BF16, attn_implementation=attention, seq=300).cuda().train()
    if arch == "gpt_oss":  # a bf16 router sends tokens elsewhere after rounding: judge attention alone
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("self_attn" in name)
    side = "left" if attention == "eager" else "right"
    batch = padded(model, 300, side) if "padding" in kind else packed(model, 300) if "documents" in kind else packed(model, 300) | {"position_ids": None}
    torch._dynamo.utils.counters.clear()
    got = step(model, torch.compile(model, backend="fastft", options={"strict": True}), batch)
    cache = torch._dynamo.utils.counters["aot_autograd"]
    assert cache["autograd_cache_saved"] + cache["autograd_cache_hit"] == 1 and not cache["autograd_cache_bypass"]
    providers = [row.provider for report in fastft.reports() for row in report.rewrites if row.pass_name == "attention"]
    assert any(kind in provider for provider in providers) and len(providers) == 2
    eager, exact = step(model, model, batch), step(model.float(), model, batch)
    for name, want in exact.items():
        error, plain = (got[name] - want).norm(), (eager[name] - want).norm()
        assert error <= (3 if arch == "gpt_oss" else 1.5) * plain + 4e-3 * want.norm(), (name, error / want.norm(), plain / want.norm())


@pytest.mark.parametrize("kind", ["padding", "documents", "causal"])
def test_no_tensor_of_query_by_key(kind):
    """16384 tokens: a bool mask of the square alone would be 256 MiB. 128 tiles a side: a length at which sorting them did not compile (kernels/mask.py)."""
    model = tiny.tiny_model("llama", layers=1, dtype=BF16, seq=16384).cuda().train()
    batch = (
        padded(model, 16384, "right") if kind == "padding" else packed(model, 16384) if kind == "documents" else packed(model, 16384) | {"position_ids": None}
    )
    batch = {k: v if v is None else v[1:] for k, v in batch.items()}
    compiled = torch.compile(model, backend="fastft", options={"strict": True})
    step(model, compiled, batch)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(model, compiled, batch)
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20


@pytest.mark.parametrize(
    "m, k, ranks, dropout",
    [
        (8192, 2048, (16, 16, 16), (0.05, 0.05, 0.05)),
        (8192, 8192, (16,), (0.05,)),
        (4099, 1000, (8, 33), (0.0, 0.5)),
        (4097, 777, (64, 3, 64, 64), (0.1, 0.0, 0.0, 0.9)),  # two launches
        (33, 64, (1,), (0.3,)),
    ],
)
def test_products_under_dropout(m, k, ranks, dropout):
    """Slices, as the graph hands them over; of packed storage x is one too."""
    total = sum(ranks)
    x, ds = torch.randn(m, k + 64, device="cuda", dtype=BF16)[:, :k], torch.randn(m, total + 8, device="cuda", dtype=BF16)[:, :total]
    a = torch.randn(total, k, device="cuda", dtype=BF16)
    seeds = torch.randint(-(2**31), 2**31 - 1, ((len(ranks) + 1) // 2, m), dtype=torch.int32, device="cuda")
    rest = (seeds, masks.columns(k, x.device), list(ranks), list(dropout))
    for op, reference, first, second in (
        (low_rank_dropout.dropped_mm, low_rank_dropout.reference_mm, x, a),
        (low_rank_dropout.dropped_grad, low_rank_dropout.reference_grad, ds, x),
    ):
        got, want = op(first, second, *rest), reference(first.double(), second.double(), *rest)[0]
        assert (got.sum(0) - want).norm() <= 1e-5 * want.norm(), op
        assert torch.equal(got, op(first, second, *rest)), "the order of the sums is not fixed"


@pytest.mark.parametrize("forward", ["outer", "k_extended"])
def test_lora_linear_under_dropout(forward):
    """Kernels in bf16 against plain products in float32, forward and all gradients, compiled: the same seeds, the same masks."""
    m, k, outs, owner, dropout = 4096, 512, (512, 256), (0, 1, 1), (0.1, 0.0, 0.3)
    rand = lambda *shape: (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).to(BF16).float()  # noqa: E731
    tensors = [rand(m, k), *(rand(n, k) for n in outs), *(rand(16, k) for _ in owner), *(rand(outs[i], 16) for i in owner)]
    seeds = torch.randint(-(2**31), 2**31 - 1, (2, m), dtype=torch.int32, device="cuda")

    def call(x, *rest, providers):
        return lora_linear.op(x, rest[:2], [None] * 2, rest[2:5], rest[5:], [None] * 3, owner, [2.0, 1.0, 0.5], dropout, seeds, *providers)

    def gradients(dtype, *providers):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        outputs = torch.compile(call)(*leaves, providers=providers)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.sin(torch.arange(y.numel(), device="cuda")).view(y.shape).to(y.dtype) for y in outputs])]

    for i, (got, want) in enumerate(zip(gradients(BF16, forward, "one_read"), gradients(torch.float32, "accumulate", "mm"), strict=True)):
        assert (got - want).norm() <= 1e-2 * want.norm(), i
