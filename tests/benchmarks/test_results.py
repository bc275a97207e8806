"""A part of a benchmark that is measured anew leaves what was measured elsewhere."""

import json
from pathlib import Path

from benchmarks.claims import at_most, write_measure
from benchmarks.results import claims_of, page_of, read_measures, write_results

TABLES = {name: (f"## Part {name}", {"seconds": "s"}) for name in ("a", "b", "c")}


def page(content: dict[str, object]) -> str:
    return page_of("none", "none.png", TABLES, content["measures"])


def test_what_was_measured_elsewhere_stays(tmp_path: Path) -> None:
    def path_of(name: str) -> Path:
        return tmp_path / "here" / f"{name}.json"

    results = tmp_path / "results.json"
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        write_measure(
            path_of(name),
            [at_most(f"seconds of {name}", 1.5, seconds)],
            text="none",
            rows=[{"seconds": seconds}],
        )
    first = read_measures(["a", "b"], path_of, results)
    write_results({"measures": first}, results, tmp_path / "page", page)
    assert [claim.holds for claim in claims_of(first)] == [True, False]

    path_of("a").unlink()
    write_measure(path_of("b"), [], text="none", rows=[{"seconds": 3.0}])
    second = read_measures(["a", "b", "c"], path_of, results)
    assert second["a"] == json.loads(results.read_text())["measures"]["a"]
    assert second["b"]["rows"] == [{"seconds": 3.0}]
    assert set(second) == {"a", "b"}
    assert [claim.claim for claim in claims_of(second)] == ["seconds of a"]
    shown = page({"measures": second})
    assert "## Part a" in shown
    assert "| 3 |" in shown
    assert "## Part c" not in shown
