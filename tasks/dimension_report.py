"""Show what a search came to: in the terminal, in Prefect, in MLflow and as files."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from stillroom.config import IntrinsicDimension
from stillroom.errors import CorruptedError
from stillroom.intrinsic_dimension.search import Dimension
from tasks.explain import plainly
from tasks.journal import Journal
from tasks.settings import Settings
from tasks.store.record import Record
from tasks.trials import PLOT, RESULT


@dataclass(frozen=True)
class DimensionOutcome:
    """The end of a search, for the terminal and for whoever called the flow."""

    summary: str
    table: str
    found: Dimension
    folder: str
    mlflow: str
    versions: tuple[str, ...] = ()


@task(
    name="write report", task_run_name="write report", cache_policy=NO_CACHE, persist_result=False
)
@plainly
def write_dimension_report(
    recipe: IntrinsicDimension, record: Record, journal: Journal
) -> DimensionOutcome:
    """Write curve and plot to the reports' folder and to MLflow, and return what they say."""
    target = Settings().root / "reports" / recipe.name
    target.mkdir(parents=True, exist_ok=True)
    for name in (RESULT, PLOT):
        # Other runs of this name share the folder: what is logged is this run's own.
        with TemporaryDirectory(prefix=".", dir=target) as scratch:
            file = Path(scratch) / name
            file.write_bytes(_content(journal, record, name))
            journal.log_file(file)
            file.replace(target / name)
    found = Dimension.from_json(json.loads(_content(journal, record, RESULT)))
    journal.figures.update(
        {k: v for k, v in record.metrics.items() if k not in ("seconds", "peak_memory_bytes")}
    )
    table = "\n".join(_table(found))
    create_markdown_artifact(
        f"{found.sentence()}\n\n{table}", key="intrinsic-dimension", description=found.sentence()
    )
    return DimensionOutcome(found.sentence(), table, found, str(target), journal.link)


def _content(journal: Journal, record: Record, name: str) -> bytes:
    content = journal.store.read_file(record, name)
    if content is None:
        raise CorruptedError(
            f"{record.kind} {record.key[:12]} has no {name}; `python -m flows store verify "
            "--repair` removes it, and a rerun makes it again"
        )
    return content


def _table(found: Dimension) -> list[str]:
    lines = ["| dimension | % of full fine-tuning | isotonic fit |", "|---|---|---|"]
    for point in found.curve:
        error = 100 * point.standard_error
        share = f"{100 * point.share:.1f} ± {error:.1f}"
        lines.append(f"| {point.dimension} | {share} | {100 * point.fitted:.1f} |")
    return lines
