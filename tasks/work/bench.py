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

    from stillroom.models import Weights
    from stillroom.streamed import OnDisk


@dataclass(frozen=True)
class Bench:
    """A stage's order, its inputs as folders by role, and an empty folder for what comes of it.

    `store_url` is the address of the store that keeps the checkpoints, for processes that help.
    Where several train together `rank` counts them from 0; what the first leaves is the result.
    """

    order: Order
    inputs: dict[str, Path]
    records: dict[str, Record]
    scratch: Path
    output: Path
    checkpoints: Checkpoints
    progress: Progress
    store_url: str = ""
    rank: int = 0

    @property
    def section(self) -> dict[str, Any]:
        """The part of the recipe that the stage reads."""
        return self.order.section

    @property
    def task(self) -> Any:
        """What the models are for: causal_lm, masked_lm or sequence_classification."""
        return self.section["task"]

    def load(self, folder: Path, weights: "Weights" = "dense") -> "PreTrainedModel":
        """Return the model in `folder`, on the device that the recipe asks for.

        Raises:
            RecipeError: the machine has no such device.
            SourceError: the folder holds no model.
        """
        from stillroom.models import load_model

        model = load_model(folder, task=self.task, weights=weights)
        return model.to(self.device)  # type: ignore[no-any-return, arg-type]

    def load_teacher(self) -> "PreTrainedModel":
        """Return the teacher, on the device that the recipe asks for, or laid out over several.

        Raises:
            RecipeError: the machine has no such device.
            SourceError: the folder holds no model.
        """
        from stillroom.layout import Layout
        from stillroom.models import load_model

        if not self.lays_out_teacher:
            return self.load(self.inputs["teacher"])
        self.require_device()
        layout = Layout(self.order.unkeyed["teacher_device_map"], self.scratch / "offloaded")
        return load_model(self.inputs["teacher"], task=self.task, laid_out=layout)

    @property
    def lays_out_teacher(self) -> bool:
        """Whether the recipe has the teacher laid out over several devices."""
        return self.order.unkeyed.get("teacher_device_map") is not None

    def open_streamed(self, folder: Path) -> "tuple[PreTrainedModel, OnDisk]":
        """Return the model in `folder` without its blocks, and the blocks, which come when needed.

        Raises:
            RecipeError: the machine has no such device as the recipe asks for.
            SourceError: the folder holds no model.
        """
        from stillroom.streamed import open_streamed

        return open_streamed(folder, task=self.task, device=self.device)

    @property
    def device(self) -> str:
        """What the recipe has models computed on.

        Raises:
            RecipeError: the machine has no such device.
        """
        self.require_device()
        device: str = self.section["device"]
        # Of several processes each has a GPU of its own.
        return f"cuda:{self.rank}" if device == "cuda" and self.rank else device

    def require_device(self) -> None:
        """Refuse a recipe whose device this machine has not.

        Raises:
            RecipeError: the machine has no such device.
        """
        import torch

        if self.section["device"] == "cuda" and not torch.cuda.is_available():
            raise RecipeError(
                "execution.device: cuda is asked for and this machine has none; set it to cpu, or "
                "run on a machine with a GPU"
            )

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
