"""Further processes that train one model with this one, on the machine's own loopback."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from stillroom.errors import StageError, StillroomError
from tasks.helpers import Helper
from tasks.processes import FAILED, GRACE_SECONDS, leave_error
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
            stack.enter_context(_member(bench, rank, threads, meeting)) for rank in range(1, size)
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
                _explain(member, error)
            raise
        over.set()
        for member in members:
            _require_whole(member)


@contextmanager
def _watched(members: list[Helper], bench: Bench) -> Iterator[threading.Event]:
    """End this process where a member is lost: it would wait for it for half an hour.

    Yields what is to be set when the work is over.
    """
    over = threading.Event()

    def watch(member: Helper) -> None:
        try:
            _require_whole(member)
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


def _member(bench: Bench, rank: int, threads: int, meeting: dict[str, str]) -> Helper:
    request = MemberRequest(
        order=bench.order,
        inputs=bench.inputs,
        records=dict(bench.records),
        store_url=bench.store_url,
        threads=threads,
        rank=rank,
    )
    return Helper(
        f"training process {rank}",
        "tasks.training_member",
        bench.scratch / f"member-{rank}",
        request,
        threads,
        variables=meeting | {"RANK": str(rank)},
    )


def _require_whole(member: Helper) -> None:
    """Wait for the end of a member.

    Raises:
        StillroomError: what its work raised.
        StageError: it was killed, or ended without a word.
    """
    if signal := member.close():
        raise StageError(
            f"{member.title} was killed by signal {signal}, perhaps because memory ran out; run "
            "again: it goes on from the last checkpoint"
        )


def _explain(member: Helper, error: Exception) -> None:
    """Raise what ended a member, where it has ended; `error` is what was noticed here.

    Raises:
        StillroomError: as `_require_whole`.
    """
    try:
        member.process.wait(1.0)  # what breaks here may be the first sign of its end
        _require_whole(member)
    except subprocess.TimeoutExpired:
        return
    except StillroomError as cause:
        raise cause from error
