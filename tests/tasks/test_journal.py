"""What a flow run writes down of its stages, and when."""

import logging
from datetime import UTC, datetime

import pytest
from prefect.exceptions import Pause
from prefect.utilities.collections import visit_collection

from stillroom.errors import StageError
from tasks.journal import Journal
from tasks.stages import IMPORT_MODEL, Order
from tasks.store.lease import read_leases
from tasks.store.store import open_store
from tasks.tracking import begin_parent_run
from tests.registering import Place

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``")  # SQLAlchemy, through MLflow


@pytest.fixture
def journal(place: Place) -> Journal:
    return Journal(place.client, place.parent, open_store(str(place.root / "store")))


def pass_stages(journal: Journal, place: Place, titles: str, *, cached: bool) -> None:
    """Have the journal hear of a stage for each letter."""
    for title in titles:
        order = Order(title=title, stage=IMPORT_MODEL, section={"title": title}, seed=0, inputs={})
        made = place.root / title
        made.mkdir()
        (made / "file").write_text(title)
        record = journal.store.add(
            made,
            kind=order.kind,
            key=order.key,
            stage_version=1,
            inputs={},
            section=order.section,
            versions={},
            licence="none",
            metrics={"seconds": 1.0},
        )
        journal.log_stage(order, record, cached=cached)


def written(place: Place) -> str:
    nested = f"tags.`mlflow.parentRunId` = '{place.parent.run_id}'"
    runs = place.client.search_runs([place.parent.experiment_id], nested)
    assert {run.info.status for run in runs} <= {"FINISHED"}
    return "".join(sorted(run.info.run_name for run in runs))


def test_cached_stages_are_written_down_once(journal: Journal, place: Place) -> None:
    pass_stages(journal, place, "abcdef", cached=True)
    journal.log_cached()
    assert written(place) == "abcdef"
    pass_stages(journal, place, "g", cached=False)
    assert written(place) == "abcdefg"
    journal.log_cached()
    assert written(place) == "abcdefg"
    assert [entry.stage for entry in journal.lineage] == list("abcdefg")


def test_the_end_writes_down_what_is_left(journal: Journal, place: Place) -> None:
    with journal:
        pass_stages(journal, place, "ab", cached=True)
    assert written(place) == "ab"
    assert place.client.get_run(place.parent.run_id).info.status == "FINISHED"


def test_a_failure_writes_down_what_is_left_too(journal: Journal, place: Place) -> None:
    pass_stages(journal, place, "ab", cached=True)
    with pytest.raises(StageError, match="c failed"), journal:
        raise StageError("c failed")
    assert written(place) == "ab"
    assert place.client.get_run(place.parent.run_id).info.status == "FAILED"


def test_a_suspended_run_is_to_go_on(journal: Journal, place: Place) -> None:
    pass_stages(journal, place, "ab", cached=True)
    until = datetime(2100, 1, 2, tzinfo=UTC)
    journal.wait_until(until)
    with pytest.raises(Pause), journal:
        raise Pause
    assert written(place) == "ab"
    run = place.client.get_run(place.parent.run_id)
    assert run.info.status == "SCHEDULED"
    assert run.data.tags["stillroom.state"] == "suspended"
    assert run.data.tags["stillroom.waits_until"] == until.isoformat()
    (left,) = read_leases(journal.store.backend).values()
    assert left.keys == tuple(sorted(entry.key for entry in journal.lineage))
    assert left.expires == until

    experiment, flow = place.parent.experiment_id, place.parent.flow_run_id
    again = begin_parent_run(place.client, experiment, flow_run_id=flow, name="tiny", recipe={})
    assert again.run_id == place.parent.run_id
    with Journal(place.client, again, journal.store):
        running = place.client.get_run(again.run_id)
        assert running.info.status == "RUNNING"
        assert not {"stillroom.state", "stillroom.waits_until"} & set(running.data.tags)
    assert read_leases(journal.store.backend) == {}
    assert place.client.get_run(again.run_id).info.status == "FINISHED"


def test_what_cannot_be_written_down_fails_the_run(
    journal: Journal, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> str:
        raise StageError("MLflow refuses")

    monkeypatch.setattr("tasks.journal.log_stage", refuse)
    monkeypatch.setattr("tasks.journal.get_run_logger", logging.getLogger)  # there is no flow
    pass_stages(journal, place, "ab", cached=True)
    with pytest.raises(StageError, match="MLflow refuses"), journal:
        pass
    assert place.client.get_run(place.parent.run_id).info.status == "FAILED"


def test_prefect_does_not_walk_through_what_changes_meanwhile(
    journal: Journal, place: Place
) -> None:
    pass_stages(journal, place, "ab", cached=True)
    walked: list[object] = []
    visit_collection(journal, walked.append, return_data=False)
    assert walked == [journal]
