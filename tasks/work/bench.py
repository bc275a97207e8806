"""What a stage finds when it starts to work, and what it hands back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillroom.checkpoint import Checkpoints
from stillroom.progress import Progress
from tasks.sources import Source
from tasks.stages import Order
from tasks.store.record import Record


@dataclass(frozen=True)
class Bench:
    """A stage's order, its inputs as folders by role, and an empty folder for what comes of it."""

    order: Order
    inputs: dict[str, Path]
    records: dict[str, Record]
    scratch: Path
    output: Path
    checkpoints: Checkpoints
    progress: Progress

    @property
    def section(self) -> dict[str, Any]:
        """The part of the recipe that the stage reads."""
        return self.order.section

    @property
    def task(self) -> Any:
        """What the models are for: causal_lm or sequence_classification."""
        return self.section["task"]

    def source(self, role: str) -> Source:
        """Return the resolved source of `role`."""
        return self.order.sources[role]

    def licence(self, role: str) -> str:
        """Return the licence of what `role` derives from."""
        return self.records[role].licence


@dataclass(frozen=True)
class Result:
    """What a stage says of its output folder."""

    licence: str
    metrics: dict[str, float] = field(default_factory=dict)
