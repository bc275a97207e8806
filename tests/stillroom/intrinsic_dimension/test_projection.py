import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import RecipeError
from stillroom.intrinsic_dimension import projection as module
from stillroom.intrinsic_dimension.hadamard import hadamard_matrix
from stillroom.intrinsic_dimension.projection import Fastfood, Kind, make_projection

KINDS: tuple[Kind, ...] = ("fastfood", "sparse")


def dense(kind: Kind, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    projection = make_projection(kind, rows, columns, seed)
    return torch.stack([projection.product(unit) for unit in torch.eye(columns)], 1)


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 300),
    part=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)
def test_both_products_are_of_one_matrix(kind: Kind, rows: int, part: float, seed: int) -> None:
    columns = max(1, round(rows * part))
    projection = make_projection(kind, rows, columns, seed)
    matrix = dense(kind, rows, columns, seed)
    across = torch.stack([projection.transposed_product(unit) for unit in torch.eye(rows)])
    assert matrix.shape == across.shape == (rows, columns)
    torch.testing.assert_close(across, matrix, rtol=1e-4, atol=1e-5)
    vector, gradient = torch.randn(columns), torch.randn(rows)
    torch.testing.assert_close(projection.product(vector), matrix @ vector, rtol=1e-4, atol=1e-4)
    product = projection.transposed_product(gradient)
    torch.testing.assert_close(product, matrix.T @ gradient, rtol=1e-4, atol=1e-4)


def test_blocks_are_the_product_of_their_explicit_factors() -> None:
    rows, columns, size = 37, 13, 16
    projection = Fastfood(rows, columns, seed=3)
    hadamard = hadamard_matrix(size) / math.sqrt(size)
    blocks = []
    for block in range(3):
        permuted = torch.eye(size)[projection.permutation[block].long()]
        signs = torch.diag(projection.signs[block].float())
        normal, lengths = projection.normal[block].diag(), projection.lengths[block].diag()
        blocks.append(lengths @ hadamard @ normal @ permuted @ hadamard @ signs)
        assert sorted(projection.permutation[block].tolist()) == list(range(size))
    expected = torch.cat(blocks)[:rows, :columns] * math.sqrt(size / rows)
    torch.testing.assert_close(dense("fastfood", rows, columns, 3), expected, rtol=1e-4, atol=1e-5)


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    projection = Fastfood(300, 10, 0)
    vector, gradient = torch.randn(10), torch.randn(300)
    whole = projection.product(vector), projection.transposed_product(gradient)
    monkeypatch.setattr(module, "PART", 32)
    again = Fastfood(300, 10, 0)
    torch.testing.assert_close(again.product(vector), whole[0])
    torch.testing.assert_close(again.transposed_product(gradient), whole[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(2048, 8), (1000, 37)])
def test_columns_have_unit_length_in_the_mean_square(kind: Kind, rows: int, columns: int) -> None:
    means = torch.tensor(
        [dense(kind, rows, columns, seed).square().sum(0).mean() for seed in range(60)]
    )
    error = means.std() / math.sqrt(len(means))
    assert abs(means.mean() - 1) < 4 * error
    assert error < 0.01


def test_columns_are_nearly_orthogonal() -> None:
    # Different columns of D entries of size 1/√D have products of size 1/√D.
    matrix = dense("fastfood", 4096, 32)
    products = matrix.T @ matrix - torch.eye(32)
    assert products.abs().max() < 8 / math.sqrt(4096)


def test_sparse_entries_are_as_many_as_their_density_says() -> None:
    rows, columns = 10_000, 300
    projection = make_projection("sparse", rows, columns, 0)
    count = len(projection.matrix.values)
    expected = rows * columns / math.sqrt(rows)
    assert abs(count - expected) < 5 * math.sqrt(expected)
    torch.testing.assert_close(projection.matrix.values.abs(), torch.full((count,), 0.1))
    assert abs(projection.matrix.values.sign().mean()) < 5 / math.sqrt(count)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides(kind: Kind) -> None:
    first = dense(kind, 200, 7, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, dense(kind, 200, 7, seed=1))
    assert not torch.equal(first, dense(kind, 200, 7, seed=2))


def test_memory_does_not_grow_with_the_dimension() -> None:
    def size(columns: int) -> int:
        buffers = make_projection("fastfood", 1 << 14, columns, 0).buffers()
        return sum(each.numel() * each.element_size() for each in buffers)

    assert size(4) == size(1 << 14) == 13 * (1 << 14)


def test_dimensions_beyond_the_model_are_refused() -> None:
    with pytest.raises(RecipeError, match="from 1 to the 10 parameters of the model, 11 came"):
        make_projection("fastfood", 10, 11, 0)
    with pytest.raises(RecipeError, match="0 came"):
        make_projection("sparse", 10, 0, 0)
