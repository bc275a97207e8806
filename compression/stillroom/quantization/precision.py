"""How exactly matrices of float32 are multiplied."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

MatmulPrecision = Literal["highest", "high", "medium"]


@contextmanager
def matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    """Multiply float32 matrices with torch's precision of this name while it is entered.

    "medium" lets a processor with bfloat16 products use them, and adds up in float32; where it
    has none, the products are float32's. "high" is TF32 on a GPU that has it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
