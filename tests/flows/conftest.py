"""A Prefect server, a tiny teacher and its text, and a home in which the whole road was walked."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.house import RECIPE, House, open_house, processes_of, small_recipe, start
from tests.flows.team import DATABASE_PASSWORD, furnish, move_into
from tests.flows.terminal import Terminal, assert_done, move_in
from tests.servers import Postgres, S3Server, postgres_server, prefect_server

SENTENCE = (
    "the cat sat on a mat and saw old blue hills far away from home while rain fell softly over "
    "green fields where nobody had walked since winter came down upon them all"
)


@pytest.fixture
def recipe() -> dict[str, Any]:
    """The whole road in small, to be changed at will."""
    return copy.deepcopy(RECIPE)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and a text."""
    from stillroom.models import save_model
    from tests.stillroom.tiny import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("parts")
    save_model(tiny_llama(seed=1, layers=8, hidden=64), tiny_tokenizer(), folder / "teacher")
    chance = random.Random(0)
    texts = [" ".join(chance.choices(SENTENCE.split(), k=40)) + "." for _ in range(70)]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as api:
        yield api


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: making them takes longer than most tests."""
    from tests.registering import new_database

    address = new_database(tmp_path_factory.mktemp("mlflow"))
    return Path(address.removeprefix("sqlite:///"))


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, parts: Path, prefect_api: str, empty_database: Path
) -> Terminal:
    """A terminal in whose home the recipe has been run without interruption; only to be read."""
    terminal = _terminal(tmp_path_factory.mktemp("finished"), parts, prefect_api)
    move_in(terminal.home, empty_database)
    terminal.write(RECIPE)
    assert_done(terminal.compress())
    return terminal


@pytest.fixture
def terminal(
    tmp_path: Path, parts: Path, prefect_api: str, empty_database: Path
) -> Callable[..., Terminal]:
    """Open a terminal with a new home, perhaps with a copy of what another home's store holds."""

    def open_terminal(like: Terminal | None = None) -> Terminal:
        opened = _terminal(tmp_path, parts, prefect_api)
        move_in(opened.home, empty_database, like.home / "store" if like else None)
        return opened

    return open_terminal


def _terminal(folder: Path, parts: Path, api: str) -> Terminal:
    for part in parts.iterdir():
        (folder / part.name).symlink_to(part)
    home = {"STILLROOM_HOME": str(folder / "home"), "PREFECT_API_URL": api}
    return Terminal(folder, home | {"STILLROOM_MLFLOW_TIMEOUT": "5"})


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Iterator[House]:
    """Everything that `make up` starts, and a small recipe in its folder."""
    terminal = open_house(tmp_path_factory.mktemp("house"))
    terminal.variables["STILLROOM_DATA_ROOTS"] = f"/nowhere:{parts}"
    terminal.variables["STILLROOM_GPUS"] = "cpu"
    terminal.variables["STILLROOM_RECIPES"] = str(terminal.folder / "recipes")
    (terminal.folder / "recipes").mkdir()
    # However short a stage is, it says how far it is.
    terminal.variables["STILLROOM_PROGRESS_SECONDS"] = "0.2"
    terminal.write(small_recipe(RECIPE, parts))
    try:
        yield start(terminal)
    finally:
        assert terminal.type("down").returncode == 0
        assert processes_of(terminal.home) == []


@pytest.fixture(scope="session")
def ordered(house: House, parts: Path) -> dict[str, Any]:
    """The first run of the small recipe, ordered from the server and done by the worker."""
    return house.make(small_recipe(RECIPE, parts))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with postgres_server(DATABASE_PASSWORD) as server:
        for name in ("prefect", "mlflow"):
            server.run("createdb", name)
        yield server


@pytest.fixture(scope="session")
def team(
    tmp_path_factory: pytest.TempPathFactory, parts: Path, postgres: Postgres, ceph: S3Server
) -> Iterator[House]:
    """What `make up` starts for a team: PostgreSQL, logins, S3, a worker of each kind."""
    terminal = furnish(tmp_path_factory.mktemp("team"), parts, postgres, ceph)
    try:
        yield move_into(terminal)
    finally:
        assert terminal.type("down").returncode == 0
        assert processes_of(terminal.home) == []
