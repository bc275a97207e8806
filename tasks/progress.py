"""Progress of long work: a bar in a terminal, lines in a log, an artifact in Prefect's UI."""

import logging
import sys
import time
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from tqdm import tqdm

from tasks.settings import Settings

# A log line is for people who do not watch.
LOG_SECONDS = 30.0


class ShownProgress:
    """Shows the progress of one stage; made when its work starts, closed when it ends."""

    def __init__(self, title: str, logger: "logging.Logger | logging.LoggerAdapter[Any]") -> None:
        self.title = title
        self.logger = logger
        self.begun: tuple[float, int] | None = None
        """When the first word of it came, and how much was done by then: what a resumed stage finds
        done, or waits for a worker, says nothing of its speed."""
        self.artifact: UUID | None = None
        self.artifact_seconds = Settings().progress_seconds
        self.bar: tqdm[Any] | None = None
        self.unit = ""
        self.sent = self.logged = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.artifact is not None and error is None:
            update_progress_artifact(self.artifact, progress=100.0)

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Show that `done` of `total` pieces are finished."""
        if sys.stderr.isatty():
            self._draw(done, total, unit, note)
        now = time.monotonic()
        if self.begun is None:
            self.begun = (now, done)
        if now - self.logged >= LOG_SECONDS:
            self.logged = now
            self.logger.info("%s", self._line(done, total, unit, note))
        if now - self.sent >= self.artifact_seconds:
            self.sent = now
            self._send(100.0 * done / max(total, 1))

    def _draw(self, done: int, total: int, unit: str, note: str) -> None:
        if self.bar is None or self.unit != unit:
            if self.bar is not None:
                self.bar.close()
            # What a resumed stage finds done is no work of this run: it must not count as speed.
            self.bar = tqdm(
                total=total,
                initial=max(done - 1, 0),
                unit=unit,
                desc=self.title,
                leave=False,
                dynamic_ncols=True,
            )
            self.unit = unit
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)

    def _line(self, done: int, total: int, unit: str, note: str) -> str:
        text = f"{self.title}: {done} of {total} {unit}"
        since, before = self.begun or (0.0, done)
        if done > before:
            left = (time.monotonic() - since) / (done - before) * (total - done)
            text += f", about {left:.0f} s left"
        return f"{text}; {note}" if note else text

    def _send(self, percent: float) -> None:
        if self.artifact is None:
            created = create_progress_artifact(progress=percent, description=self.title)
            assert isinstance(created, UUID)  # a coroutine only where it is called from one
            self.artifact = created
        else:
            update_progress_artifact(self.artifact, progress=percent)
