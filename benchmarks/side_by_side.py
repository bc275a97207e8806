"""Independent pieces of work, as many at a time as there are threads."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from stillroom.hardware import threads_here
from stillroom.quantization.precision import MatmulPrecision


def side_by_side(
    work: Callable[..., Any],
    cells: list[tuple[Any, ...]],
    precision: MatmulPrecision = "highest",
) -> list[Any]:
    """Return what `work` makes of each cell, one thread each, in processes of their own.

    Half-filled batches gain more from that than from several threads. `precision` is torch's, of
    all products of float32.
    """
    with ProcessPoolExecutor(
        threads_here(),
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(precision,),
    ) as pool:
        return list(pool.map(work, *zip(*cells, strict=True)))


def _begin(precision: MatmulPrecision) -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(precision)
