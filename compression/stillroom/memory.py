"""What the C library does with memory that is free: give it back to the system, or keep it."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Of glibc's mallopt: its names, and what it has where nobody asked.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
USUAL = {TRIM_THRESHOLD: 1 << 26, MMAP_MAX: 65_536}
KEEPING = {TRIM_THRESHOLD: (1 << 31) - 1, MMAP_MAX: 0}


def return_free_memory() -> None:
    """Give back what the C library keeps for later; where it is not glibc, do nothing.

    Each layer frees matrices of another size. glibc keeps them, and what comes next fits into
    the holes ever worse: without this a process grows by some megabytes with each block.
    """
    if (trim := _function("malloc_trim")) is not None:
        trim(0)


@contextmanager
def keeping_free_memory() -> Iterator[None]:
    """Have what is freed kept for what comes next, then give it back; not glibc: do nothing.

    Training frees and takes the same hundreds of megabytes in every step, and so does asking a
    teacher: logits, gradients. By default glibc returns each large piece to the system, which
    clears page after page of it when the next step writes there.
    """
    if (set_option := _function("mallopt")) is None:
        yield
        return
    _set(set_option, KEEPING)
    try:
        yield
    finally:
        _set(set_option, USUAL)
        return_free_memory()


def _set(set_option: Any, values: dict[int, int]) -> None:
    for name, value in values.items():
        set_option(name, value)


@cache
def _function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
