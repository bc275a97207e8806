"""Prefixes of keys and values in every attention layer (2101.00190, 2110.07602)."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.adapters.options import PrefixOptions
from stillroom.adapters.part import Part
from stillroom.adapters.prefix_attention import Prefix, put_on, record_attention, take_off
from stillroom.adapters.probe import key_of
from stillroom.adapters.routing import Rows
from stillroom.errors import RecipeError
from stillroom.training.options import derived_seed

# Words in one forward pass; a base has at least so many positions.
_PASS_WORDS = 32


class PrefixEncoder(nn.Module):
    """W₂ tanh(W₁ e + b₁) + b₂ of one embedding e for each virtual token (2101.00190, 4.3).

    One encoder makes the keys and values of all layers.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        hidden: int,
        width: int,
        generator: torch.Generator,
    ) -> None:
        """Draw an encoder of keys and values of `shapes`, each (heads, tokens, head width)."""
        super().__init__()
        self.shapes = shapes
        tokens = next(iter(shapes.values()))[1]
        outputs = sum(math.prod(shape) // tokens for shape in shapes.values())
        self.embedding = nn.Parameter(torch.randn((tokens, hidden), generator=generator))
        self.W1 = _uniform((width, hidden), hidden, generator)
        self.b1 = _uniform((width,), hidden, generator)
        self.W2 = _uniform((outputs, width), width, generator)
        self.b2 = _uniform((outputs,), width, generator)

    def forward(self) -> dict[str, Tensor]:
        """Return the keys and values by name."""
        inner = torch.tanh(functional.linear(self.embedding, self.W1, self.b1))
        made = functional.linear(inner, self.W2, self.b2)  # (tokens, outputs)
        widths = [heads * width for heads, _, width in self.shapes.values()]
        parts = zip(self.shapes.items(), torch.split(made, widths, dim=1), strict=True)
        return {
            name: part.view(tokens, heads, width).transpose(0, 1)
            for (name, (heads, tokens, width)), part in parts
        }


class PrefixAdapter(Part):
    """Keys and values that every attention layer reads before those of the text.

    An encoder with a decoder has prefixes in the encoder, in the decoder and in its attention to
    the encoder (2101.00190, 4.1). They take no positions: the text keeps its own. Without an
    encoder of their own they start as those of words drawn from the vocabulary (2101.00190, 7.4):
    16 of them add 0.04 nats to the loss of SmolLM2, and random normal numbers 4.1. What an encoder
    makes is saved, and the encoder not.
    """

    def __init__(self, base: nn.Module, options: PrefixOptions, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(derived_seed(seed, "prefix_tuning"))
        recorded = _activations(base, options.num_virtual_tokens, generator)
        if not recorded:
            raise RecipeError(
                f"prefix_tuning: expected attention layers that call transformers' attention "
                f"interface, those of {type(base).__name__} do not; use another method"
            )
        # No submodules: they are the base's.
        self._layers: dict[str, Any] = {name: base.get_submodule(name) for name in recorded}
        self._worn: list[tuple[Any, Prefix]] = []
        self._made: tuple[Any, dict[str, Tensor]] | None = None
        numbers = {
            f"{key_of(name)}/{kind}": tensor.detach().float().clone()
            for name, both in recorded.items()
            for kind, tensor in zip(("keys", "values"), both, strict=True)
        }
        self.numbers = nn.ParameterDict()
        self.encoder: PrefixEncoder | None = None
        if options.encoder_width is None:
            self.numbers.update(_parameters(numbers))
            return
        hidden: int = base.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
        shapes = {name: tuple(tensor.shape) for name, tensor in numbers.items()}
        encoder = PrefixEncoder(shapes, hidden, options.encoder_width, generator)
        self.encoder = encoder.to(next(iter(numbers.values())).device)
        self.hook_before(base, self._make_anew)

    def wear(self, rows: Rows) -> None:
        """Have these rows of each batch read the prefix, until the next call."""
        super().wear(rows)
        for layer, prefix in self._worn:
            take_off(layer, prefix)
        self._worn = []
        if rows is False:
            return
        for name, layer in self._layers.items():
            prefix = Prefix(rows, partial(self._read, key_of(name)))
            put_on(layer, prefix)
            self._worn.append((layer, prefix))

    def train(self, mode: bool = True) -> "PrefixAdapter":
        """Set the mode; what the encoder made before is forgotten."""
        # A fused optimizer changes parameters without counting their versions up.
        self._made = None
        super().train(mode)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the keys and values of every layer, by name, whatever made them."""
        if self.encoder is None:
            return {name: parameter.detach() for name, parameter in self.numbers.items()}
        with torch.no_grad():
            return {name: tensor.clone() for name, tensor in self.encoder().items()}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Take keys and values that were saved; the encoder is gone.

        Raises:
            SourceError: they are of other names or shapes.
        """
        if self.encoder is not None:
            self.numbers.update(_parameters(self.tensors()))
            self.encoder = self._made = None
        super().take(tensors)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes: not what the encoder has made, which may have a graph."""
        return {**self.__dict__, "_made": None}

    def _read(self, key: str) -> tuple[Tensor, Tensor]:
        numbers = self.numbers if self.encoder is None else self._encoded(self.encoder)
        return numbers[f"{key}/keys"], numbers[f"{key}/values"]

    def _encoded(self, encoder: PrefixEncoder) -> dict[str, Tensor]:
        """Return what the encoder makes; all layers of a pass share it, and all that train not."""
        state = torch.is_grad_enabled(), *((p._version, p.data_ptr()) for p in encoder.parameters())
        if self._made is None or self._made[0] != state:
            self._made = state, encoder()
        return self._made[1]

    def _make_anew(self, *_: Any) -> None:
        # A graph serves one backward pass, and is none of those that a block makes again.
        if self.encoder is not None and self.rows is not False and torch.is_grad_enabled():
            self._made = None
            self._encoded(self.encoder)


def _activations(
    base: nn.Module, tokens: int, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what each layer's keys and values are for random words, (heads, tokens, width)."""
    vocab: int = base.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    words = torch.randint(vocab, (1, tokens), generator=generator)
    passes = [record_attention(base, some) for some in torch.split(words, _PASS_WORDS, dim=1)]
    return {
        name: (
            torch.cat([each[name][0] for each in passes], dim=1),
            torch.cat([each[name][1] for each in passes], dim=1),
        )
        for name in passes[0]
    }


def _parameters(tensors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensor) for name, tensor in tensors.items()}


def _uniform(shape: tuple[int, ...], inputs: int, generator: torch.Generator) -> nn.Parameter:
    values = (torch.rand(shape, generator=generator) * 2 - 1) * inputs**-0.5
    return nn.Parameter(values)
