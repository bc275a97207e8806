"""Stages as forks of one process that has imported what they import: see `tasks.fork_server`.

A stage imports for some five seconds, and a run has ten stages. The process begins with the first
stage that is made: a run that makes none has none.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from tasks.processes import GRACE_SECONDS, child_environment

ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
LOST = 1
"""Exit code of a stage whose server ended without a word."""


def can_fork() -> bool:
    """Return whether stages may be forked here: elsewhere each is a process from its start.

    What drives an accelerator does not survive a fork, and a library may begin it unasked.
    """
    return sys.platform == "linux" and not any(map(os.path.exists, ACCELERATORS))


def fork_stage(folder: Path, threads: int, log: BinaryIO) -> "ForkedStage":
    """Have the stage whose request lies in a folder begin, with a log for its errors."""
    environment = child_environment(threads)
    with _lock:
        server = next((each for each in _servers if each.serves(environment)), None)
        if server is None:
            _leave(0)
            _servers.append(server := _ForkServer(environment, log))
        return server.fork(folder, log)


class ForkedStage:
    """The process of a stage; it ends with this one."""

    def __init__(self, stdout: int, control: socket.socket, server: "_ForkServer") -> None:
        self.stdout = os.fdopen(stdout)
        self._control = control
        self._server = server
        self._told = b""
        self._code: int | None = None

    def __enter__(self) -> "ForkedStage":
        return self

    def __exit__(self, *error: object) -> None:
        self.stdout.close()
        self._control.close()

    def poll(self) -> int | None:
        """Return the exit code, or the signal as a negative number; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Return what `poll` does, at its end; TimeoutExpired after so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._code is None:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            self._hear(left)
        return self._code

    def _hear(self, seconds: float | None) -> None:
        """Take in what the server tells: the number of the process, and at its end its code."""
        self._control.settimeout(seconds)
        try:
            heard = self._control.recv(64)
        except (BlockingIOError, TimeoutError):
            raise subprocess.TimeoutExpired("stage", seconds or 0.0) from None
        except ConnectionResetError:
            heard = b""
        self._told += heard
        if not heard:
            self._code = self._server.process.wait() or LOST
        elif self._told.count(b"\n") == 2:
            self._code = int(self._told.split()[1])

    def terminate(self) -> None:
        """Ask it to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is not None:
            return
        if not self._told:  # the server still imports: it will find that nobody waits
            self._control.close()
            self._code = -number
            return
        try:
            self._control.sendall(bytes([number]))
        except ConnectionError:
            self.poll()


class _ForkServer:
    def __init__(self, environment: dict[str, str], log: BinaryIO) -> None:
        """Begin it; what goes wrong before it serves goes to the log of its first stage."""
        self._environment = environment
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tasks.fork_server", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[theirs.fileno()],
            )

    def serves(self, environment: dict[str, str]) -> bool:
        open_ = self._line.fileno() >= 0 and self.process.poll() is None
        return open_ and self._environment == environment

    def fork(self, folder: Path, log: BinaryIO) -> ForkedStage:
        control, theirs = socket.socketpair()
        read, write = os.pipe()
        with theirs:
            files = [write, log.fileno(), theirs.fileno()]
            try:
                socket.send_fds(self._line, [os.fsencode(folder)], files)
            except ConnectionError:
                pass  # it has just ended, which the stage will hear of
            finally:
                os.close(write)
        return ForkedStage(read, control, self)

    def leave(self) -> None:
        """Let it end, after the last of its stages."""
        self._line.close()


_lock = threading.Lock()
_servers: list[_ForkServer] = []
"""One, and those that still have stages though the environment, or the threads, are others now."""


def _leave(seconds: float) -> None:
    """Let all of them end, and forget those that have within so many seconds."""
    for server in tuple(_servers):
        server.leave()
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(seconds)
            _servers.remove(server)


# A stage that is still at work then ends with this process, and its server after it.
atexit.register(_leave, GRACE_SECONDS)
