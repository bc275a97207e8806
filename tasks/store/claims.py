"""Claims: which worker makes which piece of a work that several share.

A claim is an empty object at partial/<key>/claims/<run>/<piece>, written only where there is none.
Claims belong to one run: those of a run that was killed bind nobody, and whoever started the
workers makes what a lost one had claimed. They go with the checkpoints.
"""

from tasks.store.backend import Backend


class StoreClaims:
    """The claims of one run on the pieces of one artifact."""

    def __init__(self, backend: Backend, key: str, run: str) -> None:
        self.backend = backend
        self.root = f"partial/{key}/claims/{run}/"

    def take(self, piece: str) -> bool:
        """Claim a piece; return False where another worker has.

        Raises:
            StoreError: the store cannot be written.
        """
        return self.backend.put_if_absent(f"{self.root}{piece}", b"")

    def taken(self) -> list[str]:
        """Return the pieces that are claimed, sorted."""
        return [entry.name.removeprefix(self.root) for entry in self.backend.list(self.root)]
