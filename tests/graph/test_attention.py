"""attention on whole models: every layer is found with the right mask, tiles are made once, loss and gradients keep the contract."""

import collections
import copy

import pytest
import tiny
import torch
from conftest import Lowered, Rewriter, assert_same, batch_for, lora_modules, tiny_lora
from torch import Tensor, nn

from fastft import _torch, match
from fastft.kernels import attention as kernel
from fastft.kernels import mask as masks
from fastft.passes.attention import attention
from fastft.passes.attention_pattern import BIAS, READ_TWICE
from fastft.passes.lora_linear import lora_linear
from fastft.passes.normalize import normalize
from fastft.result import Match, Miss
from fastft.runner import copy_graph

SEQ, WINDOW = 24, 16
ONLY = [normalize, attention, lora_linear]  # not what comes after attention and changes its masks
choose, flex_attention = kernel.choose, _torch.flex_attention


def choose_flex(q, v, plain, readable, special, dropout, even_if_empty) -> str:
    """As on a GPU."""
    flex = readable and not dropout and (special or not plain)
    return "flex" if flex else choose(q, v, plain, readable, special, dropout, even_if_empty)


def checking_tiles(q, k, v, score_mod, mask_mod, blocks, block_size, scale, reads):
    """FlexAttention's operator on a CPU is plain math and never looks at the tiles: they are held against the mask here."""
    if type(q.detach()) is torch.Tensor:  # not while AOTAutograd traces
        allowed = mask_mod(*torch.meshgrid(*map(torch.arange, (q.shape[0], 1, q.shape[2], k.shape[2])), indexing="ij"), *reads)[:, 0]
        rows, columns = (-(-length // block_size) for length in allowed.shape[1:])
        padded = nn.functional.pad(allowed, (0, columns * block_size - k.shape[2], 0, rows * block_size - q.shape[2]))
        counts = padded.view(-1, rows, block_size, columns, block_size).sum((2, 4))
        whole, some = counts == block_size**2, counts > 0
        for given, wanted in zip((0, 2, 4, 6), (some & ~whole, whole, (some & ~whole).mT, whole.mT), strict=True):
            assert torch.equal(_set(*blocks[given : given + 2]).expand_as(wanted), wanted)
    return flex_attention(q, k, v, score_mod, mask_mod, blocks, block_size, scale, reads)


def _set(counts: Tensor, numbers: Tensor) -> Tensor:
    """bool [batch, rows, columns] of the tiles that a BlockMask's two lists name; behind those counted stands any number of a tile."""
    named = torch.arange(numbers.shape[-1]) < counts[..., None]
    assert 0 <= numbers.min() and numbers.max() < numbers.shape[-1]
    return torch.zeros(numbers.shape, dtype=torch.uint8).scatter_add(-1, numbers.long(), named.byte())[:, 0] == 1


def take_flex(monkeypatch, block: int = 8) -> None:
    """FlexAttention wherever a GPU would take it: eagerly its operator is plain math, with a right backward. Small tiles, checked."""
    monkeypatch.setattr(kernel, "choose", choose_flex)
    monkeypatch.setattr(_torch, "flex_attention", checking_tiles)
    monkeypatch.setattr(masks, "BLOCK", block)


@pytest.fixture(params=["cpu", "flex"])
def provider(request, monkeypatch) -> str:
    if request.param == "flex":
        take_flex(monkeypatch)
    return request.param


def tiny_model(arch: str, implementation: str = "sdpa", layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny.tiny_model(arch, layers=layers, seq=SEQ, attn_implementation=implementation, dtype=dtype).train()
    model.config.use_cache = False
    return model


def batch(model: nn.Module, kind: str, seq: int = SEQ) -> dict[str, Tensor]:
    """kind: "" (no mask), "right" or "left" (where the padding is), "documents" (position_ids restart, elsewhere in each row)."""
    found = batch_for(model, seq=seq)
    if kind in ("left", "right"):
        found["attention_mask"] = torch.ones(2, seq, dtype=torch.long)
        found["attention_mask"][0 if kind == "left" else 1, slice(7) if kind == "left" else slice(-5, None)] = 0
    if kind == "documents":
        found["position_ids"] = torch.stack([torch.cat([torch.arange(n), torch.arange(seq - n)]) for n in (10, 3)])
    return found


class Counter:
    """A Dynamo backend: the rows that the passes give with the CPU's providers and with FlexAttention's; calls the graph as it was."""

    def __init__(self) -> None:
        self.cpu, self.flex, self.misses = (collections.Counter() for _ in range(3))

    def __call__(self, gm, example_inputs):
        normalize(gm)
        for found, chosen in ((self.cpu, choose), (self.flex, choose_flex)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernel, "choose", chosen)
                results = attention(copy_graph(gm))
            found.update(row.provider for row in results if isinstance(row, Match))
        self.misses.update(row.reason for row in results if isinstance(row, Miss))
        return gm.forward


def count(model: nn.Module, inputs: dict[str, Tensor]) -> Counter:
    """Without head and loss: less to trace."""
    counter = Counter()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model.base_model, backend=counter)(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
    return counter


# architecture -> what each of two layers says of its mask
FULL, SLIDING = "causal", f"causal, window {WINDOW}"
LAYERS = {
    "llama": [FULL] * 2,
    "mistral": [SLIDING] * 2,
    "gemma2": [SLIDING, FULL],
    "gemma3_text": [SLIDING, FULL],
    "qwen3": [FULL] * 2,
    "phi3": [FULL] * 2,
    "gpt2": [FULL] * 2,
    "gpt_neox": [FULL] * 2,
    "gpt_oss": [SLIDING, FULL],
    "deepseek_v3": [FULL] * 2,
    "olmo2": [FULL] * 2,
    "falcon": [FULL] * 2,
}
EXTRA = {"gemma2": ", softcap", "gpt_oss": ", sinks"}  # these have no sdpa implementation
NO_DOCUMENTS = ("gpt_oss", "falcon")  # transformers does not look at position_ids there
UNEQUAL = ("deepseek_v3",)  # head dimensions of values and of queries: not for the CPU's flash attention
KINDS = {"": "", "right": ", padding", "left": ", padding", "documents": ", documents"}


def expected(arch: str, implementation: str, kind: str, flex: bool, layers: int = 2) -> dict[str, int]:
    rows: collections.Counter = collections.Counter()
    for mask in LAYERS[arch][:layers]:
        mask += "" if kind == "documents" and arch in NO_DOCUMENTS else KINDS[kind]
        extra = EXTRA.get(arch, "")
        if mask == FULL and not extra:
            name = "math" if arch in UNEQUAL else "flash"
        elif mask == FULL and arch == "gpt_oss":
            name = "flash_cpu"
        elif flex:
            name = "flex"
        else:  # added padding leaves rows without keys, which PyTorch's CPU kernel gets wrong
            name = "math" if extra or implementation == "eager" and "padding" in mask else "mask"
        rows[f"{name}: {mask}{extra}"] += 1
    return rows


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", LAYERS)
def test_every_layer_is_found_with_its_mask(arch, implementation):
    if implementation == "sdpa" and arch in EXTRA:
        pytest.skip(f"{arch} has no sdpa implementation")
    layers = len(set(LAYERS[arch]))
    model = tiny_model(arch, implementation, layers)
    for kind in KINDS:
        counter = count(model, batch(model, kind))
        assert counter.cpu == expected(arch, implementation, kind, False, layers), kind
        assert counter.flex == expected(arch, implementation, kind, True, layers), kind
        assert not counter.misses


@pytest.mark.parametrize("arch", ["bloom", "mpt"])
def test_alibi_is_left_alone(arch):
    model = tiny_model(arch, "eager")
    for kind in KINDS:
        counter = count(model, batch(model, kind))
        assert counter.misses == {BIAS: 2} and not counter.cpu and not counter.flex, kind


@pytest.mark.parametrize(
    "arch, implementation, kind, provider",
    [
        ("llama", "sdpa", "", "cpu"),
        ("llama", "sdpa", "left", "flex"),
        ("llama", "eager", "left", "cpu"),  # queries without any key: equal weights for all, with the gradients of the scores
        ("llama", "eager", "left", "flex"),
        ("gemma2", "eager", "left", "flex"),
        ("gemma3_text", "sdpa", "documents", "flex"),
        ("gpt_oss", "eager", "left", "flex"),  # such queries go to the sink
        ("gpt_oss", "eager", "right", "cpu"),
        ("gpt_oss", "eager", "", "cpu"),
        ("deepseek_v3", "eager", "left", "flex"),
        ("gpt2", "eager", "right", "cpu"),
        ("falcon", "sdpa", "left", "flex"),
    ],
    indirect=["provider"],
)
def test_numerics(arch, implementation, kind, provider):
    model, rewriter = tiny_model(arch, implementation), Rewriter(only=ONLY, of="attention")
    assert_same(model, rewriter.compile(model), batch(model, kind))
    assert rewriter.providers == expected(arch, implementation, kind, provider == "flex") and not rewriter.misses


def nodes(gm: torch.fx.GraphModule, target) -> list:
    return [node for node in gm.graph.nodes if node.target is target]


def assert_tiles_made_outside(rewriter: Rewriter, distinct: int) -> None:
    """block_mask only in the outermost graph, once a mask; the bodies get all they need of it as inputs."""
    assert sum(len(nodes(gm, masks.op)) for gm in rewriter.graphs) == distinct
    bodies = [body for gm in rewriter.graphs for body in list(match.graph_modules(gm))[1:]]
    assert bodies and not any(nodes(body, masks.op) + nodes(body, masks.empty_op) for body in bodies)
    for body in bodies:
        (call,) = nodes(body, kernel.op)
        assert all(node.op == "placeholder" for name in ("reads", "blocks", "empty_blocks") for node in kernel.get(call, name))


@pytest.mark.parametrize(
    "arch, implementation, distinct, reentrant",
    [
        ("llama", "sdpa", 1, True),
        ("llama", "eager", 2, False),  # two: one for the rows without keys
        ("gemma3_text", "eager", 4, True),
        ("gemma3_text", "sdpa", 2, False),
        ("gpt_oss", "eager", 2, False),
    ],
)
def test_checkpointed(arch, implementation, distinct, reentrant, monkeypatch):
    take_flex(monkeypatch)
    model, rewriter = tiny_model(arch, implementation), Rewriter(only=ONLY, of="attention")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(model, rewriter.compile(model), batch(model, "left"))
    assert rewriter.providers == expected(arch, implementation, "left", True) and not rewriter.misses
    assert_tiles_made_outside(rewriter, distinct)


def test_checkpointed_softcap(monkeypatch):
    """Through AOTAutograd: eagerly, FlexAttention cannot make the backward of a softcap while a checkpoint watches what is saved."""
    take_flex(monkeypatch)
    plain = tiny_model("gemma2", "eager")
    model, lowered = copy.deepcopy(plain), Lowered()
    lowered.of, lowered.passes = "attention", ONLY
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(plain, lowered.compile(model), batch(model, "left"))
    assert lowered.providers == expected("gemma2", "eager", "left", True) and not lowered.misses


def test_with_lora(provider):
    model, kind = tiny_lora("llama", layers=2), "left"
    rewriter = Rewriter(only=ONLY, of="attention")
    assert_same(model, rewriter.compile(model), batch(model, kind) | {"use_cache": False})
    assert rewriter.providers == expected("llama", "sdpa", kind, provider == "flex") and not rewriter.misses
    rewriter.of = "lora_linear"
    assert rewriter.modules == lora_modules(model) and not rewriter.misses


@pytest.mark.parametrize(
    "arch, kind, provider",
    [("llama", "left", "cpu"), ("llama", "left", "flex"), ("mistral", "", "flex")],
    indirect=["provider"],
)
def test_lengths_that_change(arch, kind, provider):
    """One graph for the first length, one for all others."""
    model, rewriter = tiny_model(arch), Rewriter(only=ONLY, of="attention")
    compiled = rewriter.compile(model)
    assert_same(model, compiled, batch(model, kind))
    for seq in (SEQ + 3, SEQ - 5, SEQ + 8):
        with torch.no_grad():
            wanted = model(**batch(model, kind, seq)).logits
        torch.testing.assert_close(compiled(**batch(model, kind, seq)).logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(rewriter.graphs) == 2
    assert rewriter.providers == {row: 2 * count for row, count in expected(arch, "sdpa", kind, provider == "flex").items()}


def test_batch_sizes_that_change(provider):
    model, rewriter = tiny_model("mistral", "eager", layers=1), Rewriter(only=ONLY, of="attention")
    compiled, rows = rewriter.compile(model), {name: torch.cat([x, x.flip(0)]) for name, x in batch(model, "left").items()}
    for size in (4, 3, 2, 1):
        inputs = {name: x[:size] for name, x in rows.items()}
        with torch.no_grad():
            wanted = model(**inputs).logits
        torch.testing.assert_close(compiled(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(rewriter.graphs) == 3 and not rewriter.misses  # the first, any other, one row


def test_without_gradients(provider):
    model, rewriter = tiny_model("gemma3_text", "eager").eval(), Rewriter(only=ONLY, of="attention")
    with torch.no_grad():
        torch.testing.assert_close(rewriter.compile(model)(**batch(model, "left")).logits, model(**batch(model, "left")).logits, rtol=1e-4, atol=1e-4)
    assert rewriter.providers == expected("gemma3_text", "eager", "left", provider == "flex") and not rewriter.misses


def test_weights_that_are_returned():
    model, rewriter = tiny_model("llama", "eager"), Rewriter(of="attention")
    inputs = batch(model, "left") | {"output_attentions": True}
    with torch.no_grad():
        found, wanted = rewriter.compile(model)(**inputs), model(**inputs)
    assert torch.equal(found.logits, wanted.logits) and all(map(torch.equal, found.attentions, wanted.attentions))
    assert len(found.attentions) == 2 and rewriter.providers == {} and rewriter.misses == {READ_TWICE: 2}
