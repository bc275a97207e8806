"""Render the report: one HTML file that needs nothing else."""

from dataclasses import dataclass
from pathlib import Path

from stillroom.evaluation.estimates import Estimate
from stillroom.evaluation.plots import curves_plot, layers_plot, loss_plot, size_quality_plot
from stillroom.evaluation.report_data import (
    Curve,
    LayerError,
    LineageEntry,
    ModelRow,
    ReportData,
)
from stillroom.evaluation.tables import (
    MEGABYTE,
    format_estimate,
    main_table,
    render_markdown,
    render_table,
)

__all__ = [
    "Curve",
    "LayerError",
    "LineageEntry",
    "ModelRow",
    "ReportData",
    "render_markdown",
    "render_report",
    "render_table",
]


@dataclass(frozen=True)
class _Card:
    label: str
    value: str
    note: str


@dataclass(frozen=True)
class _Plot:
    heading: str
    svg: str
    description: str


def render_report(data: ReportData, target: Path) -> None:
    """Write the report to `target`, and its data as JSON beside it (same name, .json).

    The page loads nothing from outside; equal data gives equal bytes.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("stillroom.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        data=data,
        table=main_table(data),
        cards=_cards(data),
        # matplotlib escapes the texts it draws; nothing else may pass unescaped.
        plots=[(plot, Markup(plot.svg)) for plot in _plots(data) if plot.svg],
        format_estimate=format_estimate,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    target.with_suffix(".json").write_text(data.to_json(), encoding="utf-8")


def _plots(data: ReportData) -> list[_Plot]:
    return [
        _Plot(
            "Size against quality",
            size_quality_plot(data.rows),
            "Each model's size on disk and its quality, bars of one standard error. Squares carry "
            "an adapter, diamonds are controls.",
        ),
        _Plot(
            "Loss by stage",
            loss_plot(data.rows),
            "What each stage added to the cross-entropy of the model before it, on the same "
            "text, bars of one standard error paired by document.",
        ),
        _Plot("Training", curves_plot(data.curves), "The losses of each training, by step."),
        _Plot(
            "Error by layer",
            layers_plot(data.layer_errors),
            "Relative output error of every quantized linear, by block; a cross marks one that "
            "fell back to rounding to nearest.",
        ),
    ]


def _cards(data: ReportData) -> list[_Card]:
    """Return the headline: the last model of the chain against the first, on the first text."""
    chain = [
        row for row in data.rows if row.role == "model" and row.data_name == data.rows[0].data_name
    ]
    cards = []
    if len(chain) > 1:
        cards = [*_cost_cards(chain[0], chain[-1]), _quality_card(chain[0], chain[-1])]
    if data.gates:
        passed = sum(gate.passed for gate in data.gates)
        note = "all hold" if passed == len(data.gates) else "not to be published"
        cards.append(_Card("Gates", f"{passed} of {len(data.gates)}", note))
    return cards


def _quality_card(first: ModelRow, last: ModelRow) -> _Card:
    if first.quality.task != "sequence_classification":
        before, after = (row.quality.estimate("perplexity") for row in (first, last))
        label = "Perplexity" if first.quality.task == "causal_lm" else "Pseudo-perplexity"
        return _Card(label, format_estimate(after).text(), f"{first.name}: {_short(before)}")
    before, after = (row.quality.estimate("accuracy") for row in (first, last))
    value = f"{format_estimate(after, 100).text()} %"
    return _Card("Accuracy", value, f"{first.name}: {format_estimate(before, 100).value} %")


def _cost_cards(first: ModelRow, last: ModelRow) -> list[_Card]:
    if first.cost is None or last.cost is None:
        return []
    before, after = first.cost, last.cost
    smaller = before.size_on_disk_bytes / max(1, after.size_on_disk_bytes)
    size = _Card(
        "On disk",
        f"{after.size_on_disk_bytes / MEGABYTE:,.1f} MB",
        f"{smaller:.3g} times smaller than {first.name}",
    )
    slow, fast = before.decode_tokens_per_second, after.decode_tokens_per_second
    label, unit = "Decode", "tokens/s"
    if slow is None or fast is None:
        slow, fast = before.prefill_per_second, after.prefill_per_second
        label, unit = "Speed", after.prefill_unit
    speed = _Card(label, f"{_short(fast)} {unit}", f"{first.name}: {_short(slow)}")
    return [size, speed]


def _short(estimate: Estimate) -> str:
    return format_estimate(estimate).value
