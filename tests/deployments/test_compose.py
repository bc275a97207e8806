"""compose.yaml, as far as it can be read without an engine that runs it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.settings import Settings
from tests.deployments.composed import (
    COMPOSE,
    DEPLOYMENTS,
    ENV_EXAMPLE,
    SECRETS,
    asked_variables,
    composed,
    services,
)
from tests.flows.terminal import ROOT

# Two programs that read compose files without an engine. The first holds the specification's schema
# of its time, the second knows `name` and merged lists of anchors.
READERS = ["docker-compose==1.29.2", "podman-compose==1.6.0"]
THEIR_PARTS = [
    "dockerpty==0.4.1",
    "docopt==0.6.2",
    "texttable==1.7.0",
    "websocket-client",
    "distro",
]
SERVERS = {"postgres", "s3", "prefect", "mlflow"}
OF_IMAGES = {
    "postgres": {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD"},
    "s3": {"ROOT_ACCESS_KEY_ID", "ROOT_SECRET_ACCESS_KEY", "VGW_PORT", "VGW_REGION", "VGW_HEALTH"},
}
# Of libraries below: libpq and asyncpg, boto3, CUDA, and what all of them call not being tracked.
OF_LIBRARIES = {
    "PGPASSWORD",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "CUDA_VISIBLE_DEVICES",
    "DO_NOT_TRACK",
    "HF_HUB_DISABLE_TELEMETRY",
}


def test_services_and_how_they_wait_for_one_another() -> None:
    found = services()
    assert set(found) == SERVERS | {"set-up", "worker-cpu", "worker-gpu-0"}
    for name, service in found.items():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in found[needed], f"{name} waits for {needed} for ever"
            else:
                assert how["condition"] == "service_completed_successfully"
                assert found[needed]["restart"] == "no"
    for name in SERVERS | {"worker-cpu", "worker-gpu-0"}:
        assert "healthcheck" in found[name]
        assert found[name]["restart"] == "unless-stopped"
    assert found["worker-cpu"]["depends_on"] == found["worker-gpu-0"]["depends_on"]


def test_ports_are_of_this_machine_alone_and_movable() -> None:
    published = {name: each["ports"] for name, each in services().items() if "ports" in each}
    assert published == {
        "s3": ["127.0.0.1:7070:7070"],
        "prefect": ["127.0.0.1:4200:4200"],
        "mlflow": ["127.0.0.1:5000:5000"],
    }
    moved = services(SECRETS | {"STILLROOM_BIND": "10.0.0.1", "STILLROOM_MLFLOW_PORT": "5001"})
    assert moved["mlflow"]["ports"] == ["10.0.0.1:5001:5000"]


def test_a_gpu_worker_has_one_gpu_and_one_run_at_a_time() -> None:
    worker = services()["worker-gpu-0"]
    assert worker["profiles"] == ["gpu"]
    command = worker["command"]
    assert command[command.index("--limit") + 1] == "1"
    assert command[command.index("--pool") + 1] == "stillroom-gpu"
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
    assert worker["environment"]["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize("missing", SECRETS)
def test_without_a_secret_nothing_starts_and_the_message_says_what_to_do(missing: str) -> None:
    fewer = {name: value for name, value in SECRETS.items() if name != missing}
    with pytest.raises(KeyError, match=rf"{missing}: set it in deployments/\.env"):
        composed(fewer)


def test_secrets_are_asked_for_and_have_no_default() -> None:
    required = {name for name, (how, _) in asked_variables().items() if how == ":?"}
    assert required == set(SECRETS)
    secret = re.compile(r"PASSWORD|SECRET|_KEY$|ACCESS_KEY")
    assert not {name for name in set(asked_variables()) - required if secret.search(name)}


def test_env_example_names_what_is_asked_for_and_holds_no_secret() -> None:
    lines = [re.match(r"#?(\w+)=(.*)$", line) for line in ENV_EXAMPLE.read_text().splitlines()]
    named = {match[1]: match[2] for match in lines if match}
    assert set(named) == set(asked_variables())
    assert all(named[name] == "" for name in SECRETS)
    for name, (how, default) in asked_variables().items():
        if how == ":-":
            assert named[name] == default, name


def test_no_secret_is_in_a_command_or_in_an_address() -> None:
    for service in services().values():
        spoken = [*service["command"]] if "command" in service else []
        spoken += [value for value in service.get("environment", {}).values() if "://" in value]
        assert not [text for text in spoken if any(secret in text for secret in SECRETS.values())]


def test_every_variable_is_known_to_who_reads_it() -> None:
    for name, service in services().items():
        of_image = OF_IMAGES.get(name, OF_LIBRARIES)
        unknown = {each for each in service["environment"] if not _is_known(each, of_image)}
        assert not unknown, name


def test_telemetry_is_off_wherever_prefect_or_mlflow_runs() -> None:
    from tasks.settings import QUIET_SERVICES

    for name in set(services()) - {"postgres", "s3"}:
        assert QUIET_SERVICES.items() <= services()[name]["environment"].items(), name


def test_files_that_are_mounted_or_named_are_there() -> None:
    found = services()
    mounted = [place.split(":")[0] for each in found.values() for place in each.get("volumes", [])]
    for place in mounted:
        if place.startswith("./images"):
            assert (DEPLOYMENTS / place).is_file()
    assert set(composed(SECRETS)["volumes"]) == {p for p in mounted if not p.startswith(".")}
    for service in found.values():
        if "build" in service:
            assert (DEPLOYMENTS / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).is_file()
    logins = found["mlflow"]["environment"]["MLFLOW_AUTH_CONFIG_PATH"]
    assert (ROOT / Path(logins).relative_to("/opt/stillroom")).is_file()


@pytest.fixture(scope="session")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with programs that read compose files, apart from everything that is installed."""
    folder = tmp_path_factory.mktemp("readers")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(folder), *READERS, *THEIR_PARTS], check=True, capture_output=True)
    podman = folder / "bin" / "podman"
    podman.write_text("#!/bin/sh\necho podman version 5.6.0\n")
    podman.chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["compose", "podman_compose"])
def test_other_programs_read_the_same(readers: Path, tmp_path: Path, reader: str) -> None:
    import yaml

    # docker-compose 1.29 is older than `name`.
    without_name = COMPOSE.read_text().replace("\nname: stillroom\n", "\n")
    file = DEPLOYMENTS / f"compose-{os.getpid()}.yaml"
    env = tmp_path / "env"
    env.write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()))
    try:
        file.write_text(without_name)
        done = subprocess.run(
            [
                *(sys.executable, "-m", reader, "--file", str(file), "--env-file", str(env)),
                *("--profile", "gpu", "config"),
            ],
            env=os.environ
            | {"PYTHONPATH": str(readers), "PATH": f"{readers / 'bin'}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        file.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = yaml.safe_load(done.stdout)["services"]
    ours = services()
    assert set(theirs) == set(ours)
    for name, service in ours.items():
        assert _texts(theirs[name]["environment"]) == _texts(service["environment"]), name
        assert theirs[name].get("command") == service.get("command"), name
        assert theirs[name].get("deploy") == service.get("deploy"), name


def _texts(environment: Any) -> dict[str, str]:
    """Return an environment that may be a list of NAME=value."""
    if isinstance(environment, list):
        environment = dict(each.split("=", 1) for each in environment)
    return {name: str(value) for name, value in environment.items()}


def _is_known(name: str, others: set[str]) -> bool:
    """Return whether somebody reads a variable: we, Prefect, MLflow, an image or a library."""
    if name.startswith("STILLROOM_"):
        return name.removeprefix("STILLROOM_").lower() in Settings.model_fields
    if name.startswith("PREFECT_"):
        return name in _of_prefect()
    if name.startswith("MLFLOW_"):
        return name in _of_mlflow()
    return name in others


def _of_prefect() -> set[str]:
    from prefect.settings.legacy import _get_settings_fields
    from prefect.settings.models.root import Settings as PrefectSettings

    return set(_get_settings_fields(PrefectSettings))


def _of_mlflow() -> set[str]:
    (folder,) = importlib.util.find_spec("mlflow").submodule_search_locations
    variables = (Path(folder) / "environment_variables.py").read_text()
    # Options of `mlflow server` have variables too.
    options = (Path(folder) / "cli" / "__init__.py").read_text()
    return set(re.findall(r"^(MLFLOW_\w+) =", variables, re.MULTILINE)) | set(
        re.findall(r'envvar="(\w+)"', options)
    )
