"""Lay out the main table: once, for the page, the terminal and Prefect."""

import math
from collections.abc import Callable, Set
from dataclasses import dataclass

from stillroom.evaluation.estimates import Estimate
from stillroom.evaluation.report_data import ModelRow, ReportData

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Cell:
    """A formatted number and its standard error."""

    value: str
    error: str = ""

    def text(self) -> str:
        """Return both on one line."""
        return f"{self.value} ± {self.error}" if self.error else self.value


@dataclass(frozen=True)
class MainTable:
    """The main table: one line of cells a model, `headers` above, `units` below them."""

    headers: tuple[str, ...]
    units: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]


EMPTY = Cell("–")


def main_table(data: ReportData) -> MainTable:
    """Return the table of all models; columns that no row fills are left out."""
    columns = [
        (header, unit, [cell(row) for row in data.rows]) for header, unit, cell in _columns(data)
    ]
    kept = [column for column in columns if any(cell != EMPTY for cell in column[2])]
    lines = tuple(zip(*(cells for _, _, cells in kept), strict=True)) if kept else ()
    headers = tuple(header for header, _, _ in kept)
    return MainTable(headers, tuple(unit for _, unit, _ in kept), lines)


def render_table(data: ReportData) -> str:
    """Return the main table and the verdicts as aligned plain text."""
    table = main_table(data)
    lines = [table.headers, table.units, *(tuple(c.text() for c in line) for line in table.lines)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.headers))]
    left = _left_columns(table)
    rendered = [
        "  ".join(
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rendered.insert(2, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    rendered += ["", *(verdict.sentence for verdict in data.verdicts)] if data.verdicts else []
    rendered += [
        f"gate {gate.name} fails: {gate.sentence}" for gate in data.gates if not gate.passed
    ]
    return "\n".join(rendered)


def render_markdown(data: ReportData) -> str:
    """Return title, main table, verdicts and gates as GitHub's Markdown."""
    table = main_table(data)
    left = _left_columns(table)
    headers = [
        f"{header} ({unit})" if unit else header
        for header, unit in zip(table.headers, table.units, strict=True)
    ]
    rule = [":--" if i in left else "--:" for i in range(len(headers))]
    cells = [[_plain(cell.text()) for cell in line] for line in table.lines]
    parts = [f"# {_plain(data.title)}", _plain(data.summary)]
    parts.append("\n".join(f"| {' | '.join(line)} |" for line in (headers, rule, *cells)))
    if data.verdicts:
        parts.append("\n".join(f"- {_plain(verdict.sentence)}" for verdict in data.verdicts))
    if data.gates:
        marks = {True: "passed", False: "**failed**"}
        gates = (f"- {_plain(g.name)} {marks[g.passed]}: {_plain(g.sentence)}" for g in data.gates)
        parts.append("## Gates\n\n" + "\n".join(gates))
    return "\n\n".join(part for part in parts if part) + "\n"


def format_estimate(estimate: Estimate, scale: float = 1.0, decimals: int = 4) -> Cell:
    """Format value and standard error to the error's second digit, at most to `decimals`."""
    value, error = estimate.value * scale, estimate.standard_error
    if not math.isfinite(value):
        return Cell("∞" if value > 0 else "NaN")
    if error is None or not math.isfinite(error) or error == 0:
        return Cell(format_number(value))
    error *= scale
    decimals = min(decimals, max(0, 1 - math.floor(math.log10(error))))
    return Cell(f"{value:,.{decimals}f}", f"{error:,.{decimals}f}")


def format_number(value: float) -> str:
    """Format a number to four digits, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_count(count: int) -> str:
    """Format a count of weights: 134.5M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def _columns(data: ReportData) -> list[tuple[str, str, Callable[[ModelRow], Cell]]]:
    tasks = {row.quality.task for row in data.rows}
    speed_unit = "tokens/s" if tasks <= {"causal_lm"} else "sequences/s"
    return [
        ("Model", "", lambda row: Cell(row.name)),
        ("Text", "", lambda row: Cell(row.data_name)),
        ("Parameters", "", _parameters),
        ("On disk", "MB", lambda row: _megabytes(row, "size_on_disk_bytes")),
        ("In memory", "MB", lambda row: _megabytes(row, "memory_bytes")),
        *_quality_columns(tasks),
        ("KL to teacher", "nats", lambda row: format_estimate(row.quality.estimate("kl_nats"))),
        ("Agreement", "%", _agreement),
        ("Prefill", speed_unit, _prefill),
        ("Decode", "tokens/s", _decode),
        ("Loss added", "nats", lambda row: format_estimate(row.loss.nats) if row.loss else EMPTY),
        ("Share", "% of loss", _share),
    ]


def _quality_columns(tasks: Set[str]) -> list[tuple[str, str, Callable[[ModelRow], Cell]]]:
    if "sequence_classification" in tasks:
        return [("Accuracy", "%", _accuracy)]
    if "masked_lm" in tasks:
        return [("Pseudo-perplexity", "", _perplexity), ("Accuracy", "%", _accuracy)]
    return [("Perplexity", "", _perplexity)]


def _parameters(row: ModelRow) -> Cell:
    return Cell(format_count(row.cost.parameters)) if row.cost else EMPTY


def _megabytes(row: ModelRow, figure: str) -> Cell:
    return Cell(f"{getattr(row.cost, figure) / MEGABYTE:,.1f}") if row.cost else EMPTY


def _accuracy(row: ModelRow) -> Cell:
    return format_estimate(row.quality.estimate("accuracy"), 100, decimals=2)


def _agreement(row: ModelRow) -> Cell:
    return format_estimate(row.quality.estimate("agreement"), 100, decimals=2)


def _perplexity(row: ModelRow) -> Cell:
    return format_estimate(row.quality.estimate("perplexity"))


def _prefill(row: ModelRow) -> Cell:
    return format_estimate(row.cost.prefill_per_second) if row.cost else EMPTY


def _decode(row: ModelRow) -> Cell:
    speed = row.cost.decode_tokens_per_second if row.cost else None
    return format_estimate(speed) if speed else EMPTY


def _share(row: ModelRow) -> Cell:
    if row.loss is None or row.loss.share is None:
        return EMPTY
    return Cell(f"{100 * row.loss.share:.0f}")


def _left_columns(table: MainTable) -> set[int]:
    return {i for i, header in enumerate(table.headers) if header in ("Model", "Text")}


def _plain(text: str) -> str:
    """Return `text` on one line, without what Markdown or HTML would take for markup."""
    line = " ".join(text.split())
    for mark in "\\`*_[]|#":
        line = line.replace(mark, "\\" + mark)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
