"""Tensors of experts, which a checkpoint has one by one and a model in one parameter."""

from collections import Counter
from collections.abc import Iterable

from torch import nn

from stillroom.blocks import LinearWeight, weight_at

ENDING = ".weight"


def parameter_of(name: str, weight: LinearWeight) -> str:
    """Return the name of the parameter in which the weight of the layer `name` lies."""
    owner = name if weight.expert is None else name.rsplit(".", 2)[0]
    return f"{owner}.{weight.parameter}"


def plain_experts(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Return the keys that are unpacked weights of single experts, each with its layer's name."""
    own = model.state_dict().keys()
    names = {
        key: key.removesuffix(ENDING) for key in keys if key.endswith(ENDING) and key not in own
    }
    return {key: name for key, name in names.items() if _is_expert(model, name)}


def _is_expert(model: nn.Module, name: str) -> bool:
    try:
        weight = weight_at(model, name)
    except (AttributeError, ValueError):
        return False
    return weight.expert is not None and hasattr(weight.module, weight.parameter)


class Parts:
    """Which parameters have come, where several layers' weights lie in one."""

    def __init__(self) -> None:
        self._came: Counter[str] = Counter()  # how many numbers of each
        self._whole: dict[str, int] = {}

    def add(self, name: str, weight: LinearWeight) -> None:
        """Take note of the weight of the layer `name`."""
        parameter = parameter_of(name, weight)
        self._came[parameter] += weight.stored.numel()
        self._whole[parameter] = getattr(weight.module, weight.parameter).numel()

    @property
    def parameters(self) -> set[str]:
        """The parameters of which something came."""
        return set(self._came)

    @property
    def lacking(self) -> list[str]:
        """The parameters of which something did not."""
        return [name for name, came in self._came.items() if came < self._whole[name]]
