"""The command line: `python -m flows`."""

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.approve import add_approve_command
from flows.part import PARTS
from stillroom.errors import RecipeError, ServiceUnreachableError, StillroomError
from stillroom.exit_codes import REFUSED, ended
from tasks.store.commands import add_store_commands, run_store_command

UNREACHED = "Failed to reach API"
"""How the RuntimeError begins that Prefect raises where its server does not answer."""
DIMENSION = "measure-intrinsic-dimension"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 1 where a gate refused, 2 for an error to act on, 3 for a defect.

    What goes wrong in a run is an error to act on; its traceback stands in the run's log.
    """
    options = _parser().parse_args(arguments)
    return ended(lambda: options.run(options) if "run" in options else _store(options), "error:")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows", description="Distil a language model into small ones."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compress = commands.add_parser("compress", help="make what a recipe says")
    _add_recipe(compress)
    compress.add_argument(
        "--until",
        choices=PARTS,
        metavar="PART",
        help=f"make what this part takes and no more: {', '.join(PARTS)}",
    )
    compress.set_defaults(run=_compress)

    dimension = commands.add_parser(
        DIMENSION, help="measure in how few dimensions a model learns a task"
    )
    _add_recipe(dimension)
    dimension.set_defaults(run=_measure_dimension)

    schema = commands.add_parser("schema", help="print what a recipe may say, as JSON schema")
    schema.add_argument("of", nargs="?", choices=["compress", DIMENSION], default="compress")
    schema.set_defaults(run=_schema)

    add_approve_command(commands)
    add_store_commands(commands)

    up = commands.add_parser("up", help="start Prefect, MLflow and a worker on loopback")
    up.set_defaults(run=_up)
    down = commands.add_parser("down", help="stop them")
    down.set_defaults(run=_down)
    return parser


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", type=Path, help="a YAML file, such as those in deployments/")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="a.b=c",
        help="change one value of the recipe; may be given again",
    )
    command.add_argument(
        "--plan", action="store_true", help="say what would be done, and do nothing"
    )


def _compress(options: argparse.Namespace) -> int:
    from stillroom.config import load_recipe

    recipe = load_recipe(options.recipe, options.changes)
    if options.plan:
        return _plan(recipe, options.until)
    return _run_until(recipe, options.until) if options.until else _run(recipe)


def _plan(recipe: Any, until: Any) -> int:
    from flows.plan import plan, print_plan
    from tasks.settings import Settings
    from tasks.store.store import open_store

    stages = plan(recipe, open_store(Settings().store_url), until)
    for line in print_plan(recipe, stages, until):
        print(line)
    return 0


def _run_until(recipe: Any, until: Any) -> int:
    from tasks.settings import Settings

    # Prefect reads its environment when it is imported.
    os.environ.update(Settings().environment())
    _require_server(recipe.execution)
    from flows.make_part import make_part

    with typed():
        state: Any = make_part(recipe, until, return_state=True)
    if not state.is_completed():
        raise StillroomError(state.message or f"the run ended as {state.name}")
    outcome = state.result()
    print("\n".join(["", *outcome.artifacts, "", outcome.summary, f"MLflow: {outcome.mlflow}"]))
    return 0


def _run(recipe: Any) -> int:
    from tasks.settings import Settings

    settings = Settings()
    # Prefect reads its environment when it is imported.
    os.environ.update(settings.environment())
    _require_server(recipe.execution)
    from flows.compress import compress

    with typed():
        state: Any = compress(recipe, return_state=True)
    if not state.is_completed() and state.name != "Refused":
        raise StillroomError(state.message or f"the run ended as {state.name}")
    outcome = state.result(raise_on_failure=False)
    for line in _account(outcome, settings):
        print(line)
    return 0 if outcome.gates_passed and outcome.approval != "refused" else REFUSED


def _measure_dimension(options: argparse.Namespace) -> int:
    from stillroom.config import load_dimension_recipe
    from tasks.settings import Settings

    recipe, settings = load_dimension_recipe(options.recipe, options.changes), Settings()
    if options.plan:
        from flows.dimension_road import plan_search, print_search
        from tasks.store.store import open_store

        stages, whole = plan_search(recipe, open_store(settings.store_url))
        for line in print_search(recipe, stages, whole):
            print(line)
        return 0
    # Prefect reads its environment when it is imported.
    os.environ.update(settings.environment())
    _require_server(recipe.execution)
    from flows.measure_intrinsic_dimension import measure_intrinsic_dimension

    with typed():
        state: Any = measure_intrinsic_dimension(recipe, return_state=True)
    if not state.is_completed():
        raise StillroomError(state.message or f"the run ended as {state.name}")
    outcome = state.result()
    print(f"\n{outcome.table}\n\n{outcome.summary}")
    for uri in outcome.versions:
        print(f"  load it: mlflow.pyfunc.load_model({uri!r})")
    print(f"curve and plot: {outcome.folder}\nMLflow: {outcome.mlflow}")
    return 0


@contextmanager
def typed() -> Iterator[None]:
    """Run a flow as a deployment would: with the tag by which an automation finds lost runs.

    Raises:
        ServiceUnreachableError: Prefect's server does not answer.
    """
    from httpx import TransportError
    from prefect import tags
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from tasks.servers.logins import logging_in

    # Our flows give signs of life themselves; Prefect's would hold the terminal up to a second.
    alone = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
    _collect_garbage()
    try:
        with logging_in(), tags("stillroom"), alone:
            yield
    except (TransportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith(UNREACHED):
            raise
        raise ServiceUnreachableError(
            f"Prefect's server does not answer ({error}): see whether it runs; without "
            "PREFECT_API_URL a run brings its own"
        ) from error


def _collect_garbage() -> None:
    """Collect garbage from now on, and not among what has been imported."""
    gc.freeze()
    gc.enable()


def _require_server(execution: Any) -> None:
    """Refuse to send stages to workers that nobody has told where to ask for them."""
    from prefect.settings import PREFECT_API_URL

    if execution.over == "workers" and not PREFECT_API_URL.value():
        raise RecipeError(
            "execution.over: workers needs a Prefect server that workers ask for runs; start one "
            "with `make up`, set PREFECT_API_URL to one that runs, or take execution.over: here"
        )


def _account(outcome: Any, settings: Any) -> list[str]:
    lines = ["", outcome.table, "", *outcome.gates, "", outcome.summary]
    lines += [f"  load it: mlflow.pyfunc.load_model({uri!r})" for uri in outcome.versions]
    if outcome.to_approve:
        lines.append(f"  approve it: python -m flows approve {outcome.to_approve}")
    lines += [f"report: {outcome.report}", f"MLflow: {outcome.mlflow}"]
    if not settings.services():
        lines.append("both UIs on what this made: `make up` (Prefect on 4200, MLflow on 5000)")
    return lines


def _store(options: argparse.Namespace) -> int:
    from tasks.settings import Settings
    from tasks.store.store import open_store

    settings = Settings()
    _collect_garbage()

    def registered() -> set[str]:
        from tasks.registered import registered_keys
        from tasks.tracking import connect

        return registered_keys(connect(settings.tracking_uri))

    return run_store_command(options, open_store(settings.store_url), registered)


def _schema(options: argparse.Namespace) -> int:
    from stillroom.config import IntrinsicDimension, Recipe

    kind = IntrinsicDimension if options.of == DIMENSION else Recipe
    print(json.dumps(kind.model_json_schema(), indent=2))
    return 0


def _up(options: argparse.Namespace) -> int:
    from tasks.servers.services import start_services
    from tasks.settings import Settings

    settings = Settings()
    services = start_services(settings, print)
    print(f"Prefect: {services['prefect_ui']}\nMLflow:  {services['mlflow']}")
    if settings.login:
        print(f"log in as {settings.user}; Prefect's page wants it in one field, as USER:PASSWORD")
    print("stop them with `make down`")
    return 0


def _down(options: argparse.Namespace) -> int:
    from tasks.servers.services import stop_services
    from tasks.settings import Settings

    stop_services(Settings(), print)
    return 0


if __name__ == "__main__":
    # Nearly all objects of this process are modules, and stay: to look them through again and
    # again, and once more at the end, takes longer than a cached run's own work.
    gc.disable()
    gc.set_threshold(100_000, 50, 50)
    code = main()
    gc.freeze()
    sys.exit(code)
