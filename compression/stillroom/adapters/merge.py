"""Merge an adapter into its base: one dense model, as fast as the base alone."""

from typing import Any

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.lora import LoraAdapter
from stillroom.adapters.options import method_of
from stillroom.adapters.places import head_modules
from stillroom.errors import MismatchError


def merge_lora(adapted: AdaptedModel, name: str) -> Any:
    """Return the base, changed in place, with W + B A · alpha / rank in place of each W.

    A classifier's head becomes the adapter's own. All adapters are taken off.

    Raises:
        MismatchError: the adapter is no LoRA; or the base is quantized, and the sum would lie on
            no grid.
        NotFiniteError: a merged weight is NaN or infinite.
    """
    worn = adapted.worn(name)
    if not isinstance(worn.method, LoraAdapter):
        raise MismatchError(
            f"adapter {name}: a low-rank update can be merged, {method_of(worn.options)} came; "
            "serve it beside its base"
        )
    worn.method.merge(adapted.base)
    if worn.head is not None:
        for head, module in head_modules(adapted.base).items():
            module.load_state_dict(worn.head.copies[head].state_dict())
    for other in list(adapted.adapters):
        adapted.remove(other)
    return adapted.base
