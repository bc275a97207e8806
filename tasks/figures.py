"""What was measured of a model, read back from its evaluation."""

import json
from dataclasses import dataclass
from typing import Any

from stillroom.errors import CorruptedError
from stillroom.evaluation.estimates import Quality
from stillroom.evaluation.figures import Cost, ReloadCheck
from tasks.store.record import Record
from tasks.store.store import ArtifactStore


@dataclass(frozen=True)
class Figures:
    """Quality and cost of one model on one text."""

    quality: Quality
    cost: Cost


def read_figures(store: ArtifactStore, evaluation: Record) -> Figures:
    """Return what an evaluation artifact holds.

    Raises:
        CorruptedError: a file of it is missing or changed.
    """
    quality = Quality.from_json(_required(store, evaluation, "quality.json"))
    return Figures(quality, Cost.from_json(_required(store, evaluation, "cost.json")))


def read_layers(store: ArtifactStore, model: Record) -> list[dict[str, Any]]:
    """Return the account of each quantized layer; none where the model is not quantized."""
    text = store.read_file(model, "layers.json")
    layers: list[dict[str, Any]] = json.loads(text) if text else []
    return layers


def read_reload(model: Record) -> ReloadCheck | None:
    """Return how far the model's logits moved when it was loaded afresh; None: never exported."""
    difference = model.metrics.get("reload_max_difference")
    if difference is None:
        return None
    return ReloadCheck(difference, model.metrics["reload_max_logit"])


def _required(store: ArtifactStore, record: Record, name: str) -> str:
    content = store.read_file(record, name)
    if content is None:
        raise CorruptedError(
            f"{record.kind} {record.key[:12]} has no {name}; `python -m flows store verify "
            "--repair` removes it, and a rerun makes it again"
        )
    return content.decode()
