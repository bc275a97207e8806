"""Turn what the machine refuses into one sentence, and end a task with it alone."""

import errno
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

from stillroom.errors import OutOfMemoryError, StageError, StillroomError, StoreError
from stillroom.redaction import redact

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

P = ParamSpec("P")
R = TypeVar("R")

# safetensors, torch and SQLite report what the operating system refused in words only.
_FULL = ("StorageFull", "disk is full", "No space left")
_REFUSED = ("readonly database", "unable to open database file", "Read-only file system")
_MEMORY = ("allocate memory", "out of memory")


def explain(error: Exception, title: str) -> StillroomError | None:
    """Return the error as one that the user can act on, or None where it is a fault of ours.

    Prefect's server keeps the text of what leaves a flow: an error whose text holds a secret is
    returned without it, a fault of ours too.
    """
    said = redact(str(error))
    hides = said != str(error)
    if isinstance(error, StillroomError):
        return type(error)(said) if hides else error
    text, number = " ".join(said.split()), getattr(error, "errno", None)
    if number == errno.ENOSPC or any(words in text for words in _FULL):
        return StoreError(
            f"{title}: the disk is full; free some space (`python -m flows store gc --dry-run` "
            "shows what can go) and run again: what is finished is kept"
        )
    if number in (errno.EROFS, errno.EACCES, errno.EPERM) or any(w in text for w in _REFUSED):
        return StoreError(
            f"{title}: {text[:300]}; give STILLROOM_HOME a folder that can be written"
        )
    if isinstance(error, MemoryError) or any(words in text for words in _MEMORY):
        return OutOfMemoryError(
            f"{title} ran out of memory ({text[:200]}); run again with fewer batch_rows or a "
            "shorter sequence_length: what is finished is kept"
        )
    return StageError(f"{title}: {type(error).__name__}: {text[:500]}") if hides else None


def concluded(title: str, work: "Callable[[], State[R]]") -> "State[R]":
    """Return the state that a flow's work comes to: Failed where the user can act on an error.

    Raises:
        Exception: the work failed by a fault of ours.
    """
    from prefect.states import Failed

    from tasks.heartbeat import beating

    with beating():
        try:
            return work()
        except Exception as error:
            explained = explain(error, title)
            if explained is None:
                raise
            return Failed(message=str(explained))


def plainly(work: Callable[P, R]) -> Callable[P, R]:
    """Have a Prefect task end as Failed where the user can act on the error.

    Prefect writes a traceback for an exception that leaves a task, and none for a Failed state;
    whoever calls the task gets the exception all the same.
    """

    @wraps(work)
    def run(*arguments: P.args, **named: P.kwargs) -> R:
        from prefect.states import Failed

        try:
            return work(*arguments, **named)
        except Exception as error:
            explained = explain(error, work.__name__.replace("_", " "))
            if explained is None:
                raise
            return cast(R, Failed(message=str(explained), data=explained))

    return run
