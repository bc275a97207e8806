"""Word ids in the order that takes the fewest bits: the Elias-Fano code of sorted numbers.

The order of words that all count the same carries nothing, and sorting saves what it would cost
(Elias 1974; Fano 1971). Of M ids below u, sorted, repeats allowed, the l = max(0, ⌊log2(u / M)⌋)
low bits of each are kept as they are. What is left, h_i = id_i >> l, never falls: the bits h_i + i
of a string are set, one an id. The last can be ((u − 1) >> l) + M − 1, so that a code has

  M·l + M + ⌈u / 2^l⌉ − 1 bits: first those of the ids' low parts, then the string, then zeros up to
  a whole byte. Bit j is bit j mod 8 of byte ⌊j / 8⌋, counted from the least significant; a low part
  begins with its least significant bit.

The size depends on M and u alone, so that codes can be rows of an array. 16 of 49,152 words take
215 bits; no code of a fixed size takes fewer than log2 C(u + M − 1, M) = 205.1, and 16 bits a word
take 256.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.errors import CorruptedError

WIDTH = 32
"""Bits of the integers that low parts are cut out of, and set into again."""


def code_bytes(count: int, vocabulary: int) -> int:
    """Return the bytes of a code of `count` ids below `vocabulary`."""
    low, high = _bits(count, vocabulary)
    return -(-(count * low + high) // 8)


def encode(ids: NDArray[Any], vocabulary: int) -> NDArray[np.uint8]:
    """Return the codes (positions, bytes) of ids (positions, M) in any order.

    Ids are integers from 0 to `vocabulary` − 1, which is below 2^32.

    Raises:
        IndexError: the code has no room for an id.
    """
    positions, count = ids.shape
    low, high = _bits(count, vocabulary)
    ordered = np.sort(ids.astype(np.uint32), axis=-1)
    parts = np.unpackbits(_bytes_of(ordered), axis=-1, bitorder="little")[..., :low]
    ones = np.zeros((positions, high), np.uint8)
    np.put_along_axis(ones, (ordered >> low) + np.arange(count), 1, axis=-1)
    bits = np.concatenate([parts.reshape(positions, count * low), ones], axis=-1)
    return np.packbits(bits, axis=-1, bitorder="little")


def decode(codes: NDArray[np.uint8], count: int, vocabulary: int) -> NDArray[np.int64]:
    """Return the sorted ids (…, M) of codes (…, bytes).

    Raises:
        CorruptedError: a code is not one of `count` ids.
    """
    low, high = _bits(count, vocabulary)
    shape = (*codes.shape[:-1], count)
    bits = np.unpackbits(codes, axis=-1, bitorder="little")
    ones = bits[..., count * low : count * low + high]
    if (ones.sum(-1) != count).any():
        raise CorruptedError(
            f"expected codes of {count} words each among {vocabulary}, other bytes came; "
            "capture the teacher again"
        )
    # Row by row, so that each code's ones lie side by side.
    places = np.nonzero(ones)[-1].reshape(shape)
    parts = np.zeros((*shape, WIDTH), np.uint8)
    parts[..., :low] = bits[..., : count * low].reshape(*shape, low)
    lowest = np.packbits(parts, axis=-1, bitorder="little").view("<u4")[..., 0]
    ids: NDArray[np.int64] = (places - np.arange(count) << low) + lowest
    return ids


def _bits(count: int, vocabulary: int) -> tuple[int, int]:
    """Return how many low bits an id has, and how many bits the string of the high parts."""
    if count == 0:
        return 0, 0
    low = max(0, (vocabulary // count).bit_length() - 1)
    return low, count + (vocabulary - 1 >> low)


def _bytes_of(values: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Return the bytes (…, 4) of some numbers, the least significant first."""
    return values.astype("<u4")[..., np.newaxis].view(np.uint8)
