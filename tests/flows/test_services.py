"""`make up`, `make down`, and what a browser, a script and a terminal find in between."""

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.flows.house import STAGES, House, open_house, processes_of, small_recipe, start
from tests.flows.terminal import ROOT, assert_refused

pytestmark = pytest.mark.integration
RECIPES = ROOT / "deployments" / "recipes"


def is_free(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) != 0


def test_up_when_it_is_up_says_so(house: House) -> None:
    done = house.terminal.type("up")
    assert done.returncode == 0
    assert "running already" in done.stdout
    assert house.prefect in done.stdout


def test_pools_and_a_paused_schedule(house: House) -> None:
    pools = {pool["name"]: pool for pool in house.ask("POST", "/work_pools/filter", {})}
    assert {"stillroom-cpu", "stillroom-gpu"} <= set(pools)
    assert pools["stillroom-cpu"]["type"] == "process"
    (schedule,) = house.deployment_of("compress-named")["schedules"]
    assert schedule["schedule"]["cron"]
    assert schedule["active"] is False
    assert (RECIPES / f"{schedule['parameters']['recipe_name']}.yaml").is_file()
    assert house.deployment["work_pool_name"] == "stillroom-cpu"


def test_recipe_is_the_form(house: House) -> None:
    schema = house.deployment["parameter_openapi_schema"]
    assert schema["properties"]["recipe"]["$ref"].endswith("/Recipe")
    recipe = schema["definitions"]["Recipe"]["properties"]
    assert {"teacher", "data", "distillation", "quantization", "adapters"} <= set(recipe)
    bits = schema["definitions"]["Quantization"]["properties"]["bits"]
    assert bits == {
        "title": "Bits",
        "type": "integer",
        "enum": [2, 3, 4, 8],
        "default": 4,
        "description": "Bits a weight.",
    }
    for name, section in schema["definitions"].items():
        for field, facts in section["properties"].items():
            # A section in a section is described by its own definition.
            described = schema["definitions"].get(facts.get("$ref", "").split("/")[-1], facts)
            assert described.get("description"), f"{name}.{field}"


@pytest.mark.parametrize(
    ("section", "value"),
    [("quantization", {"bits": 5}), ("nonsense", 1), ("seed", -1), ("teacher", {})],
)
def test_server_refuses_a_bad_recipe(
    house: House, recipe: dict[str, Any], section: str, value: object
) -> None:
    answer = house.order(recipe | {section: value})
    assert 400 <= answer.status_code < 500, answer.text
    assert "recipe" in answer.json()["detail"]


def test_run_ordered_from_the_server(house: House, ordered: dict[str, Any]) -> None:
    assert ordered["name"] == "tiny"
    states = house.states(ordered["id"])
    assert states == dict.fromkeys(
        [*STAGES, "check gates", "register", "write report"], "Completed"
    )
    of_run = {"flow_runs": {"id": {"any_": [ordered["id"]]}}}
    artifacts = house.ask("POST", "/artifacts/filter", {"artifacts": None, **of_run})
    kinds = {artifact["type"] for artifact in artifacts}
    assert {"table", "markdown"} <= kinds
    page = next(a for a in artifacts if a["key"] == "report-page")
    assert "report.html" in page["data"]
    assert (house.terminal.home / "reports" / "tiny" / "report.html").exists()


def test_a_recipe_from_the_server_reads_what_is_listed_alone(
    house: House, recipe: dict[str, Any], parts: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "planted"}\n')
    link = parts / "link.jsonl"
    link.symlink_to(tmp_path / "secret.jsonl")
    runs = {}
    try:
        for place in ("/etc/passwd", str(link), "s3://elsewhere/texts"):
            asked = small_recipe(recipe, parts)
            asked["data"]["train"]["source"] = place
            answer = house.order(asked)
            assert answer.status_code == 201, answer.text
            runs[place] = answer.json()["id"]
        ended = {place: house.await_end(run) for place, run in runs.items()}
    finally:
        link.unlink()
    for place, run in ended.items():
        assert run["state"]["type"] == "FAILED"
        assert place in run["state"]["message"]
        assert "a recipe that comes through the server may read" in run["state"]["message"]
        assert set(house.states(run["id"])) <= {"import teacher"}


def test_run_is_remembered_by_mlflow(house: House, ordered: dict[str, Any]) -> None:
    experiment = house.ask_mlflow("GET", "/experiments/get-by-name", experiment_name="tiny")
    body = {
        "experiment_ids": [experiment["experiment"]["experiment_id"]],
        "filter": f"tags.`stillroom.flow_run_id` = '{ordered['id']}'",
    }
    runs = house.ask_mlflow("POST", "/runs/search", body)["runs"]
    tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in runs]
    (parent,) = [
        run["info"]["run_id"]
        for run, named in zip(runs, tags, strict=True)
        if named["stillroom.run"] == "parent"
    ]
    nested = {t["stillroom.stage"] for t in tags if t.get("mlflow.parentRunId") == parent}
    assert nested == set(STAGES)
    assert {run["info"]["status"] for run in runs} == {"FINISHED"}
    for name in ("tiny", "tiny-law"):
        found = house.ask_mlflow("GET", "/registered-models/alias", name=name, alias="champion")
        assert found["model_version"]["version"] == "1"
        assert found["model_version"]["status"] == "READY"


def test_prefect_deployment_run(house: House, ordered: dict[str, Any], parts: Path) -> None:
    recipe = small_recipe(dict(ordered["parameters"]["recipe"]), parts)
    house.python(
        *("-m", "prefect", "--no-prompt"),
        *("deployment", "run", "compress/compress", "--watch", "--watch-interval", "1"),
        *("--params", json.dumps({"recipe": recipe})),
        seconds=120,
    )
    last = {"sort": "START_TIME_DESC", "limit": 1}
    (run,) = house.ask("POST", "/flow_runs/filter", last)
    assert run["id"] != ordered["id"]
    assert house.states(run["id"]) == {
        **dict.fromkeys(STAGES, "Cached"),
        **dict.fromkeys(["check gates", "register", "write report"], "Completed"),
    }
    found = house.ask_mlflow("GET", "/registered-models/alias", name="tiny", alias="champion")
    assert found["model_version"]["version"] == "1"  # the same artifact: no second version


@pytest.mark.parametrize("name", ["PREFECT", "MLFLOW"])
def test_taken_port(tmp_path: Path, name: str) -> None:
    terminal = open_house(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(terminal.variables[f"STILLROOM_{name}_PORT"])))
        taken.listen()
        assert_refused(terminal.type("up"), "is taken", f"STILLROOM_{name}_PORT")
    assert processes_of(terminal.home) == []
    assert "no servers are running" in terminal.type("down").stdout


def test_port_that_is_none(tmp_path: Path) -> None:
    terminal = open_house(tmp_path)
    terminal.variables["STILLROOM_MLFLOW_PORT"] = "http"
    assert_refused(terminal.type("up"), "STILLROOM_MLFLOW_PORT", "'http'")


def test_up_after_a_crash_and_down_twice(tmp_path: Path) -> None:
    terminal = open_house(tmp_path)
    try:
        house = start(terminal)
        _set_there(house)
        before = [_what_users_set(house, name) for name in ("compress", "compress-named")]
        pids = json.loads((terminal.home / "services.json").read_text())["pids"]
        os.kill(pids["prefect"], signal.SIGKILL)

        house = start(terminal)
        after = [_what_users_set(house, name) for name in ("compress", "compress-named")]
        assert after == before
    finally:
        done = terminal.type("down")
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["worker", "mlflow", "prefect"]
    assert processes_of(terminal.home) == []
    assert all(
        is_free(terminal.variables[f"STILLROOM_{name}_PORT"]) for name in ("PREFECT", "MLFLOW")
    )
    again = terminal.type("down")
    assert again.returncode == 0
    assert "no servers are running" in again.stdout


def _set_there(house: House) -> None:
    """Set on the server what an operator may set there."""
    named, typed = (house.deployment_of(name) for name in ("compress-named", "compress"))
    monday = f"/deployments/{named['id']}/schedules/{named['schedules'][0]['id']}"
    house.ask("PATCH", monday, {"active": True})
    yearly = {
        "schedule": {"cron": "0 0 1 1 *", "timezone": "UTC"},
        "parameters": {"recipe": {"name": "mine"}},
        "active": False,
    }
    house.ask("POST", f"/deployments/{typed['id']}/schedules", [yearly])
    more = {
        "parameters": {"changes": ["quantization.bits=3"]},
        "concurrency_limit": 2,
        "concurrency_options": {"collision_strategy": "CANCEL_NEW"},
        "job_variables": {"env": {"MINE": "1"}},
    }
    house.ask("PATCH", f"/deployments/{named['id']}", more)


def _what_users_set(house: House, name: str) -> Any:
    found = house.deployment_of(name)
    limit = (found["global_concurrency_limit"] or {}).get("limit")
    named = ("id", "parameters", "concurrency_options", "job_variables")
    schedules = sorted(found["schedules"], key=lambda each: str(each["id"]))
    return {key: found[key] for key in named} | {"limit": limit, "schedules": schedules}
