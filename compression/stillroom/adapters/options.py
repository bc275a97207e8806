"""What each method of adapting a base has to be told."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from stillroom.errors import RecipeError

Method = Literal[
    "lora",
    "bottleneck",
    "prefix_tuning",
    "prompt_tuning",
    "p_tuning",
    "bitfit",
    "top_layers",
    "full",
]


@dataclass(frozen=True)
class LoraOptions:
    """Shape of the update B A · alpha / rank, and beside which layers it stands.

    `target_modules` are the last parts of their names; None is every linear in the blocks.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse a rank below 1."""
        _require_positive("lora.rank", self.rank)


@dataclass(frozen=True)
class BottleneckOptions:
    """Width of the bottleneck, and where it stands.

    `houlsby`: after the attention's and after the feed-forward layer's output (1902.00751);
    `pfeiffer`: after the feed-forward layer's alone (2005.00247).
    """

    width: int = 32
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    activation: Literal["gelu", "relu", "silu"] = "gelu"

    def __post_init__(self) -> None:
        """Refuse a width below 1."""
        _require_positive("bottleneck.width", self.width)


@dataclass(frozen=True)
class PrefixOptions:
    """Keys and values that every attention layer reads before those of the text.

    With `encoder_width` they come out of an MLP of that inner width while they are trained, as in
    prefix tuning (2101.00190); None trains them directly, as P-tuning v2 does (2110.07602).
    """

    num_virtual_tokens: int = 16
    encoder_width: int | None = None

    def __post_init__(self) -> None:
        """Refuse a prefix of no tokens."""
        _require_positive("prefix_tuning.num_virtual_tokens", self.num_virtual_tokens)
        if self.encoder_width is not None:
            _require_positive("prefix_tuning.encoder_width", self.encoder_width)


@dataclass(frozen=True)
class PromptOptions:
    """Embeddings that stand before the text's (2104.08691).

    They start as those of the words `init_token_ids`, or of words drawn from the vocabulary.
    """

    num_virtual_tokens: int = 16
    init_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse a prompt of no tokens."""
        _require_positive("prompt_tuning.num_virtual_tokens", self.num_virtual_tokens)


@dataclass(frozen=True)
class PTuningOptions:
    """Embeddings that an encoder makes, before, inside and after the text (2103.10385).

    `template` says where: pairs of a place and how many virtual tokens stand there. Place n ≥ 0 is
    before the n-th token of the row, −1 after its last token. A text that is to be continued has to
    be longer than the last place.
    """

    template: tuple[tuple[int, int], ...] = ((0, 16),)
    encoder: Literal["lstm", "mlp"] = "lstm"
    encoder_width: int = 128

    def __post_init__(self) -> None:
        """Refuse a template without tokens, or with a place that is none."""
        _require_positive("p_tuning.encoder_width", self.encoder_width)
        places = [place for place, _ in self.template]
        if not places or len(set(places)) < len(places) or min(places) < -1:
            raise RecipeError(
                "p_tuning.template: expected different places, each a token's number from 0 or -1 "
                f"for the end; {places} came"
            )
        for _, count in self.template:
            _require_positive("p_tuning.template: virtual tokens at a place", count)


@dataclass(frozen=True)
class BitFitOptions:
    """Biases alone are trained (2106.10199); there is nothing to choose."""


@dataclass(frozen=True)
class TopLayersOptions:
    """The last `layers` blocks are trained, the others stay."""

    layers: int = 1

    def __post_init__(self) -> None:
        """Refuse no layers."""
        _require_positive("top_layers.layers", self.layers)


@dataclass(frozen=True)
class FullOptions:
    """Everything is trained, in a copy of the base; there is nothing to choose."""


AdapterOptions = (
    LoraOptions
    | BottleneckOptions
    | PrefixOptions
    | PromptOptions
    | PTuningOptions
    | BitFitOptions
    | TopLayersOptions
    | FullOptions
)

KINDS: dict[Method, type[AdapterOptions]] = {
    "lora": LoraOptions,
    "bottleneck": BottleneckOptions,
    "prefix_tuning": PrefixOptions,
    "prompt_tuning": PromptOptions,
    "p_tuning": PTuningOptions,
    "bitfit": BitFitOptions,
    "top_layers": TopLayersOptions,
    "full": FullOptions,
}


def method_of(options: AdapterOptions) -> Method:
    """Return the name of the method that the options are for."""
    return next(method for method, kind in KINDS.items() if type(options) is kind)


def make_options(method: Method, fields: dict[str, Any]) -> AdapterOptions:
    """Return a method's options from JSON values; lists become tuples.

    Raises:
        RecipeError: a value is out of its range.
    """
    return KINDS[method](**{name: _frozen(value) for name, value in fields.items()})


def as_fields(options: AdapterOptions) -> dict[str, Any]:
    """Return the options as values that JSON can hold."""
    return asdict(options)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list | tuple) else value


def _require_positive(what: str, value: int) -> None:
    if value < 1:
        raise RecipeError(f"{what} must be at least 1; {value} came")
