import pytest
import torch

from stillroom.errors import MismatchError
from stillroom.quantization.formats.folder import open_quantized
from stillroom.quantization.losses import Loss, measure_losses
from stillroom.quantization.weight import relative_output_error
from tests.stillroom.quantization.formats.test_convert import saved, weight
from tests.stillroom.quantization.test_sequential import rows
from tests.stillroom.tiny import tiny_llama


def test_the_error_is_the_trace_formula_on_the_inputs_that_came(tmp_path):
    saved(tmp_path)
    result = open_quantized(tmp_path)
    original, model = tiny_llama(hidden=64), tiny_llama(hidden=64)
    losses = measure_losses(model, result, list(rows(padded=False).input_ids))
    assert list(losses) == list(result.layers)
    name = "model.layers.1.mlp.down_proj"
    came = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: came.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=rows(padded=False).input_ids)
    inputs = came[0].flatten(0, 1)
    expected = relative_output_error(
        original.get_submodule(name).weight.detach(), result.weight(name), 2 * inputs.T @ inputs
    )
    assert losses[name].relative_error == pytest.approx(expected, rel=1e-4)
    assert torch.equal(model.get_submodule(name).weight.detach(), result.weight(name).dequantize())


def test_weights_beyond_the_grid_are_counted():
    grid = weight(0, 4)
    values = grid.dequantize()
    assert Loss(grid, values).clipped == 0
    values[3, 5] = 1000.0
    values[7, 9] = -1000.0
    assert Loss(grid, values).clipped == 2


def test_a_layer_without_energy_lost_nothing():
    assert Loss(weight(0, 4), torch.zeros(32, 64)).relative_error == 0


def test_a_layer_that_the_model_does_not_have_is_named(tmp_path):
    saved(tmp_path)
    with pytest.raises(MismatchError, match=r"holds model\.layers\.0\.mlp\.down_proj"):
        measure_losses(tiny_llama(hidden=32), open_quantized(tmp_path), [])
