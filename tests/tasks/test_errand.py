"""What a worker does with an order that came through Prefect's server, and what it refuses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stillroom.errors import MismatchError, RecipeError, SourceError, StillroomError, StoreError
from stillroom.progress import silent
from tasks import errand as errand_module
from tasks.child import Request
from tasks.errand import Errand, class_of_workers, do_errand, find_inputs
from tasks.sources import Source
from tasks.stages import (
    CACHE_TEACHER,
    DISTILL_STUDENT,
    EVALUATE_MODEL,
    IMPORT_MODEL,
    Order,
    Stage,
)
from tasks.store.record import Record
from tasks.store.store import ArtifactStore, open_store

DEPLOYMENT = "make-stage/make-stage"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """The worker's store, which its environment names, and no process that really works."""
    url = (tmp_path / "store").as_uri()
    monkeypatch.setenv("STILLROOM_STORE", url)
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path / "home"))
    return open_store(url)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    requests: list[Request] = []
    monkeypatch.setattr(errand_module, "run_child", lambda request, *_: requests.append(request))
    return requests


def stored(store: ArtifactStore, folder: Path, kind: str, key: str) -> Record:
    folder.mkdir(exist_ok=True)
    (folder / "content").write_text(key)
    return store.add(
        folder, kind=kind, key=key, inputs={}, section={}, versions={}, stage_version=1
    )


def order_of(stage: Stage = CACHE_TEACHER, **fields: Any) -> Order:
    return Order(title="a stage", stage=stage, section={}, seed=0).model_copy(update=fields)


def sent(order: Order, kinds: Mapping[str, str] | None = None, **fields: Any) -> Errand:
    return Errand(**{"order": order, "key": order.key, "kinds": dict(kinds or {}), **fields})


def test_the_worker_takes_inputs_from_its_own_store(
    store: ArtifactStore, asked: list[Request], tmp_path: Path
) -> None:
    teacher = stored(store, tmp_path / "model", "model", "a" * 64)
    order = order_of(inputs={"teacher": teacher.key})
    done = do_errand(sent(order, {"teacher": "model"}, threads=3), DEPLOYMENT, silent)
    (request,) = asked
    assert request.records == {"teacher": teacher}
    assert request.store_url == store.url
    assert request.threads == 3
    assert done == f"made teacher-cache {order.key[:12]} in {store.url}"


def test_what_is_there_is_not_made_again(
    store: ArtifactStore, asked: list[Request], tmp_path: Path
) -> None:
    order = order_of(inputs={"teacher": "a" * 64})
    stored(store, tmp_path / "cache", order.kind, order.key)
    done = do_errand(sent(order, {"teacher": "model"}), DEPLOYMENT, silent)
    assert "already" in done
    assert asked == []


def test_inputs_that_are_not_in_its_store(store: ArtifactStore, asked: list[Request]) -> None:
    order = order_of(inputs={"teacher": "a" * 64})
    with pytest.raises(StoreError, match=f"{store.url}, has no model aaaaaaaaaaaa.*STILLROOM_STO"):
        do_errand(sent(order, {"teacher": "model"}), DEPLOYMENT, silent)
    assert asked == []


@pytest.mark.parametrize(
    ("order", "error", "words"),
    [
        (
            order_of(sources={"source": Source("/etc", "local", "x")}),
            SourceError,
            "reads no sources",
        ),
        (order_of(IMPORT_MODEL), MismatchError, "import_model 1 came"),
        (order_of(Stage("cache_teacher", "model", 5)), MismatchError, "cache_teacher 5 came"),
        (order_of(Stage("cache_teacher", "teacher-cache", 1)), MismatchError, "teacher 1 came"),
        (order_of(Stage("..os", "model", 1)), MismatchError, "..os 1 came"),
        (
            order_of(EVALUATE_MODEL, section={"hardware": "EPYC, 2 threads"}),
            MismatchError,
            "workers of make-stage/make-stage, all threads; EPYC",
        ),
        (
            order_of(DISTILL_STUDENT, unkeyed={"training": {"learning_rate": 1.0}}),
            RecipeError,
            "learning_rate",
        ),
        (order_of(unkeyed={"workers": 5000}), RecipeError, "workers"),
        (order_of(unkeyed={"command": "true"}), RecipeError, "command"),
        (order_of(section={"trust_remote_code": True}), SourceError, "STILLROOM_ALLOW_REMOTE_CODE"),
        (order_of(unkeyed={"trust_remote_code": True}), RecipeError, "trust_remote_code"),
        (order_of(inputs={"../../teacher": "a" * 64}), RecipeError, "no input that a flow orders"),
        (order_of(inputs={"teacher": "../" * 20}), RecipeError, "no input that a flow orders"),
        (order_of(inputs={"data": "a" * 64}), RecipeError, "no input that a flow orders"),
    ],
)
def test_an_order_that_no_flow_writes_is_refused(
    store: ArtifactStore,
    asked: list[Request],
    order: Order,
    error: type[StillroomError],
    words: str,
) -> None:
    kinds = {"teacher": "model", "../../teacher": "model"}
    with pytest.raises(error, match=words):
        do_errand(sent(order, kinds), DEPLOYMENT, silent)
    assert asked == []


def test_a_worker_with_other_versions_refuses(store: ArtifactStore, asked: list[Request]) -> None:
    with pytest.raises(MismatchError, match="the same versions of the project, torch"):
        do_errand(sent(order_of(), key="b" * 64), DEPLOYMENT, silent)
    assert asked == []


@pytest.mark.parametrize("kind", ["../models", "a/b", "", "Model"])
def test_a_kind_is_a_word(kind: str) -> None:
    with pytest.raises(ValueError, match="kinds"):
        sent(order_of(), {"teacher": kind})


def test_a_record_that_was_sent_is_not_believed(store: ArtifactStore, tmp_path: Path) -> None:
    real = stored(store, tmp_path / "model", "model", "a" * 64)
    order = order_of(inputs={"teacher": real.key})
    assert find_inputs(store, order, {"teacher": "model"}) == {"teacher": real}


def test_workers_measure_for_their_deployment() -> None:
    assert class_of_workers("make-stage/big", None) == "workers of make-stage/big, all threads"
    order = order_of(EVALUATE_MODEL, section={"hardware": class_of_workers("make-stage/big", 2)})
    with pytest.raises(MismatchError, match="the hardware here is workers of make-stage/small"):
        do_errand(sent(order, threads=2), "make-stage/small", silent)
