"""Backup and restore as OPERATING.md has them, of servers that run and of a home that is lost."""

import shutil
from pathlib import Path

import pytest

from tests.deployments.manual import run_block
from tests.flows.house import House, open_house, start
from tests.flows.terminal import Terminal
from tests.servers import postgres_server
from tests.tasks.store.making import add, write_files

pytestmark = [pytest.mark.integration, pytest.mark.service]


@pytest.mark.timeout(600)
def test_a_lost_home_comes_back(tmp_path: Path) -> None:
    terminal = open_house(tmp_path)
    places = {"STILLROOM_HOME": str(terminal.home), "BACKUP": str(tmp_path / "backup")}
    try:
        house = start(terminal)
        _leave_traces(house, tmp_path)
        run_block("back up", places)
        assert terminal.type("down").returncode == 0
        shutil.rmtree(terminal.home)

        assert "is sound" in run_block("restore", places)
        _assert_traces(start(terminal), terminal)
    finally:
        assert terminal.type("down").returncode == 0


def _leave_traces(house: House, folder: Path) -> None:
    deployment = house.deployment_of("compress-named")
    schedule = f"/deployments/{deployment['id']}/schedules/{deployment['schedules'][0]['id']}"
    house.ask("PATCH", schedule, {"active": True})
    house.ask_mlflow("POST", "/registered-models/create", {"name": "kept"})
    add(house.terminal.store, write_files(folder / "artifact"))
    note = house.terminal.home / "mlflow-artifacts" / "1" / "note.txt"
    note.parent.mkdir(parents=True)
    note.write_text("a file of a version")


def _assert_traces(house: House, terminal: Terminal) -> None:
    assert house.deployment_of("compress-named")["schedules"][0]["active"] is True
    kept = house.ask_mlflow("GET", "/registered-models/get", name="kept")
    assert kept["registered_model"]["name"] == "kept"
    assert len(terminal.records("model")) == 1
    note = terminal.home / "mlflow-artifacts" / "1" / "note.txt"
    assert note.read_text() == "a file of a version"


def test_postgresql_comes_back(tmp_path: Path) -> None:
    login = {"PGHOST": "127.0.0.1", "PGUSER": "keeper", "PGPASSWORD": "password-of-both"}
    databases = ("prefect", "mlflow", "mlflow_logins")
    with postgres_server(login["PGPASSWORD"]) as server:
        for name in databases:
            server.run("createdb", name)
            server.run("psql", "--dbname", name, "--command", f"create table {name}_rows (n int)")
            server.run("psql", "--dbname", name, "--command", f"insert into {name}_rows values (7)")
        here = login | {"PGPORT": str(server.port), "BACKUP": str(tmp_path)}
        run_block("back up PostgreSQL", here, server.programs)
    with postgres_server(login["PGPASSWORD"]) as other:
        here = login | {"PGPORT": str(other.port), "BACKUP": str(tmp_path)}
        run_block("restore PostgreSQL", here, other.programs)
        for name in databases:
            query = f"select n from {name}_rows"
            said = other.run("psql", "--dbname", name, "--tuples-only", "--command", query)
            assert said.split() == ["7"]
