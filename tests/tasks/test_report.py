"""The report's files, where two runs of one recipe write theirs at once."""

from pathlib import Path

import pytest

import stillroom.evaluation.report
from stillroom.evaluation.report_data import ReportData
from tasks.report import keep_report


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
