import pytest
import torch

from stillroom.errors import StageError
from stillroom.intrinsic_dimension.hadamard import hadamard_matrix, next_power_of_two, transform


def sylvester(size: int) -> torch.Tensor:
    """Entry (i, j) is −1 to the number of bits that i and j share: no recursion, no product."""
    return torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    ).double()


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64, 128, 256])
def test_the_transform_is_the_explicit_matrix(size: int) -> None:
    matrix = sylvester(size)
    assert torch.equal(hadamard_matrix(size).double(), matrix)
    values = torch.randn(2, 3, size, dtype=torch.float64)
    torch.testing.assert_close(transform(values, orthonormal=False), values @ matrix)
    torch.testing.assert_close(transform(values), values @ matrix / size**0.5)


@pytest.mark.parametrize("size", [4096, 1 << 13])
def test_large_transforms_equal_butterflies(size: int) -> None:
    values = torch.randn(2, size, dtype=torch.float64)
    expected = values.clone()
    width = 1
    while width < size:
        pairs = expected.view(2, -1, 2, width)
        expected = torch.stack(
            [pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2
        ).reshape(2, size)
        width *= 2
    torch.testing.assert_close(transform(values, orthonormal=False), expected)


def test_orthonormal_it_is_its_own_inverse_and_leaves_its_input() -> None:
    values = torch.randn(5, 1 << 15)
    before = values.clone()
    torch.testing.assert_close(transform(transform(values)), values, rtol=1e-4, atol=1e-5)
    assert torch.equal(values, before)


def test_other_lengths_are_refused() -> None:
    with pytest.raises(StageError, match="power of two, 12 came; pad it to 16"):
        transform(torch.zeros(3, 12))
    assert [next_power_of_two(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
