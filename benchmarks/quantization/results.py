"""Gather rows and measurements into results.json, the table and the plot."""

import json
from typing import Any

from benchmarks.circumstances import circumstances
from benchmarks.claims import Claim
from benchmarks.quantization.cells import SHORT, Cell, table_cells, timing_cells
from benchmarks.quantization.claims import quality_claims, speed_claims
from benchmarks.quantization.floor import floor_seconds, sgemm_rate
from benchmarks.quantization.measures import keep, measure_path
from benchmarks.quantization.places import HERE
from benchmarks.quantization.rows import read_row
from benchmarks.quantization.summary import summarise
from benchmarks.quantization.work import CALIBRATION_ROWS, LENGTH
from benchmarks.results import claims_of, read_measures, write_results
from benchmarks.text import text_source

RESULTS = HERE / "results.json"
PAGE = HERE / "RESULTS.md"
PLOT = HERE / "quantization.png"
MEASURED = ["decode", "floor", "gpu", "growth", "kills", "memory", "sst2"]
SHOWN = ("kl", "perplexity", "bytes", "cpu_seconds", "peak_bytes")


def measure_floor() -> None:
    """Keep the sgemm rate and the floor that follows from it."""
    rate = sgemm_rate()
    seconds = floor_seconds(SHORT, CALIBRATION_ROWS, LENGTH, rate)
    keep("floor", [], flops_per_cpu_second=rate, cpu_seconds=seconds)


def finished_rows(cells: list[Cell]) -> list[dict[str, Any]]:
    """Return the rows that are done, in the order of the cells."""
    found = [(cell, read_row(cell)) for cell in cells]
    return [row | {"name": cell.name} for cell, row in found if row is not None]


def gather() -> list[Claim]:
    """Write results.json, its page and the plot from what is done; return the claims."""
    from benchmarks.quantization.plot import plot

    measures = read_measures(MEASURED, measure_path, RESULTS)
    parts = json.loads(RESULTS.read_text())
    # What has no row on this machine stays as it was measured elsewhere.
    if rows := finished_rows(table_cells()):
        parts["table"] = _part(rows, quality_claims(rows))
        plot(rows, PLOT)
    if timed := finished_rows(timing_cells()):
        claims = []
        if "floor" in measures:
            claims = speed_claims(timed, measures["floor"]["cpu_seconds"])
        parts["timing"] = _part(timed, claims)
    write_results(parts | {"measures": measures}, RESULTS, PAGE, summarise)
    return claims_of({"table": parts["table"], "timing": parts["timing"], **measures})


def _part(rows: list[dict[str, Any]], claims: list[Claim]) -> dict[str, Any]:
    return {
        "text": text_source(),
        "rows": [_short(row) for row in rows],
        "circumstances": circumstances(),
        "claims": [claim.as_json() for claim in claims],
    }


def print_table() -> None:
    """Print the rows, a line each; a cell that was not run is marked with a dash."""
    print(f"{'row':58} {'KL':>8} {'ppl':>8} {'MB':>7} {'CPU s':>8} {'peak GB':>8}")
    for cell in table_cells() + timing_cells():
        row = read_row(cell)
        values = [None] * len(SHOWN) if row is None else [row.get(key) for key in SHOWN]
        formats = ("8.4f", "8.2f", "7.2f", "8.1f", "8.2f")
        units = (1, 1, 1e6, 1, 1e9)
        texts = [
            format(value / unit, form) if value is not None else "-".rjust(int(form[0]))
            for value, unit, form in zip(values, units, formats, strict=True)
        ]
        print(f"{cell.name:58} {' '.join(texts)}")


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its long lists rounded."""
    lists = {
        key: [round(each, 4) for each in row[key]] for key in ("row_kl", "row_nll") if key in row
    }
    return row | lists
