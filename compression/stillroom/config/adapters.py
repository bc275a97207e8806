"""The section of a recipe that says what is learned on top of the frozen base: one of a union."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from stillroom.config.section import Count, Identifier, Section
from stillroom.config.sections import Data
from stillroom.config.training import Training

USUAL_METHOD = "lora"


class AnyAdapter(Section):
    """What every adapter has."""

    name: Identifier
    """Name of the adapter, in lower case, digits and dashes."""
    data: Data
    """What the adapter learns, and on what it is measured."""
    training: Training = Training()
    """How the loop runs."""


class Merge(Section):
    """Make one model of a quantized base and its adapter: merge, quantize again, measure."""

    max_added_nats: Annotated[float, Field(ge=0)] = 0.05
    """Most that this may add to the held-out loss of the adapter beside its base, in nats a
    prediction; above it the run fails."""


class Lora(AnyAdapter):
    """Low-rank updates beside the frozen weights."""

    method: Literal["lora"] = "lora"
    """lora: low-rank updates beside the frozen weights; they can be merged."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """Inner width of each low-rank update."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the update's inputs dropped in training."""
    target_modules: tuple[str, ...] | None = None
    """Last parts of the names of the layers to adapt; absent: every linear in the blocks."""
    merge: Merge | None = None
    """Also leave a quantized model with the adapter in its weights; absent: it stays beside."""


class Bottleneck(AnyAdapter):
    """Small two-layer networks after the sublayers."""

    method: Literal["bottleneck"]
    """bottleneck: small two-layer networks after the sublayers (Houlsby, Pfeiffer)."""
    width: Annotated[int, Field(ge=1, le=4096)] = 32
    """Neurons of each bottleneck."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """houlsby: after attention and feed-forward; pfeiffer: after the feed-forward alone."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """What stands between the two layers."""


class PrefixTuning(AnyAdapter):
    """Keys and values before those of the text, in every layer."""

    method: Literal["prefix_tuning"]
    """prefix_tuning: keys and values before those of the text in every layer; without an
    encoder_width this is P-tuning v2."""
    num_virtual_tokens: Annotated[int, Field(ge=1, le=4096)] = 16
    """Length of the prefix in tokens."""
    encoder_width: Count | None = None
    """Inner width of an MLP that makes the prefix while it is trained; absent: it is trained
    itself."""


class PromptTuning(AnyAdapter):
    """Embeddings before the text's."""

    method: Literal["prompt_tuning"]
    """prompt_tuning: embeddings before the text's."""
    num_virtual_tokens: Annotated[int, Field(ge=1, le=4096)] = 16
    """Length of the prompt in tokens."""
    init_token_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Words, by their ids, whose embeddings the prompt starts as; absent: drawn ones."""


class PTuning(AnyAdapter):
    """Embeddings that an encoder makes, anywhere in the text."""

    method: Literal["p_tuning"]
    """p_tuning: embeddings that an LSTM or MLP makes, before, inside or after the text."""
    template: tuple[tuple[Annotated[int, Field(ge=-1)], Count], ...] = ((0, 16),)
    """Where virtual tokens stand: pairs of a place (before which token of the row, counted from 0;
    -1: after its last) and how many stand there."""
    encoder: Literal["lstm", "mlp"] = "lstm"
    """What makes the embeddings while they are trained."""
    encoder_width: Count = 128
    """Its inner width."""


class BitFit(AnyAdapter):
    """The biases alone."""

    method: Literal["bitfit"]
    """bitfit: the biases alone are trained."""


class TopLayers(AnyAdapter):
    """The last layers, in a copy."""

    method: Literal["top_layers"]
    """top_layers: the last layers are trained, in a copy; a baseline."""
    layers: Count = 1
    """How many."""


class Full(AnyAdapter):
    """Everything, in a copy."""

    method: Literal["full"]
    """full: everything is trained, in a copy as large as the dense base; a baseline."""


def _method(value: Any) -> Any:
    if isinstance(value, dict):
        return value.get("method", USUAL_METHOD)
    return getattr(value, "method", USUAL_METHOD)


Adapter = Annotated[
    Annotated[Lora, Tag("lora")]
    | Annotated[Bottleneck, Tag("bottleneck")]
    | Annotated[PrefixTuning, Tag("prefix_tuning")]
    | Annotated[PromptTuning, Tag("prompt_tuning")]
    | Annotated[PTuning, Tag("p_tuning")]
    | Annotated[BitFit, Tag("bitfit")]
    | Annotated[TopLayers, Tag("top_layers")]
    | Annotated[Full, Tag("full")],
    Discriminator(_method),
]
"""A task or domain learned on top of the frozen base; the method is lora unless it is named."""
