import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from stillroom.contents import Contents
from stillroom.serving import CODE
from tasks.packaging import write_package


def test_packages_written_at_once_leave_nothing_of_mlflows_among_the_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = f"{CODE}\nimport time\ntime.sleep(0.1)\n"
    monkeypatch.setattr("tasks.packaging.CODE", slow)
    contents = Contents("base", "causal_lm", "a" * 64, "Apache-2.0", ())
    monkeypatch.delitem(sys.modules, "dbutils", raising=False)

    def write(name: str) -> None:
        model = SimpleNamespace(artifact_location="file:///nowhere", model_id=name)
        (tmp_path / name).mkdir()
        write_package(tmp_path / name / "package", contents, model, "run-1")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert (tmp_path / "d" / "package" / "MLmodel").is_file()
    left_behind = "dbutils" in sys.modules
    assert not left_behind
