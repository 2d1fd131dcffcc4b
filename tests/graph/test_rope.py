"""rope: two matches a layer in every architecture that rotates queries and keys, each spelling by hand, and what is none."""

import collections

import pytest
import tiny
import torch
from conftest import batch_for, with_lora
from torch import nn

from fastft import match
from fastft.passes.normalize import normalize
from fastft.passes.rope import NORMED, NOT_ROTARY, PLAIN, rope
from fastft.result import Match, Miss

# architecture -> (provider, cosines in a graph of any number of layers)
ROTARY = {
    "llama": (PLAIN, 1),
    "mistral": (PLAIN, 1),
    "qwen3": (NORMED, 1),
    "gemma2": (PLAIN, 1),
    "gemma3_text": (NORMED, 2),  # sliding and full attention
    "phi3": (PLAIN, 1),
    "gpt_neox": (PLAIN, 1),  # q and k slices of one tensor, rotated in part
    "cohere": (PLAIN, 1),  # even and odd entries
    "gptj": (PLAIN, 0),  # a table in each layer
    "olmo2": (NORMED, 1),  # the norm over all heads
    "gpt_oss": (PLAIN, 1),  # two sums; YaRN
    "deepseek_v2": (PLAIN, 1),  # complex
    "deepseek_v3": (PLAIN, 1),
    "falcon": (PLAIN, 1),
    "roformer": (PLAIN, 0),  # a table, split in each layer
    "moshi": (PLAIN, 2),  # a buffer in each layer
}


class Recorder:
    """A Dynamo backend: runs rope on every graph and body, sees to it that nothing changes, and calls the graph as it is."""

    def __init__(self) -> None:
        self.matches: list[Match] = []
        self.misses: list[Miss] = []
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm, example_inputs):
        for body in match.graph_modules(gm):
            normalize(body)
            before = str(body.graph)
            results = rope(body)
            assert str(body.graph) == before
            self.graphs.append(body)
            self.matches += [result for result in results if isinstance(result, Match)]
            self.misses += [result for result in results if isinstance(result, Miss)]
        return gm.forward

    @property
    def modules(self) -> dict[str, int]:
        return dict(collections.Counter(match.module_path(node) for found in self.matches for node in found.nodes))

    @property
    def cosines(self) -> int:
        nodes = [node for gm in self.graphs for node in gm.graph.nodes]
        return sum(match.is_method(node, "cos") or match.is_function(node, torch.cos, torch.polar) for node in nodes)


def record(model: nn.Module, batch: dict, **options) -> Recorder:
    recorder = Recorder()
    torch.compile(model, backend=recorder, **options)(**batch)
    return recorder


def tiny_model(arch: str, layers: int, **options) -> nn.Module:
    return tiny.tiny_model(arch, layers=layers, seq=16, **options).train()


@pytest.mark.parametrize("arch", ROTARY)
def test_two_matches_a_layer_and_one_cosine(arch):
    model = tiny_model(arch, layers=2)
    recorder = record(model, batch_for(model))
    provider, cosines = ROTARY[arch]
    assert len(recorder.matches) == 4 and not recorder.misses
    assert {(found.op, found.provider, len(found.nodes)) for found in recorder.matches} == {("rope", provider, 1)}
    assert list(recorder.modules.values()) == [2, 2]
    assert all("att" in name and f".{i}." in name for i, name in enumerate(recorder.modules))
    assert recorder.cosines == cosines


def test_layers_without_rotation():
    model = tiny_model("llama4_text", layers=4)
    recorder = record(model, batch_for(model))
    rotary = sum(model.config.no_rope_layers)  # 1 where it has
    assert 0 < rotary < 4 and list(recorder.modules.values()) == [2] * rotary
    assert not recorder.misses and recorder.cosines == 1


@pytest.mark.parametrize("arch", ["gpt2", "bloom"])
def test_no_rotation(arch):
    model = tiny_model(arch, layers=2)
    recorder = record(model, batch_for(model))
    assert recorder.graphs and not recorder.matches and not recorder.misses


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_matches_are_what_attention_reads(arch):
    model = tiny_model(arch, layers=2)
    recorder = record(model, batch_for(model))
    calls = [node for gm in recorder.graphs for node in gm.graph.nodes if "scaled_dot_product" in str(node.target)]
    queries = [node.args[0] for node in calls]
    keys = [node.args[1].args[0].args[0].args[0] for node in calls]  # under getitem, expand, reshape
    assert len(calls) == 2 and [found.nodes for found in recorder.matches] == [[node] for pair in zip(queries, keys, strict=True) for node in pair]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt_oss"])
def test_checkpoint_bodies(arch):
    """In a body cos and sin are two inputs."""
    model = tiny_model(arch, layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recorder = record(model, batch_for(model))
    assert len(recorder.graphs) == 3 and not any(match.is_method(node, "cos") for node in recorder.graphs[1].graph.nodes)
    assert [found.provider for found in recorder.matches] == [ROTARY[arch][0]] * 4
    assert not recorder.misses and recorder.cosines == 1


@pytest.mark.parametrize("arch", ["llama", "cohere"])
def test_bfloat16_with_autocast(arch):
    model = with_lora(tiny_model(arch, layers=1, dtype=torch.bfloat16)).train()
    with torch.autocast("cpu", torch.bfloat16):
        recorder = record(model, batch_for(model))
    assert len(recorder.matches) == 2 and not recorder.misses and recorder.cosines == 1
    # Cohere rotates in float32: the node is the cast back.
    assert {match.dtype(found.nodes[0]) for found in recorder.matches} == {torch.bfloat16}


@pytest.mark.parametrize("arch", ["llama", "gptj", "roformer"])
def test_symbolic_sizes(arch):
    model = tiny_model(arch, layers=1)
    recorder = Recorder()
    compiled = torch.compile(model, backend=recorder, dynamic=True)
    compiled(**batch_for(model, seq=16))
    compiled(**batch_for(model, batch=3, seq=24))
    assert len(recorder.graphs) == 1 and len(recorder.matches) == 2 and not recorder.misses


# Spellings: functions of x (2, 3, 5, 8) and the angles (5, 4).


def half(x):
    return torch.cat((-x[..., 4:], x[..., :4]), -1)


def every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def both(angles):
    return torch.cat((angles, angles), -1)


def twice(angles):
    return angles.repeat_interleave(2, dim=-1)


def halves(x, angles):
    emb = both(angles)
    return x * emb.cos() + half(x) * emb.sin()


def swapped(x, angles):
    emb = both(angles)
    return half(x) * emb.sin() + emb.cos() * x


def other_way(x, angles):
    emb = both(angles)
    return x * emb.cos() - half(x) * emb.sin()


def chunks(x, angles):
    emb = both(angles)
    one, two = x.chunk(2, dim=-1)
    return torch.add(x * emb.cos(), torch.cat([torch.neg(two), one], dim=-1).mul(emb.sin()))


def scaled(x, angles):
    emb = both(angles)
    cos, sin = (emb.cos() * 1.3).to(torch.bfloat16), (emb.sin() * 1.3).to(torch.bfloat16)
    return x * cos + half(x) * sin


def interleaved(x, angles):
    emb = twice(angles)
    return x * emb.cos() + every_two(x) * emb.sin()


def interleaved_sums(x, angles):
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def interleaved_view(x, angles):
    even, odd = x.unflatten(-1, (4, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape)


def two_sums(x, angles):
    one, two = torch.split(x, 4, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


def to_halves(x, angles):
    """DeepSeek: even and odd entries come out as halves."""
    even, odd = x[..., 0::2], x[..., 1::2]
    emb = both(angles)
    cos, sin = emb.cos()[..., :4], emb.sin()[..., :4]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


def first_to_halves(x, angles):
    """DeepSeek before: the entries are sorted, then rotated as halves."""
    x = x.view(2, 3, 5, 4, 2).transpose(4, 3).reshape(2, 3, 5, 8)
    return halves(x, angles)


def indexed(x, angles):
    return halves(x[..., torch.arange(7, -1, -1)], angles)


def part(x, angles):
    """GPT-NeoX: 4 of 8 entries."""
    turned, kept = x[..., :4], x[..., 4:]
    emb = both(angles[..., :2])
    turned = turned * emb.cos() + torch.cat((-turned[..., 2:], turned[..., :2]), -1) * emb.sin()
    return torch.cat((turned, kept), dim=-1)


def last_part(x, angles):
    """DeepSeek-V2: of the last 4."""
    kept, turned = x.split([4, 4], dim=-1)
    angles = angles[..., :2]
    cos, sin = angles.cos(), angles.sin()
    one, two = turned.chunk(2, -1)
    return torch.cat((kept, torch.cat((one * cos - two * sin, two * cos + one * sin), -1)), -1)


def polar(x, angles):
    turn = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(x.float().reshape(2, 3, 5, 4, 2)) * turn).flatten(3)


def sections(x, angles):
    """M-RoPE (Qwen2-VL): cos in pieces of three positions."""
    emb = both(torch.stack((angles, angles + 1, angles + 2)))
    cos, sin = (torch.cat([piece[i % 3] for i, piece in enumerate(t.split([1, 3, 1, 3], dim=-1))], dim=-1) for t in (emb.cos(), emb.sin()))
    return x * cos + half(x) * sin


SPELLINGS = [halves, swapped, other_way, chunks, scaled, interleaved, interleaved_sums, interleaved_view, two_sums]
SPELLINGS += [to_halves, first_to_halves, indexed, part, last_part, polar, sections]


def captured(function, *inputs) -> tuple[Recorder, tuple]:
    """What rope says of a function, and the nodes that its graph returns."""
    recorder = Recorder()
    torch.compile(function, backend=recorder)(*inputs)
    (gm,) = recorder.graphs
    return recorder, next(node for node in gm.graph.nodes if node.op == "output").args[0]


X, ANGLES = torch.randn(2, 3, 5, 8), torch.randn(5, 4)


@pytest.mark.parametrize("rotate", SPELLINGS)
def test_spellings(rotate):
    recorder, (rotated,) = captured(rotate, X, ANGLES)
    assert recorder.matches == [Match("rope", PLAIN, [rotated])] and not recorder.misses


@pytest.mark.parametrize("rotate", [polar, halves])
def test_the_cast_back_is_the_rotated_tensor(rotate):
    recorder, (rotated, _) = captured(lambda x, angles: ((y := rotate(x.float(), angles).to(x.dtype)), y.float()), X.bfloat16(), ANGLES)
    assert recorder.matches == [Match("rope", PLAIN, [rotated])] and match.dtype(rotated) == torch.bfloat16


def test_inputs_as_cos_and_sin():
    def rotate(q, k, cos, sin):
        return q * cos + half(q) * sin, half(k) * sin + k * cos

    recorder, rotated = captured(rotate, X, X + 1, torch.randn(5, 8), torch.randn(5, 8))
    assert recorder.matches == [Match("rope", PLAIN, [node]) for node in rotated] and not recorder.misses


def test_tables_of_sin_and_cos():
    """GPT-J looks up one row of both, RoFormer one of each."""

    def rotate(x, table, ids, cosines, sines):
        sin, cos = torch.gather(table, 0, ids[:, None].repeat(1, 8)).chunk(2, dim=-1)
        first = x * twice(cos) + every_two(x) * twice(sin)
        cos, sin = torch.nn.functional.embedding(ids, cosines), sines[ids]
        return first, x * both(cos) + half(x) * both(sin)

    recorder, rotated = captured(rotate, X, torch.randn(9, 8), torch.arange(5), torch.randn(9, 4), torch.randn(9, 4))
    assert recorder.matches == [Match("rope", PLAIN, [node]) for node in rotated] and not recorder.misses


def in_each_head(x):
    return x.view(2, 5, 3, 24).transpose(1, 2).chunk(3, dim=-1)


def in_all_heads(x):
    return x.view(2, 5, 9, 8).transpose(1, 2).split(3, dim=1)


@pytest.mark.parametrize("split", [in_each_head, in_all_heads])
def test_query_and_key_in_one_tensor(split):
    def rotate(x, angles):
        q, k, v = split(x)
        return halves(q, angles), interleaved(k, angles), v

    recorder, (q, k, _) = captured(rotate, torch.randn(2, 5, 72), ANGLES)
    assert recorder.matches == [Match("rope", PLAIN, [q]), Match("rope", PLAIN, [k])] and not recorder.misses


def layer_norm(x):
    return torch.nn.functional.layer_norm(x, (8,))


def rms_norm(x):
    return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)


def root_norm(x):
    """Gemma 4's."""
    return (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)) * (1.0 + x[0, 0, 0])


def no_norm(x):
    return x * x.pow(2)


NORMS = {layer_norm: NORMED, torch.nn.RMSNorm(8): NORMED, rms_norm: NORMED, root_norm: NORMED, no_norm: PLAIN}


@pytest.mark.parametrize("norm", NORMS)
def test_norm_before(norm):
    recorder, _ = captured(lambda x, angles: halves(norm(x.view(2, 5, 3, 8)).transpose(1, 2), angles), torch.randn(2, 5, 24), ANGLES)
    assert [found.provider for found in recorder.matches] == [NORMS[norm]]


def no_minus(x, angles):
    emb = both(angles)
    return x * emb.cos() + torch.cat((x[..., 4:], x[..., :4]), -1) * emb.sin()


def two_minus(x, angles):
    emb = both(angles)
    return x * emb.cos() + torch.cat((-x[..., 4:], -x[..., :4]), -1) * emb.sin()


def other_split(x, angles):
    emb = both(angles)
    return x * emb.cos() + torch.cat((-x[..., 2:], x[..., :2]), -1) * emb.sin()


def mirrored(x, angles):
    one, two = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((one * cos + two * sin, one * sin - two * cos), -1)


def minus_x(x, angles):
    emb = both(angles)
    return torch.cat((x[..., 4:], x[..., :4]), -1) * emb.sin() - x * emb.cos()


def plus_x(x, angles):
    emb = both(angles)
    return x * emb.cos() + x + half(x) * emb.sin()


def twice_sin(x, angles):
    emb = both(angles)
    turned = half(x) * emb.sin()
    return x * emb.cos() + (turned + turned)


def sin_first(x, angles):
    emb = both(angles)
    return x * emb.sin() + half(x) * emb.cos()


def other_angle(x, angles):
    return x * both(angles).cos() + half(x) * both(angles + 1).sin()


def other_tensor(x, angles):
    emb = both(angles)
    return x * emb.cos() + half(x + 1) * emb.sin()


def no_sin(x, angles):
    return x * both(angles).cos()


def half_of_it(x, angles):
    one, two = x.chunk(2, -1)
    return one * angles.cos() - two * angles.sin()


def other_dimension(x, angles):
    emb = both(angles)
    x = torch.cat((x, x), 1)[:, :4]
    return x * emb.cos() + torch.cat((-x[:, 2:], x[:, :2]), 1) * emb.sin()


def real_part(x, angles):
    turn = torch.polar(torch.ones_like(angles), angles)
    return (torch.view_as_complex(x.view(2, 3, 5, 4, 2)) * turn).real


@pytest.mark.parametrize(
    "function",
    [
        no_minus,
        two_minus,
        minus_x,
        plus_x,
        twice_sin,
        other_split,
        mirrored,
        sin_first,
        other_angle,
        other_tensor,
        no_sin,
        half_of_it,
        other_dimension,
        real_part,
    ],
)
def test_other_products_with_a_cosine(function):
    recorder, _ = captured(function, X, ANGLES)
    assert not recorder.matches and [missed.reason for missed in recorder.misses] == [NOT_ROTARY]


def test_products_of_inputs_are_no_miss():
    recorder, _ = captured(lambda x, gate, up: x * gate + half(x) * gate * up, X, X, X)
    assert recorder.graphs and not recorder.matches and not recorder.misses
