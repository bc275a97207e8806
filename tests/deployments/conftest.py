"""The recipe and its parts are those of the flows."""

from tests.flows.conftest import parts, recipe

__all__ = ["parts", "recipe"]
