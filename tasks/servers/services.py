"""The servers of one machine: a Prefect server, an MLflow server and a worker."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from stillroom.errors import ServiceUnreachableError, StillroomError
from tasks.servers.automations import create_automations
from tasks.servers.deployments import deploy
from tasks.servers.gpu_workers import gpu_workers
from tasks.servers.logins import adopt_password, known_login, require_login_outside
from tasks.servers.processes import alone, end_group, require_free
from tasks.servers.variables import (
    ROOT,
    base_variables,
    mlflow_options,
    mlflow_variables,
    prefect_variables,
)
from tasks.settings import Settings, is_of

START_SECONDS = 180
CPU_POOL, GPU_POOL = "stillroom-cpu", "stillroom-gpu"
POOLS = {
    CPU_POOL: "Runs flows, and stages that need no accelerator.",
    GPU_POOL: "Runs stages on accelerators; its workers have STILLROOM_ROOT and STILLROOM_STORE.",
}


def start_services(settings: Settings, say: Callable[[str], None]) -> dict[str, str]:
    """Start the servers, register the deployments, and return where everything is.

    Raises:
        StillroomError: a port is taken, or another command is starting the servers.
        ServiceUnreachableError: a server does not come up; its log says why.
    """
    with alone(settings.root):
        if settings.services():
            say("the servers are running already")
            return settings.services()
        if settings.services_file.exists():  # what is left of them
            stop_services(settings, say)
        return _start_all(settings, say)


def _start_all(settings: Settings, say: Callable[[str], None]) -> dict[str, str]:
    require_login_outside(settings)
    if settings.prefect_port == settings.mlflow_port:
        raise StillroomError(f"Prefect and MLflow cannot both have port {settings.mlflow_port}")
    require_free(settings.host, settings.prefect_port, "STILLROOM_PREFECT_PORT")
    require_free(settings.host, settings.mlflow_port, "STILLROOM_MLFLOW_PORT")
    on_gpus = gpu_workers(settings.gpus)
    running = _Running(settings)
    try:
        say("waiting for the servers (their first start takes about 40 s)")
        running.start_servers()
        register(running.services["prefect"], running.environment)
        say(f"registered the deployments and the work pools {CPU_POOL} and {GPU_POOL}")
        # Stopped after the worker whose flows wait for them.
        for each in on_gpus:
            running.start(each.name, *each.module(GPU_POOL), more=each.environment)
        # Not the pool's limit: runs wait for others in it, which are in a queue of their own. Nor
        # the worker's: a run that is retried at once would end such a worker.
        limit = {"concurrency_limit": settings.runs_at_once}
        queue = f"{running.services['prefect']}/work_pools/{CPU_POOL}/queues/default"
        _ask("PATCH", queue, limit).raise_for_status()
        running.start("worker", "prefect", "worker", "start", "--pool", CPU_POOL, "--type=process")
        running.await_workers("worker", CPU_POOL, 1)
        for i, each in enumerate(on_gpus):
            running.await_workers(each.name, GPU_POOL, i + 1)
        running.note(ready=True)
    except BaseException:
        stop_services(settings, say)
        raise
    return running.services


def stop_services(settings: Settings, say: Callable[[str], None]) -> None:
    """Stop what `start_services` started here, and only that."""
    file = settings.services_file
    if not file.exists():
        say("no servers are running")
        return
    pids: dict[str, int] = json.loads(file.read_text())["pids"]
    # The worker first: it must still reach the server to say that its runs have ended.
    for name in reversed(pids):
        if end_group(pids[name], settings.root):
            say(f"stopped {name}")
    file.unlink()


class _Running:
    """The servers that are being started, written down as they come up."""

    def __init__(self, settings: Settings) -> None:
        prefect, mlflow = (
            f"http://{settings.near_host}:{port}"
            for port in (settings.prefect_port, settings.mlflow_port)
        )
        self.settings = settings
        self.services = {"prefect": f"{prefect}/api", "prefect_ui": prefect, "mlflow": mlflow}
        self.environment = base_variables(settings, self.services)
        self.pids: dict[str, int] = {}
        self.logs = settings.root / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        prefects = settings.root / "prefect"
        prefects.mkdir(exist_ok=True)
        prefects.chmod(0o700)  # its database holds blocks, and the key that they are locked with

    def note(self, *, ready: bool = False) -> None:
        """Write down what runs, so that `make down` finds it whatever happens here."""
        listed = {"services": self.services, "pids": self.pids, "ready": ready}
        part = self.settings.services_file.with_suffix(".part")
        part.write_text(json.dumps(listed))
        part.replace(self.settings.services_file)

    def start(self, name: str, *module: str, more: Mapping[str, str] | None = None) -> None:
        """Start a Python module as a server of its own process group.

        What `more` says it alone is told: everyone can read a command line, and the worker needs
        no database's password.
        """
        with (self.logs / f"{name}.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment | dict(more or {}),
                cwd=ROOT,
                start_new_session=True,
            )
        self.pids[name] = process.pid
        # The command ends and the server goes on: nobody is to wait for it here.
        process.returncode = 0
        self.note()

    def start_servers(self) -> None:
        """Start both servers at once and wait until they answer."""
        settings, where = self.settings, ("--host", self.settings.host, "--port")
        self.start(
            "prefect",
            *("tasks.servers.prefect_server", "server", "start"),
            *(*where, str(settings.prefect_port)),
            more=prefect_variables(settings),
        )
        self.start(
            "mlflow",
            *("mlflow", "server", *where, str(settings.mlflow_port), "--workers", "1"),
            *mlflow_options(settings),
            more=mlflow_variables(settings),
        )
        self._await("prefect", lambda: _answers(f"{self.services['prefect']}/health"))
        self._await("mlflow", lambda: _answers(f"{self.services['mlflow']}/health"))
        adopt_password(settings, self.services["mlflow"])

    def await_workers(self, name: str, pool: str, number: int) -> None:
        """Wait until so many workers, this one the last of them, have called at their pool."""
        url = f"{self.services['prefect']}/work_pools/{pool}/workers/filter"
        online = {"workers": {"status": {"any_": ["ONLINE"]}}}
        self._await(name, lambda: len(_ask("POST", url, online).json()) >= number)

    def _await(self, name: str, is_up: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_up():
            if time.monotonic() > deadline or not is_of(self.pids[name], self.settings.root):
                log = self.logs / f"{name}.log"
                raise ServiceUnreachableError(f"the {name} server did not start; {log} says why")
            time.sleep(0.3)


def register(api: str, environment: dict[str, str]) -> None:
    """Create the pools and automations that are missing and bring the deployments up to date."""
    for name, description in POOLS.items():
        if _ask("GET", f"{api}/work_pools/{name}").status_code == httpx.codes.NOT_FOUND:
            pool = {"name": name, "type": "process", "description": description}
            _ask("POST", f"{api}/work_pools/", pool).raise_for_status()
    deploy(api, environment, _ask)
    create_automations(api, _ask)


def _ask(method: str, url: str, body: dict[str, Any] | None = None) -> httpx.Response:
    # A proxy of the environment is not for loopback.
    with httpx.Client(trust_env=False, timeout=30, auth=known_login()) as client:
        return client.request(method, url, json=body)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):  # not up yet: asked until the deadline
        return _ask("GET", url).is_success
    return False
