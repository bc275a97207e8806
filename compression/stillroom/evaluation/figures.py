"""What was measured of a model beside its quality, readable without torch."""

from dataclasses import dataclass, field
from typing import Literal

from stillroom.evaluation.estimates import Estimate


@dataclass(frozen=True)
class Cost:
    """What a model takes on one machine."""

    parameters: int
    """Weights as the architecture counts them, tied ones once; packed integers as weights."""
    size_on_disk_bytes: int
    memory_bytes: int
    """Parameters and buffers as loaded, shared storage once."""
    prefill_per_second: Estimate
    prefill_unit: Literal["tokens/s", "sequences/s"]
    decode_tokens_per_second: Estimate | None
    """None for a model that does not generate."""
    latency_ms: Estimate
    """Per generated token; per sequence for a model that does not generate."""
    hardware: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the figures as JSON text."""
        from pydantic import TypeAdapter

        return TypeAdapter(Cost).dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str) -> "Cost":
        """Return what `to_json` wrote."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_json(text)


@dataclass(frozen=True)
class ReloadCheck:
    """How far the logits of two loads of one model lie apart."""

    max_difference: float
    max_logit: float

    @property
    def relative(self) -> float:
        """Return the largest difference over the largest logit, both in absolute value."""
        if self.max_difference == 0:
            return 0.0
        return self.max_difference / self.max_logit if self.max_logit else float("inf")
