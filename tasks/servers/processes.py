"""The processes of the servers: who may start them, where, and how they end."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from stillroom.errors import SettingsError, StillroomError
from tasks.settings import is_of

STOP_SECONDS = 20


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
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


def end_group(leader: int, home: Path) -> bool:
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


def require_free(host: str, port: int, variable: str) -> None:
    """Return where nothing listens at a port.

    Raises:
        StillroomError: something does, or this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise SettingsError(
                    f"STILLROOM_HOST: nothing can be bound to {host}, port {port} "
                    f"({error.strerror}); expected an address of this machine"
                ) from None
            raise StillroomError(
                f"port {port} is taken ({error.strerror}); stop what listens there, or set "
                f"{variable} to another one"
            ) from None
