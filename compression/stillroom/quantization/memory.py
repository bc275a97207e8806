"""Give memory that is free back to the system."""

import ctypes
from functools import cache
from typing import Any


def return_free_memory() -> None:
    """Give back what the C library keeps for later; where it is not glibc, do nothing.

    Each layer frees matrices of another size. glibc keeps them, and what comes next fits into
    the holes ever worse: without this a process grows by some megabytes with each block.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
