"""The size of a model, from its config.json alone, and of a student of it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillroom.builtin import builtin_model
from stillroom.config import Student
from stillroom.errors import SourceError
from tasks.sources import place_of


@dataclass(frozen=True)
class Shape:
    """How many layers a model has, and how wide they are.

    `inner` is the width of a feed-forward layer, or of one expert. `gated` layers have three
    matrices, others two. `copies` counts the matrices as large as the vocabulary.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    gated: bool
    vocabulary: int
    copies: int
    experts: int = 1
    experts_of_a_token: int = 1

    @property
    def block_parameters(self) -> float:
        """Parameters of one block."""
        return self._block(self.experts)

    @property
    def embedding_parameters(self) -> float:
        """Parameters of embeddings and head."""
        return self.copies * self.vocabulary * self.hidden

    @property
    def parameters(self) -> float:
        """All parameters."""
        return self.layers * self.block_parameters + self.embedding_parameters

    @property
    def active_parameters(self) -> float:
        """Parameters that one token is multiplied by."""
        return self.layers * self._block(self.experts_of_a_token) + self.embedding_parameters

    def of_student(self, student: Student) -> "Shape":
        """Return the shape of what a recipe's student starts as."""
        layers, heads = student.layers, student.attention_heads or self.heads
        shape = replace(
            self,
            layers=layers if isinstance(layers, int) else len(layers),
            hidden=student.hidden_size or self.hidden,
            inner=student.intermediate_size or self.inner,
            heads=heads,
            key_heads=max(1, self.key_heads * heads // self.heads),
        )
        return replace(shape, experts=1, experts_of_a_token=1) if student.experts else shape

    def _block(self, experts: int) -> float:
        attention = self.hidden * self.head_width * (2 * self.heads + 2 * self.key_heads)
        return attention + experts * (3 if self.gated else 2) * self.hidden * self.inner


def model_shape(source: str | Path) -> Shape:
    """Return the shape that a model's config.json states.

    Raises:
        SourceError: there is no config at hand.
    """
    config = _config(source)
    hidden = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    key_heads = config.get("num_key_value_heads") or heads
    experts = config.get("num_local_experts") or config.get("num_experts") or 1
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    return Shape(
        layers=_first(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        hidden=hidden,
        inner=config.get("moe_intermediate_size") or inner if experts > 1 else inner,
        heads=heads,
        key_heads=key_heads,
        head_width=config.get("head_dim") or hidden // heads,
        # The older kind of feed-forward layer has no gate.
        gated=key_heads != heads or config.get("hidden_act") == "silu",
        vocabulary=config["vocab_size"],
        copies=1 if config.get("tie_word_embeddings", True) else 2,
        experts=experts,
        experts_of_a_token=config.get("num_experts_per_tok") or 1,
    )


def _config(source: str | Path) -> dict[str, Any]:
    if isinstance(source, str) and source.startswith("builtin:"):
        return builtin_model(source.removeprefix("builtin:")).config
    if isinstance(source, str) and place_of(source) != "local":
        raise SourceError(
            f"the config of {source} is not at hand; give a snapshot of its "
            "config.json as teacher.config"
        )
    path = Path(source).expanduser()
    file = path / "config.json" if path.is_dir() else path
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: no readable config.json ({error})") from error
    return config


def _first(config: dict[str, Any], *names: str) -> int:
    for name in names:
        if name in config:
            return int(config[name])
    raise SourceError(f"config.json has none of {', '.join(names)}")
