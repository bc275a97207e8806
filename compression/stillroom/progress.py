"""How long work tells the outside how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Called after each piece of long work; cheap enough to call at every step."""

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Report that `done` of `total` pieces, counted in `unit`, are finished."""


def silent(done: int, total: int, unit: str, note: str = "") -> None:
    """Report nothing."""
