"""Score against trained parameters, as Houlsby et al. plot them (1902.00751, figure 1)."""

from pathlib import Path
from typing import Any


def plot(measures: dict[str, Any], path: Path) -> None:
    """Draw every method on both bases, and write the picture."""
    if "sst2" not in measures:
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    rows = measures["sst2"]["rows"]
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
    axis.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
