"""Draw the report's plots as SVG that takes its colours from the page."""

import io
import re
import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from stillroom.evaluation.report_data import Curve, LayerError, ModelRow
from stillroom.evaluation.tables import MEGABYTE

# Matplotlib knows no CSS: it draws in these colours, which become the page's variables.
INK, MUTED, LINE = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0101{10 + i}" for i in range(8))
CONTROL, BAD = "#010105", "#010106"
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", CONTROL: "--muted", BAD: "--bad"} | {
    colour: f"--series-{i + 1}" for i, colour in enumerate(SERIES)
}
MOST_POINTS = 400


def size_quality_plot(rows: Sequence[ModelRow]) -> str:
    """Return size on disk against quality, one panel a text, models of one panel comparable."""
    panels = [
        (name, [row for row in rows if row.data_name == name and row.cost])
        for name in dict.fromkeys(row.data_name for row in rows)
    ]
    panels = [(name, members) for name, members in panels if members]
    if not panels:
        return ""
    figure, axes = _figure(len(panels), height=3.6)
    for axis, (name, members) in zip(axes, panels, strict=True):
        task = members[0].quality.task
        metric = "accuracy" if task == "sequence_classification" else "perplexity"
        estimates = [row.quality.estimate(metric) for row in members]  # type: ignore[arg-type]
        scale = 1 if metric == "perplexity" else 100
        x = [row.cost.size_on_disk_bytes / MEGABYTE for row in members if row.cost]
        y = [estimate.value * scale for estimate in estimates]
        errors = [(estimate.standard_error or 0.0) * scale for estimate in estimates]
        for i, row in enumerate(members):
            colour = CONTROL if row.role == "control" else SERIES[0 if row.role == "model" else 1]
            marker = {"model": "o", "adapter": "s", "control": "D"}[row.role]
            axis.errorbar(
                x[i], y[i], errors[i], fmt=marker, color=colour, capsize=3, markersize=7, lw=1.4
            )
        _pad(axis, x, [v + sign * e for v, e in zip(y, errors, strict=True) for sign in (-1, 1)])
        _label_points(axis, x, y, [row.name for row in members])
        axis.set_title(name, loc="left", parse_math=False, color=INK)
        axis.set_xlabel("on disk (MB)")
        named = "pseudo-perplexity" if task == "masked_lm" else "perplexity"
        axis.set_ylabel(f"{named} (lower is better)" if scale == 1 else "accuracy (%)")
    return _svg(figure, "size-quality")


def loss_plot(rows: Sequence[ModelRow]) -> str:
    """Return the nats that each stage added, with standard errors."""
    steps = [(row, row.loss) for row in rows if row.loss]
    if not steps:
        return ""
    figure, (axis,) = _figure(1, height=0.9 + 0.42 * len(steps))
    for place, (row, step) in enumerate(steps):
        colour = SERIES[1 if row.role == "adapter" else 0]
        error = step.nats.standard_error or 0.0
        axis.barh(
            place, step.nats.value, xerr=error, color=colour, ecolor=INK, capsize=3, height=0.6
        )
    labels = [f"{step.previous} → {step.name}" for _, step in steps]
    axis.set_yticks(range(len(steps)), labels, parse_math=False)
    axis.invert_yaxis()
    axis.axvline(0, color=INK, lw=0.8)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("added cross-entropy (nats per prediction); left of 0 is a gain")
    return _svg(figure, "loss")


def curves_plot(curves: Sequence[Curve]) -> str:
    """Return training curves, one panel a stage."""
    stages = list(dict.fromkeys(curve.stage for curve in curves if curve.steps))
    if not stages:
        return ""
    figure, axes = _figure(len(stages), height=3.1)
    for axis, stage in zip(axes, stages, strict=True):
        members = [curve for curve in curves if curve.stage == stage and curve.steps]
        for i, curve in enumerate(members):
            stride = max(1, -(-len(curve.steps) // MOST_POINTS))
            few = len(curve.steps) <= 12
            axis.plot(
                curve.steps[::stride],
                curve.values[::stride],
                color=SERIES[i % len(SERIES)],
                lw=1.6,
                marker="o" if few else None,
                markersize=4,
            )
        _legend(axis, [curve.name for curve in members])
        axis.set_title(stage, loc="left", parse_math=False, color=INK, pad=24)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(members[0].unit, parse_math=False)
    return _svg(figure, "curves")


def layers_plot(errors: Sequence[LayerError]) -> str:
    """Return one bar a quantized linear, grouped by block, coloured by its place in the block."""
    if not errors:
        return ""
    figure, (axis,) = _figure(1, height=3.1)
    kinds = list(dict.fromkeys(error.module.rpartition(".")[2] for error in errors))
    place, ticks = 0.0, []
    for block, members in groupby(errors, key=lambda error: error.block):
        start = place
        for error in members:
            kind = kinds.index(error.module.rpartition(".")[2])
            colour = SERIES[kind % len(SERIES)]
            axis.bar(place, error.relative_error, width=1.0, color=colour)
            if error.fallback:
                axis.plot(place, error.relative_error, marker="x", color=BAD, markersize=6)
            place += 1
        ticks.append(((start + place - 1) / 2, "other" if block is None else str(block)))
        place += 1.5
    _legend(axis, kinds, columns=8)
    stride = max(1, -(-len(ticks) // 32))
    axis.set_xticks([t for t, _ in ticks[::stride]], [label for _, label in ticks[::stride]])
    axis.margins(x=0.01)
    axis.grid(visible=False, axis="x")
    axis.set_xlabel("block")
    axis.set_ylabel("relative output error")
    return _svg(figure, "layers")


def _figure(panels: int, height: float) -> tuple[Any, list[Any]]:
    """Return a figure of the page's width, three panels a line at most."""
    from matplotlib.figure import Figure

    columns = min(panels, 3)
    lines = -(-panels // columns)
    figure = Figure(figsize=(9.2, height * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in grid:
        axis.set_facecolor("none")
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(LINE)
        axis.tick_params(colors=MUTED, labelcolor=MUTED, labelsize=9, length=3)
        axis.xaxis.label.set(color=MUTED, size=9)
        axis.yaxis.label.set(color=MUTED, size=9)
        axis.title.set(size=10)
        axis.grid(color=LINE, lw=0.6)
        axis.set_axisbelow(True)
    for spare in grid[panels:]:
        spare.set_axis_off()
    return figure, list(grid[:panels])


def _pad(axis: Any, x: Sequence[float], y: Sequence[float]) -> None:
    height = max(y) - min(y) or abs(max(y)) or 1.0
    axis.set_xlim(0, 1.12 * max(x) or 1.0)
    axis.set_ylim(min(y) - 0.12 * height, max(y) + 0.12 * height)


def _label_points(axis: Any, x: Sequence[float], y: Sequence[float], names: Sequence[str]) -> None:
    """Write the names beside the points, pushed upwards where they would meet."""
    axis.figure.draw_without_rendering()
    points = 72 / axis.figure.dpi
    spots = axis.transData.transform(list(zip(x, y, strict=True))) * points  # (models, 2), points
    middle = (axis.bbox.x0 + axis.bbox.width / 2) * points
    taken: list[tuple[float, float, float]] = []
    for i in sorted(range(len(names)), key=lambda i: float(spots[i][1])):
        across, up = float(spots[i][0]), float(spots[i][1])
        right, width = across <= middle, 9 + 5.5 * len(names[i])
        left, end = (across, across + width) if right else (across - width, across)
        height = up
        for other_left, other_end, other in sorted(taken, key=lambda place: place[2]):
            if left < other_end and other_left < end and abs(height - other) < 12:
                height = other + 12
        taken.append((left, end, height))
        axis.annotate(
            names[i],
            (x[i], y[i]),
            xytext=(9 if right else -9, height - up),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            color=INK,
            size=9,
            parse_math=False,
        )


def _legend(axis: Any, names: Sequence[str], columns: int = 3) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=SERIES[i % len(SERIES)]) for i in range(len(names))]
    legend = axis.legend(
        patches,
        list(names),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=0.9,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _svg(figure: Any, name: str) -> str:
    """Return the figure as an <svg> element: the same bytes each time, no outside reference."""
    import matplotlib

    buffer = io.StringIO()
    options: Any = {"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        # A name in a script that the measuring font lacks is still drawn by the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", text, count=1)
    text = text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    # Several plots share one page: their ids must not meet.
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text
