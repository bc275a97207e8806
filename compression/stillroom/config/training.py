"""The section of a recipe that says how the one training loop runs."""

from typing import Annotated, Literal

from pydantic import Field

from stillroom.config.section import Count, Fraction, Section


class Training(Section):
    """How the one training loop runs."""

    epochs: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Passes over the training rows; ignored where steps is given."""
    steps: Count | None = None
    """Optimizer steps; absent: as many as the epochs need."""
    batch_rows: Annotated[int, Field(ge=1, le=4096)] = 4
    """Rows in one forward and backward pass."""
    gradient_accumulation: Annotated[int, Field(ge=1, le=1024)] = 1
    """Passes added up to one optimizer step."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-4
    """Highest learning rate of AdamW, reached after the warm-up."""
    warmup_fraction: Fraction = 0.1
    """Share of the steps in which the learning rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Decoupled weight decay of AdamW."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    checkpoint_every_steps: Count = 100
    """Optimizer steps between two checkpoints; a crash costs at most so many."""
    evaluate_every_steps: Count = 50
    """Optimizer steps between two measurements on held-out rows."""
    early_stopping_patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many measurements in a row that did not get better, and keep the best: by the
    divergence from the teacher, who is then asked about the held-out rows too, or where nobody is
    asked by the cross-entropy; 0: all steps, and the last is kept."""
    bucket_by_length: bool = False
    """Put rows of about one length into a batch, which saves padding; packed rows have none."""
    gradient_checkpointing: bool = False
    """Make activations again in the backward pass: less memory, about a third more time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers of the forward pass; parameters and optimizer stay as the model has them."""
