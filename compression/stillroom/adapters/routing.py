"""Which rows of a batch go through an adapter, and how a layer's output is changed for them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rows = Tensor | bool
"""Indices (n,) of the rows that wear an adapter; True: all of them, False: none."""


def rows_by_name(names: Sequence[str | None]) -> dict[str, Rows]:
    """Return the rows that wear each adapter."""
    rows: dict[str, Rows] = {}
    for name in dict.fromkeys(names):
        if name is not None:
            which = [row for row, each in enumerate(names) if each == name]
            rows[name] = True if len(which) == len(names) else torch.tensor(which)
    return rows


def change_rows(rows: Rows, output: Tensor, change: Callable[[Tensor | slice], Tensor]) -> Tensor:
    """Return `output` (batch, …) with the rows that wear an adapter replaced.

    `change(which)` returns the new values of the rows `which`, an index of the first dimension.
    """
    if rows is False:
        return output
    if rows is True:
        return change(slice(None))
    changed = output.clone()
    changed[rows] = change(rows).to(output.dtype)
    return changed
