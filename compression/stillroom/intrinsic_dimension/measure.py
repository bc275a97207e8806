"""Measure an intrinsic dimension in one process, trial after trial."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import nn

from stillroom.checkpoint import Checkpoints, NoCheckpoints
from stillroom.data.examples import Examples
from stillroom.intrinsic_dimension.search import (
    Dimension,
    ModelSize,
    Search,
    Trial,
    conclude,
    next_trials,
)
from stillroom.intrinsic_dimension.trial import Outcome, TrialOptions, run_trial
from stillroom.progress import Progress, silent
from stillroom.training.state import require_same

FINISHED = "finished-"
RESULT = "result.json"


def measure_intrinsic_dimension(
    load_base: Callable[[int], nn.Module],
    rows: tuple[Examples, Examples],
    search: Search,
    options: TrialOptions,
    *,
    checkpoints: Checkpoints | None = None,
    fingerprint: str = "",
    progress: Progress = silent,
) -> Dimension:
    """Return the dimension in which the base learns the first of `rows` nearly as well as in all.

    `load_base` gives the base afresh for each trial, a new head drawn from the trial's seed; it is
    measured on the second of `rows`. With `checkpoints` no finished trial is repeated, and the one
    that was interrupted goes on; `fingerprint` names the base and the rows.

    Raises:
        MismatchError: a finished trial was made with other options or another fingerprint.
        what `stillroom.intrinsic_dimension.trial.run_trial` raises.
    """
    kept = _Finished(checkpoints or NoCheckpoints(), options, fingerprint)
    finished = kept.read()
    while trials := next_trials(search, finished):
        for trial in trials:
            outcome = run_trial(
                trial,
                load_base(trial.seed),
                rows,
                options,
                checkpoints=_Below(kept.checkpoints, f"{trial.name}."),
                fingerprint=f"{fingerprint} {trial}",
                progress=progress,
            )
            kept.save(trial, outcome)
            finished[trial] = outcome.score
            kept.size = outcome.size
    assert kept.size is not None
    return conclude(search, finished, kept.size)


class _Finished:
    """Scores of finished trials among the checkpoints."""

    def __init__(self, checkpoints: Checkpoints, options: TrialOptions, fingerprint: str) -> None:
        self.checkpoints = checkpoints
        # As JSON gives it back.
        self.identity = json.loads(json.dumps(asdict(options) | {"fingerprint": fingerprint}))
        self.size: ModelSize | None = None

    def read(self) -> dict[Trial, float]:
        """Return the scores that earlier attempts left.

        Raises:
            MismatchError: they were made with other options.
        """
        found = {}
        for name in self.checkpoints.names():
            if name.startswith(FINISHED):
                with tempfile.TemporaryDirectory() as folder:
                    self.checkpoints.load(name, Path(folder))
                    result = json.loads((Path(folder) / RESULT).read_text())
                require_same(name, result["identity"], self.identity)
                found[Trial(**result["trial"])] = float(result["score"])
                self.size = ModelSize(**result["size"])
        return found

    def save(self, trial: Trial, outcome: Outcome) -> None:
        """Keep a score, then let go of what only the trial's own training needed."""
        result = {
            "identity": self.identity,
            "trial": asdict(trial),
            "score": outcome.score,
            "size": asdict(outcome.size),
        }
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / RESULT).write_text(json.dumps(result))
            self.checkpoints.save(FINISHED + trial.name, Path(folder))
        unfinished = _Below(self.checkpoints, f"{trial.name}.")
        for name in unfinished.names():
            unfinished.delete(name)


class _Below:
    """The pieces whose names start with a prefix, without it."""

    def __init__(self, checkpoints: Checkpoints, prefix: str) -> None:
        self.checkpoints = checkpoints
        self.prefix = prefix

    def names(self) -> list[str]:
        """Return the names of the complete pieces, sorted."""
        every = self.checkpoints.names()
        return [name.removeprefix(self.prefix) for name in every if name.startswith(self.prefix)]

    def save(self, name: str, folder: Path) -> None:
        """Keep every file below `folder` as the piece `name`."""
        self.checkpoints.save(self.prefix + name, folder)

    def load(self, name: str, folder: Path) -> None:
        """Write the files of the piece `name` below `folder`."""
        self.checkpoints.load(self.prefix + name, folder)

    def delete(self, name: str) -> None:
        """Forget the piece `name`."""
        self.checkpoints.delete(self.prefix + name)
