"""The one training loop of the library."""

from stillroom.training.history import TrainingHistory
from stillroom.training.loop import Batch, Evaluate, LossFunction, train
from stillroom.training.options import TrainingOptions, learning_rate_at, total_steps

__all__ = [
    "Batch",
    "Evaluate",
    "LossFunction",
    "TrainingHistory",
    "TrainingOptions",
    "learning_rate_at",
    "total_steps",
    "train",
]
