"""The fast Walsh-Hadamard transform, as products with small dense matrices."""

import math

import torch
from torch import Tensor

from stillroom.errors import StageError

# A product with 64 × 64 numbers keeps a CPU's matrix units busy; butterflies wait for memory.
FACTOR_BITS = 6


def transform(values: Tensor, *, orthonormal: bool = True) -> Tensor:
    """Return H · values along the last dimension (…, n), for n a power of two.

    H is Sylvester's matrix, H_2n = [[H_n, H_n], [H_n, −H_n]], which is symmetric; orthonormal: over
    √n, so that the transform is its own inverse. O(n log n) time, and O(n) memory beside the input.
    H_n is the Kronecker product of smaller ones (Le et al. 2013, 1408.3060, section 3).

    Raises:
        StageError: n is no power of two.
    """
    size = values.shape[-1]
    if size < 1 or size & (size - 1):
        raise StageError(
            f"Hadamard transform: expected a last dimension that is a power of two, {size} came; "
            f"pad it to {next_power_of_two(max(size, 1))}"
        )
    shape, inner = values.shape, 1
    for bits in _factors(size.bit_length() - 1):
        factor = _matrix(bits, values, orthonormal=orthonormal)
        width = 1 << bits
        if inner == 1:
            values = values.reshape(-1, width) @ factor
        else:
            values = factor @ values.reshape(-1, width, inner)
        inner *= width
    return values.reshape(shape)


def next_power_of_two(number: int) -> int:
    """Return the least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def hadamard_matrix(size: int) -> Tensor:
    """Return Sylvester's matrix (size, size) of ±1, for `size` a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _factors(bits: int) -> list[int]:
    """Return how the bits of n are shared out over products, as evenly as may be."""
    count = math.ceil(bits / FACTOR_BITS)
    return [bits // count + (i < bits % count) for i in range(count)]


def _matrix(bits: int, like: Tensor, *, orthonormal: bool) -> Tensor:
    matrix = hadamard_matrix(1 << bits).to(like)
    return matrix / 2 ** (bits / 2) if orthonormal else matrix
