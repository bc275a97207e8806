"""Write the report: a page for MLflow, a table for the terminal and for Prefect."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from stillroom.config import Recipe, dump_recipe
from stillroom.evaluation.attribution import LossStep, Verdict, attribute_loss, judge
from stillroom.evaluation.gates import GateResult
from stillroom.evaluation.report_data import Curve, LayerError, ModelRow, ReportData
from stillroom.evaluation.tables import render_markdown, render_table
from tasks.explain import plainly
from tasks.figures import Figures, read_figures, read_layers
from tasks.journal import Journal
from tasks.outcome import Approval, Outcome
from tasks.publish import Publication
from tasks.settings import Settings
from tasks.store.record import Record
from tasks.training_curves import read_curves

PAGE, BESIDE = "report.html", "report.json"
Role = Literal["model", "adapter", "control"]


@dataclass(frozen=True)
class Shown:
    """A row that the report shows: a model measured on a text."""

    label: str
    text: str
    role: Role
    model: Record
    evaluation: Record
    adapter: Record | None = None


@task(
    name="write report", task_run_name="write report", cache_policy=NO_CACHE, persist_result=False
)
@plainly
def write_report(
    recipe: Recipe,
    shown: Sequence[Shown],
    gates: list[GateResult],
    published: Publication,
    journal: Journal,
) -> Outcome:
    """Write the report and return where it is and what it says."""
    figures = {row.evaluation.key: read_figures(journal.store, row.evaluation) for row in shown}
    data = _report_data(recipe, shown, figures, gates, published, journal)
    target = Settings().root / "reports" / recipe.name / PAGE
    keep_report(data, target.parent, journal.log_file)
    journal.figures.update(_summary_figures(data))
    page = render_markdown(data)
    create_markdown_artifact(page, key="report", description=data.summary)
    create_link_artifact(target.as_uri(), link_text="report.html", key="report-page")
    return Outcome(
        summary=data.summary,
        gates_passed=all(gate.passed for gate in gates),
        table=render_table(data),
        gates=tuple(gate.sentence for gate in gates),
        versions=tuple(version.uri for version in published.versions),
        report=str(target),
        mlflow=journal.link,
        page=page,
        approval=_approval(published),
        to_approve=_to_approve(published),
    )


def _report_data(
    recipe: Recipe,
    shown: Sequence[Shown],
    figures: dict[str, Figures],
    gates: list[GateResult],
    published: Publication,
    journal: Journal,
) -> ReportData:
    final = [row for row in shown if row.role == "model"][-1]
    made = [row for row in shown if row.role != "model" or row is not shown[0]]
    some = figures[final.evaluation.key].cost
    return ReportData(
        title=recipe.name,
        created=max(row.evaluation.created for row in shown).strftime("%Y-%m-%d %H:%M UTC"),
        rows=tuple(_rows(shown, figures)),
        summary=_summary(recipe, gates, published),
        curves=tuple(_curves(made, journal)),
        layer_errors=tuple(_layer_errors(final.model, journal)),
        verdicts=tuple(_verdicts(shown, figures)),
        gates=tuple(gates),
        lineage=tuple(journal.lineage),
        recipe_text=dump_recipe(recipe),
        hardware=some.hardware,
        versions=final.evaluation.versions,
    )


def _rows(shown: Sequence[Shown], figures: dict[str, Figures]) -> list[ModelRow]:
    steps: dict[str, LossStep] = {}
    for chain in _chains(shown):
        qualities = [(row.label, figures[row.evaluation.key].quality) for row in chain]
        for row, step in zip(chain[1:], attribute_loss(qualities), strict=True):
            steps[row.evaluation.key] = step
    return [
        ModelRow(
            name=row.label,
            data_name=row.text,
            quality=figures[row.evaluation.key].quality,
            cost=figures[row.evaluation.key].cost,
            loss=steps.get(row.evaluation.key),
            role=row.role,
        )
        for row in shown
    ]


def _chains(shown: Sequence[Shown]) -> list[list[Shown]]:
    """Return the rows in which each follows from the one before, on the same text."""
    texts = dict.fromkeys(row.text for row in shown)
    return [[row for row in shown if row.text == text and row.role != "control"] for text in texts]


def _verdicts(shown: Sequence[Shown], figures: dict[str, Figures]) -> list[Verdict]:
    quality = {(row.label, row.text): figures[row.evaluation.key].quality for row in shown}
    models = [row for row in shown if row.role == "model"]
    verdicts = []
    for row in shown:
        mine = quality[row.label, row.text]
        if row.role == "control":
            rivals = [
                model
                for model in models
                if model.model.kind == row.model.kind and _same_road(model.model, row.model)
            ]
            for rival in rivals:
                claim = f"{rival.label} beats {row.label}"
                verdicts.append(judge(claim, quality[rival.label, rival.text], mine))
        elif row.adapter is not None:
            bare = next(other for other in shown if other.text == row.text and not other.adapter)
            claim = f"the adapter {row.text} helps on held-out text of its own"
            verdicts.append(judge(claim, mine, quality[bare.label, bare.text]))
    return verdicts


def _same_road(model: Record, control: Record) -> bool:
    """Return whether a control was made by the same stage from the same base as the model."""
    same = ("teacher", "data", "base")
    return all(model.inputs.get(role) == control.inputs.get(role) for role in same)


def _curves(made: Sequence[Shown], journal: Journal) -> list[Curve]:
    curves: list[Curve] = []
    seen = set()
    for row in made:
        record = row.adapter or row.model
        if record.key not in seen:
            seen.add(record.key)
            curves += [
                replace(curve, stage=row.label) for curve in read_curves(journal.store, record)
            ]
    return curves


def _layer_errors(model: Record, journal: Journal) -> list[LayerError]:
    return [
        LayerError(
            layer["name"],
            layer["relative_error"],
            layer["block"],
            layer["bits"],
            layer["fell_back"],
        )
        for layer in read_layers(journal.store, model)
    ]


def _summary(recipe: Recipe, gates: list[GateResult], published: Publication) -> str:
    failed = [gate.name for gate in gates if not gate.passed]
    names = ", ".join(f"{each.name} version {each.version}" for each in published.versions)
    if recipe.publish is None:
        return "measured, not published: the recipe has no publish section"
    if failed:
        return f"registered {names} without an alias: the gates {', '.join(failed)} failed"
    passed, alias = f"all {len(gates)} gates passed", recipe.publish.alias
    said = published.answer.sentence if published.answer else ""
    match _approval(published):
        case "pending":
            return f"registered {names}: {passed}, and @{alias} waits for an approval"
        case "refused":
            return f"registered {names} without an alias: {passed}; {said}"
        case "approved":
            return f"registered {names} as @{alias}: {passed}; {said}"
        case _:
            return f"registered {names} as @{alias}: {passed}"


def _approval(published: Publication) -> Approval:
    if published.question is None:
        return "not asked"
    if published.answer is None:
        return "pending"
    return "approved" if published.answer.approve else "refused"


def _to_approve(published: Publication) -> str:
    asks = published.question is not None and _approval(published) != "approved"
    return published.question.versions[0] if published.question and asks else ""


def keep_report(data: ReportData, folder: Path, log: Callable[[Path], None]) -> None:
    """Log page and data, and leave them in a folder that other runs of this name share.

    A page that is there already is not drawn again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=folder) as scratch:
        page, beside = Path(scratch) / PAGE, Path(scratch) / BESIDE
        if not _copied(data, folder, page, beside):
            from stillroom.evaluation.report import render_report

            render_report(data, page)
        log(page)
        log(beside)
        with _alone(folder):
            (folder / BESIDE).unlink(missing_ok=True)  # a crash leaves no page beside other data
            os.replace(page, folder / PAGE)
            os.replace(beside, folder / BESIDE)


def _copied(data: ReportData, folder: Path, page: Path, beside: Path) -> bool:
    """Return whether the folder held the page of this data, and the two are copied."""
    with _alone(folder), suppress(OSError):
        if (folder / BESIDE).read_text(encoding="utf-8") == data.to_json():
            shutil.copyfile(folder / PAGE, page)
            shutil.copyfile(folder / BESIDE, beside)
            return True
    return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _summary_figures(data: ReportData) -> dict[str, float]:
    figures: dict[str, float] = {}
    for row in data.rows:
        if row.role == "model":
            name = row.name.replace(" ", "_")
            figures[f"{name}/nats_per_token"] = row.quality.estimate("nats").value
            figures[f"{name}/kl_nats_per_token"] = row.quality.estimate("kl_nats").value
            if row.cost:
                figures[f"{name}/size_bytes"] = float(row.cost.size_on_disk_bytes)
    return figures
