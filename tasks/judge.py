"""Judge a result: every gate of the recipe, and the claims that the road makes."""

from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from stillroom.config import Gates
from stillroom.evaluation.gates import GateBounds, GateFigures, GateResult, check_gates
from tasks.explain import plainly
from tasks.figures import Figures, read_figures, read_layers, read_reload
from tasks.journal import Journal
from tasks.store.record import Record

BOUNDS = GateBounds.__dataclass_fields__.keys()


@dataclass(frozen=True)
class Candidate:
    """The final model with its evaluation, and what it is compared with."""

    model: Record
    evaluation: Record
    teacher: Record
    champion: Record | None
    """Evaluations on the same text; no champion: nothing is registered yet."""


@task(name="check gates", task_run_name="check gates", cache_policy=NO_CACHE, persist_result=False)
@plainly
def judge_candidate(candidate: Candidate, bounds: Gates, journal: Journal) -> list[GateResult]:
    """Return what became of every gate.

    Raises:
        MismatchError: the models were measured on different text.
    """
    store = journal.store
    figures = read_figures(store, candidate.evaluation)
    asked = {name: value for name, value in bounds.model_dump().items() if name in BOUNDS}
    gates = check_gates(_figures(candidate, figures, journal), GateBounds(**asked))
    # A model that was only imported was exported by nobody: there is nothing to load afresh.
    imported = "source" in candidate.model.inputs
    return [gate for gate in gates if not (imported and gate.name == "reload")]


def _figures(candidate: Candidate, figures: Figures, journal: Journal) -> GateFigures:
    store = journal.store
    layers = read_layers(store, candidate.model)
    champion = candidate.champion
    return GateFigures(
        candidate=figures.quality,
        teacher=read_figures(store, candidate.teacher).quality,
        champion=read_figures(store, champion).quality if champion else None,
        cost=figures.cost,
        fallback_modules=tuple(layer["name"] for layer in layers if layer["fell_back"]),
        reload=read_reload(candidate.model),
    )
