"""The teacher asked at every step, which the cache is measured against."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.distillation.losses import dense_kl
from stillroom.fine_tuning import aligned_labels, output_logits
from stillroom.training.batches import Batch


@dataclass(frozen=True)
class OnlineTeacher:
    """A loss: KL from all of the teacher's logits, computed in the step itself."""

    teacher: Any

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return KL(teacher ‖ student), in nats a token."""
        with torch.no_grad():
            expected = output_logits(self.teacher, batch)
        loss = dense_kl(output_logits(model, batch), expected, aligned_labels(batch))
        return loss, {"kl_nats": loss.item()}
