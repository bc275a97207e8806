import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from stillroom.errors import OutOfMemoryError, SourceError, StageError, StoreError
from stillroom.progress import silent
from tasks.child import Request
from tasks.explain import explain
from tasks.processes import FAILED, ROOT
from tasks.run_child import run_child
from tasks.sources import Source
from tasks.stages import IMPORT_MODEL, Order
from tests.stage_processes import is_stage

SECTION = {"dtype": "float32", "trust_remote_code": False, "task": "causal_lm"}


def request(folder: Path, source: Path) -> Request:
    order = Order(
        title="import teacher",
        stage=IMPORT_MODEL,
        section=SECTION,
        seed=0,
        sources={"source": Source(str(source), "local", "0" * 64)},
    )
    return Request(order=order, records={}, store_url=str(folder / "store"), threads=1)


def test_an_error_of_the_work_comes_back_as_what_it_was(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has changed while the flow ran"):
        run_child(request(tmp_path, tmp_path), tmp_path / "scratch", silent)
    assert not list((tmp_path / "scratch").iterdir()), "the work folder was left behind"


def test_a_killed_child_is_named_as_short_of_memory(tmp_path: Path) -> None:
    def kill_the_child() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for child in psutil.Process().children(recursive=True):
                if is_stage(child):
                    os.kill(child.pid, signal.SIGKILL)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_the_child)
    killer.start()
    with pytest.raises(OutOfMemoryError, match="import teacher was killed by the operating system"):
        run_child(request(tmp_path, tmp_path), tmp_path / "scratch", silent)
    killer.join()


def test_a_child_that_dies_without_a_word_leaves_its_last_lines(tmp_path: Path) -> None:
    broken = request(tmp_path, tmp_path).model_copy(update={"threads": 0})
    with pytest.raises(StageError, match=r"ended with code 1(.|\n)*positive"):
        run_child(broken, tmp_path / "scratch", silent)


def test_work_folders_of_the_dead_are_cleared_away(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    scratch = tmp_path / "scratch"
    (scratch / f"{ended.pid}-abc").mkdir(parents=True)
    (scratch / f"{os.getpid()}-mine").mkdir()
    with pytest.raises(SourceError):
        run_child(request(tmp_path, tmp_path), scratch, silent)
    assert [path.name for path in scratch.iterdir()] == [f"{os.getpid()}-mine"]


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StoreError, "the disk is full"),
        (
            Exception('IoError(Os { code: 28, kind: StorageFull, message: "…" })'),
            StoreError,
            "full",
        ),
        (OSError(errno.EROFS, "Read-only file system"), StoreError, "Read-only"),
        (MemoryError(), OutOfMemoryError, "ran out of memory"),
        (RuntimeError("can't allocate memory: you tried"), OutOfMemoryError, "fewer batch_rows"),
    ],
)
def test_what_the_machine_refused_is_said_plainly(
    error: Exception, kind: type[Exception], said: str
) -> None:
    explained = explain(error, "quantize")
    assert type(explained) is kind
    assert said in str(explained)


def test_a_fault_of_ours_is_not_explained_away() -> None:
    assert explain(KeyError("x"), "quantize") is None


@pytest.mark.parametrize(
    "error", [SourceError("hush-hush"), KeyError("hush-hush"), OSError(errno.EACCES, "hush-hush")]
)
def test_a_secret_is_taken_out_of_an_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    explained = explain(error, "quantize")
    assert explained is not None
    assert "***" in str(explained)
    assert "hush" not in str(explained)
    if isinstance(error, SourceError):
        assert type(explained) is SourceError


def test_the_kept_log_of_a_child_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It tells the number of its threads when it dies of it.
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "torch.set_num_threads")
    broken = request(tmp_path, tmp_path).model_copy(update={"threads": 0})
    with pytest.raises(StageError, match="its log is"):
        run_child(broken, tmp_path / "scratch", silent)
    (log,) = (tmp_path / "scratch" / "logs").iterdir()
    assert "***" in log.read_text()
    assert "torch.set_num_threads" not in log.read_text()


def test_a_child_without_its_parent_does_not_begin(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "request.json").write_text(request(tmp_path, tmp_path).model_dump_json())
    command = [sys.executable, "-m", "tasks.child", str(tmp_path), str(ended.pid)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == FAILED
    assert not (tmp_path / "error.json").exists()
