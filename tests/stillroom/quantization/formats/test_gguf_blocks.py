from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import MismatchError, NotFiniteError
from stillroom.quantization.formats.gguf_blocks import choose_type, encode_blocks, round_scales
from stillroom.quantization.weight import QuantizedWeight

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")


def decoded(weight, kind):
    return torch.from_numpy(
        gguf.dequantize(encode_blocks(weight, kind), gguf.GGMLQuantizationType[kind])
    )


def random_weight(seed, bits, group_size, zero=None, out=3, columns=192):
    draw = torch.Generator().manual_seed(seed)
    shape = (out, columns // group_size)
    zeros = torch.randint(1, 2**bits, shape, generator=draw).to(torch.uint8)
    return QuantizedWeight(
        torch.randint(0, 2**bits, (out, columns), generator=draw).to(torch.uint8),
        (torch.rand(shape, generator=draw) * 0.1 + 1e-6).half(),
        zeros if zero is None else torch.full_like(zeros, zero),
        bits,
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(2, None), (3, None), (3, 4), (4, 8), (4, None), (8, 128)]),
    st.sampled_from([32, 64, 96, 192]),
)
def test_blocks_hold_the_weight(seed, grid, group_size):
    bits, zero = grid
    weight = random_weight(seed, bits, group_size, zero)
    kind = choose_type(weight, "Q5_0")
    assert kind == {8: "Q8_0", 4: "Q4_0" if zero else "Q5_0"}.get(bits, "Q4_0")
    assert torch.equal(decoded(weight, kind), weight.dequantize())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([32, 64, 192]))
def test_q4_1_is_as_exact_as_a_half_precision_minimum(seed, group_size):
    weight = random_weight(seed, 4, group_size)
    assert choose_type(weight) == "Q4_1"
    error = (decoded(weight, "Q4_1") - weight.dequantize()).abs().view(3, -1, group_size)
    minimum = weight.scales.float() * weight.zeros
    assert (error <= (minimum - minimum.half().float()).abs()[..., None] * 1.001).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_rounded_scales_make_q4_1_exact(seed):
    weight = random_weight(seed, 4, 32)
    nearby = round_scales(weight)
    assert torch.equal(decoded(nearby, "Q4_1"), nearby.dequantize())
    assert torch.equal(nearby.integers, weight.integers)
    change = nearby.scales.float() / weight.scales.float() - 1
    assert change[weight.scales > 1e-4].abs().max() <= 0.0075


@pytest.mark.parametrize("zero", range(1, 16))
def test_no_nearer_scale_is_exact(zero):
    halves = np.arange(1, 0x6C01, dtype=np.uint16).view(np.float16)  # all up to 4096
    scales = torch.from_numpy(halves)[:, None]
    zeros = torch.full_like(scales, zero, dtype=torch.uint8)
    weight = QuantizedWeight(torch.zeros(len(halves), 32, dtype=torch.uint8), scales, zeros, 4)
    came = round_scales(weight).scales[:, 0].double()
    exact = scales[(scales.double() * zero).half().double() == scales.double() * zero].double()
    assert torch.isin(came, exact).all()
    above = torch.searchsorted(exact, scales[:, 0].double()).clamp_max(len(exact) - 1)
    wanted = scales[:, 0].double()
    nearest = (
        (exact[above] - wanted).abs().minimum((exact[(above - 1).clamp_min(0)] - wanted).abs())
    )
    assert torch.equal((came - wanted).abs(), nearest)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (random_weight(0, 4, 16), "multiple of 32"),
        (random_weight(0, 4, 48), "multiple of 32"),
        (random_weight(0, 8, 32, zero=100), "symmetric: true"),
    ],
)
def test_what_no_block_holds_is_refused(weight, message):
    with pytest.raises(MismatchError, match=message):
        choose_type(weight)


def test_scales_beyond_half_precision_are_refused():
    weight = random_weight(0, 4, 32)
    with pytest.raises(NotFiniteError):
        encode_blocks(replace(weight, scales=torch.full_like(weight.scales, 60000.0)), "Q4_1")
