"""KL to fp32 against bytes and against CPU seconds, all quantizers in one picture."""

from pathlib import Path
from typing import Any

MARKS = {"stillroom": "o", "gptqmodel": "s", "llmcompressor": "^", "bitsandbytes": "D"}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows of draw 0 on the most peers' number of blocks, and write the picture."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    fewest = min((row["blocks"] for row in rows), default=0)
    shown = [row for row in rows if row["draw"] == 0 and row["blocks"] == fewest and "kl" in row]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for name in sorted({f"{row['method']} {row['variant']}" for row in shown}):
        own = [row for row in shown if f"{row['method']} {row['variant']}" == name]
        mark = MARKS[own[0]["method"]]
        for axis, key, unit in zip(axes, ("bytes", "cpu_seconds"), (1e6, 1), strict=True):
            xs = [row[key] / unit for row in own]
            axis.plot(xs, [row["kl"] for row in own], mark, label=name, alpha=0.75)
    axes[0].set_ylabel(f"KL to fp32 (nats a token), {fewest} blocks quantized")
    axes[0].set_xlabel("MB of integers, scales and zero points")
    axes[1].set_xlabel("CPU seconds")
    axes[1].set_xscale("log")
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
