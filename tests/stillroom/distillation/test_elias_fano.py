import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stillroom.distillation.elias_fano import code_bytes, decode, encode
from stillroom.errors import CorruptedError


def slow_code(ids, vocabulary):
    """Return the bytes of one code, built bit by bit as the text of the format says."""
    count = len(ids)
    low = max(0, math.floor(math.log2(vocabulary / count))) if count else 0
    string = ["0"] * (count + math.ceil(vocabulary / 2**low) - 1 if count else 0)
    bits = ""
    for i, word in enumerate(sorted(ids)):
        bits += "".join(str(word // 2**k % 2) for k in range(low))
        string[i + word // 2**low] = "1"
    bits += "".join(string)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8)]


@st.composite
def words(draw):
    """Return a vocabulary and some positions' ids below it, the extremes often among them."""
    vocabulary = draw(st.one_of(st.integers(1, 40), st.integers(1, 200_000)))
    count = draw(st.integers(0, 24))
    word = st.one_of(st.sampled_from([0, vocabulary - 1]), st.integers(0, vocabulary - 1))
    one = st.lists(word, min_size=count, max_size=count)
    return vocabulary, count, draw(st.lists(one, min_size=1, max_size=4))


@settings(deadline=None, max_examples=200)
@given(words())
@example((1, 1, [[0]]))
@example((5, 0, [[], []]))
@example((3, 8, [[2] * 8, [0] * 8]))
@example((49_152, 16, [[49_151] * 16, [0] * 16]))
@example((151_936, 1, [[151_935], [0]]))
@example((2**32, 2, [[2**32 - 1, 0]]))
def test_codes_are_those_of_the_format_and_give_the_sorted_ids_back(case):
    vocabulary, count, rows = case
    ids = np.array(rows, dtype=np.int64).reshape(len(rows), count)
    codes = encode(ids, vocabulary)
    assert codes.dtype == np.uint8
    assert codes.shape == (len(rows), code_bytes(count, vocabulary))
    assert codes.tolist() == [slow_code(row, vocabulary) for row in rows]
    found = decode(codes[np.newaxis], count, vocabulary)
    assert found.dtype == np.int64
    assert found[0].tolist() == [sorted(row) for row in rows]


@pytest.mark.parametrize(
    ("count", "vocabulary", "size"),
    [(16, 49_152, 27), (2, 49_152, 4), (16, 151_936, 31), (2, 151_936, 5), (1, 256, 2), (0, 9, 0)],
)
def test_sizes_by_hand(count, vocabulary, size):
    assert code_bytes(count, vocabulary) == size


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 300_000))
def test_size_is_within_two_bits_an_id_of_what_any_code_takes(count, vocabulary):
    least = math.log2(math.comb(vocabulary + count - 1, count))
    assert least <= 8 * code_bytes(count, vocabulary) < least + 2 * count + 8


def test_a_single_id_is_its_own_low_part():
    # 256 words, one id: eight low bits, and a string of the one bit that is set.
    assert encode(np.array([[0xA5]]), 256).tolist() == [[0xA5, 1]]


def test_bytes_that_are_no_code_are_refused():
    codes = encode(np.array([[3, 60, 9]]), 64)
    codes[0, -1] = 0
    with pytest.raises(CorruptedError, match="codes of 3 words each among 64"):
        decode(codes, 3, 64)


def test_an_id_that_the_code_has_no_room_for_is_refused():
    for word in (-1, 64):
        with pytest.raises(IndexError):
            encode(np.array([[3, word]]), 64)
