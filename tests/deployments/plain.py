"""The services of compose.yaml as plain processes of one machine, which has other addresses."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.deployments.composed import DEPLOYMENTS, instructions, services
from tests.flows.terminal import FOREIGN, ROOT
from tests.servers import free_port, running

HEALTHY_SECONDS = 240
CPU_IMAGE = DEPLOYMENTS / "images" / "cpu.Dockerfile"


@dataclass
class Machine:
    """A folder, and how what compose.yaml says is said there."""

    folder: Path
    secrets: Mapping[str, str]
    says: dict[str, str]
    """What compose.yaml and the image say, each with what stands for it here."""
    more: dict[str, str] = field(default_factory=dict)
    """Variables of this machine alone."""

    def __post_init__(self) -> None:
        self.services = services(self.secrets)
        self.logs = self.folder / "logs"
        self.logs.mkdir()

    def here(self, text: str) -> str:
        for theirs, ours in self.says.items():
            text = text.replace(theirs, ours)
        return text

    def environment(self, name: str) -> dict[str, str]:
        """Return the variables of a service: those of its image, and then its own."""
        kept = {name: text for name, text in os.environ.items() if not name.startswith(FOREIGN)}
        said = {**_of_image(), **self.services[name].get("environment", {})}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        here = {variable: self.here(value) for variable, value in said.items()}
        return kept | here | {"PATH": path, "OMP_NUM_THREADS": "1"} | self.more

    def run(self, name: str, command: list[str]) -> "subprocess.CompletedProcess[str]":
        """Run a command as in a service's container."""
        return subprocess.run(
            [self.here(word) for word in command],
            cwd=ROOT,
            env=self.environment(name),
            capture_output=True,
            text=True,
            check=False,
            timeout=HEALTHY_SECONDS,
        )

    @contextmanager
    def up(self, *names: str) -> Iterator[None]:
        """Start services in this order, each when the one before it is healthy."""
        with ExitStack() as stack:
            for name in names:
                command = [self.here(word) for word in self.services[name]["command"]]
                started = running(command, self.logs / name, self.environment(name))
                process = stack.enter_context(started)
                self._await_health(name, process)
            yield

    def log(self, name: str) -> str:
        return (self.logs / name).read_text()[-4000:]

    def _await_health(self, name: str, process: "subprocess.Popen[bytes]") -> None:
        kind, *test = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        deadline = time.monotonic() + HEALTHY_SECONDS
        while (done := self.run(name, test)).returncode != 0:
            assert process.poll() is None, self.log(name)
            assert time.monotonic() < deadline, f"{done.stderr}\n{self.log(name)}"
            time.sleep(1)


def _of_image() -> dict[str, str]:
    lines = [rest for word, rest in instructions(CPU_IMAGE) if word == "ENV"]
    pairs = [pair.split("=", 1) for line in lines for pair in shlex.split(line)]
    return {name: value for name, value in pairs if not name.startswith("PIP_")}


def machine(
    folder: Path, secrets: Mapping[str, str], s3: str, postgres: int, data: Path
) -> Machine:
    """Return a machine that has free ports, and these servers already."""
    ports = {port: str(free_port()) for port in ("4200", "5000", "8080")}
    says: dict[str, str] = {
        "http://s3:7070": s3,
        "@postgres:5432": f"@127.0.0.1:{postgres}",
        "/opt/stillroom": str(ROOT),
        "/home/stillroom/.stillroom": str(folder / "home"),
        "0.0.0.0": "127.0.0.1",
        "http://prefect:4200": f"http://127.0.0.1:{ports['4200']}",
        "http://mlflow:5000": f"http://127.0.0.1:{ports['5000']}",
    }
    says |= {f"localhost:{port}": f"localhost:{ours}" for port, ours in ports.items()}
    says |= {f"127.0.0.1:{port}": f"127.0.0.1:{ours}" for port, ours in ports.items()}
    says |= {f"--port={port}": f"--port={ours}" for port, ours in ports.items()}
    (folder / "home" / "prefect").mkdir(parents=True)
    more = {
        "STILLROOM_DATA_ROOTS": str(data),
        "PREFECT_WORKER_WEBSERVER_PORT": ports["8080"],
        "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    made = Machine(folder, secrets, says, more)
    # A word of its own, which is no part of another one.
    made.services["prefect"]["command"][-1] = ports["4200"]
    _move_logins(made)
    return made


def _move_logins(made: Machine) -> None:
    logins = DEPLOYMENTS / "images" / "mlflow-logins.ini"
    moved = made.folder / logins.name
    moved.write_text(made.here(logins.read_text()))
    made.more["MLFLOW_AUTH_CONFIG_PATH"] = str(moved)
