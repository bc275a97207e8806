"""Draw what a search for the intrinsic dimension found."""

from pathlib import Path

from stillroom.intrinsic_dimension.search import Dimension

INK, LINE, ACCENT, BAND = "#1a1a1a", "#c8c8c8", "#20639b", "#20639b33"


def write_plot(found: Dimension, file: Path) -> None:
    """Write the curve, its isotonic fit, and the dimension with its interval as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    x = [point.dimension for point in found.curve]
    axis.errorbar(
        x,
        [100 * point.share for point in found.curve],
        [100 * point.standard_error for point in found.curve],
        fmt="o",
        color=INK,
        capsize=3,
        label=f"mean of {found.seeds} seeds, ± standard error",
    )
    axis.plot(x, [100 * point.fitted for point in found.curve], color=ACCENT, label="isotonic fit")
    axis.axhline(100 * found.share, color=INK, lw=0.8, ls="--")
    if found.dimension is not None:
        low, high = found.interval
        axis.axvline(found.dimension, color=ACCENT, lw=0.8)
        axis.axvspan(low or x[-1], high or x[-1], color=BAND, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("dimension of the subspace")
    axis.set_ylabel("reached, % of full fine-tuning")
    axis.set_title(found.sentence(), loc="left", fontsize=9, parse_math=False)
    axis.grid(color=LINE, lw=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right", fontsize=9)
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
