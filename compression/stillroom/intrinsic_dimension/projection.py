"""Random projections from d numbers to D: stacked Fastfood blocks, and a very sparse matrix.

Both are drawn on the CPU from a seed, so that every machine and device has the same one. The
columns of P (D, d) have length 1 in the mean square, E‖P e_j‖² = 1: a step in the subspace is about
as long as the step in θ that it stands for (Li et al. 2018, 1804.08838, section 2).
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.errors import RecipeError
from stillroom.intrinsic_dimension.hadamard import next_power_of_two, transform

Kind = Literal["fastfood", "sparse"]

# Blocks are gone through in parts of so many numbers, which stay in a processor's cache.
PART = 1 << 18
# Drawn in parts of so many, so that the keys that are sorted take little memory. It decides what
# a seed stands for.
DRAWN = 1 << 20


def make_projection(kind: Kind, rows: int, columns: int, seed: int) -> "Projection":
    """Return the projection that `seed` stands for.

    Raises:
        RecipeError: there are not 1 to `rows` columns.
    """
    if not 1 <= columns <= rows:
        raise RecipeError(
            f"subspace: expected a dimension from 1 to the {rows} parameters of the model, "
            f"{columns} came; choose one in between"
        )
    match kind:
        case "fastfood":
            return Fastfood(rows, columns, seed)
        case "sparse":
            return Sparse(rows, columns, seed)


class Fastfood(nn.Module):
    """Blocks √(n/D) · S H G Π H B, one below the other, cut to (D, d) (Le et al. 2013, 1408.3060).

    n is the least power of two that is at least d; v is filled up with zeros to n. H is
    orthonormal, B holds ±1, Π permutes, G is normal, and S = s / ‖G‖ with s of the chi distribution
    of n degrees of freedom gives the rows of a block the lengths of normal ones (section 3 there).
    Every entry has E[P_ij²] = 1/D. O(D log d) time; 13 bytes of memory a row.
    """

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.size = next_power_of_two(columns)
        self.scale = math.sqrt(self.size / rows)
        shape = (-(-rows // self.size), self.size)
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        permutation = torch.empty(shape, dtype=torch.int32)
        for part in _parts(shape, DRAWN):
            permutation[part] = _permutations(permutation[part].shape, generator)
        normal = torch.randn(shape, generator=generator)
        lengths = _chi(shape, generator) / normal.norm(dim=1, keepdim=True)
        # They follow from the seed: no state to save, but they move with the module.
        for name, value in (
            ("signs", signs),
            ("permutation", permutation),
            ("normal", normal),
            ("lengths", lengths),
        ):
            self.register_buffer(name, value, persistent=False)
        self.signs: Tensor
        self.permutation: Tensor
        self.normal: Tensor
        self.lengths: Tensor

    def product(self, vector: Tensor) -> Tensor:
        """Return P v (rows,) of v (columns,), in float32."""
        filled = nn.functional.pad(vector.float(), (0, self.size - self.columns)) * self.scale
        blocks = torch.empty_like(self.normal)
        for part in _parts(blocks.shape, PART):
            mixed = transform(self.signs[part] * filled)
            mixed = mixed.gather(1, self.permutation[part].long()).mul_(self.normal[part])
            torch.mul(transform(mixed), self.lengths[part], out=blocks[part])
        return blocks.view(-1)[: self.rows]

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """Return Pᵀ g (columns,) of g (rows,), in float32."""
        total = torch.zeros(self.size, device=gradient.device)
        for part in _parts(self.normal.shape, PART):
            given = self._blocks_of(gradient, part)
            mixed = transform(given * self.lengths[part]).mul_(self.normal[part])
            place = self.permutation[part].long()
            mixed = transform(torch.empty_like(mixed).scatter_(1, place, mixed))
            total += mixed.mul_(self.signs[part]).sum(0)
        return total[: self.columns] * self.scale

    def _blocks_of(self, gradient: Tensor, part: slice) -> Tensor:
        given = gradient[part.start * self.size : part.stop * self.size].float()
        missing = (part.stop - part.start) * self.size - len(given)
        return nn.functional.pad(given, (0, missing)).view(-1, self.size)


class Sparse(nn.Module):
    """Entries ±1/√(D p) with probability p = 1/√D, else 0 (Li, Hastie & Church 2006).

    Each column is drawn by the number of its entries, then their rows. O(d √D) time and memory.
    """

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        generator = torch.Generator().manual_seed(seed)
        place = _sparse_places(rows, columns, generator)
        signs = torch.randint(0, 2, place.shape, generator=generator) * 2.0 - 1.0
        values = signs / rows**0.25  # √(D p) = D^(1/4)
        flipped = place % columns * rows + place // columns
        order = flipped.argsort()
        self.matrix = Compressed(place, values, rows, columns)
        self.transposed = Compressed(flipped[order], values[order], columns, rows)

    def product(self, vector: Tensor) -> Tensor:
        """Return P v (rows,) of v (columns,), in float32."""
        return self.matrix.product(vector)

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """Return Pᵀ g (columns,) of g (rows,), in float32."""
        return self.transposed.product(gradient)


Projection = Fastfood | Sparse
"""A fixed matrix P (rows, columns), known by its products with vectors."""


class Compressed(nn.Module):
    """A sparse matrix by rows (CSR): `places` row · columns + column of its `values`, ascending."""

    def __init__(self, places: Tensor, values: Tensor, rows: int, columns: int) -> None:
        super().__init__()
        self.shape = (rows, columns)
        counts = torch.bincount(places // columns, minlength=rows)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        self.register_buffer("starts", starts.int(), persistent=False)
        self.register_buffer("columns", (places % columns).int(), persistent=False)
        self.register_buffer("values", values, persistent=False)
        self.starts: Tensor
        self.columns: Tensor
        self.values: Tensor

    def product(self, vector: Tensor) -> Tensor:
        """Return the product (rows,) with a vector (columns,), in float32."""
        with warnings.catch_warnings():
            # "Sparse CSR tensor support is in beta state": the products are tested here.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            matrix = torch.sparse_csr_tensor(
                self.starts, self.columns, self.values, self.shape, check_invariants=False
            )
        product: Tensor = matrix @ vector.float()
        return product


def _parts(shape: Sequence[int], numbers: int) -> list[slice]:
    blocks, size = shape
    step = max(1, numbers // size)
    return [slice(at, min(at + step, blocks)) for at in range(0, blocks, step)]


def _permutations(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return a random permutation in each row, as int32."""
    # 62 random bits: two equal ones, whose order would not be random, do not come about.
    keys = torch.randint(0, 1 << 62, shape, generator=generator)
    return keys.argsort(dim=1).int()


def _chi(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return draws of the chi distribution with shape[1] degrees of freedom.

    By Wilson and Hilferty's cube of a normal number: within 1 % at 3 degrees already, and torch's
    own gamma draws take no generator.
    """
    freedom = shape[1]
    third = 2 / (9 * freedom)
    cube = 1 - third + math.sqrt(third) * torch.randn(shape, generator=generator)
    return cube.clamp_(min=0).pow_(1.5).mul_(math.sqrt(freedom))


def _sparse_places(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return the places row · columns + column of the entries, sorted, each with probability p.

    The gaps between them are geometric, so that no place is asked one by one.
    """
    chance = 1 / math.sqrt(rows)
    total = rows * columns
    found = []
    last = -1
    count = int(total * chance) + 1
    while last < total:
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        # P(gap > k) = (1 − p)^k; 1 − u is never 0. With p = 1 every gap is 1.
        gaps = torch.ones(count, dtype=torch.long)
        if chance < 1:
            gaps += ((1 - uniform).log() / math.log1p(-chance)).floor().long()
        found.append(last + gaps.cumsum(0))
        last = int(found[-1][-1])
        count = max(16, count // 8)
    places = torch.cat(found)
    return places[places < total]
