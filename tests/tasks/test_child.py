"""What one stage's process does where another run makes the same artifact."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stillroom.errors import StoreError
from stillroom.progress import silent
from tasks import child
from tasks.stages import IMPORT_MODEL, Order
from tasks.store.store import open_store
from tasks.work.bench import Bench
from tests.tasks.store.making import add

ORDER = Order(title="import teacher", stage=IMPORT_MODEL, section={}, seed=0, sources={})


def request(folder: Path) -> child.Request:
    return child.Request(order=ORDER, records={}, store_url=str(folder / "store"), threads=1)


def missing_piece(_: Bench) -> None:
    raise StoreError("no checkpoint named 'best-00000010'")


def test_a_slower_run_takes_what_the_faster_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))

    def overtaken(bench: Bench) -> None:
        (bench.output / "model").write_text("the faster run's")
        add(store, bench.output, key=ORDER.key)
        missing_piece(bench)

    monkeypatch.setitem(sys.modules, IMPORT_MODEL.work, SimpleNamespace(work=overtaken))
    record = child.work(request(tmp_path), tmp_path, silent)
    assert record == store.find(ORDER.kind, ORDER.key)


def test_an_error_stays_one_where_nobody_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, IMPORT_MODEL.work, SimpleNamespace(work=missing_piece))
    with pytest.raises(StoreError, match="no checkpoint named"):
        child.work(request(tmp_path), tmp_path, silent)
