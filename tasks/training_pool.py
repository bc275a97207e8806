"""Further processes that train one model with this one, on the machine's own loopback."""

import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from stillroom.errors import StageError, StillroomError
from tasks.processes import (
    FAILED,
    GRACE_SECONDS,
    child_environment,
    end_child,
    error_from,
    last_line,
    leave_error,
)
from tasks.training_member import MemberRequest
from tasks.work.bench import Bench

LOOPBACK = "127.0.0.1"


@contextmanager
def training_team(bench: Bench) -> Iterator[None]:
    """Have as many processes train together as the order asks for, this one the first of them.

    The threads of this process are shared out. The others do the same work on a scratch folder,
    and leave nothing: the stage's result is this process's. Where one is lost, so is the step; a
    rerun goes on from the last checkpoint.

    Raises:
        StillroomError: what the work of one raised.
        StageError: one was killed, or ended without a word.
    """
    import torch

    size = bench.order.unkeyed.get("processes", 1)
    if size == 1:
        yield
        return
    threads = max(1, torch.get_num_threads() // size)
    torch.set_num_threads(threads)
    meeting = _meeting(size)
    with ExitStack() as stack:
        members = [
            stack.enter_context(_Member(bench, rank, threads, meeting)) for rank in range(1, size)
        ]
        os.environ.update(meeting | {"RANK": "0"})
        over = stack.enter_context(_watched(members, bench))
        try:
            yield
        except StillroomError:
            raise
        except Exception as error:
            # A connection that broke says nothing of why the other end went away.
            for member in members:
                member.explain(error)
            raise
        over.set()
        for member in members:
            member.close()


@contextmanager
def _watched(members: list["_Member"], bench: Bench) -> Iterator[threading.Event]:
    """End this process where a member is lost: it would wait for it for half an hour.

    Yields what is to be set when the work is over.
    """
    over = threading.Event()

    def watch(member: "_Member") -> None:
        try:
            member.close()
        except StillroomError as error:
            # An error that all of them meet is better told by this process.
            if not over.wait(GRACE_SECONDS):
                leave_error(error, bench.order.title, bench.scratch)
                os._exit(FAILED)

    for member in members:
        threading.Thread(target=watch, args=(member,), daemon=True).start()
    try:
        yield over
    finally:
        over.set()


def _meeting(size: int) -> dict[str, str]:
    """Return the environment in which `size` processes find one another."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return meeting | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})


class _Member:
    """One further process, which is ended with the block, whatever happens."""

    def __init__(self, bench: Bench, rank: int, threads: int, meeting: dict[str, str]) -> None:
        self.rank = rank
        self.folder = bench.scratch / f"member-{rank}-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir(parents=True)
        request = MemberRequest(
            order=bench.order,
            inputs=bench.inputs,
            records=dict(bench.records),
            store_url=bench.store_url,
            threads=threads,
            rank=rank,
        )
        (self.folder / "request.json").write_text(request.model_dump_json())
        with (self.folder / "stderr.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tasks.training_member", str(self.folder), str(os.getpid())],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=child_environment(threads) | meeting | {"RANK": str(rank)},
                text=True,
            )

    def __enter__(self) -> "_Member":
        return self

    def __exit__(self, *error: object) -> None:
        end_child(self.process)

    def close(self) -> None:
        """Wait for the end of the process.

        Raises:
            StillroomError: what its work raised.
            StageError: it ended in another way than it should.
        """
        code = self.process.wait()
        if code == FAILED and (self.folder / "error.json").exists():
            raise error_from(self.folder / "error.json")
        if code < 0:
            raise StageError(
                f"training process {self.rank} was killed by signal {-code}, perhaps because "
                "memory ran out; run again: it goes on from the last checkpoint"
            )
        if code > 0:
            said = last_line(self.folder / "stderr.log")
            raise StageError(f"training process {self.rank} ended with code {code}: {said}")

    def explain(self, error: Exception) -> None:
        """Raise what ended the process, where it has ended; `error` is what was noticed here.

        Raises:
            StillroomError: as `close`.
        """
        try:
            self.process.wait(1.0)  # what breaks here may be the first sign of its end
            self.close()
        except subprocess.TimeoutExpired:
            return
        except StillroomError as cause:
            raise cause from error
