import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import MismatchError
from stillroom.quantization.packing import pack, pack_rows, unpack, unpack_rows, unpack_zeros
from stillroom.quantization.weight import QuantizedWeight

BITS = st.sampled_from([2, 3, 4, 8])


def _weight(seed, bits, out=32, columns=64, groups=4):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, *shape):
        return torch.randint(low, 2**bits, shape, generator=generator, dtype=torch.uint8)

    scales = torch.rand(out, groups, generator=generator).half()
    return QuantizedWeight(draw(0, out, columns), scales, draw(1, out, groups), bits)


def _slow_pack(values, bits):
    """Lay out one column bit by bit and read the bits as signed words."""
    stream = [(int(value) >> bit) & 1 for value in values for bit in range(bits)]
    words = []
    for start in range(0, len(stream), 32):
        word = sum(bit << i for i, bit in enumerate(stream[start : start + 32]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), BITS)
def test_rows_are_packed_bit_by_bit_and_come_back(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (64, 3), generator=generator, dtype=torch.uint8)
    words = pack_rows(values, bits)
    assert words.dtype == torch.int32
    assert words.shape == (64 * bits // 32, 3)
    for column in range(3):
        assert words[:, column].tolist() == _slow_pack(values[:, column], bits)
    assert torch.equal(unpack_rows(words, bits), values)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), BITS, st.sampled_from(["gptq", "gptq_v2"]))
def test_a_weight_comes_back_from_either_format(seed, bits, checkpoint_format):
    weight = _weight(seed, bits)
    packed = pack(weight, checkpoint_format)
    again = unpack(packed, bits, checkpoint_format)
    assert torch.equal(again.integers, weight.integers)
    assert torch.equal(again.zeros, weight.zeros)
    assert torch.equal(again.scales, weight.scales)
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shapes_and_dtypes_of_a_checkpoint(bits):
    packed = pack(_weight(0, bits))
    assert packed.qweight.shape == (64 * bits // 32, 32)
    assert packed.qzeros.shape == (4, 32 * bits // 32)
    assert packed.scales.shape == (4, 32)
    assert packed.g_idx.tolist() == [i // 16 for i in range(64)]
    assert packed.g_idx.dtype == packed.qweight.dtype == packed.qzeros.dtype == torch.int32
    assert packed.scales.dtype == torch.float16


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_stores_zero_points_less_one_and_version_2_as_they_are(bits):
    weight = _weight(1, bits)
    stored = unpack_rows(pack(weight).qzeros.T, bits).T  # (groups, out)
    assert torch.equal(stored, weight.zeros.T - 1)
    assert torch.equal(unpack_rows(pack(weight, "gptq_v2").qzeros.T, bits).T, weight.zeros.T)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_0_that_borrowed_from_its_neighbour_is_read_back(bits):
    zeros = torch.tensor([[0, 1, 3, 2] * 8], dtype=torch.uint8)  # (groups, out)
    ones = pack_rows(torch.ones(32, 1, dtype=torch.uint8), bits).T
    written = pack_rows(zeros.T, bits).T - ones
    assert torch.equal(unpack_zeros(written, bits, "gptq"), zeros)


def test_the_usual_symmetric_zero_point_is_the_known_word():
    weight = _weight(2, 4)
    middle = QuantizedWeight(weight.integers, weight.scales, torch.full_like(weight.zeros, 8), 4)
    assert (pack(middle).qzeros == 0x77777777).all()


def test_values_that_do_not_fill_words_are_refused():
    with pytest.raises(MismatchError, match="multiple of 32 values of 3 bits, got 40"):
        pack_rows(torch.zeros(40, 2, dtype=torch.uint8), 3)


def test_reordered_columns_are_refused():
    packed = pack(_weight(3, 4))
    packed.g_idx.copy_(packed.g_idx.flip(0))
    with pytest.raises(MismatchError, match="desc_act"):
        unpack(packed, 4)
