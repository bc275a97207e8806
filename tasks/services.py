"""The servers of one machine: a Prefect server, an MLflow server and a worker, on loopback."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from stillroom.errors import ServiceUnreachableError, StillroomError
from tasks.settings import QUIET_SERVICES, Settings

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
START_SECONDS = 180
STOP_SECONDS = 20
CPU_POOL, GPU_POOL = "stillroom-cpu", "stillroom-gpu"


def start_services(settings: Settings, say: Callable[[str], None]) -> dict[str, str]:
    """Start the servers, register the deployments, and return where everything is.

    Raises:
        StillroomError: a port is taken.
        ServiceUnreachableError: a server does not come up; its log says why.
    """
    if settings.services():
        say("the servers are running already")
        return settings.services()
    prefect_port = int(os.environ.get("STILLROOM_PREFECT_PORT", "4200"))
    mlflow_port = int(os.environ.get("STILLROOM_MLFLOW_PORT", "5000"))
    for port in (prefect_port, mlflow_port):
        _require_free(port)
    logs = settings.root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    prefect, mlflow = f"http://{HOST}:{prefect_port}", f"http://{HOST}:{mlflow_port}"
    environment = _environment(settings, prefect, mlflow)
    services = {"prefect": f"{prefect}/api", "prefect_ui": prefect, "mlflow": mlflow}
    file = settings.root / "services.json"
    pids: dict[str, int] = {}

    def start(name: str, *command: str) -> None:
        pids[name] = _start(command, logs / f"{name}.log", environment)
        listed = services | {"pid": str(pids["prefect"]), "pids": json.dumps(pids)}
        file.write_text(json.dumps(listed))

    try:
        start(
            "prefect",
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            HOST,
            "--port",
            str(prefect_port),
        )
        start(
            "mlflow",
            "-m",
            "mlflow",
            "server",
            "--host",
            HOST,
            "--port",
            str(mlflow_port),
            "--backend-store-uri",
            f"sqlite:///{settings.root / 'mlflow.db'}",
            "--default-artifact-root",
            settings.artifact_location,
            "--no-serve-artifacts",
            "--workers",
            "1",
        )
        say("waiting for the Prefect server (its first start takes about 40 s)")
        _await(f"{prefect}/api/health", pids["prefect"], logs / "prefect.log")
        _await(f"{mlflow}/health", pids["mlflow"], logs / "mlflow.log")
        _deploy(environment, say)
        start("worker", "-m", "prefect", "worker", "start", "--pool", CPU_POOL, "--type", "process")
    except BaseException:
        stop_services(settings, say)
        raise
    return services


def stop_services(settings: Settings, say: Callable[[str], None]) -> None:
    """Stop what `start_services` started here, and only that."""
    file = settings.root / "services.json"
    if not file.exists():
        say("no servers are running")
        return
    pids: dict[str, int] = json.loads(json.loads(file.read_text()).get("pids", "{}"))
    # The worker first: it must still reach the server to say that its runs have ended.
    for name in reversed(pids):
        if _is_ours(pids[name]):
            os.killpg(pids[name], signal.SIGTERM)
            _await_end(pids[name])
            say(f"stopped {name}")
    file.unlink()


def _environment(settings: Settings, prefect: str, mlflow: str) -> dict[str, str]:
    return (
        os.environ
        | QUIET_SERVICES
        | {
            "PREFECT_HOME": str(settings.root / "prefect"),
            "PREFECT_API_URL": f"{prefect}/api",
            "PREFECT_SERVER_UI_API_URL": f"{prefect}/api",
            "MLFLOW_TRACKING_URI": mlflow,
            "STILLROOM_HOME": str(settings.root),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "compression")]),
        }
    )


def _start(command: tuple[str, ...], log: Path, environment: dict[str, str]) -> int:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    return process.pid


def _deploy(environment: dict[str, str], say: Callable[[str], None]) -> None:
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    for pool in (CPU_POOL, GPU_POOL):
        create = [*prefect, "work-pool", "create", pool, "--type", "process", "--overwrite"]
        _command(create, environment)
    _command(
        [*prefect, "deploy", "--all", "--prefect-file", "deployments/prefect.yaml"], environment
    )
    say(f"registered the deployments and the work pools {CPU_POOL} and {GPU_POOL}")


def _command(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StillroomError(
            f"{' '.join(command[3:])} failed: {(done.stdout + done.stderr)[-800:]}"
        )


def _await(url: str, pid: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):  # not up yet: asked until the deadline
            if httpx.get(url, timeout=5).is_success:
                return
        if not _is_ours(pid):
            break
        time.sleep(0.5)
    raise ServiceUnreachableError(f"{url} does not answer; {log} says why")


def _await_end(pid: int) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while _is_ours(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    if _is_ours(pid):
        os.killpg(pid, signal.SIGKILL)


def _is_ours(pid: int) -> bool:
    """Return whether `pid` is still a server of ours, not a later process of that number."""
    with contextlib.suppress(ChildProcessError):  # started by an earlier command: no child of ours
        os.waitpid(pid, os.WNOHANG)
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"prefect" in command or b"mlflow" in command


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise StillroomError(
                f"port {port} is taken; stop what listens there, or set STILLROOM_PREFECT_PORT "
                "and STILLROOM_MLFLOW_PORT"
            ) from None
