import pytest
import torch

from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.packing import pack
from stillroom.quantization.rounding import round_to_nearest


def _layers(bits=4, checkpoint_format="gptq", out=32, columns=64):
    generator = torch.Generator().manual_seed(bits)
    W, bias = torch.randn(out, columns, generator=generator), torch.randn(out, generator=generator)
    weight = round_to_nearest(W, QuantizationOptions(bits, 16)).weight
    packed = pack(weight, checkpoint_format)
    dense = torch.nn.Linear(columns, out)
    dense.weight.data, dense.bias.data = weight.dequantize(), bias
    return QuantizedLinear(packed, bias, bits, checkpoint_format), dense


def _inputs(dtype=torch.float32):
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_outputs_and_input_gradients_are_those_of_the_dense_layer(bits, checkpoint_format):
    packed, dense = _layers(bits, checkpoint_format)
    first, second = _inputs().requires_grad_(), _inputs().requires_grad_()
    ours, theirs = packed(first), dense(second)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert torch.allclose(first.grad, second.grad, rtol=1e-4, atol=1e-4)


def test_the_dense_weight_is_not_kept_for_the_backward_pass():
    packed, _ = _layers()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        packed(_inputs().requires_grad_())
    assert all(tensor.numel() < 64 * 32 for tensor in kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_goes_through(dtype):
    packed, dense = _layers()
    outputs = packed(_inputs(dtype))
    assert outputs.dtype == dtype
    assert torch.allclose(outputs.float(), dense(_inputs()), rtol=0.05, atol=0.15)


def test_a_change_of_dtype_leaves_the_weight_as_it_was():
    packed, dense = _layers()
    packed.to(torch.bfloat16)
    assert packed.scales.dtype == torch.float16
    assert packed.bias.dtype == torch.bfloat16
    assert torch.equal(packed.dequantize(), dense.weight)


def test_reordered_groups_are_read_by_their_index():
    packed, dense = _layers()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    plain = packed.dequantize()
    packed.g_idx = packed.g_idx[order]
    expected = torch.empty_like(plain)
    zeros, scales = 16 * [None], packed.scales.float()
    from stillroom.quantization.packing import unpack_rows, unpack_zeros

    integers = unpack_rows(packed.qweight, 4).float()
    zeros = unpack_zeros(packed.qzeros, 4, "gptq").float()
    for column in range(64):
        group = int(packed.g_idx[column])
        expected[:, column] = (integers[column] - zeros[group]) * scales[group]
    assert torch.equal(packed.dequantize(), expected)
    assert not torch.equal(expected, dense.weight)


def test_to_linear_gives_the_dense_layer():
    packed, dense = _layers()
    again = packed.to_linear()
    assert torch.equal(again.weight, dense.weight)
    assert torch.equal(again.bias, dense.bias)
    assert (packed.in_features, packed.out_features) == (again.in_features, again.out_features)


def test_it_has_nothing_to_train():
    packed, _ = _layers()
    assert list(packed.parameters()) == []
