"""The sensor on a real Prefect server: what it orders when a model or a text changes, and once."""

import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Failed

from flows.compress_named import compress_named
from flows.plan import planned_orders, resolve_source
from flows.watch_sources import Row, watch_sources
from stillroom.config import load_recipe
from tasks.named_runs import order_run
from tasks.registry import champion, move_alias, register_base
from tasks.settings import Settings
from tasks.store.s3 import s3_client
from tasks.store.store import open_store
from tests.registering import Place, llama_folder
from tests.servers import S3Server, free_port, rgw_is_installed

pytestmark = [
    pytest.mark.integration,
    pytest.mark.service,
    pytest.mark.filterwarnings("ignore:The ``noload``"),  # SQLAlchemy, through MLflow
]
NO_CEPH = pytest.mark.skipif(not rgw_is_installed(), reason="Ceph's radosgw is not installed")
NEW = "is watched from now on"
QUIET = ("nothing since that run", "nothing: it is Scheduled")


@dataclass
class Desk:
    """A folder of recipes, and a Prefect server that knows how to run them."""

    folder: Path
    client: SyncPrefectClient

    def write(self, name: str, **changes: Any) -> str:
        """Write a recipe under a name that no other test has, and return it."""
        recipe = {
            "name": "tiny",
            "teacher": {"source": "builtin:minilm"},
            "data": {"train": {"source": "builtin:python-docs"}},
            "quantization": {},
        }
        unique = f"{name}-{uuid.uuid4().hex[:8]}"
        (self.folder / f"{unique}.yaml").write_text(yaml.safe_dump(recipe | changes))
        return unique

    def look(self, *names: str) -> tuple["State[Any]", dict[str, Row]]:
        state: State[Any] = watch_sources(names, return_state=True)
        rows: list[Row] = state.result(raise_on_failure=False)
        return state, {row.recipe: row for row in rows}

    def look_at(self, name: str) -> Row:
        state, rows = self.look(name)
        assert state.is_completed(), state.message
        return rows[name]

    def runs(self, name: str) -> list[FlowRun]:
        tags = FlowRunFilterTags(all_=[f"recipe:{name}"])
        return self.client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=tags))


@pytest.fixture(scope="module")
def server(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The Prefect server, for this process, with the deployment that no worker serves."""
    updates = {PREFECT_API_URL: prefect_api, PREFECT_HOME: tmp_path_factory.mktemp("here")}
    with temporary_settings(updates=updates), get_client(sync_client=True) as client:
        client.create_deployment(client.create_flow(compress_named), name="compress-named")
        yield


@pytest.fixture
def desk(server: None, place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    folder = place.root / "recipes"
    folder.mkdir()
    monkeypatch.setenv("STILLROOM_RECIPES", str(folder))
    monkeypatch.setenv("STILLROOM_HOME", str(place.root / "home"))
    monkeypatch.setenv("STILLROOM_STORE", (place.root / "store").as_uri())
    with get_client(sync_client=True) as client:
        yield Desk(folder, client)


def register(place: Place, seed: int) -> str:
    """Register a model under the alias that a recipe names."""
    folder = llama_folder(place.root, seed)
    version = register_base(place.client, place.candidate("teacher", folder, f"{seed:064x}"))
    move_alias(place.client, version, "champion", champion(place.client, "teacher", "champion"))
    return version.version


def test_a_new_version_of_the_teacher_orders_one_run(desk: Desk, place: Place) -> None:
    first = register(place, 0)
    name = desk.write("registered", teacher={"source": "models:/teacher@champion"})
    row = desk.look_at(name)
    assert (NEW in row.changed, row.ordered) == (True, "a run")
    (run,) = desk.runs(name)
    assert run.parameters == {"recipe_name": name}
    assert str(run.id) in row.run
    for _ in range(2):
        again = desk.look_at(name)
        assert (again.changed, again.ordered) == QUIET
        assert again.run == row.run
    assert len(desk.runs(name)) == 1

    second = register(place, 1)
    row = desk.look_at(name)
    assert row.changed == f"models:/teacher@champion is now version {second}"
    assert desk.look_at(name).ordered == QUIET[1]
    assert len(desk.runs(name)) == 2

    # What it once was is something new all the same: the result of the other is registered now.
    assert register(place, 0) == first
    assert desk.look_at(name).changed == f"models:/teacher@champion is now version {first}"
    assert desk.look_at(name).ordered == QUIET[1]
    assert len(desk.runs(name)) == 3


@pytest.mark.parametrize("server_name", ["mock_s3", pytest.param("ceph", marks=NO_CEPH)])
def test_a_new_object_orders_one_run(
    desk: Desk,
    server_name: str,
    s3_environment: Callable[[S3Server], None],
    request: pytest.FixtureRequest,
) -> None:
    s3_environment(request.getfixturevalue(server_name))
    client, bucket = s3_client(), f"texts-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=bucket)

    def put(key: str, text: str) -> None:
        client.put_object(Bucket=bucket, Key=key, Body=json.dumps({"text": text}).encode())

    source = f"s3://{bucket}/new"
    put("new/1.jsonl", "one")
    name = desk.write("texts", data={"train": {"source": source}})
    assert NEW in desk.look_at(name).changed
    for changed in ("new/2.jsonl", "new/1.jsonl"):  # another object; the same with other content
        put(changed, "two")
        row = desk.look_at(name)
        assert (row.changed, row.ordered) == (f"{source} holds something new", "a run")
        assert desk.look_at(name).ordered == QUIET[1]
    put("newer/1.jsonl", "beside it")
    assert desk.look_at(name).ordered == QUIET[1]
    assert len(desk.runs(name)) == 3
    client.close()


def test_what_is_made_already_orders_nothing(desk: Desk, tmp_path: Path) -> None:
    name = desk.write("made")
    recipe = load_recipe(desk.folder / f"{name}.yaml")
    store = open_store(Settings().store_url)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("x")
    for order in planned_orders(recipe, resolve_source).values():
        if order.kind != "evaluation":  # another machine's: its key is not looked for
            store.add(
                tmp_path / "made",
                kind=order.kind,
                key=order.key,
                inputs={},
                section={},
                versions={},
                stage_version=1,
            )
    assert desk.look_at(name) == Row(name, "nothing: all of it is made", "nothing")
    assert desk.runs(name) == []


@pytest.mark.parametrize("ended", ["Failed", "Refused", "Cancelled"])
def test_a_run_that_failed_is_not_ordered_again(desk: Desk, ended: str) -> None:
    name = desk.write("failing")
    row = desk.look_at(name)
    (run,) = desk.runs(name)
    state: State[Any] = Failed(name=ended, message="no good")
    desk.client.set_flow_run_state(run.id, state, force=True)
    again = desk.look_at(name)
    assert again.ordered == (
        f"nothing: it ended as {ended}: no good; choose Retry there when it is mended"
    )
    assert again.run == row.run
    assert len(desk.runs(name)) == 1


def test_who_orders_at_once_gets_the_same_run(desk: Desk) -> None:
    name, together = desk.write("raced"), Barrier(8)

    def order() -> uuid.UUID:
        with get_client(sync_client=True) as client:
            together.wait(30)
            return order_run(name, "k" * 16, {"s3://a/b": "1"}, None, client).id

    with ThreadPoolExecutor(8) as pool:
        # The server's address is a setting of this context, which threads do not inherit.
        runs = [pool.submit(copy_context().run, order) for _ in range(8)]
        assert len({run.result() for run in runs}) == 1
    (run,) = desk.runs(name)
    assert run.labels["stillroom.source s3://a/b"] == "1"


def test_one_that_cannot_be_read_does_not_stop_the_others(
    desk: Desk, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nobody")
    monkeypatch.setenv("STILLROOM_S3_TIMEOUT", "2")
    register(place, 0)
    away = desk.write("a", data={"train": {"source": "s3://away/texts"}})
    missing = desk.write("b", teacher={"source": "models:/missing@champion"})
    circle = desk.write(
        "c", teacher={"source": "models:/teacher@champion"}, publish={"name": "teacher"}
    )
    plain = desk.write("d")
    good = desk.write("e", teacher={"source": "models:/teacher@champion"})
    (desk.folder / "broken.yaml").write_text("name: [")
    state, rows = desk.look()
    assert state.is_failed()
    lines = dict(line.split(": ", 1) for line in str(state.message).splitlines())
    assert set(lines) == {"broken", away, missing, circle}
    assert "is not YAML" in lines["broken"]
    assert "does not answer" in lines[away] or "Could not connect" in lines[away]
    assert "MLflow has no such registered version" in lines[missing]
    assert "is what it publishes: each run would order the next" in lines[circle]
    assert all(rows[name].ordered == f"{name}: {line}" for name, line in lines.items())
    assert rows[plain] == Row(plain, "it names no registered model and nothing on S3", "nothing")
    assert rows[good].ordered == "a run"
    assert len(desk.runs(good)) == 1
    assert all(desk.runs(name) == [] for name in (away, missing, circle, plain))
    # By its own name it is looked at all the same.
    assert desk.look_at(plain).ordered == "a run"


def test_a_name_that_is_none(desk: Desk) -> None:
    state, _ = desk.look("nobody")
    assert state.is_failed()
    assert "no recipe is named 'nobody'" in str(state.message)
