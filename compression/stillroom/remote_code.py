"""Python code that a model brings along: it runs within `trusting_code` alone."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting_code(trusted: bool = True) -> Iterator[None]:
    """Let what is loaded here, in this thread, run code of its own; only code that you have read.

    Code that runs can do whatever its user can.
    """
    before = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(before)


def code_is_trusted() -> bool:
    """Return whether a model's own code may run here."""
    return _trusted.get()


def copy_code(source: Path, target: Path) -> None:
    """Give a folder the code of the one that it was made from, but for files that it has."""
    for file in source.glob("*.py"):
        if not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
