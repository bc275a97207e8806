"""A model trained in a random subspace: θ = θ0 + P θ_d, of which only θ_d (d,) learns."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stillroom.errors import RecipeError, StageError
from stillroom.intrinsic_dimension.projection import Kind, Projection, make_projection
from stillroom.quantization.linear import QuantizedLinear
from stillroom.training.options import derived_seed


@dataclass(frozen=True)
class SubspaceOptions:
    """Which subspace: its dimension d, how P is drawn, and the seed that it is drawn from.

    `structure_aware`: of the d numbers one a layer scales the layer's part of P (SAID); else all
    of them are projected (DID).
    """

    dimension: int
    projection: Kind = "fastfood"
    structure_aware: bool = False
    seed: int = 0


class SubspaceModel(nn.Module):
    """`base`, frozen, with all its trainable parameters θ (D,) moved along P (D, d).

    DID: θ = θ0 + P v for v (d,) (Li et al. 2018, 1804.08838, equation 2). SAID: θ_i = θ0_i +
    λ_i (P v)_i for layer i of m, with v (d − m,) (Aghajanyan et al. 2020, 2012.13255, section 3.2);
    `vector` (d,) then holds v and λ − 1. It starts at zero, where the model is the base. Everything
    that is trained lies in the subspace, a classifier's new head too: d counts all of it. Tied
    parameters count once.

    Raises:
        RecipeError: the base is quantized, or d is not above m or not at most D.
        StageError: no parameter of the base requires a gradient.
    """

    def __init__(self, base: nn.Module, options: SubspaceOptions) -> None:
        super().__init__()
        _refuse_quantized(base)
        self.options = options
        self.shapes = {
            name: value.shape for name, value in base.named_parameters() if value.requires_grad
        }
        if not self.shapes:
            raise StageError("subspace: no parameter of the base requires a gradient; unfreeze it")
        self.size = sum(shape.numel() for shape in self.shapes.values())
        self.groups = layer_groups(list(self.shapes)) if options.structure_aware else {}
        scales = len(set(self.groups.values()))
        if options.dimension <= scales:
            raise RecipeError(
                f"subspace: structure-aware, {scales} of the dimensions scale the model's layers: "
                f"expected more than that, {options.dimension} came; raise the least dimension to "
                f"{scales + 1} or more, or set structure_aware to false"
            )
        device = next(base.parameters()).device
        seed = derived_seed(options.seed, "subspace")
        directions = options.dimension - scales
        self.projection = make_projection(options.projection, self.size, directions, seed)
        self.base = base.requires_grad_(False)
        self.vector = nn.Parameter(torch.zeros(options.dimension))
        self.to(device)
        self._kept: tuple[int, dict[str, Tensor]] | None = None

    @property
    def config(self) -> Any:
        """The base's config."""
        return self.base.config

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """No: activations made again in the backward pass would be those of the base."""
        return False

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return what the base with the parameters θ makes of its inputs."""
        return functional_call(self.base, self.moved_parameters(), inputs, options)

    def train(self, mode: bool = True) -> "SubspaceModel":
        """Set the base for training or not."""
        self._kept = None
        super().train(mode)
        return self

    def moved_parameters(self) -> dict[str, Tensor]:
        """Return θ by the names of the base's parameters; a gradient reaches `vector` alone.

        In evaluation mode and without gradients θ is made once, and again where `vector` changed.
        """
        if self.training or torch.is_grad_enabled():
            return self._moved()
        version = self.vector._version
        if self._kept is None or self._kept[0] != version:
            self._kept = (version, self._moved())
        return self._kept[1]

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the base with θ as its own parameters, moved in place; this model ends."""
        for name, value in self._moved().items():
            self.base.get_parameter(name).copy_(value)
        self.vector.zero_()
        return self.base

    def _moved(self) -> dict[str, Tensor]:
        scales = dict.fromkeys(self.groups.values())
        directions = self.options.dimension - len(scales)
        # P is float32, whatever a forward pass is cast to.
        with torch.autocast(self.vector.device.type, enabled=False):
            apply: Any = _Product.apply
            flat: Tensor = apply(self.vector[:directions], self.projection)
            offsets = torch.split(flat, [shape.numel() for shape in self.shapes.values()])
            factors = dict(zip(scales, 1 + self.vector[directions:], strict=True))
            moved = {}
            for (name, shape), offset in zip(self.shapes.items(), offsets, strict=True):
                scaled = factors[self.groups[name]] * offset if self.groups else offset
                start = self.base.get_parameter(name)
                moved[name] = start + scaled.view(shape).to(start.dtype)
        return moved


def layer_groups(names: list[str]) -> dict[str, str]:
    """Return the layer of each parameter: its numbered block, else the part that it lies in.

    Outside of the blocks `embeddings.word.weight` and `embeddings.norm.bias` lie in `embeddings`.
    """
    found = {}
    for name in names:
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        end = numbers[0] + 1 if numbers else max(1, len(parts) - 2)
        found[name] = ".".join(parts[:end])
    return found


def lora_parameters_a_rank(model: nn.Module) -> int:
    """Return how many parameters each rank of LoRA on every linear in the blocks adds.

    A linear (out, in) gets rank · (out + in) of them (Hu et al. 2021, 2106.09685, section 4.2).
    """
    from stillroom.blocks import find_blocks, find_linears

    _, blocks = find_blocks(model)
    weights: Iterator[Any] = (
        linear.weight for block in blocks for linear in find_linears(block).values()
    )
    return sum(sum(weight.shape) for weight in weights)


class _Product(torch.autograd.Function):
    """P v, with the gradient Pᵀ g."""

    @staticmethod
    def forward(context: Any, vector: Tensor, projection: Projection) -> Tensor:
        context.projection = projection
        return projection.product(vector)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return context.projection.transposed_product(gradients[0]), None


def _refuse_quantized(base: nn.Module) -> None:
    quantized = getattr(getattr(base, "config", None), "quantization_config", None) is not None
    packed = any(isinstance(module, QuantizedLinear) for module in base.modules())
    if quantized or packed:
        raise RecipeError(
            "subspace: expected a dense base, a quantized one came: its integers cannot move; "
            "measure the dense model that it was made of"
        )
