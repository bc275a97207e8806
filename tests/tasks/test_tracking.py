import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stillroom.errors import RecipeError, ServiceUnreachableError
from stillroom.redaction import redact
from tasks.mlflow_batches import flatten
from tasks.store.s3_client import s3_client
from tasks.tracking import (
    StageRecord,
    begin_parent_run,
    connect,
    end_parent_run,
    ensure_experiment,
    log_file,
    log_stage,
)
from tests.registering import Place, new_database
from tests.servers import S3Server, free_port

# MLflow itself uses what SQLAlchemy will drop.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``")
AWAY_SECONDS = 12.0


def stage(name: str = "quantize", **more: object) -> StageRecord:
    given = {"key": "k" * 64, "kind": "model", "cached": False, **more}
    return StageRecord(name, **given)  # type: ignore[arg-type]


def test_stage_is_nested_with_its_tags_parameters_metrics_and_curve(place: Place) -> None:
    page = place.root / "report.html"
    page.write_text("<p>hello")
    record = stage(
        params={"bits": 4, "nested": {"group_size": 64}},
        metrics={"size_bytes": 12.0, "odd+name": 1.0},
        history=[(step, {"loss_nats": 3.0 - step}) for step in range(3)],
        files=(page,),
    )

    run = place.client.get_run(log_stage(place.client, place.parent, record))

    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == place.parent.run_id
    assert run.data.tags["stillroom.artifact_key"] == "k" * 64
    assert run.data.tags["stillroom.cached"] == "false"
    assert run.data.params == {"bits": "4", "nested.group_size": "64"}
    assert run.data.metrics == {"size_bytes": 12.0, "odd_name": 1.0, "loss_nats": 1.0}
    curve = place.client.get_metric_history(run.info.run_id, "loss_nats")
    assert [(point.step, point.value) for point in curve] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert [file.path for file in place.client.list_artifacts(run.info.run_id)] == ["report.html"]
    assert (place.root / "files" / run.info.run_id / "artifacts" / "report.html").is_file()


def test_rerun_finds_its_parent_and_makes_no_second(place: Place) -> None:
    end_parent_run(place.client, place.parent, "FAILED")

    again = begin_parent_run(
        place.client,
        place.parent.experiment_id,
        flow_run_id="flow-1",
        name="tiny",
        recipe={"name": "tiny"},
    )
    other = begin_parent_run(
        place.client, place.parent.experiment_id, flow_run_id="flow-2", name="tiny", recipe={}
    )

    assert again == place.parent
    assert other.run_id != place.parent.run_id
    assert place.client.get_run(again.run_id).info.status == "RUNNING"


def test_a_stage_of_the_parent_is_not_taken_for_the_parent(place: Place) -> None:
    log_stage(place.client, place.parent, stage())
    again = begin_parent_run(
        place.client, place.parent.experiment_id, flow_run_id="flow-1", name="tiny", recipe={}
    )
    assert again.run_id == place.parent.run_id


def test_failed_stage_is_gone_over_by_the_rerun_and_a_finished_one_left(place: Place) -> None:
    failed = stage(status="FAILED", error="out of memory", params={"bits": 4})
    first = log_stage(place.client, place.parent, failed)
    run = place.client.get_run(first)
    assert (run.info.status, run.data.tags["stillroom.error"]) == ("FAILED", "out of memory")

    # Another value of a parameter would be refused by MLflow; the first stays.
    second = log_stage(
        place.client, place.parent, stage(params={"bits": 3}, metrics={"size_bytes": 1.0})
    )
    third = log_stage(place.client, place.parent, stage(metrics={"size_bytes": 2.0}))

    assert first == second == third
    run = place.client.get_run(first)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"size_bytes": 1.0}


def test_more_points_and_parameters_than_one_batch_holds(place: Place) -> None:
    record = stage(
        params={f"p{i}": i for i in range(250)},
        history=[(step, {"loss_nats": float(step)}) for step in range(2000)],
    )
    run_id = log_stage(place.client, place.parent, record)
    assert len(place.client.get_run(run_id).data.params) == 250
    assert len(place.client.get_metric_history(run_id, "loss_nats")) == 2000


def test_numbers_that_are_none_are_kept_as_such(place: Place) -> None:
    record = stage(metrics={"a": float("nan"), "b": float("inf")})
    run = place.client.get_run(log_stage(place.client, place.parent, record))
    assert all(value != value for value in run.data.metrics.values())


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("s3://KEY:SECRET@bucket/prefix", "s3://***@bucket/prefix"),
        ("https://user:pa55@host:5000/x", "https://***@host:5000/x"),
        ("postgresql+psycopg2://me:pw@db/x", "postgresql+psycopg2://***@db/x"),
        ("s3://b/p?access_key=A&secret_key=B&region=eu", "s3://b/p?access_key=***&secret_key=***"
         "&region=eu"),
        ("https://h/f?X-Amz-Signature=abc&X-Amz-Credential=d", "https://h/f?X-Amz-Signature=***"
         "&X-Amz-Credential=***"),
        ("models:/small@champion", "models:/small@champion"),
        ("write to me@example.org, see https://example.org/a?page=2",
         "write to me@example.org, see https://example.org/a?page=2"),
    ],
)  # fmt: skip
def test_redact(text: str, hidden: str) -> None:
    assert redact(text) == hidden


def test_no_secret_reaches_mlflow(place: Place) -> None:
    recipe = {
        "name": "tiny",
        "data": {"train": {"source": "s3://KEY:HUSH@bucket/x?token=HUSH"}},
        "adapters": [{"name": "law", "data": {"source": "https://u:HUSH@h/"}}],
        "long": "x" * 10_000,
    }
    parent = begin_parent_run(
        place.client,
        place.parent.experiment_id,
        flow_run_id="secret",
        name="tiny",
        recipe=recipe,
        tags={"store": "s3://KEY:HUSH@bucket"},
    )
    run = place.client.get_run(parent.run_id)
    file = place.root / "files" / parent.run_id / "artifacts" / "recipe.yaml"

    assert "HUSH" not in json.dumps(run.to_dictionary()) + file.read_text()
    assert run.data.params["adapters.law.data.source"] == "https://***@h/"
    assert len(run.data.params["long"]) == 500
    assert yaml.safe_load(file.read_text())["long"] == recipe["long"]


def test_flatten_names_the_items_of_lists() -> None:
    section = {"adapters": [{"rank": 1}, {"name": "law", "rank": 2}], "layers": [0, 2]}
    assert flatten(section) == {
        "adapters.0.rank": "1",
        "adapters.law.name": "law",
        "adapters.law.rank": "2",
        "layers": "[0, 2]",
    }


def test_two_processes_make_one_experiment(tmp_path: Path) -> None:
    code = (
        "import sys; from tasks.tracking import connect, ensure_experiment; "
        "print(ensure_experiment(connect(sys.argv[1]), 'shared', sys.argv[2]))"
    )
    uri = new_database(tmp_path)
    command = [sys.executable, "-c", code, uri, (tmp_path / "files").as_uri()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ids = {process.communicate(timeout=60)[0].strip() for process in both}
    assert len(ids) == 1
    assert ids != {""}


def test_experiment_that_comes_up_in_between_is_taken(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = place.client.get_experiment_by_name
    answers = iter([None, seen("tiny")])
    monkeypatch.setattr(place.client, "get_experiment_by_name", lambda _: next(answers))
    assert ensure_experiment(place.client, "tiny") == place.parent.experiment_id


def test_deleted_experiment_is_named(place: Place) -> None:
    place.client.delete_experiment(place.parent.experiment_id)
    with pytest.raises(RecipeError, match="'tiny' is deleted"):
        ensure_experiment(place.client, "tiny")


@pytest.mark.usefixtures("mlflow_environment")
def test_server_that_does_not_answer_is_named_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STILLROOM_MLFLOW_TIMEOUT", "0.5")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(ServiceUnreachableError, match="it continues where it stopped") as error:
        connect(f"http://user:HUSH@127.0.0.1:{port}")
    assert time.monotonic() - start < 5
    assert f"http://***@127.0.0.1:{port}" in str(error.value)


def test_an_s3_server_that_is_away_for_some_seconds_is_waited_for(
    mock_s3: S3Server,
    s3_environment: Callable[[S3Server], None],
    mlflow_environment: None,
    tmp_path: Path,
) -> None:
    from moto.server import ThreadedMotoServer

    s3_environment(mock_s3)
    s3_client().create_bucket(Bucket="late")
    port = free_port()
    s3_environment(replace(mock_s3, endpoint=f"http://127.0.0.1:{port}"))
    client = connect(new_database(tmp_path))
    run = client.create_run(ensure_experiment(client, "late", "s3://late/mlflow"))
    (tmp_path / "note").write_text("made meanwhile")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)  # shares what the mock keeps
    timer = threading.Timer(AWAY_SECONDS, server.start)
    timer.start()
    try:
        log_file(client, run.info.run_id, tmp_path / "note")
    finally:
        timer.join()
        server.stop()
    (kept,) = s3_client(mock_s3.endpoint).list_objects_v2(Bucket="late")["Contents"]
    assert kept["Key"].endswith("/artifacts/note")
