"""A stage that is made on another machine: the order as it is sent, and how it is done there."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom.errors import MismatchError, RecipeError, SourceError, StoreError
from stillroom.hardware import threads_here
from stillroom.progress import Progress
from tasks.child import Request
from tasks.reach import require_code_allowed
from tasks.run_child import run_child
from tasks.settings import Settings
from tasks.stages import (
    CACHE_TEACHER,
    DISTILL_STUDENT,
    EVALUATE_MODEL,
    MERGE_ADAPTER,
    QUANTIZE_MODEL,
    RUN_TRIAL,
    TRAIN_ADAPTER,
    TUNE_TEACHER,
    Order,
)
from tasks.store.record import Record, Sha256
from tasks.store.store import ArtifactStore, open_store

ELSEWHERE = (
    TUNE_TEACHER,
    CACHE_TEACHER,
    DISTILL_STUDENT,
    QUANTIZE_MODEL,
    TRAIN_ADAPTER,
    MERGE_ADAPTER,
    EVALUATE_MODEL,
    RUN_TRIAL,
)
"""The stages that compute with a model; those that read sources stay where the flow runs."""
SAME_STORE = "the flow and its workers must have the same STILLROOM_STORE"
_ROLE, _KEY = re.compile("[a-z][a-z_]{0,40}"), re.compile("[0-9a-f]{64}")
_Kind = Annotated[str, Field(pattern="^[a-z][a-z-]{0,40}$")]
_Processes = Annotated[int, Field(ge=1, le=64)]
_CLOSED = ConfigDict(frozen=True, extra="forbid")


class Errand(BaseModel):
    """An order, and the kinds of its inputs, which the worker finds in its own store."""

    model_config = _CLOSED

    order: Order
    key: Sha256
    """The order's key where it was written; a worker with other versions comes to another one."""
    kinds: dict[str, _Kind]
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Absent: one a processor of the worker."""

    @classmethod
    def of(cls, order: Order, records: Mapping[str, Record], threads: int | None) -> Self:
        """Return the errand for an order whose inputs are `records`."""
        kinds = {role: record.kind for role, record in records.items()}
        return cls(order=order, key=order.key, kinds=kinds, threads=threads)


class _Rhythm(BaseModel):
    model_config = _CLOSED

    checkpoint_every_steps: Annotated[int, Field(ge=1)] = 100
    gradient_checkpointing: bool = False


class _Unkeyed(BaseModel):
    """What an order may say that is not in its key: nothing that changes what comes of it."""

    model_config = _CLOSED

    training: _Rhythm = _Rhythm()
    processes: _Processes = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    workers: _Processes = 1
    over: Literal["processes", "prefect", "ray"] = "processes"
    teacher_device_map: Literal["auto"] | None = None


def class_of_workers(deployment: str, threads: int | None) -> str:
    """Return how the hardware of a deployment's workers is named in the keys of measurements.

    Whoever writes the key does not know which worker will take the run: speeds are compared within
    a deployment, whose pool has workers of one class. What the processor is called stands in the
    measurement itself.
    """
    return f"workers of {deployment}, {threads or 'all'} threads"


def do_errand(errand: Errand, deployment: str, progress: Progress) -> str:
    """Make the order's artifact in this machine's store, in a process of its own; say what is done.

    Whoever reaches Prefect's API can order it, so nothing is believed that can be looked up: which
    stages there are, the key, the inputs. Nothing that is sent is a path or an address.

    Raises:
        StillroomError: it is no order for a worker, or could not be made; the message says why.
    """
    order, settings = errand.order, Settings()
    _require_honest(errand, deployment)
    if order.trusts_code:
        require_code_allowed(order.title, settings)
    store = open_store(settings.store_url)
    what = f"{order.kind} {order.key[:12]}"
    if store.find(order.kind, order.key) is not None:
        return f"{what} was in {store.url} already"
    request = Request(
        order=order,
        records=find_inputs(store, order, errand.kinds),
        store_url=settings.store_url,
        threads=errand.threads or threads_here(),
    )
    run_child(request, settings.scratch_root, progress)
    return f"made {what} in {store.url}"


def find_inputs(store: ArtifactStore, order: Order, kinds: Mapping[str, str]) -> dict[str, Record]:
    """Return the records of an order's inputs, as this machine's store has them.

    A record that was sent could have other files under the same key.

    Raises:
        RecipeError: an input is named in a way that no flow names it.
        StoreError: the store does not have it.
    """
    found = {}
    for role, key in order.inputs.items():
        kind = kinds.get(role, "")
        # The role names a folder, kind and key a file.
        if not (_ROLE.fullmatch(role) and _KEY.fullmatch(key) and kind):
            raise RecipeError(f"{order.title}: {role!r} is no input that a flow orders")
        record = store.find(kind, key)
        if record is None:
            raise StoreError(
                f"{order.title}: the store of the worker, {store.url}, has no {kind} {key[:12]}, "
                f"from which it is made; {SAME_STORE}"
            )
        found[role] = record
    return found


def _require_honest(errand: Errand, deployment: str) -> None:
    order = errand.order
    if order.sources:
        raise SourceError(
            f"{order.title}: a worker reads no sources, {', '.join(order.sources)} came; order the "
            "recipe, which resolves them"
        )
    if order.stage not in ELSEWHERE:
        known = ", ".join(f"{stage.name} {stage.version}" for stage in ELSEWHERE)
        raise MismatchError(
            f"{order.title}: this worker makes {known}; {order.stage.name} {order.stage.version} "
            "came. Have the flow and its workers run the same version of the project"
        )
    if order.key != errand.key:
        raise MismatchError(
            f"{order.title}: here the key is {order.key[:12]}, where it was ordered "
            f"{errand.key[:12]}; have the flow and its workers run the same versions of the "
            "project, torch and transformers"
        )
    hardware: Any = order.section.get("hardware")
    ours = class_of_workers(deployment, errand.threads)
    if order.stage == EVALUATE_MODEL and hardware != ours:
        raise MismatchError(f"{order.title}: the hardware here is {ours}; {hardware} came")
    try:
        _Unkeyed.model_validate(order.unkeyed)
    except ValidationError as error:
        raise RecipeError(
            f"{order.title}: what is not in its key may not change what comes of it: "
            + " ".join(str(error).split())[:300]
        ) from error
