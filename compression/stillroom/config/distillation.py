"""The section of a recipe that says what the student is and how it learns from the teacher."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillroom.config.section import Count, Section
from stillroom.config.training import Training

# Hinton et al. 2015; Sanh et al. 2019 (DistilBERT), section 3; Fedus et al. 2021 (Switch), table 7.
PRESETS: dict[str, dict[str, Any]] = {
    "hinton": {"soft_weight": 1.0, "hard_weight": 0.0, "temperature": 2.0},
    "distilbert": {
        "soft_weight": 5.0,
        "hard_weight": 2.0,
        "cosine_weight": 1.0,
        "temperature": 2.0,
        "cache": {"hidden_states": "last"},
    },
    "switch": {"soft_weight": 0.25, "hard_weight": 0.75, "temperature": 1.0},
}


class Student(Section):
    """Which part of the teacher the student starts as."""

    layers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] = 6
    """How many of the teacher's layers, or exactly which, counted from 0."""
    rule: Literal["every_other", "first_last", "even"] = "even"
    """Which layers are taken where only their number is given."""
    hidden_size: Count | None = None
    """Channels between the layers; of the teacher's those that its norms let through most, on the
    calibration rows, are kept; absent: all."""
    intermediate_size: Count | None = None
    """Neurons of each feed-forward layer, the most active ones; absent: all."""
    attention_heads: Count | None = None
    """Query heads of each layer, those with the largest outputs; the heads of a key-value head stay
    together; absent: all."""
    experts: Literal["mean", "most_used"] | None = None
    """Make a mixture of experts (Switch, Mixtral, Qwen3-MoE) a dense student: each feed-forward
    layer starts as the mean of its experts, or as the one most used on the calibration rows;
    absent: a mixture stays one."""


class Cache(Section):
    """What is kept of the teacher's outputs."""

    kind: Literal["sampled", "top_k", "dense"] = "sampled"
    """sampled: exact head and drawn tail, unbiased; top_k: biased; dense: everything, to audit."""
    head: Annotated[int, Field(ge=0, le=256)] = 2
    """Most likely tokens kept exactly at each position (with top_k: all that is kept)."""
    draws: Annotated[int, Field(ge=0, le=255)] = 16
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

    @model_validator(mode="after")
    def _keeps_some_words(self) -> "Cache":
        if (self.kind == "top_k" and self.head < 1) or (self.kind == "sampled" and self.draws < 1):
            raise ValueError(
                "a sampled teacher cache needs draws >= 1, a top_k one head >= 1: "
                f"head {self.head} and draws {self.draws} came"
            )
        return self


class Distillation(Section):
    """How the student learns from the cached teacher."""

    student: Student = Student()
    """Where the student starts."""
    cache: Cache = Cache()
    """What is kept of the teacher's outputs."""
    preset: Literal["hinton", "distilbert", "switch"] | None = None
    """A paper's weights: hinton 1 soft at temperature 2; distilbert 5 soft, 2 hard, 1 cosine at
    temperature 2; switch 0.25 soft, 0.75 hard at 1; what the recipe says besides goes before."""
    temperature: Annotated[float, Field(ge=0.1, le=100)] = 1.0
    """Both distributions are softened by it; the teacher's outputs are captured at it."""
    divergence: Literal["kl", "cross_entropy", "reverse_kl", "jensen_shannon"] = "kl"
    """How far the student's distribution is from the teacher's; the last two need cache.kind dense,
    because drawn probabilities would bias them."""
    soft_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the divergence from the teacher, scaled by temperature squared."""
    hard_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy on the text or the labels."""
    cosine_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of one less the cosine between the last hidden states of student and teacher; needs
    cache.hidden_states last, and a student as wide as its teacher."""
    training: Training = Training()
    """How the loop runs."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return values
        cache = values.get("cache", {})
        merged = PRESETS[preset] | values
        if isinstance(cache, dict) and "cache" in PRESETS[preset]:
            merged["cache"] = PRESETS[preset]["cache"] | cache
        return merged

    @model_validator(mode="after")
    def _some_weight(self) -> "Distillation":
        if self.soft_weight + self.hard_weight + self.cosine_weight <= 0:
            raise ValueError("soft_weight, hard_weight and cosine_weight are 0: give one a weight")
        if self.cosine_weight > 0 and self.cache.hidden_states == "none":
            raise ValueError(
                f"cosine_weight: {self.cosine_weight} needs the teacher's hidden states; set "
                "cache.hidden_states to last"
            )
        if self.cosine_weight > 0 and self.student.hidden_size is not None:
            raise ValueError(
                f"cosine_weight: {self.cosine_weight} needs a student as wide as its teacher, and "
                f"student.hidden_size is {self.student.hidden_size}; leave one of them out"
            )
        return self
