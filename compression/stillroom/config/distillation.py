"""The section of a recipe that says what the student is and how it learns from the teacher."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillroom.config.section import Count, Section
from stillroom.config.training import Training

# Hinton et al. 2015; Sanh et al. 2019 (DistilBERT), section 3; Fedus et al. 2021 (Switch), table 7.
PRESETS: dict[str, dict[str, float]] = {
    "hinton": {"soft_weight": 1.0, "hard_weight": 0.0, "temperature": 2.0},
    "switch": {"soft_weight": 0.25, "hard_weight": 0.75, "temperature": 1.0},
}


class Student(Section):
    """Which part of the teacher the student starts as."""

    layers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] = 6
    """How many of the teacher's layers, or exactly which, counted from 0."""
    rule: Literal["every_other", "first_last", "even"] = "even"
    """Which layers are taken where only their number is given."""
    experts: Literal["mean", "most_used"] | None = None
    """Make a mixture of experts (Switch, Mixtral, Qwen3-MoE) a dense student: each feed-forward
    layer starts as the mean of its experts, or as the one most used on the calibration rows;
    absent: a mixture stays one."""


class Cache(Section):
    """What is kept of the teacher's outputs."""

    kind: Literal["sampled", "top_k", "dense"] = "sampled"
    """sampled: exact head and drawn tail, unbiased; top_k: biased; dense: everything, to audit."""
    head: Annotated[int, Field(ge=0, le=256)] = 4
    """Most likely tokens kept exactly at each position (with top_k: all that is kept)."""
    draws: Annotated[int, Field(ge=0, le=255)] = 8
    """Tokens drawn from the rest of the distribution at each position."""
    rows_per_shard: Count = 16
    """Rows in one shard; a crash costs at most one shard."""
    batch_rows: Annotated[int, Field(ge=1, le=4096)] = 4
    """Rows in one forward pass of the teacher."""
    audit_rows: Annotated[int, Field(ge=0, le=256)] = 0
    """First rows whose every logit is kept beside the targets, to measure their bias; a row takes
    4 bytes a token and word: 101 MB for 512 tokens and 49,152 words."""
    hidden_states: Literal["none", "last"] = "none"
    """last: keep the teacher's last hidden states too, 2 bytes a token and hidden unit."""


class Distillation(Section):
    """How the student learns from the cached teacher."""

    student: Student = Student()
    """Where the student starts."""
    cache: Cache = Cache()
    """What is kept of the teacher's outputs."""
    preset: Literal["hinton", "switch"] | None = None
    """A paper's weights: hinton 1 soft at temperature 2; switch 0.25 soft, 0.75 hard at temperature
    1; what the recipe says besides goes before."""
    temperature: Annotated[float, Field(ge=0.1, le=100)] = 1.0
    """Both distributions are softened by it; the teacher's outputs are captured at it."""
    divergence: Literal["kl", "cross_entropy", "reverse_kl", "jensen_shannon"] = "kl"
    """How far the student's distribution is from the teacher's; the last two need cache.kind dense,
    because drawn probabilities would bias them."""
    soft_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the divergence from the teacher, scaled by temperature squared."""
    hard_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy on the text or the labels."""
    training: Training = Training()
    """How the loop runs."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        return PRESETS.get(preset, {}) | values if isinstance(preset, str) else values

    @model_validator(mode="after")
    def _some_weight(self) -> "Distillation":
        if self.soft_weight + self.hard_weight <= 0:
            raise ValueError("soft_weight and hard_weight are both 0: give one of them a weight")
        return self
