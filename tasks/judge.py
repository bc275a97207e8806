"""Judge a result: every gate of the recipe, and the claims that the road makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from prefect import task
from prefect.cache_policies import NO_CACHE

from stillroom.config import Gates
from stillroom.evaluation.gates import GateBounds, GateFigures, GateResult, check_gates
from tasks.explain import plainly
from tasks.figures import Figures, read_figures, read_layers, read_reload
from tasks.journal import Journal
from tasks.store.record import Record

BOUNDS = GateBounds.__dataclass_fields__.keys()
ALWAYS = {"max_reload_difference", "allow_fallback"}
"""Bounds of the gates that hold for every model."""


@dataclass(frozen=True)
class Candidate:
    """The final model with its evaluation, and what it is compared with."""

    model: Record
    evaluation: Record
    teacher: Record
    champion: Record | None
    """Evaluations on the same text; no champion: nothing is registered yet."""
    merged: Mapping[str, tuple[Record, Record]] = field(default_factory=dict)
    """By adapter: the model that it is merged into, and its evaluation on the adapter's text."""


@task(name="check gates", task_run_name="check gates", cache_policy=NO_CACHE, persist_result=False)
@plainly
def judge_candidate(candidate: Candidate, bounds: Gates, journal: Journal) -> list[GateResult]:
    """Return what became of every gate; of merged models, those that always hold.

    Raises:
        MismatchError: the models were measured on different text.
    """
    store = journal.store
    figures = read_figures(store, candidate.evaluation)
    asked = {name: value for name, value in bounds.model_dump().items() if name in BOUNDS}
    gates = check_gates(_figures(candidate, figures, journal), GateBounds(**asked))
    # A model that was only imported was exported by nobody: there is nothing to load afresh.
    imported = "source" in candidate.model.inputs
    gates = [gate for gate in gates if not (imported and gate.name == "reload")]
    always = GateBounds(**{name: value for name, value in asked.items() if name in ALWAYS})
    for adapter, (model, evaluation) in candidate.merged.items():
        gates += _judge_merged(adapter, model, evaluation, always, journal)
    return gates


def _judge_merged(
    adapter: str, model: Record, evaluation: Record, bounds: GateBounds, journal: Journal
) -> list[GateResult]:
    figures = GateFigures(
        candidate=read_figures(journal.store, evaluation).quality,
        fallback_modules=_fallen_back(model, journal),
        reload=read_reload(model),
    )
    return [
        replace(
            gate, name=f"{gate.name} ({adapter})", sentence=f"{adapter} merged: {gate.sentence}"
        )
        for gate in check_gates(figures, bounds)
    ]


def _fallen_back(model: Record, journal: Journal) -> tuple[str, ...]:
    layers = read_layers(journal.store, model)
    return tuple(layer["name"] for layer in layers if layer["fell_back"])


def _figures(candidate: Candidate, figures: Figures, journal: Journal) -> GateFigures:
    store = journal.store
    champion = candidate.champion
    return GateFigures(
        candidate=figures.quality,
        teacher=read_figures(store, candidate.teacher).quality,
        champion=read_figures(store, champion).quality if champion else None,
        cost=figures.cost,
        fallback_modules=_fallen_back(candidate.model, journal),
        reload=read_reload(candidate.model),
    )
