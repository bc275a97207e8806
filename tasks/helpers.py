"""Processes that help a stage: how one is started, what it leaves, and how it is ended."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from pydantic import BaseModel

from stillroom.errors import StageError
from tasks.processes import FAILED, child_environment, end_child, error_from, last_line


class Helper:
    """A process `python -m MODULE FOLDER PARENT`, which is ended with the block it is used in.

    FOLDER, which is made, holds request.json and the log. `title` names it in errors.
    """

    def __init__(
        self,
        title: str,
        module: str,
        folder: Path,
        request: BaseModel,
        threads: int,
        *,
        stdout: int | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.title = title
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "request.json").write_text(request.model_dump_json())
        with (folder / "stderr.log").open("wb") as log:
            said: int | IO[bytes] = log if stdout is None else stdout
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(folder), str(os.getpid())],
                stdout=said,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=child_environment(threads) | dict(variables or {}),
                text=True,
            )

    def __enter__(self) -> "Helper":
        return self

    def __exit__(self, *error: object) -> None:
        end_child(self.process)

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error; one that was killed has not failed, it is lost."""
        return (self.process.poll() or 0) > 0

    def close(self) -> int:
        """Wait for the end of the process; return 0, or the signal that killed it.

        Raises:
            StillroomError: what its work raised.
            StageError: it ended without a word.
        """
        code = self.process.wait()
        if code == FAILED and (self.folder / "error.json").exists():
            raise error_from(self.folder / "error.json")
        if code > 0:
            said = last_line(self.folder / "stderr.log")
            raise StageError(f"{self.title} ended with code {code}: {said}")
        return -code
