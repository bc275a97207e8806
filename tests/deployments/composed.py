"""compose.yaml as an engine reads it: variables put in, merged parts in their places."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.flows.terminal import ROOT

DEPLOYMENTS = ROOT / "deployments"
COMPOSE = DEPLOYMENTS / "compose.yaml"
ENV_EXAMPLE = DEPLOYMENTS / "env.example"
_PLACE = re.compile(r"\$\{(?P<name>\w+)(?:(?P<how>:[-?])(?P<rest>[^}]*))?\}")

SECRETS = {
    "POSTGRES_PASSWORD": "database-password",
    "STILLROOM_PASSWORD": "a-long-password",
    "MLFLOW_SECRET_KEY": "signature",
    "S3_ACCESS_KEY": "access-key",
    "S3_SECRET_KEY": "secret-key",
}


def composed(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return what compose.yaml says with these variables, anchors and extensions resolved."""
    content: dict[str, Any] = _filled(yaml.safe_load(COMPOSE.read_text()), variables)
    return {name: part for name, part in content.items() if not name.startswith("x-")}


def services(variables: Mapping[str, str] = SECRETS) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = composed(variables)["services"]
    return found


def asked_variables() -> dict[str, tuple[str, str]]:
    """Return the variables that compose.yaml asks for, each with how it is asked: :- or :?."""
    lines = [line for line in COMPOSE.read_text().splitlines() if not line.strip().startswith("#")]
    places = _PLACE.finditer("\n".join(lines))
    return {place["name"]: (place["how"] or "", place["rest"] or "") for place in places}


def run_lines(dockerfile: Path) -> list[str]:
    """Return the commands that a Dockerfile runs."""
    return [rest for word, rest in instructions(dockerfile) if word == "RUN"]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile and what follows each."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in pairs]


def parsed_by_prefect(command: list[str]) -> dict[str, Any]:
    """Return the options that Prefect reads; what it does not know is an error."""
    from prefect.cli._app import _app as app

    program, *words = command
    assert program == "prefect"
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    options: dict[str, Any] = bound.arguments
    return options


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    match value:
        case str():
            return _PLACE.sub(lambda place: _value(place, variables), value)
        case dict():
            return {key: _filled(each, variables) for key, each in value.items()}
        case list():
            return [_filled(each, variables) for each in value]
    return value


def _value(place: "re.Match[str]", variables: Mapping[str, str]) -> str:
    value = variables.get(place["name"], "")
    if not value and place["how"] == ":?":
        raise KeyError(f"{place['name']}: {place['rest']}")
    return value or (place["rest"] if place["how"] == ":-" else "")
