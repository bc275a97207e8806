"""The servers of one machine: a Prefect server, an MLflow server and a worker, on loopback."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from stillroom.errors import ServiceUnreachableError, StillroomError
from tasks.automations import create_automations
from tasks.gpu_workers import gpu_workers
from tasks.settings import QUIET_SERVICES, Settings, is_of

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
START_SECONDS = 180
STOP_SECONDS = 20
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
    with _alone(settings.root):
        if settings.services():
            say("the servers are running already")
            return settings.services()
        if settings.services_file.exists():  # what is left of them
            stop_services(settings, say)
        return _start_all(settings, say)


def _start_all(settings: Settings, say: Callable[[str], None]) -> dict[str, str]:
    ports = {name: _port(name, default) for name, default in (("PREFECT", 4200), ("MLFLOW", 5000))}
    if ports["PREFECT"] == ports["MLFLOW"]:
        raise StillroomError(f"Prefect and MLflow cannot both have port {ports['MLFLOW']}")
    on_gpus = gpu_workers(settings.gpus)
    running = _Running(settings, ports)
    try:
        say("waiting for the servers (their first start takes about 40 s)")
        running.start_servers()
        register(running.services["prefect"], running.environment)
        say(f"registered the deployments and the work pools {CPU_POOL} and {GPU_POOL}")
        # Stopped after the worker whose flows wait for them.
        for each in on_gpus:
            running.start(each.name, *each.module(GPU_POOL), variables=each.environment)
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
        if _end_group(pids[name], settings.root):
            say(f"stopped {name}")
    file.unlink()


class _Running:
    """The servers that are being started, written down as they come up."""

    def __init__(self, settings: Settings, ports: dict[str, int]) -> None:
        prefect, mlflow = (f"http://{HOST}:{ports[name]}" for name in ("PREFECT", "MLFLOW"))
        self.settings, self.ports = settings, ports
        self.services = {"prefect": f"{prefect}/api", "prefect_ui": prefect, "mlflow": mlflow}
        self.environment = _environment(settings, self.services)
        self.pids: dict[str, int] = {}
        self.logs = settings.root / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        (settings.root / "prefect").mkdir(exist_ok=True)

    def note(self, *, ready: bool = False) -> None:
        """Write down what runs, so that `make down` finds it whatever happens here."""
        listed = {"services": self.services, "pids": self.pids, "ready": ready}
        part = self.settings.services_file.with_suffix(".part")
        part.write_text(json.dumps(listed))
        part.replace(self.settings.services_file)

    def start(self, name: str, *module: str, variables: dict[str, str] | None = None) -> None:
        """Start a Python module as a server of its own process group."""
        with (self.logs / f"{name}.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment | (variables or {}),
                cwd=ROOT,
                start_new_session=True,
            )
        self.pids[name] = process.pid
        # The command ends and the server goes on: nobody is to wait for it here.
        process.returncode = 0
        self.note()

    def start_servers(self) -> None:
        """Start both servers at once and wait until they answer."""
        root, where = self.settings.root, ("--host", HOST, "--port")
        self.start("prefect", "prefect", "server", "start", *where, str(self.ports["PREFECT"]))
        self.start(
            "mlflow",
            *("mlflow", "server", *where, str(self.ports["MLFLOW"]), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}"),
            *("--default-artifact-root", self.settings.artifact_location),
            # Clients put files in their place directly, not through the server.
            "--no-serve-artifacts",
        )
        self._await("prefect", lambda: _answers(f"{self.services['prefect']}/health"))
        self._await("mlflow", lambda: _answers(f"{self.services['mlflow']}/health"))

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


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Let one command at a time start servers for a home.

    Raises:
        StillroomError: another command is at it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / "services.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StillroomError(
                f"another command is starting the servers of {root}; wait for it"
            ) from None
        yield


def _environment(settings: Settings, services: dict[str, str]) -> dict[str, str]:
    return (
        os.environ
        | QUIET_SERVICES
        | {
            "PREFECT_HOME": str(settings.root / "prefect"),
            "PREFECT_API_URL": services["prefect"],
            "PREFECT_SERVER_UI_API_URL": services["prefect"],
            "MLFLOW_TRACKING_URI": services["mlflow"],
            # Three of them without a word, and an automation says that the run is lost.
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            # Scheduled scoring of traces: seven processes that nobody here asks for.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "STILLROOM_HOME": str(settings.root),
            # The pull step of the deployments reads it: recipes name files relative to it.
            "STILLROOM_ROOT": str(ROOT),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "compression")]),
        }
    )


def register(api: str, environment: dict[str, str]) -> None:
    """Create the pools and automations that are missing and bring the deployments up to date."""
    for name, description in POOLS.items():
        if _ask("GET", f"{api}/work_pools/{name}").status_code == httpx.codes.NOT_FOUND:
            pool = {"name": name, "type": "process", "description": description}
            _ask("POST", f"{api}/work_pools/", pool).raise_for_status()
    switched_on = {_rhythm(schedule) for schedule, _ in _schedules(api) if schedule["active"]}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    command += ["--prefect-file", "deployments/prefect.yaml"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StillroomError(f"prefect deploy failed: {(done.stdout + done.stderr)[-800:]}")
    # Deploying pauses every schedule again, those too that the user switched on in the UI.
    for schedule, url in _schedules(api):
        if _rhythm(schedule) in switched_on and not schedule["active"]:
            _ask("PATCH", url, {"active": True}).raise_for_status()
    create_automations(api, _ask)


def _schedules(api: str) -> list[tuple[dict[str, Any], str]]:
    """Return each schedule of the deployments, and its address."""
    answer = _ask("POST", f"{api}/deployments/filter", {})
    answer.raise_for_status()
    return [
        (schedule, f"{api}/deployments/{deployment['id']}/schedules/{schedule['id']}")
        for deployment in answer.json()
        for schedule in deployment["schedules"]
    ]


def _rhythm(schedule: dict[str, Any]) -> tuple[str, str]:
    return schedule["deployment_id"], json.dumps(schedule["schedule"], sort_keys=True)


def _ask(method: str, url: str, body: dict[str, Any] | None = None) -> httpx.Response:
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    login = (user, password) if user else None
    # A proxy of the environment is not for loopback.
    with httpx.Client(trust_env=False, timeout=30, auth=login) as client:
        return client.request(method, url, json=body)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):  # not up yet: asked until the deadline
        return _ask("GET", url).is_success
    return False


def _end_group(leader: int, home: Path) -> bool:
    """End a server with all that it started; return whether anything ran."""
    members = _members(leader, home)
    found = bool(members)
    if is_of(leader, home):
        _signal([leader], signal.SIGTERM)  # it ends its own in order
        _await_end(leader, home)
    for number in (signal.SIGTERM, signal.SIGKILL):
        members = _members(leader, home)
        _signal(members, number)
        for pid in members:
            _await_end(pid, home)
    return found


def _members(leader: int, home: Path) -> list[int]:
    """Return the processes of a group that run for this home: never a later group of its number."""
    import psutil

    def in_group(pid: int) -> bool:
        with contextlib.suppress(ProcessLookupError):  # gone in between
            return os.getpgid(pid) == leader
        return False

    return [pid for pid in psutil.pids() if in_group(pid) and is_of(pid, home)]


def _await_end(pid: int, home: Path) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while is_of(pid, home) and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):  # started by an earlier command
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.1)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # gone in between
            os.kill(pid, number)


def _port(name: str, default: int) -> int:
    """Return a server's port.

    Raises:
        StillroomError: something else listens there.
    """
    variable = f"STILLROOM_{name}_PORT"
    text = os.environ.get(variable, str(default))
    if not text.isdigit() or not 0 < int(text) < 2**16:
        raise StillroomError(f"{variable}: expected a port number, {text!r} came")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, int(text)))
        except OSError as error:
            raise StillroomError(
                f"port {text} is taken ({error.strerror}); stop what listens there, or set "
                f"{variable} to another one"
            ) from None
    return int(text)
