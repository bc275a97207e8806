"""What the inputs of a block's weights are in the full-precision model, and what is left out."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from stillroom.blocks import find_weights
from stillroom.quantization.capture import BlockCaller, Place, Rows
from stillroom.quantization.inputs import collect, plan_rounds, watch_inputs
from stillroom.quantization.streaming import Activations, Stream


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
