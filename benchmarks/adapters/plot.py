"""The measurements as one picture, a panel a question."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def plot(measures: dict[str, Any], path: Path) -> None:
    """Draw a panel for each measurement that has one and is done, and write the picture."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    drawn = {name: draw for name, draw in PANELS.items() if name in measures}
    if not drawn:
        return
    figure, axes = pyplot.subplots(
        len(drawn), 1, figsize=(9, 4.5 * len(drawn)), layout="constrained", squeeze=False
    )
    for axis, (name, draw) in zip(axes[:, 0], drawn.items(), strict=True):
        draw(axis, measures[name])
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _sst2(axis: Any, found: dict[str, Any]) -> None:
    """Score against trained parameters, as Houlsby et al. plot them (1902.00751, figure 1)."""
    rows = found["rows"]
    for base, marker in zip(dict.fromkeys(row["base"] for row in rows), "os", strict=True):
        here = [row for row in rows if row["base"] == base]
        axis.errorbar(
            [row["trained"] for row in here],
            [row["accuracy"] for row in here],
            yerr=[row["standard_error"] for row in here],
            fmt=marker,
            label=base,
            capsize=2,
            alpha=0.8,
        )
        if marker == "o":
            for row in here:
                axis.annotate(
                    row["method"], (row["trained"], row["accuracy"]), (4, 5),
                    textcoords="offset points", fontsize=7,
                )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters, without the head")
    axis.set_ylabel("SST-2: right, %; the error is that of the loss")


def _dimension(axis: Any, found: dict[str, Any]) -> None:
    """Share of full fine-tuning's accuracy in each dimension, and where it is enough."""
    for number, row in enumerate(found["rows"]):
        curve, color = found["curves"][row["model"]], f"C{number}"
        x = [point["dimension"] for point in curve]
        shares, errors = (
            [100 * point[key] for point in curve] for key in ("share", "standard_error")
        )
        axis.errorbar(x, shares, errors, fmt="o", capsize=2, color=color)
        fitted = [100 * point["fitted"] for point in curve]
        axis.plot(x, fitted, color=color, label=row["model"])
        if row["dimension"] is not None:
            axis.axvline(row["dimension"], color=color, linewidth=0.8)
            ends = (row["low"] or x[0], row["high"] or x[-1])
            axis.axvspan(*ends, color=color, alpha=0.12, linewidth=0)
    axis.axhline(found["percent"], color="grey", linewidth=0.8, linestyle="--")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("dimension of the subspace")
    axis.set_ylabel("SST-2: reached, % of full fine-tuning")


PANELS: dict[str, Callable[[Any, dict[str, Any]], None]] = {"sst2": _sst2, "dimension": _dimension}
