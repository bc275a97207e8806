from dataclasses import replace

import pytest
import torch

from stillroom.blocks import read_weight, write_weight
from stillroom.quantization.export import save_quantized
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.loading import load_quantized
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.rounding import round_to_nearest
from stillroom.quantization.sequential import quantize_model
from tests.stillroom.quantization.test_sequential import logits, rows
from tests.stillroom.tiny import tiny_llama


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_layers_may_differ_in_bits_and_groups(tmp_path, weights):
    model = tiny_llama(hidden=64)
    result = quantize_model(model, rows(), QuantizationOptions(4, 32))
    choices = {
        "model.layers.0.mlp.up_proj": (3, 64),
        "model.layers.1.mlp.down_proj": (8, -1),
        "model.layers.1.self_attn.q_proj": (2, 16),
    }
    for name, (bits, group_size) in choices.items():
        linear = model.get_submodule(name)
        options = QuantizationOptions(bits, group_size)
        weight = round_to_nearest(read_weight(linear), options).weight
        write_weight(linear, weight.dequantize())
        result.layers[name] = replace(result.layers[name], weight=weight)
    save_quantized(model, None, result, tmp_path)
    loaded = load_quantized(tmp_path, weights=weights)
    assert torch.equal(logits(loaded, rows()), logits(model, rows()))
    if weights == "packed":
        bits = {
            name: layer.bits
            for name, layer in loaded.named_modules()
            if isinstance(layer, QuantizedLinear)
        }
        assert bits == dict.fromkeys(result.layers, 4) | {
            name: bits for name, (bits, _) in choices.items()
        }
