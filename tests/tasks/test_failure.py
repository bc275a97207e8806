"""What the page about a failed run says."""

import logging

import pytest

from stillroom.errors import (
    CorruptedError,
    DataError,
    LoginError,
    OutOfMemoryError,
    PieceGoneError,
    RecipeError,
    ServiceUnreachableError,
    SettingsError,
    StillroomError,
    StoreError,
    StoreUnreachableError,
)
from stillroom.evaluation.report_data import LineageEntry
from tasks.explain import explain
from tasks.failure import failure_page, write_failure

FINISHED = [
    LineageEntry("import teacher", "a" * 64, 3.2, cached=True),
    LineageEntry("prepare data", "b" * 64, 12.4),
]


def page(
    error: Exception,
    finished: list[LineageEntry] = FINISHED,
    unfinished: dict[str, int | None] | None = None,
) -> str:
    return failure_page(error, explain(error, "tiny"), finished, unfinished or {})


def test_a_stage_that_failed() -> None:
    shown = page(DataError("distil student: 3 rows"), unfinished={"distil student": 2})
    assert "**Where:** in the stage *distil student*" in shown
    assert "**Why:** distil student: 3 rows" in shown
    assert "**What to do:** Mend the source" in shown
    assert "2 checkpoints of *distil student*, from which it goes on; 2 finished stages" in shown
    assert f"| import teacher | {'a' * 12} | was there before |" in shown
    assert f"| prepare data | {'b' * 12} | made in 12 s |" in shown


def test_a_table_stands_apart_from_the_lines_around_it() -> None:
    assert ".\n\n| stage | artifact | |\n|---|---|---|\n| import" in page(StoreError("full"))


@pytest.mark.parametrize(
    ("finished", "unfinished", "words"),
    [
        ([], {}, ["before the first stage", "nothing was made yet."]),
        (FINISHED, {}, ["between stages, after *prepare data*"]),
        ([], {"a": 0}, ["in the stage *a*", "nothing was made yet."]),
        ([], {"a": 1, "b": 0}, ["in the stage *a*, *b*", "1 checkpoint of *a*"]),
        ([], {"a": None}, ["what the store holds of *a*, which could not be counted"]),
    ],
)
def test_where_it_failed(
    finished: list[LineageEntry], unfinished: dict[str, int | None], words: list[str]
) -> None:
    shown = page(RecipeError("no"), finished, unfinished)
    assert all(word in shown for word in words), shown


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OutOfMemoryError("x"), "Make the stage smaller"),
        (MemoryError("x"), "Make the stage smaller"),
        (ServiceUnreachableError("x"), "see that MLflow and Prefect answer"),
        (LoginError("x"), "give the worker the login"),
        (SettingsError("x"), "correct the setting where the worker is started"),
        (StoreUnreachableError("x"), "the server of the store answers"),
        (PieceGoneError("x"), "let the other run of the same work end"),
        (CorruptedError("x"), "repair it"),
        (OSError(28, "No space left on device"), "See to the store or the disk"),
        (RecipeError("x"), "Change the recipe"),
        (StillroomError("x"), "report the sentence and the log"),
        (ValueError("x"), "report the sentence and the log"),
    ],
)
def test_what_to_do(error: Exception, advice: str) -> None:
    assert advice in page(error)


def test_what_comes_from_elsewhere_is_shown_as_text_and_without_secrets() -> None:
    shown = page(RecipeError("<img src=x>\n# no\nhttps://me:secret@host/a?token=abc"))
    assert "**Why:** &lt;img src=x&gt; # no https://***@host/a?token=***\n" in shown


def test_a_run_from_a_terminal_is_typed_again() -> None:
    assert "type the same command" in page(RecipeError("x"))


def test_a_page_that_cannot_be_left_does_not_hide_the_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no\nserver")

    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "some")
    monkeypatch.setattr("tasks.failure.create_markdown_artifact", refuse)
    monkeypatch.setattr("tasks.failure.get_run_logger", logging.getLogger)
    write_failure(RecipeError("x"), RecipeError("x"))
    assert caplog.messages == ["Prefect was not told of the failure: no server"]


def test_without_a_flow_run_there_is_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    monkeypatch.setattr(
        "tasks.failure.create_markdown_artifact", lambda page, **_: left.append(page)
    )
    write_failure(RecipeError("x"), RecipeError("x"))
    assert left == []
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "some")
    write_failure(RecipeError("x"), RecipeError("x"))
    assert len(left) == 1
