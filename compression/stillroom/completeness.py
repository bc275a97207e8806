"""Tell a model of which all tensors came from one that transformers completed with random ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom.errors import SourceError


def require_whole(
    model: Any, found: Mapping[str, Any], folder: Path | str, *, new_head: bool
) -> None:
    """Refuse a model whose files lack some of its tensors, with `new_head` some of its body's.

    `found` is transformers' loading info. What is lacking was drawn at random, with a warning.

    Raises:
        SourceError: some are lacking.
    """
    lacking = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    if new_head:
        lacking = {name for name in lacking if not _is_of_head(name, model.base_model_prefix)}
    if not lacking:
        return
    packed = any(name.endswith(".qweight") for name in found["unexpected_keys"])
    remedy = (
        "its weights are packed: config.json has to say how under quantization_config"
        if packed
        else "save the whole model again, as the class that it is loaded as"
    )
    raise SourceError(
        f"{folder} cannot be loaded as a {type(model).__name__}: its files lack {len(lacking)} of "
        f"its tensors, first {min(lacking)}, which would be random; {remedy}"
    )


def _is_of_head(name: str, body: str) -> bool:
    """Return whether a tensor is the head's, or the pooling's in front of it."""
    return not name.startswith(f"{body}.") or "pooler" in name
