"""What the inputs of a block's weights are in the full-precision model, and what is left out."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from stillroom.blocks import find_blocks, find_weights
from stillroom.quantization.capture import BlockCaller, Place, Rows, Watch
from stillroom.quantization.hessian import Statistics
from stillroom.quantization.inputs import Sums, collect, dead_inputs, plan_rounds, watch_inputs
from stillroom.quantization.streaming import Activations, Stream
from tests.stillroom.quantization.test_architectures import make
from tests.stillroom.tiny_mixtures import tiny_mixtral, tiny_qwen3_moe, tiny_switch


class _Block(nn.Module):
    """Multiplies `twice` (or more) times by one weight, once by the other."""

    def __init__(self, times):
        super().__init__()
        self.times = times
        self.twice = nn.Linear(32, 32, bias=False)
        self.once = nn.Linear(32, 32, bias=False)

    def forward(self, hidden_states, **_):
        inner = hidden_states
        for _ in range(self.times):
            inner = self.twice(torch.tanh(inner))
        return hidden_states + self.once(inner)


class _Config(PreTrainedConfig):
    model_type = "calls_one_weight_again"


class _Model(PreTrainedModel):
    config_class = _Config

    def __init__(self, times):
        super().__init__(_Config())
        self.words = nn.Embedding(64, 32)
        self.layers = nn.ModuleList([_Block(times)])
        self.head = nn.Linear(32, 64)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.words(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.head(hidden))


@torch.no_grad()
@pytest.mark.parametrize("times", [1, 2, 3])
def test_inputs_that_nothing_has_moved_have_no_shift(tmp_path, times):
    torch.manual_seed(0)
    model = _Model(times).eval()
    ids = torch.randint(0, 64, (4, 16))
    caller = BlockCaller(model, {"layers": model.layers})
    with caller.entered():
        place = Place("layers", 0)
        streams = []
        for name in ("original", "now"):
            streams.append(Stream(caller, [Rows(ids, torch.ones_like(ids))], tmp_path / name))
            streams[-1].enter()
        weights = {f"layers.0.{n}": each for n, each in find_weights(model.layers[0]).items()}
        rounds = plan_rounds(streams[0], place, weights)
        watched = [name for each in rounds for name in each.watched]
        kept = Activations(tmp_path / "inputs")
        watch_inputs(streams[0], place, weights, watched, kept)
        sums = collect(streams[1], place, weights, watched, False, set(), kept)
    assert kept.has("layers.0.once-0")
    assert kept.has("layers.0.twice-0") is (times == 1)
    assert sums["layers.0.twice"].train.tokens == times * ids.numel()
    for each in sums.values():
        assert each.train.shift is None or not each.train.shift.any()


@torch.no_grad()
def test_what_an_idle_expert_has_shares_its_input(tmp_path):
    model = tiny_qwen3_moe(num_experts=8)
    block = model.model.layers[0]
    caller = BlockCaller(model, {"model.layers": model.model.layers})
    with caller.entered():
        ids = torch.tensor([[5, 6]])
        stream = Stream(caller, [Rows(ids, torch.ones_like(ids))], tmp_path)
        stream.enter()
        called = []
        weights = find_weights(block)
        with Watch(weights, lambda name, *_: called.append(name)):
            stream.run(Place("model.layers", 0), 0)
        rounds = plan_rounds(stream, Place("model.layers", 0), weights)
    idle = [name for name in weights if ".experts." in name and name not in called]
    assert idle
    groups = [set(group) for each in rounds for group in each.groups]
    for expert in range(8):
        prefix = f"mlp.experts.{expert}."
        assert {f"{prefix}gate_proj", f"{prefix}up_proj"} in groups
        assert {f"{prefix}down_proj"} in groups
    assert all(each.once for each in rounds)


@torch.no_grad()
def test_an_expert_that_only_a_later_batch_reaches_has_its_round(tmp_path):
    model = tiny_switch(num_experts=8)
    blocks = model.encoder.block
    place = Place("encoder.block", 1)
    batches = [Rows(torch.tensor([[5, 6]]) + i, torch.ones(1, 2, dtype=int)) for i in range(16)]
    with BlockCaller(model, {"encoder.block": blocks}).entered() as caller:
        stream = Stream(caller, batches, tmp_path)
        stream.enter()
        stream.advance(Place("encoder.block", 0))
        weights = find_weights(blocks[1])
        called: list[list[str]] = []
        for b in range(len(batches)):
            called.append([])
            with Watch(weights, lambda name, *_: called[-1].append(name)):
                stream.run(place, b)
        rounds = plan_rounds(stream, place, weights)
    planned = [name for each in rounds for group in each.groups for name in group]
    reached = {name for names in called for name in names}
    assert {*called[0]} < reached
    assert {*planned} == reached
    assert planned[: len(called[0])] == called[0]
    assert len(planned) == len({*planned})


def _first_block(model, ids, mask, folder):
    """Return what the first block's weights see of some rows, by layer's name."""
    prefix, blocks = find_blocks(model)
    with torch.no_grad(), BlockCaller(model, {prefix: blocks}).entered() as caller:
        stream = Stream(caller, [Rows(ids, mask)], folder)
        stream.enter()
        weights, place = find_weights(blocks[0]), Place(prefix, 0)
        watched = [name for each in plan_rounds(stream, place, weights) for name in each.watched]
        return collect(stream, place, weights, watched, False, set(), None)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mixtral", "qwen3_moe"])
def test_padding_does_not_count(kind, tmp_path):
    ids = torch.randint(4, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    tokens = []
    for padding in (0, 9):
        ids[mask == 0] = padding
        seen = _first_block(make(kind), ids, mask, tmp_path / str(padding))
        tokens.append({name: each.train.tokens for name, each in seen.items()})
        last = [each.train.hessian for each in seen.values()]
        if padding == 0:
            first = last
    real = int(mask.sum())
    experts = {name: count for name, count in tokens[0].items() if ".experts." in name}
    assert all(count == real for name, count in tokens[0].items() if name not in experts)
    downs = sum(count for name, count in experts.items() if name.endswith("down_proj"))
    assert downs == (2 * real if experts else 0)
    assert tokens[0] == tokens[1]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(first, last, strict=True))


def test_padding_does_not_count_where_an_expert_gets_every_token(tmp_path):
    """Mixtral takes the tokens by the place they give the expert, not in their order."""
    ids = torch.randint(4, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 3:] = mask[2, 5:] = 0
    hessians = []
    for padding in (0, 9):
        ids[mask == 0] = padding
        model = tiny_mixtral(num_local_experts=2)
        seen = _first_block(model, ids, mask, tmp_path / str(padding))
        assert all(each.train.tokens == int(mask.sum()) for each in seen.values())
        hessians.append([each.train.hessian for each in seen.values()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*hessians, strict=True))


def test_an_expert_may_get_as_many_tokens_as_there_are_rows(tmp_path):
    """Its inputs, (tokens, in), are no (rows, length), though the numbers are the same."""
    ids = torch.randint(4, 64, (3, 32), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 20:] = 0
    model = tiny_qwen3_moe(num_experts=32)
    seen = _first_block(model, ids, mask, tmp_path)
    counts = [each.train.tokens for name, each in seen.items() if name.endswith("gate_proj")]
    assert 3 in counts
    assert sum(counts) == 2 * int(mask.sum())


@torch.no_grad()
def test_inputs_of_some_tokens_are_not_taken_for_those_of_others(tmp_path):
    """The quantized model may send an expert as many tokens as the original, but others."""
    model = tiny_switch()
    ids = torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    blocks = model.encoder.block
    with BlockCaller(model, {"encoder.block": blocks}).entered() as caller:
        stream = Stream(caller, [Rows(ids, torch.ones_like(ids))], tmp_path / "original")
        stream.enter()
        stream.advance(Place("encoder.block", 0))
        kept = Activations(tmp_path / "inputs")
        weights = find_weights(blocks[1])
        watch_inputs(stream, Place("encoder.block", 1), weights, list(weights), kept)
    files = {path.name for path in (tmp_path / "inputs").iterdir()}
    assert "layer.0.SelfAttention.q-0.safetensors" in files
    assert not any(".experts." in name for name in files)


def test_an_input_is_dead_that_is_zero_on_all_rows():
    def seen(*diagonal):
        return Statistics(torch.diag(torch.tensor(diagonal)), torch.zeros(3), tokens=1)

    train = seen(1.0, 0.0, 0.0)
    assert dead_inputs(Sums(train, None)) == 2
    assert dead_inputs(Sums(train, seen(0.0, 2.0, 0.0))) == 1
