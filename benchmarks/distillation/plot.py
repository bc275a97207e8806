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
    figure = pyplot.figure(figsize=(11, 3.2 * -(-len(drawn) // 2)), layout="constrained")
    for place, (name, draw) in enumerate(drawn.items(), 1):
        axis = figure.add_subplot(-(-len(drawn) // 2), 2, place)
        draw(axis, measures[name]["rows"])
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _targets(axis: Any, rows: list[dict[str, Any]]) -> None:
    labels = [f"{row['head']} + {row['draws']}" for row in rows]
    axis.plot(labels, [row["squared_error"] for row in rows], "o-")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("words kept + words drawn, in the default's bytes")
    axis.set_ylabel("squared error of the targets")


def _caches(axis: Any, rows: list[dict[str, Any]]) -> None:
    _bars(
        axis,
        [row["targets"] for row in rows],
        [row["over_dense"] for row in rows],
        [row["standard_error"] for row in rows],
    )
    axis.axvline(1.0, color="grey", linewidth=0.8)
    axis.set_xlim(left=0.9)
    axis.set_xlabel("KL to the teacher over that of dense logits")


def _depths(axis: Any, rows: list[dict[str, Any]]) -> None:
    trained = [row for row in rows if row.get("untrained_kl_nats")]
    sizes = [row["parameters"] / 1e6 for row in trained]
    axis.plot(sizes, [row["untrained_kl_nats"] for row in trained], "o-", label="before training")
    axis.plot(sizes, [row["kl_nats"] for row in trained], "o-", label="after it")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("million parameters")
    axis.set_ylabel("KL to the teacher, nats a token")
    axis.legend(fontsize=8)


def _sst2(axis: Any, rows: list[dict[str, Any]]) -> None:
    errors = [row["standard_error"] for row in rows]
    _bars(axis, [row["model"] for row in rows], [row["accuracy"] for row in rows], errors)
    axis.set_xlim(left=50)
    axis.set_xlabel("SST-2: right, %; the error is that of the loss")


def _mixture(axis: Any, rows: list[dict[str, Any]]) -> None:
    nats = [row["nats_per_byte"] for row in rows]
    _bars(axis, [row["model"] for row in rows], nats, None)
    axis.set_xlim(left=0.9 * min(nats))
    axis.set_xlabel("cross-entropy on other text, nats a byte")


def _bars(axis: Any, names: list[str], values: list[float], errors: list[float] | None) -> None:
    axis.barh(names, values, xerr=errors, height=0.6)
    axis.invert_yaxis()


PANELS: dict[str, Callable[[Any, list[dict[str, Any]]], None]] = {
    "targets": _targets,
    "caches": _caches,
    "depths": _depths,
    "sst2": _sst2,
    "mixture": _mixture,
}
