"""attention by hand: every spelling that is taken, every one that is left with its reason, and results equal to eager's in all of them."""

import inspect
import operator
import re

import pytest
import torch
from conftest import Lowered, Rewriter
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from fastft import contract
from fastft.kernels import attention as kernel
from fastft.passes.attention import DTYPES, LENGTHS
from fastft.passes.attention_mask import FROM_MEMORY, HEADS, VALUES, WRITTEN
from fastft.passes.attention_pattern import BIAS, FORM, READ_TWICE, SHAPE

from .test_attention import take_flex

B, H, S, D = 2, 4, 20, 16
INF, LEAST = float("-inf"), torch.finfo(torch.float64).min
SHAPES = {"q": (B, H, S, D), "k": (B, H, S, D), "v": (B, H, S, D), "k2": (B, 2, S, D), "v2": (B, 2, S, D), "k_long": (B, H, 28, D), "v_long": (B, H, 28, D)}
SHAPES |= {"wide": (B, H, S, 2 * D), "bias": (S, S), "sinks": (H,), "q1": (1, H, S, D), "v1": (B, 1, S, D)}
INPUTS = {name: torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i, (name, shape) in enumerate(SHAPES.items())}
INPUTS["pad"] = torch.ones(B, S, dtype=torch.bool)
INPUTS["pad"][0, :9], INPUTS["pad"][1, -9:] = False, False  # a tile of 8 is left out here and there
INPUTS["pads"] = INPUTS["pad"].repeat(2, 1)
INPUTS |= {"lengths": torch.tensor([5, 17]), "seg": torch.tensor([[0] * 9 + [1] * 11, [2] * 3 + [0] * 17]), "seg1": torch.tensor([[0] * 9 + [1] * 11])}


@pytest.fixture(params=["cpu", "flex"])
def provider(request, monkeypatch) -> str:
    if request.param == "flex":
        take_flex(monkeypatch)
    return request.param


def results(run, names: list[str], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What `run` returns, and the gradients of a fixed sum of it."""
    given = [INPUTS[name].clone().to(dtype).requires_grad_() if name in SHAPES else INPUTS[name].clone() for name in names]
    torch.manual_seed(0)
    out = run(*given)
    out = out if isinstance(out, tuple) else (out,)
    sum((x.double() * torch.arange(x.numel()).sin().view(x.shape)).sum() for x in out).backward()
    return {f"out{i}": x.detach() for i, x in enumerate(out)} | {n: x.grad for n, x in zip(names, given, strict=True) if x.grad is not None}


def assert_equal(form, backend) -> None:
    names = list(inspect.signature(form).parameters)
    wanted = results(form, names)
    found = results(torch.compile(form, backend=backend, fullgraph=True), names)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def product(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(2, 3))


def weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(product(q, k) * 0.25, -1)


def masked(allowed: Tensor, least: float | None) -> Tensor:
    return allowed if least is None else torch.where(allowed, torch.zeros((), dtype=torch.float64), torch.full((), least, dtype=torch.float64))


def causal(least: float | None = None) -> Tensor:
    return masked(torch.arange(S)[None, :] <= torch.arange(S)[:, None], least)


def padded(pad: Tensor, least: float | None = None) -> Tensor:
    """The row that is padded on the left has queries without any key."""
    return masked(causal() & keys(pad), least)


def with_mask(scores: Tensor, mask: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(scores + mask, -1), v)


def repeated(x: Tensor) -> Tensor:
    return x[:, :, None, :, :].expand(B, 2, 2, S, D).reshape(B, H, S, D)


def capped(scores: Tensor) -> Tensor:
    return torch.tanh(scores / 5.0) * 5.0


def with_sinks(scores: Tensor, sinks: Tensor, v: Tensor, over: int = -1) -> Tensor:
    scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], -1)
    return torch.matmul(torch.softmax(scores - scores.max(over, keepdim=True).values, -1)[..., :-1], v)


def documents(seg: Tensor) -> Tensor:
    return seg[:, None, :, None] == seg[:, None, None, :]


def keys(pad: Tensor) -> Tensor:
    return pad[:, None, None, :]


def changed(x: Tensor, write) -> Tensor:
    write(x)
    return x


FULL, CAUSAL = "flash: full", "flash: causal"
PADDED, ADDED = "mask/flex: causal, padding", "math/flex: causal, padding"  # the CPU's provider / FlexAttention
FORMS = {
    # fmt: off
    "sdpa": (lambda q, k, v: sdpa(q, k, v), FULL),
    "positional": (lambda q, k, v: sdpa(q, k, v, None, 0.0, True), CAUSAL),
    "keywords": (lambda q, k, v: sdpa(query=q, key=k, value=v, is_causal=True, dropout_p=0.0, attn_mask=None), CAUSAL),
    "scale": (lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.7), CAUSAL),
    "enable_gqa": (lambda q, k2, v2: sdpa(q, k2, v2, is_causal=True, enable_gqa=True), CAUSAL),
    "repeat_interleave": (lambda q, k2, v2: sdpa(q, k2.repeat_interleave(2, 1), torch.repeat_interleave(v2, 2, dim=1)), FULL),
    "expanded": (lambda q, k2, v2, pad: sdpa(q, repeated(k2), repeated(v2), padded(pad)), PADDED),
    "expanded, spelled out": (lambda q, k2, v2: weights(q, repeated(k2)) @ repeated(v2), FULL),
    "k repeated otherwise than v": (lambda q, k2, v2: sdpa(q, k2.repeat(1, 2, 1, 1), repeated(v2)), FULL),
    "causal mask": (lambda q, k, v: sdpa(q, k, v, causal()), CAUSAL),
    "additive causal mask": (lambda q, k, v: sdpa(q, k, v, torch.triu(torch.full((S, S), INF, dtype=q.dtype), 1)), CAUSAL),
    "mask of ones": (lambda q, k, v: sdpa(q, k, v, torch.ones(S, S, dtype=torch.bool)), FULL),
    "bool mask": (lambda q, k, v, pad: sdpa(q, k, v, padded(pad)), PADDED),
    "documents": (lambda q, k, v, seg: sdpa(q, k, v, causal() & documents(seg)), "mask/flex: causal, documents"),
    "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.3), "math: full, dropout"),
    "dropout, mask": (lambda q, k, v, pad: sdpa(q, k, v, padded(pad), 0.3), "mask: causal, padding, dropout"),
    "other length": (lambda q, k_long, v_long: sdpa(q, k_long, v_long), FULL),
    "other length, spelled out": (lambda q, k_long, v_long: weights(q, k_long) @ v_long, FULL),
    "other head dimension": (lambda q, k, wide, pad: sdpa(q, k, wide, padded(pad)), PADDED),
    "mask made in no_grad": (lambda q, k, v, pad: sdpa(q, k, v, torch.no_grad()(padded)(pad)), PADDED),
    "softmax and repeat_interleave by keyword": (
        lambda q, k2, v2: torch.softmax(input=product(q, torch.repeat_interleave(input=k2, repeats=2, dim=1)), dim=-1) @ v2.repeat_interleave(repeats=2, dim=1),
        FULL,
    ),
    "scale after": (lambda q, k, v: torch.softmax(product(q, k) * 0.25, dim=-1) @ v, FULL),
    "scale before": (lambda q, k, v: torch.matmul(torch.nn.functional.softmax(product(q / 4, k), 3), v), FULL),
    "division": (lambda q, k, v: (product(q, k) / D**0.5).softmax(-1).matmul(v), FULL),
    "twice": (lambda q, k, v: torch.softmax(torch.div(product(q, k), 2) * -0.5, -1) @ v, FULL),
    "in place": (lambda q, k, v: torch.softmax(operator.iadd(operator.itruediv(product(q, k), 4.0), causal(LEAST)), -1) @ v, CAUSAL),
    "additive mask": (lambda q, k, v, pad: with_mask(product(q, k) * 0.25, padded(pad, LEAST), v), ADDED),
    "mask first": (lambda q, k, v, pad: torch.softmax(padded(pad, LEAST) + product(q, k), -1) @ v, ADDED),
    "dropout, spelled out": (lambda q, k, v: dropout(weights(q, k), 0.3) @ v, "math: full, dropout"),
    "dropout, additive mask": (lambda q, k, v, pad: dropout(torch.softmax(product(q, k) + padded(pad, LEAST), -1), 0.3) @ v, "math: causal, padding, dropout"),
    "dropout not in training": (lambda q, k, v: dropout(weights(q, k), 0.3, training=False) @ v, FULL),
    "softcap": (lambda q, k, v, pad: with_mask(capped(product(q, k) * 0.25), padded(pad, LEAST), v), "math/flex: causal, padding, softcap"),
    "causal softcap": (lambda q, k, v: with_mask(capped(product(q, k)), causal(LEAST), v), "math/flex: causal, softcap"),
    "sinks": (lambda q, k, v, sinks, pad: with_sinks(product(q, k) + padded(pad, LEAST), sinks, v), "math/flex: causal, padding, sinks"),
    "heads in another layout": (lambda q, k, v: sdpa(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2), FULL),
    # left
    "causal, other length": (lambda q, k_long, v_long: sdpa(q, k_long, v_long, is_causal=True), LENGTHS),
    "window, more queries": (lambda q, k_long: sdpa(k_long, q, q, torch.arange(28)[:, None] - torch.arange(S) < S), LENGTHS),
    "padding, other length": (lambda q, k_long, v_long, pad: sdpa(k_long, q, q, keys(pad)), LENGTHS),
    "3-D sdpa": (lambda q, k, v: sdpa(q[:, 0], k[:, 0], v[:, 0]), SHAPE),
    "3-D": (lambda q, k, v: torch.softmax(q[0] @ k[0].mT, -1) @ v[0], SHAPE),
    "bmm": (lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q[0], k[0].transpose(1, 2)), -1), v[0]), SHAPE),
    "baddbmm": (lambda q, k, v, bias: torch.bmm(torch.softmax(torch.baddbmm(bias, q[0], k[0].mT, alpha=0.25), -1), v[0]), BIAS),
    "baddbmm, 4-D": (lambda q, k, v, bias: torch.softmax(torch.baddbmm(bias, q[0], k[0].mT)[None], -1) @ v[:1], FORM),
    "masked_fill": (lambda q, k, v, pad: torch.softmax(product(q, k).masked_fill(~padded(pad), LEAST), -1) @ v, FORM),
    "where": (lambda q, k, v: torch.softmax(torch.where(causal(), product(q, k), torch.tensor(INF, dtype=q.dtype)), -1) @ v, FORM),
    "a bias, then masked_fill": (lambda q, k, v, bias: torch.softmax((product(q, k) + bias).masked_fill(~causal(), LEAST), -1) @ v, BIAS),
    "number first": (lambda q, k, v: torch.softmax(0.25 * product(q, k), -1) @ v, FORM),
    "cast, then scaled": (lambda q, k, v: torch.softmax(product(q, k).float() * 0.25, -1).to(v.dtype) @ v, FORM),
    "dropout by keyword": (lambda q, k, v: dropout(input=weights(q, k), p=0.3) @ v, FORM),
    "tanh by keyword": (lambda q, k, v: torch.softmax(torch.tanh(input=product(q, k)) * 5, -1) @ v, FORM),
    "masked_fill by keyword": (lambda q, k, v: torch.softmax(torch.masked_fill(input=product(q, k), mask=~causal(), value=LEAST), -1) @ v, FORM),
    "sinks without a sink": (lambda q, k, v: torch.softmax(torch.cat(tensors=[product(q, k)], dim=-1), -1)[..., :-1] @ v[:, :, :-1], FORM),
    "a number less the scores": (lambda q, k, v: torch.softmax(1.0 - product(q, k), -1)[..., :-1] @ v[:, :, :-1], FORM),
    "permuted": (lambda q, k, v: torch.softmax(q @ k.permute(0, 1, 3, 2), -1) @ v, FORM),
    "softmax over heads": (lambda q, k, v: torch.softmax(product(q, k), 1) @ v, FORM),
    "softmax over queries": (lambda q, k, v: torch.softmax(product(q, k), dim=-2) @ v, FORM),
    "no product": (lambda q, k, v: torch.softmax(q, -1) @ v.mT, FORM),
    "tanh without a cap": (lambda q, k, v: torch.softmax(torch.tanh(product(q, k)), -1) @ v, FORM),
    "two caps": (lambda q, k, v: torch.softmax(torch.tanh(product(q, k) / 5) * 4, -1) @ v, FORM),
    "a part of the weights": (lambda q, k, v: weights(q, k)[:, :, 2:5] @ v, FORM),
    "learned temperature": (lambda q, k, v, sinks: torch.softmax(product(q, k) * sinks.view(1, -1, 1, 1), -1) @ v, FORM),
    "weights returned": (lambda q, k, v: (lambda w: (w @ v, w))(weights(q, k)), READ_TWICE),
    "scores returned": (lambda q, k, v: (lambda s: (torch.softmax(s, -1) @ v, s))(product(q, k) * 0.25), READ_TWICE),
    "div_": (lambda q, k, v: torch.softmax(changed(product(q, k), lambda s: s.div_(4.0)), -1) @ v, READ_TWICE),
    "relative positions": (lambda q, k, v, bias: with_mask(product(q, k) * 0.25, bias, v), FROM_MEMORY),
    "bias in sdpa": (lambda q, k, v, bias: sdpa(q, k, v, bias), FROM_MEMORY),
    "mask and bias": (lambda q, k, v, bias: with_mask(product(q, k) + bias, causal(LEAST), v), BIAS),
    "a mask for each head": (lambda q, k, v: sdpa(q, k, v, torch.arange(S) <= torch.arange(S)[:, None] + torch.arange(H)[:, None, None]), HEADS),
    "a weak mask": (lambda q, k, v: sdpa(q, k, v, causal(-50.0)), VALUES),
    "a mask written in place": (lambda q, k, v: sdpa(q, k, v, changed(causal(), lambda mask: mask[:, 0].fill_(False))), WRITTEN),
    "dtypes": (lambda q, k, v: torch.softmax(product(q.float(), k.float()) * 0.25, -1).to(v.dtype) @ v, DTYPES),
    # not attention: no reason given
    "router": (lambda q, k, v: operator.itemgetter(0)(torch.softmax(q[:, 0] @ k[0, 0].t(), -1).topk(2)) * v.sum(), None),
    "einsum": (lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k), -1), v), None),
    "product by keyword": (lambda q, k, v: torch.matmul(weights(q, k), other=v), None),
    "weights on the right": (lambda q, k, v: (v.mT @ weights(q, k).mT).mT, None),
    # fmt: on
}


@pytest.mark.parametrize("name", FORMS)
def test_form(name, provider):
    form, row = FORMS[name]
    rewriter = Rewriter(of="attention")
    assert_equal(form, rewriter)
    row = row and re.sub(r"^(\w+)/(\w+)", r"\1" if provider == "cpu" else r"\2", row)
    taken = row and ": " in row
    assert rewriter.providers == ({row: 1} if taken else {}) and rewriter.misses == ({row: 1} if row and not taken else {})


def in_body(mask):
    """A checkpointed body that makes its mask itself."""
    return lambda q, k, v, seg, pad: checkpoint(lambda *x: sdpa(*x[:3], mask(*x[3:])), q, k, v, seg, pad, use_reentrant=False)


# Odd, and easily taken for something else. What is found does not matter, only that the results are right.
ODD = {
    # fmt: off
    "heads permuted": lambda q, k2, v2: sdpa(q, *(x[:, torch.tensor([1, 0]), None].expand(B, 2, 2, S, D).reshape(B, H, S, D) for x in (k2, v2))),
    "number of keys": lambda q, k, v, lengths: sdpa(q, k, v, causal() & (torch.arange(S) < lengths[:, None, None, None])),
    "documents the same in all rows": lambda q, k, v, seg1, pad: sdpa(q, k, v, documents(seg1) & keys(pad)),
    "nothing allowed": lambda q, k, v: sdpa(q, k, v, torch.zeros(S, S, dtype=torch.bool)),
    # The CPU's own gradients are wrong for such queries: outputs only.
    "sdpa, queries without keys": lambda q, k, v, pad: sdpa(q.detach(), k.detach(), v.detach(), padded(pad, LEAST)) + 0 * q,
    "not quite the least": lambda q, k, v, pad: with_mask(product(q, k), padded(pad, -1e4), v),
    "a sum of masks": lambda q, k, v, pad: with_mask(product(q, k), causal(-1e4) + torch.where(keys(pad), 0.0, -1e4).double(), v),
    "alpha": lambda q, k, v: torch.softmax(torch.add(product(q, k), causal(-1e5), alpha=0.0), -1) @ v,
    "rounding_mode": lambda q, k, v: torch.softmax(torch.div(product(q, k), 4, rounding_mode="floor"), -1) @ v,
    "weights in no_grad": lambda q, k, v: torch.no_grad()(weights)(q, k) @ v,
    "keys written": lambda q, k, v: (c := 1 * k.detach(), w := weights(q.detach(), c), c.zero_(), w @ v + c)[-1],  # a cache that is used again
    "diagonal written": lambda q, k, v: sdpa(q, k, v, changed(causal(), lambda mask: mask.diagonal().fill_(False))),
    "padding written": lambda q, k, v, pad: sdpa(q, k, v, (p := pad.roll(1, -1), padded(p), p.chunk(2)[0].fill_(True))[1]),
    "its base written": lambda q, k, v, pad: sdpa(q, k, v, (p := pad.roll(1, -1), padded(p.unfold(1, S, 1)[:, 0]), p.fill_(True))[1]),
    "a view of the result": lambda q, k, v: (weights(*(x.view(B, S, H, D).transpose(1, 2) for x in (q, k))) @ v.view(B, S, H, D).transpose(1, 2)).view(-1, D),
    "softcap alone": lambda q, k, v: torch.softmax(capped(product(q, k)), -1) @ v,
    "softcap, other length": lambda q, k_long, v_long: torch.softmax(capped(product(q, k_long)), -1) @ v_long,
    "sinks alone": lambda q, k, v, sinks: with_sinks(product(q, k), sinks, v),
    "another maximum": lambda q, k, v, sinks: with_sinks(product(q, k), sinks, v, -2),
    "a sink for each query": lambda q, k, v, sinks: torch.cat([product(q[:, :, :H], k), sinks.view(H, 1).expand(B, H, H, 1)], -1).softmax(-1)[..., :-1] @ v,
    "two dropouts": lambda q, k, v: dropout(dropout(weights(q, k), 0.2), 0.3) @ v,
    "more heads of k than of q": lambda q, k, v: weights(q[:, :1], k) @ v,
    # The mask differs between the rows of the batch, but no tensor that it reads has just these rows.
    "causal in the first row alone": lambda q, k, v: sdpa(q, k, v, causal() | (torch.arange(B)[:, None, None, None] > 0)),
    "padding by the row's number": lambda q, k, v: sdpa(q, k, v, causal() & (torch.arange(S) >= 9 * torch.arange(B)[:, None, None, None])),
    "rows from the second on": lambda q, k, v, pads: sdpa(q, k, v, padded(pads[1 : B + 1])),
    "the first rows": lambda q, k, v, pads: with_mask(product(q, k), padded(pads[:B], LEAST), v),
    "rows in columns": lambda q, k, v, pad: sdpa(q, k, v, padded(pad.transpose(0, 1).contiguous().transpose(0, 1))),
    "one q for all rows": lambda q1, k, v, pad: sdpa(q1, k, v, keys(pad)),
    "one head of v": lambda q, k, v1, pad: sdpa(q, k, v1, padded(pad)),
    "body: documents": in_body(lambda seg, pad: documents(seg.cumsum(-1)) & keys(pad)),
    "body: padding": in_body(lambda seg, pad: documents(seg) & keys(pad.roll(1, -1))),
    "body: all": in_body(lambda seg, pad: causal() & keys(pad.roll(1, -1))),
    "body: padding written outside": lambda q, k, v, seg, pad: in_body(lambda seg, pad: padded(pad))(
        q, k, v, seg, changed(pad.roll(1, -1), lambda p: p.fill_(True))
    ),
    "body: nothing": in_body(lambda seg, pad: documents(seg) & keys(pad)),
    # fmt: on
}


@pytest.mark.parametrize("name", ODD)
def test_odd(name, provider):
    assert_equal(ODD[name], Rewriter(of="attention"))


def regions(inside, first, second):
    @torch.compiler.nested_compile_region
    def region(q, k, v, pad, mask):
        return sdpa(q, k, v, mask if inside is None else inside(pad))

    return lambda q, k, v, pad: region(region(q, k, v, pad, first()), k, v, pad, second())


def window(pad: Tensor | None = None) -> Tensor:
    return causal().triu(-3)


# The mask made inside, or the two given.
REGIONS = {"causal": (None, causal, window), "window": (None, window, causal)}
REGIONS |= {"padding inside": (padded, causal, causal), "window inside": (window, causal, causal)}


@pytest.mark.parametrize("name", REGIONS)
def test_region(name, provider):
    """One body, called twice: what a mask is must hold for both calls."""
    assert_equal(regions(*REGIONS[name]), Lowered())


LOW = {
    "sdpa": (lambda q, k, v: sdpa(q, k, v, is_causal=True), CAUSAL),
    "spelled out": (lambda q, k, v: weights(q, k) @ v, FULL),
    "softmax in float32": (lambda q, k, v: torch.softmax(product(q, k) * 0.25, -1, dtype=torch.float32).to(q.dtype) @ v, FULL),
    "padding": (lambda q, k, v, pad: with_mask(product(q, k) * 0.25, padded(pad, max(torch.finfo(q.dtype).min, -3e38)).to(q.dtype), v), ADDED),
    "scores in float32": (lambda q, k, v: torch.autocast("cpu", enabled=False)(weights)(9 * q, k) @ v, None),
}


@pytest.mark.parametrize("how", ["float16", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", LOW)
def test_low_precision(name, how, provider):
    form, row = LOW[name]
    names, dtype = list(inspect.signature(form).parameters), torch.float32 if how == "autocast" else getattr(torch, how)
    rewriter, wanted = Rewriter(of="attention"), results(form, names)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        eager = results(form, names, dtype)
        found = results(torch.compile(form, backend=rewriter, fullgraph=True), names, dtype)
    compared = contract.compare(found, eager, wanted, torch.bfloat16 if how == "autocast" else dtype)
    assert compared.ok, str(compared)
    if row is not None:
        assert {key.replace("flex", "math") for key in rewriter.providers} == {row.replace("/flex", "")}


def test_autocast_casts_what_differs(provider, monkeypatch):
    """A model kept in float32: its tables rotate q and k in float32, v comes out of a linear in 16 bits, and so do the scores."""
    seen, choose = [], kernel.choose
    monkeypatch.setattr(kernel, "choose", lambda q, v, *rest: seen.append((q.dtype, v.dtype)) or choose(q, v, *rest))
    form = lambda q, k, v, pad: sdpa(q * 0.9, k, v @ torch.eye(D, dtype=v.dtype), padded(pad))  # noqa: E731
    names, rewriter = list(inspect.signature(form).parameters), Rewriter(of="attention")
    wanted = results(form, names)
    with torch.autocast("cpu", torch.bfloat16):
        eager = results(form, names, torch.float32)
        found = results(torch.compile(form, backend=rewriter, fullgraph=True), names, torch.float32)
    assert found["out0"].dtype == eager["out0"].dtype == torch.bfloat16
    compared = contract.compare(found, eager, wanted, torch.bfloat16)
    assert compared.ok, str(compared)
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert rewriter.providers == {PADDED.replace("mask/" if provider == "flex" else "/flex", ""): 1} and not rewriter.misses
