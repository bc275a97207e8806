"""What a stage finds when it starts to work, and what it hands back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.checkpoint import Checkpoints
from stillroom.errors import RecipeError
from stillroom.progress import Progress
from tasks.sources import Source
from tasks.stages import Order
from tasks.store.record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    def load(self, folder: Path) -> "PreTrainedModel":
        """Return the model in `folder`, on the device that the recipe asks for.

        Raises:
            RecipeError: the machine has no such device.
            SourceError: the folder holds no model.
        """
        import torch

        from stillroom.models import load_model

        device = self.section["device"]
        if device == "cuda" and not torch.cuda.is_available():
            raise RecipeError(
                "execution.device: cuda is asked for and this machine has none; set it to cpu, or "
                "run on a machine with a GPU"
            )
        model = load_model(folder, task=self.task)
        return model.to(device)  # type: ignore[no-any-return]

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
