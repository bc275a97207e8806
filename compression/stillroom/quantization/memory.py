"""Give memory that is free back to the system."""

import ctypes
import gc
from functools import cache
from typing import Any


def return_free_memory() -> None:
    """Let go of young garbage, and give back what the C library keeps for later, if it is glibc.

    The end of a forward pass leaves cycles of frames, which hold tensors until Python comes to
    look for them. And each layer frees matrices of another size, which glibc keeps, and what comes
    next fits into the holes ever worse: a process grew by a megabyte or two with each block.
    """
    gc.collect(1)  # the generations since; all the modules' objects are old
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
