"""The process that stages are forked from: `python -m tasks.fork_server LINE`.

It has imported what stages import, which takes a processor some five seconds, and does nothing
else. LINE is the number of a socket to the flow's process. Each message on it is the folder of a
stage, as `tasks.child` takes it, with three files: the stage's standard output and error, and a
socket on which its number and then its exit code are told, and on which signals for it arrive.
A stage ends with the flow's process, and this process after it.
"""

import importlib
import os
import selectors
import signal
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tasks import child
from tasks.processes import importing, set_title
from tasks.stages import STAGES

MESSAGE_BYTES = 8192


@dataclass
class _Forked:
    """A stage that runs: its process, and the socket to whoever waits for it."""

    pid: int
    control: socket.socket


def main(line: socket.socket) -> None:
    """Fork stages for as long as the other end of the line is there, and see them end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the flow's to answer
    with importing():
        for name in ("torch", "transformers.modeling_utils", *(stage.work for stage in STAGES)):
            importlib.import_module(name)
    _Server(line).serve()


class _Server:
    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.stages: list[_Forked] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(line, selectors.EVENT_READ)
        # A stage that ends wakes the selector.
        self.woken, self.waker = socket.socketpair()
        for end in (self.woken, self.waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self.waker.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(self.woken, selectors.EVENT_READ)

    def serve(self) -> None:
        wanted = True
        while wanted or self.stages:
            for ready, _ in self.selector.select():
                if ready.fileobj is self.line:
                    message, files, *_ = socket.recv_fds(self.line, MESSAGE_BYTES, 3)
                    if message:
                        self._fork(Path(os.fsdecode(message)), *files)
                    else:
                        wanted = False
                        self.selector.unregister(self.line)
                elif ready.fileobj is self.woken:
                    self.woken.recv(MESSAGE_BYTES)
                else:
                    self._signal(ready.data)
            self._reap()

    def _fork(self, folder: Path, stdout: int, stderr: int, control: int) -> None:
        waiting = socket.socket(fileno=control)
        if _is_closed(waiting):  # cancelled before it began
            waiting.close()
        else:
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                self._become_stage(folder, stdout, stderr, waiting, parent)
            stage = _Forked(pid, waiting)
            self.stages.append(stage)
            self.selector.register(waiting, selectors.EVENT_READ, stage)
            _tell(stage, pid)
        os.close(stdout)
        os.close(stderr)

    def _become_stage(
        self, folder: Path, stdout: int, stderr: int, control: socket.socket, parent: int
    ) -> NoReturn:
        """Be the stage's process: with its own output, and with nothing of the server's."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.selector.close()
            for end in (self.line, self.woken, self.waker, control):
                end.close()
            for stage in self.stages:
                stage.control.close()
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stdout)
            os.close(stderr)
            set_title("stage")
            code = child.main(folder, parent)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _signal(self, stage: _Forked) -> None:
        """Pass on the signals that came for a stage, which ends with whoever waits for it."""
        try:
            numbers = stage.control.recv(MESSAGE_BYTES)
        except ConnectionResetError:
            numbers = b""
        if not numbers:
            self.selector.unregister(stage.control)
        for number in numbers or (signal.SIGKILL,):
            os.kill(stage.pid, number)

    def _reap(self) -> None:
        for stage in tuple(self.stages):
            pid, status = os.waitpid(stage.pid, os.WNOHANG)
            if pid:
                self.stages.remove(stage)
                with suppress(KeyError):
                    self.selector.unregister(stage.control)
                _tell(stage, os.waitstatus_to_exitcode(status))
                stage.control.close()


def _is_closed(control: socket.socket) -> bool:
    try:
        return control.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def _tell(stage: _Forked, number: int) -> None:
    with suppress(ConnectionError):  # whoever waited has gone
        stage.control.sendall(f"{number}\n".encode())


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
