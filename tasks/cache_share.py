"""A share of the work on one teacher cache, done on any machine that knows the store."""

from pydantic import BaseModel, ConfigDict

from stillroom.errors import StageError
from stillroom.progress import Progress
from stillroom.remote_code import trusting_code
from tasks.errand import find_inputs
from tasks.reach import require_code_allowed
from tasks.run_child import scratch_folder
from tasks.settings import Settings
from tasks.stages import Order
from tasks.store.record import Record
from tasks.store.store import open_store


class Share(BaseModel):
    """What one of several workers is to do: the same for all of them."""

    model_config = ConfigDict(frozen=True)

    order: Order
    records: dict[str, Record]
    """The order's inputs, as they are in the store."""
    run: str
    """To which the claims of all workers on this cache belong."""
    threads: int


def work_share(share: Share, progress: Progress) -> None:
    """Make pieces in a process of its own, and leave them in the store, until none is unclaimed.

    Raises:
        StillroomError: what the work of the process raised, a store that cannot be read, or a
            process that was killed.
    """
    # The flow that orders shares knows this module: it is to start without torch.
    from tasks.cache_pool import share_capture
    from tasks.cache_worker import plan_capture
    from tasks.work.bench import Bench

    settings = Settings()
    store = open_store(settings.store_url)
    order = share.order
    if order.trusts_code:
        require_code_allowed(order.title, settings)
    with scratch_folder(settings.scratch_root) as folder, store.lease(order.key):
        kinds = {role: record.kind for role, record in share.records.items()}
        # Whoever reaches the server's API can order a share: what is sent is looked up here.
        records = find_inputs(store, order, kinds)
        inputs = {
            role: store.fetch(record, folder / "inputs" / role) for role, record in records.items()
        }
        bench = Bench(
            order=order,
            inputs=inputs,
            records=records,
            scratch=folder,
            output=folder,
            checkpoints=store.checkpoints(order.key),
            progress=progress,
            store_url=settings.store_url,
        )
        with trusting_code(order.trusts_code):
            plan = plan_capture(order, inputs)
        if share_capture(bench, plan, 1, share.threads, share.run):
            raise StageError(
                f"{order.title}: a worker was killed, perhaps because memory ran out; what it had "
                "begun is made again by the run that ordered it"
            )
