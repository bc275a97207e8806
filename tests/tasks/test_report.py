"""The report's files, where two runs of one recipe write theirs at once."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import stillroom.evaluation.report
from stillroom.evaluation.report_data import LayerError, ReportData
from tasks.report import _layer_errors, keep_report
from tasks.store.store import open_store


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the pages that were drawn."""
    titles: list[str] = []

    def render(data: ReportData, target: Path) -> None:
        titles.append(data.title)
        target.write_text(f"page of {data.title}")
        target.with_suffix(".json").write_text(data.to_json())

    monkeypatch.setattr(stillroom.evaluation.report, "render_report", render)
    return titles


def report(title: str) -> ReportData:
    return ReportData(title, "2026-01-02 03:04 UTC", ())


def test_each_run_logs_its_own_report(tmp_path: Path, drawn: list[str]) -> None:
    folder, logged = tmp_path / "reports" / "tiny", list[tuple[str, str]]()

    def log(file: Path) -> None:
        if not logged:
            keep_report(report("other"), folder, lambda _: None)  # comes in between
        logged.append((file.name, file.read_text()))

    keep_report(report("mine"), folder, log)

    assert logged == [("report.html", "page of mine"), ("report.json", report("mine").to_json())]
    assert (folder / "report.html").read_text() == "page of mine"
    assert ReportData.from_json((folder / "report.json").read_text()) == report("mine")
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]


def test_the_same_page_is_drawn_once(tmp_path: Path, drawn: list[str]) -> None:
    logged: list[str] = []
    for title in ("mine", "mine", "other", "mine"):
        keep_report(report(title), tmp_path, lambda file: logged.append(file.read_text()))
    assert drawn == ["mine", "other", "mine"]
    assert logged[2:4] == ["page of mine", report("mine").to_json()]


def test_each_layer_is_shown_with_its_own_bits(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    layers = [
        {"name": name, "relative_error": 0.1, "block": 0, "bits": bits, "fell_back": False}
        for name, bits in (("q_proj", 8), ("k_proj", 2))
    ]
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "layers.json").write_text(json.dumps(layers))
    model = store.add(
        tmp_path / "made",
        kind="model",
        key="a" * 64,
        inputs={},
        section={"bits": 4, "mixed": {"bits": [2, 8]}},
        versions={},
        stage_version=1,
    )
    journal: Any = SimpleNamespace(store=store)
    assert _layer_errors(model, journal) == [
        LayerError("q_proj", 0.1, 0, 8),
        LayerError("k_proj", 0.1, 0, 2),
    ]
