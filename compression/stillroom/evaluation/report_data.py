"""What a report says, as data: the same file feeds the page, the terminal and Prefect."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from stillroom.evaluation.attribution import LossStep, Verdict
from stillroom.evaluation.estimates import Quality
from stillroom.evaluation.figures import Cost
from stillroom.evaluation.gates import GateResult


@dataclass(frozen=True)
class ModelRow:
    """One model on one text."""

    name: str
    data_name: str
    quality: Quality
    cost: Cost | None = None
    loss: LossStep | None = None
    """What this model lost against the one before it; None for the first and for controls."""
    role: Literal["model", "adapter", "control"] = "model"


@dataclass(frozen=True)
class Curve:
    """A figure of the training, step by step."""

    stage: str
    """Curves of one stage share a panel."""
    name: str
    unit: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class LayerError:
    """How far a quantized linear's output lies from the full-precision one."""

    module: str
    """Dotted name."""
    relative_error: float
    """Squared error of the output over the squared output."""
    block: int | None = None
    bits: int | None = None
    fallback: bool = False
    """Rounded to nearest although another method was asked for."""


@dataclass(frozen=True)
class LineageEntry:
    """One artifact on the way to the result."""

    stage: str
    key: str
    """64 hexadecimal digits."""
    seconds: float | None = None
    cached: bool = False


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows; equal data gives equal bytes."""

    # JSON has no numbers for NaN and infinity: without this they come out as null.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"ser_json_inf_nan": "strings"}

    title: str
    created: str
    """When, as it shall be shown."""
    rows: tuple[ModelRow, ...]
    summary: str = ""
    """One sentence on what became of the result: registered as what, or why not."""
    curves: tuple[Curve, ...] = ()
    layer_errors: tuple[LayerError, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    gates: tuple[GateResult, ...] = ()
    lineage: tuple[LineageEntry, ...] = ()
    recipe_text: str = ""
    hardware: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return all of it as JSON text."""
        from pydantic import TypeAdapter

        return TypeAdapter(ReportData).dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str) -> "ReportData":
        """Return what `to_json` wrote."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_json(text)
