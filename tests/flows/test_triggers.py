"""What orders a run of what `make up` starts: a name, a part, a new version; and how one fails."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.registry import champion, move_alias, register_base
from tests.flows.house import STAGES, House, small_recipe
from tests.registering import llama_folder, new_place

pytestmark = [pytest.mark.integration, pytest.mark.service]
PART_DEPLOYMENTS = {
    "prepare-teacher": "teacher",
    "prepare-data": "data",
    "cache-teacher": "teacher_cache",
    "distil": "student",
    "quantize": "quantized",
    "train-adapters": "adapters",
    "evaluate": "evaluation",
}
MEASURED = ["import teacher", "prepare data", "evaluate teacher"]
Recipe = dict[str, Any]


@pytest.fixture
def own(recipe: Recipe, tmp_path: Path, parts: Path) -> Recipe:
    """A recipe that measures its teacher and no more; no folder that it names is listed."""
    (tmp_path / "text.jsonl").write_bytes((parts / "text.jsonl").read_bytes())
    (tmp_path / "teacher").symlink_to(parts / "teacher")
    small = small_recipe(recipe, tmp_path)
    for section in ("distillation", "quantization", "adapters", "publish"):
        del small[section]
    return small


def write(house: House, name: str, recipe: Recipe) -> None:
    (house.terminal.folder / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


def end_of(house: House, deployment: str, parameters: dict[str, Any]) -> dict[str, Any]:
    answer = house.order_of(deployment, parameters)
    assert answer.status_code == 201, answer.text
    return house.await_end(answer.json()["id"])


def test_a_long_stage_says_how_far_it_is(house: House, ordered: dict[str, Any]) -> None:
    shown = {
        each["description"]: each["data"] for each in house.artifacts(ordered["id"], "progress")
    }
    assert {"cache teacher", "distil student", "quantize"} <= set(shown)
    assert set(shown) <= set(STAGES)
    assert set(shown.values()) == {100.0}
    assert not any(each["key"] == "failure" for each in house.artifacts(ordered["id"], "markdown"))


def test_every_part_is_a_deployment(house: House) -> None:
    for name, until in PART_DEPLOYMENTS.items():
        found = house.ask("GET", f"/deployments/name/make-part/{name}")
        assert found["parameters"] == {"until": until}
        assert found["work_pool_name"] == "stillroom-cpu"


def test_a_part_alone(house: House, ordered: dict[str, Any]) -> None:
    run = end_of(house, "make-part/prepare-data", {"recipe": ordered["parameters"]["recipe"]})
    assert run["state"]["type"] == "COMPLETED", run["state"]
    assert run["name"] == "tiny, data"
    assert house.states(run["id"]) == dict.fromkeys(
        ["import teacher", "prepare data", "prepare data law"], "Cached"
    )


@pytest.mark.parametrize("name", ["../recipe", "/etc/passwd", "a b", ""])
def test_the_server_refuses_what_is_no_name(house: House, name: str) -> None:
    answer = house.order_of("compress-named/compress-named", {"recipe_name": name})
    assert 400 <= answer.status_code < 500, answer.text


def test_by_name(house: House, own: Recipe, tmp_path: Path) -> None:
    write(house, "by-name", own)
    run = end_of(house, "compress-named/compress-named", {"recipe_name": "by-name"})
    assert run["state"]["type"] == "COMPLETED", f"{run['state']}\n{house.log('worker')}"
    assert set(MEASURED) < set(house.states(run["id"]))

    # The same file by a change, or by the form, is another's wish: it reads what is listed.
    (tmp_path / "secret.jsonl").write_text('{"text": "planted"}\n')
    change = f"data.evaluation.source={tmp_path / 'secret.jsonl'}"
    parameters = {"recipe_name": "by-name", "changes": [change]}
    run = end_of(house, "compress-named/compress-named", parameters)
    assert run["state"]["type"] == "FAILED"
    assert "a recipe that comes through the server may read" in run["state"]["message"]
    assert "planted" not in json.dumps(house.artifacts(run["id"], "markdown"))


def test_a_failure_says_what_to_do_and_retry_goes_on(
    house: House, own: Recipe, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    good = text.read_text()
    text.write_text('{"text": "far too little of it to make a row"}\n')
    write(house, "little", own)
    run = end_of(house, "compress-named/compress-named", {"recipe_name": "little"})
    assert run["state"]["type"] == "FAILED"
    (page,) = (each for each in house.artifacts(run["id"], "markdown") if each["key"] == "failure")
    shown = page["data"]
    assert "# little failed" in shown
    assert "**Where:** in the stage *prepare data*" in shown
    assert run["state"]["message"] in shown
    assert "**What to do:** Mend the source" in shown
    assert "choose *Retry* on the page of this run" in shown
    assert "order `compress-named/compress-named` once more" in shown
    assert "1 finished stage, which is not done again" in shown
    assert "| import teacher | " in shown

    text.write_text(good)
    # What the button of the UI asks for.
    again = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    house.ask("POST", f"/flow_runs/{run['id']}/set_state", {"state": again, "force": True})
    ended = house.await_end(run["id"])
    assert ended["state"]["type"] == "COMPLETED", f"{ended['state']}\n{house.log('worker')}"


@pytest.mark.filterwarnings("ignore:The ``noload``")  # SQLAlchemy, through MLflow
def test_a_new_version_orders_one_run_of_two_sensors(
    house: House, own: Recipe, tmp_path: Path, mlflow_environment: None
) -> None:
    place = new_place(tmp_path, house.mlflow)

    def register(seed: int) -> None:
        folder = llama_folder(tmp_path, seed)
        version = register_base(place.client, place.candidate("big", folder, f"{seed:064x}"))
        move_alias(place.client, version, "champion", champion(place.client, "big", "champion"))

    def look(sensors: int) -> list[dict[str, Any]]:
        """Have sensors look at once; return the runs that there are then."""
        answers = [house.order_of("watch-sources/watch-sources", {}) for _ in range(sensors)]
        for answer in answers:
            ended = house.await_end(answer.json()["id"])
            assert ended["state"]["type"] == "COMPLETED", ended["state"]
            (table,) = house.artifacts(ended["id"], "table")
            tables.append({row["recipe"]: row for row in json.loads(table["data"])})
        of_recipe = {"flow_runs": {"tags": {"all_": ["watch-sources", "recipe:watched"]}}}
        found: list[dict[str, Any]] = house.ask("POST", "/flow_runs/filter", of_recipe)
        return found

    tables: list[dict[str, Any]] = []
    register(0)
    watched = copy.deepcopy(own)
    watched["teacher"]["source"] = "models:/big@champion"
    write(house, "watched", watched)
    (run,) = look(2)
    assert run["parameters"] == {"recipe_name": "watched"}
    assert all(table["watched"]["run"].startswith(f"{house.prefect}/") for table in tables)
    register(1)
    runs = look(2)
    assert len(runs) == 2
    assert "models:/big@champion is now version 2" in {
        table["watched"]["changed"] for table in tables[2:]
    }
    for each in runs:
        ended = house.await_end(each["id"])
        assert ended["state"]["type"] == "COMPLETED", f"{ended['state']}\n{house.log('worker')}"
