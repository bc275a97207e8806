import pytest
import torch

from stillroom.quantization.allocation import LayerChoice, layer_options
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.formats.loading import load_quantized
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_llama


@torch.no_grad()
@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_layers_may_differ_in_bits_and_groups(tmp_path, weights):
    model, data = tiny_llama(hidden=64), token_rows()
    options = QuantizationOptions(4, 32, damping=0.05)
    choices = {
        "model.layers.0.mlp.up_proj": LayerChoice(3, 64),
        "model.layers.1.mlp.down_proj": LayerChoice(8, -1),
        "model.layers.1.self_attn.q_proj": LayerChoice(2, 16),
    }
    result = quantize_model(model, data, options, layer_options=layer_options(choices, options))
    save_quantized(model, None, result, tmp_path)
    loaded = load_quantized(tmp_path, weights=weights)
    ids = data.input_ids
    assert torch.allclose(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    if weights == "packed":
        bits = {
            name: layer.bits
            for name, layer in loaded.named_modules()
            if isinstance(layer, QuantizedLinear)
        }
        expected = dict.fromkeys(result.layers, 4)
        assert bits == expected | {name: choice.bits for name, choice in choices.items()}
