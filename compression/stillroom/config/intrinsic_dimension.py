"""The recipe of a search for the intrinsic dimension of a model on a task."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillroom.config.recipe import Recipe
from stillroom.config.section import Count, Identifier, Section
from stillroom.config.sections import Data, Execution, Model, Publish
from stillroom.config.training import Training


class DimensionSearch(Section):
    """Where the dimension is looked for, and what a trial in a subspace is."""

    min_dimension: Count = 16
    """Least dimension of the geometric grid."""
    max_dimension: Count = 16384
    """Largest dimension of the geometric grid; what needs more counts as not reached."""
    grid_points: Annotated[int, Field(ge=2, le=64)] = 6
    """Dimensions of the grid, its ends among them."""
    tolerance: Annotated[float, Field(gt=1, le=100)] = 1.3
    """Bisection on the logarithm ends where the bracket's ends are within this factor."""
    seeds: Annotated[int, Field(ge=3, le=100)] = 3
    """Trainings of each dimension and of all parameters, each with a seed of its own, from which
    come its subspace, its new head and its order of rows."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of full fine-tuning that is to be reached: of its accuracy for classification, of the
    nats that it gains over the untrained base otherwise."""
    projection: Literal["fastfood", "sparse"] = "fastfood"
    """How the subspace is drawn: stacked Fastfood blocks, or a very sparse matrix, whose memory
    grows with the dimension."""
    structure_aware: bool = False
    """Spend one dimension a layer on the layer's scale (SAID); else all are directions (DID)."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Trials that run side by side, each with a share of the threads, or all threads of another
    machine; their number changes nothing of what comes of it as long as that share is the same."""


class IntrinsicDimension(Section):
    """Measure in how few dimensions a model learns a task nearly as well as in all."""

    name: Identifier
    """Name of the recipe, in lower case, digits and dashes; runs and experiments bear it."""
    task: Literal["causal_lm", "masked_lm", "sequence_classification"] = "causal_lm"
    """Continue text, name hidden words of a text, or sort texts into classes."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Every random number follows from it; the trials' seeds are counted on from it."""
    model: Model
    """The model to measure; all its parameters count, a classifier's new head among them."""
    data: Data
    """What it learns, and the held-out rows that trials are compared on."""
    full: Training = Training(learning_rate=3e-4)
    """How full fine-tuning runs, of which a share is to be reached."""
    subspace: Training = Training(learning_rate=3e-3)
    """How training in a subspace of d dimensions runs. Its learning rate is that of a step in all D
    parameters: at one rate steps are as long as full fine-tuning's, whatever d is (the d numbers
    get √(D / d) times as much)."""
    search: DimensionSearch = DimensionSearch()
    """Where the dimension is looked for."""
    publish: Publish | None = None
    """Where the base is registered, and as name-subspace the best trained subspace of the least
    dimension that reaches; absent, or where none reaches: it is only measured."""
    execution: Execution = Execution()
    """On what the trials run."""

    @model_validator(mode="after")
    def _fits_together(self) -> "IntrinsicDimension":
        search = self.search
        if search.max_dimension <= search.min_dimension:
            raise ValueError(
                f"search.max_dimension: expected more than min_dimension, "
                f"{search.min_dimension}, {search.max_dimension} came"
            )
        for name in ("fine_tune", "vocabulary"):
            if getattr(self.model, name) is not None:
                raise ValueError(f"model.{name}: the model is measured as it is; leave it out")
        if self.subspace.gradient_checkpointing:
            raise ValueError(
                "subspace.gradient_checkpointing: activations made again would be the base's; set "
                "it to false, or take fewer batch_rows"
            )
        if self.publish and self.publish.approval:
            raise ValueError(
                "publish.approval: a subspace is registered by what it reaches, and nobody is "
                "asked; leave it out"
            )
        if self.execution.training_processes > 1:
            raise ValueError(
                "execution.training_processes: a trial trains in one process; set "
                f"search.workers to {self.execution.training_processes} for trials side by side"
            )
        return self

    def shared_part(self) -> Recipe:
        """Return what it has in common with the recipes that make models: its first stages.

        Raises:
            ValueError: its data do not fit its task.
        """
        return Recipe(
            name=self.name,
            task=self.task,
            seed=self.seed,
            teacher=self.model,
            data=self.data,
            execution=self.execution,
        )

    @model_validator(mode="after")
    def _first_stages_fit(self) -> "IntrinsicDimension":
        self.shared_part()
        return self
