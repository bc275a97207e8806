"""Which layers of a model are quantized, and how."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch

from torch import nn

from stillroom.blocks import LinearWeight, find_weights
from stillroom.errors import RecipeError
from stillroom.quantization.obq import refuse_large
from stillroom.quantization.options import QuantizationOptions, check_fits

logger = logging.getLogger(__name__)
# Convolutions and tables of positions are a smaller share of a block's weights.
LARGEST_SHARE_UNSEEN = 0.1


@dataclass(frozen=True)
class Choices:
    """Which layers are quantized, and how."""

    options: QuantizationOptions
    layer_options: Mapping[str, QuantizationOptions]
    skip: tuple[str, ...]

    def of(self, name: str) -> QuantizationOptions:
        """Return the options of a layer."""
        return self.layer_options.get(name, self.options)

    def weights(self, prefix: str, block: nn.Module) -> dict[str, LinearWeight]:
        """Return the weights of a block that are to be quantized, by full name."""
        named = {f"{prefix}.{name}": each for name, each in find_weights(block).items()}
        return {name: each for name, each in named.items() if not self._skips(name)}

    def check(self, stacks: Mapping[str, nn.ModuleList]) -> tuple[str, ...]:
        """Return the names of the layers that are left out.

        Raises:
            RecipeError: a layer does not fit, or a pattern fits none.
        """
        skipped, chosen = self.skipped(stacks), self.chosen(stacks)
        for name, weight in chosen.items():
            check_fits(self.of(name), *weight.shape, name)
            if self.of(name).method == "obq":
                refuse_large(*weight.shape)
        unknown = sorted(self.layer_options.keys() - {*chosen, *skipped})
        if unknown:
            first = next(iter(chosen))
            raise RecipeError(f"there is no layer {unknown[0]}; the first layer is {first}")
        return skipped

    def chosen(self, stacks: Mapping[str, nn.ModuleList]) -> dict[str, LinearWeight]:
        """Return the weights of all blocks that are to be quantized, by full name."""
        return {
            name: weight
            for stack, blocks in stacks.items()
            for index, block in enumerate(blocks)
            for name, weight in self.weights(f"{stack}.{index}", block).items()
        }

    def skipped(self, stacks: Mapping[str, nn.ModuleList]) -> tuple[str, ...]:
        """Return the names of the layers that are left out.

        Raises:
            RecipeError: a pattern fits none, or they fit all.
        """
        names = list(Choices(self.options, {}, ()).chosen(stacks))
        skipped = tuple(name for name in names if self._skips(name))
        idle = [each for each in self.skip if not any(fnmatch(name, each) for name in names)]
        if idle or len(skipped) == len(names):
            raise RecipeError(
                f"skip must fit some of the layers, not all and not none: "
                f"{', '.join(idle or self.skip)}; the first layer is {names[0]}"
            )
        return skipped

    def settings(self) -> object:
        """Return all of it as JSON."""
        single = {name: asdict(options) for name, options in sorted(self.layer_options.items())}
        return [asdict(self.options), single, list(self.skip)]

    def _skips(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.skip)


def warn_of_unseen(stacks: Mapping[str, nn.ModuleList]) -> None:
    """Say which large share of the blocks' weights is in no layer that could be quantized."""
    whole, unseen = 0, {}
    for stack, blocks in stacks.items():
        found = {id(getattr(each.module, each.parameter)) for each in find_weights(blocks).values()}
        for name, parameter in blocks.named_parameters():
            if parameter.dim() > 1:
                whole += parameter.numel()
                if id(parameter) not in found:
                    unseen[f"{stack}.{name}"] = parameter.numel()
    share = sum(unseen.values()) / whole
    if share > LARGEST_SHARE_UNSEEN:
        logger.warning(
            "%.0f %% of the weights inside the blocks are not quantized, first %s: they belong "
            "neither to a linear layer nor to experts that transformers marks as such",
            100 * share,
            next(iter(unseen)),
        )
