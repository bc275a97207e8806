"""A user's terminal: what is typed, what comes back, and what lies in the home afterwards."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tasks.store.record import Record
from tasks.store.store import ArtifactStore, open_store

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 120
FOREIGN = ("AWS_", "HF_", "MLFLOW_", "PREFECT_", "STILLROOM_")


@dataclass
class Terminal:
    """A folder with recipes, and the variables that are set in it."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return Path(self.variables["STILLROOM_HOME"])

    @property
    def store(self) -> ArtifactStore:
        return open_store(str(self.home / "store"))

    def write(self, recipe: dict[str, object]) -> None:
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

    def compress(self, *more: str) -> "subprocess.CompletedProcess[str]":
        return self.type("compress", "recipe.yaml", *more)

    def type(
        self, *arguments: str, seconds: float = RUN_SECONDS
    ) -> "subprocess.CompletedProcess[str]":
        """Run `python -m flows ...` to its end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flows", *arguments]

    def environment(self) -> dict[str, str]:
        kept = {name: text for name, text in os.environ.items() if not name.startswith(FOREIGN)}
        # A configured user is in a folder of his own, with no cloud login.
        return kept | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "compression")]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            **self.variables,
        }

    def records(self, kind: str) -> list[Record]:
        return [record for record in self.store.records() if record.kind == kind]

    def versions(self) -> int:
        """Return how many versions are registered here."""
        with contextlib.closing(sqlite3.connect(self.home / "mlflow.db")) as database:
            count: int = database.execute("SELECT count(*) FROM model_versions").fetchone()[0]
            return count

    def forget(self, record: Record) -> None:
        self.store.forget(record)


def move_in(home: Path, database: Path, store: Path | None = None) -> None:
    """Make a home with an empty MLflow database, and with what a store holds."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(database, home / "mlflow.db")
    if store is not None:
        shutil.copytree(store, home / "store")


def assert_refused(done: "subprocess.CompletedProcess[str]", *words: str) -> str:
    """Assert that a command failed with one clear line, and return that line."""
    output = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 2, output
    assert "Traceback" not in output, output
    lines = done.stderr.rstrip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert errors[0] == lines[-1], output  # nothing spilled over into a second line
    for word in words:
        assert word in errors[0], errors[0]
    return errors[0]


def assert_sound(terminal: Terminal) -> None:
    """Assert that `store verify` finds every file with its hash."""
    done = terminal.type("store", "verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is sound: every file has its hash" in done.stdout


def assert_done(done: "subprocess.CompletedProcess[str]", cached: tuple[str, ...] = ()) -> None:
    """Assert that a command succeeded, and that these stages were not done again."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for title in cached:
        assert f"Task run '{title}' - Finished in state Cached(" in done.stdout + done.stderr, title
