"""The stages: what each is called, what kind of artifact it makes, and who does the work."""

from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from stillroom.config import Section
from tasks.keys import artifact_key
from tasks.sources import Source


@dataclass(frozen=True)
class Stage:
    """A step of the road. `version` rises when the same inputs come to give another result."""

    name: str
    kind: str
    version: int

    @property
    def work(self) -> str:
        """Module whose function `work` does it, in a process of its own."""
        return f"tasks.work.{self.name}"


IMPORT_MODEL = Stage("import_model", "model", 1)
TRIM_VOCABULARY = Stage("trim_vocabulary", "model", 3)
PREPARE_DATA = Stage("prepare_data", "dataset", 4)
TUNE_TEACHER = Stage("tune_teacher", "model", 4)
CACHE_TEACHER = Stage("cache_teacher", "teacher-cache", 6)
DISTILL_STUDENT = Stage("distill_student", "model", 4)
QUANTIZE_MODEL = Stage("quantize_model", "model", 7)
TRAIN_ADAPTER = Stage("train_adapter", "adapter", 7)
MERGE_ADAPTER = Stage("merge_adapter", "model", 5)
EVALUATE_MODEL = Stage("evaluate_model", "evaluation", 5)
RUN_TRIAL = Stage("run_trial", "trial", 3)
FIT_DIMENSION = Stage("fit_dimension", "intrinsic-dimension", 2)

STAGES = (
    IMPORT_MODEL,
    TRIM_VOCABULARY,
    PREPARE_DATA,
    TUNE_TEACHER,
    CACHE_TEACHER,
    DISTILL_STUDENT,
    QUANTIZE_MODEL,
    TRAIN_ADAPTER,
    MERGE_ADAPTER,
    EVALUATE_MODEL,
    RUN_TRIAL,
    FIT_DIMENSION,
)


TRUSTS_CODE = "trust_remote_code"


class Artifact(Protocol):
    """What a stage takes from another: an artifact that exists, or one that is only planned."""

    @property
    def kind(self) -> str:
        """Kind of the artifact."""

    @property
    def key(self) -> str:
        """Key of the artifact."""


class Order(BaseModel):
    """One stage with everything that decides its result: a small JSON, handed to whoever does it.

    `section` is what the stage reads of the recipe; `unkeyed` changes how it is done, not what
    comes of it; `sources` are resolved references by role; `inputs` are artifact keys by role.
    """

    model_config = ConfigDict(frozen=True)

    title: str
    stage: Stage
    section: dict[str, Any]
    unkeyed: dict[str, Any] = {}
    seed: int
    sources: dict[str, Source] = {}
    inputs: dict[str, str] = {}

    @property
    def kind(self) -> str:
        """Kind of the artifact that comes of it."""
        return self.stage.kind

    @property
    def trusts_code(self) -> bool:
        """Whether the recipe says that code which its teacher brings along may run."""
        return bool(self.section.get(TRUSTS_CODE, False))

    @property
    def key(self) -> str:
        """Key of the artifact that comes of it."""
        identities = {role: source.identity for role, source in self.sources.items()}
        return artifact_key(
            self.stage.name,
            self.stage.version,
            self.section,
            self.seed,
            {**identities, **self.inputs},
        )


def as_json(section: Section, *without: str) -> dict[str, Any]:
    """Return a recipe section as JSON, with every default spelled out."""
    return section.model_dump(mode="json", exclude=set(without))
