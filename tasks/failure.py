"""A page in Prefect's UI about a run that failed: where, why, what is kept, and how it goes on."""

import html
from collections.abc import Mapping, Sequence

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import deployment, flow_run

from stillroom.errors import (
    CorruptedError,
    LoginError,
    MismatchError,
    OutOfMemoryError,
    PieceGoneError,
    RecipeError,
    ServiceUnreachableError,
    SettingsError,
    SourceError,
    StillroomError,
    StoreError,
    StoreUnreachableError,
)
from stillroom.evaluation.report_data import LineageEntry
from stillroom.redaction import redact

ARTIFACT = "failure"
_RERUN = "then run it again"
# The first that fits counts: what is particular stands before what is general.
_ADVICE: tuple[tuple[type[StillroomError], str], ...] = (
    (
        OutOfMemoryError,
        "Make the stage smaller as the sentence says, or have it run on a larger machine; "
        f"{_RERUN}.",
    ),
    (
        ServiceUnreachableError,
        f"The recipe is in order: see that MLflow and Prefect answer, {_RERUN}.",
    ),
    (
        LoginError,
        f"The recipe is in order: give the worker the login as the sentence says, {_RERUN}.",
    ),
    (
        SettingsError,
        f"The recipe is in order: correct the setting where the worker is started, {_RERUN}.",
    ),
    (
        StoreUnreachableError,
        f"The recipe is in order: see that the server of the store answers, {_RERUN}.",
    ),
    (
        CorruptedError,
        "Something changed files in the store: repair it as the sentence says where the store is "
        f"at hand, {_RERUN}.",
    ),
    (
        PieceGoneError,
        f"The recipe is in order: let the other run of the same work end, {_RERUN}.",
    ),
    (StoreError, f"See to the store or the disk as the sentence says, {_RERUN}."),
    (SourceError, f"Mend the source, or name another one in the recipe; {_RERUN}."),
    (RecipeError, f"Change the recipe as the sentence says, {_RERUN}."),
    (MismatchError, f"Change the recipe so that both belong together, {_RERUN}."),
)
_UNKNOWN = (
    "Look at the sentence and at this run's log. If it does not say what to change, run it again; "
    "if the same comes again, it is a fault of Stillroom: report the sentence and the log."
)


def write_failure(
    error: Exception,
    explained: StillroomError | None,
    finished: Sequence[LineageEntry] = (),
    unfinished: Mapping[str, int | None] | None = None,
) -> None:
    """Leave the page with the flow run that is under way; do nothing where none is.

    Args:
        error: what ended the run.
        explained: the same as one that the user can act on, or None.
        finished: the stages that have their artifacts.
        unfinished: the stages that had begun, and how many checkpoints there are of each; None
            where the store does not say.
    """
    if flow_run.id is None:
        return
    try:
        page = failure_page(error, explained, finished, unfinished or {})
        create_markdown_artifact(page, key=ARTIFACT, description=f"{flow_run.name} failed")
    except Exception as unwritten:
        # What failed first counts: the run ends with that.
        told = " ".join(str(unwritten).split())[:300]
        get_run_logger().warning("Prefect was not told of the failure: %s", told)


def failure_page(
    error: Exception,
    explained: StillroomError | None,
    finished: Sequence[LineageEntry],
    unfinished: Mapping[str, int | None],
) -> str:
    """Return the page as Markdown."""
    sentence = str(explained) if explained else f"{type(error).__name__}: {error}"
    # It may hold what a stranger wrote, and the page is shown as HTML.
    shown = html.escape(" ".join(redact(sentence).split()), quote=False)
    parts = [
        f"# {flow_run.name or 'The run'} failed",
        f"**Where:** {_where(finished, unfinished)}",
        f"**Why:** {shown}",
        f"**What to do:** {_advice(explained)}",
        f"**Run it again:** {_again()}",
        f"**What is kept:** {_kept(finished, unfinished)}",
    ]
    return "\n\n".join(parts) + "\n"


def _where(finished: Sequence[LineageEntry], unfinished: Mapping[str, int | None]) -> str:
    if unfinished:
        return "in the stage " + ", ".join(f"*{title}*" for title in unfinished)
    if finished:
        return f"between stages, after *{finished[-1].stage}*"
    return "before the first stage"


def _advice(explained: StillroomError | None) -> str:
    return next((text for kind, text in _ADVICE if isinstance(explained, kind)), _UNKNOWN)


def _again() -> str:
    if deployment.id is None:
        return "type the same command; it goes on where this run ended."
    return (
        "choose *Retry* on the page of this run, which takes the same parameters; or order "
        f"`{flow_run.flow_name}/{deployment.name}` once more in the way that ordered this one. "
        "Either goes on where this run ended."
    )


def _kept(finished: Sequence[LineageEntry], unfinished: Mapping[str, int | None]) -> str:
    lines = [
        f"what the store holds of *{title}*, which could not be counted"
        if pieces is None
        else f"{pieces} checkpoint{'s' if pieces > 1 else ''} of *{title}*, from which it goes on"
        for title, pieces in unfinished.items()
        if pieces != 0
    ]
    if finished:
        lines.append(
            f"{len(finished)} finished stages, none of which is done again"
            if len(finished) > 1
            else "1 finished stage, which is not done again"
        )
    if not lines:
        return "nothing was made yet."
    table = [f"| {each.stage} | {each.key[:12]} | {_how(each)} |" for each in finished]
    head = ["", "", "| stage | artifact | |", "|---|---|---|"] if table else []
    return "; ".join(lines) + "." + "\n".join(head + table)


def _how(entry: LineageEntry) -> str:
    if entry.cached:
        return "was there before"
    return "made" if entry.seconds is None else f"made in {entry.seconds:.0f} s"
