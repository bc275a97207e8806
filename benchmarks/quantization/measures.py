"""Measurements that are no cell of the table: growth, memory, crashes. Each is kept as a file."""

import hashlib
import random
import shutil
from pathlib import Path
from statistics import correlation, median
from typing import Any

from benchmarks.claims import Claim, at_least, at_most, write_measure
from benchmarks.quantization.cells import MAIN, SHORT, Cell
from benchmarks.quantization.places import bench_folder
from benchmarks.quantization.rows import run_job
from benchmarks.quantization.work import BLOCKS, CALIBRATION_ROWS

KILLS = 10
MEMORY_RUNS = 3


def measure_path(name: str) -> Path:
    """Return the file of a measurement: a JSON object with `claims`, and whatever else."""
    return bench_folder() / "measures" / f"{name}.json"


def keep(name: str, claims: list[Claim], **more: Any) -> None:
    """Keep a measurement with its claims; the table picks it up from its file."""
    write_measure(measure_path(name), claims, **more)


def measure_growth() -> None:
    """Time plain GPTQ on 5 to 30 blocks and on 8 to 32 rows, and fit straight lines."""
    by_blocks = {n: _seconds(blocks=n) for n in (5, 10, 20, BLOCKS)}
    by_rows = {n: _seconds(rows=n) for n in (8, 16, 32)}
    claims = [
        at_least(
            f"CPU seconds grow linearly in {word} ({min(points)} to {max(points)}): "
            f"share of the variance that a straight line explains",
            0.98,
            linear_share(points),
        )
        for word, points in (("blocks", by_blocks), ("calibration rows", by_rows))
    ]
    keep("growth", claims, seconds_by_blocks=by_blocks, seconds_by_rows=by_rows)


def measure_memory() -> None:
    """Take the default's peak on SmolLM2, and see that 4 times its blocks change nothing.

    The latter by plain GPTQ on half of the rows, which goes through the same steps faster. Peaks
    of the same run differ by a tenth: of the first the largest counts, of the others the median.
    """
    whole = [_run("default", BLOCKS)["peak_bytes"] for _ in range(MEMORY_RUNS)]
    peaks: dict[int, list[int]] = {BLOCKS: [], 4 * BLOCKS: []}
    for _ in range(MEMORY_RUNS):
        for n, found in peaks.items():
            found.append(_run("plain", n, rows=CALIBRATION_ROWS // 2)["peak_bytes"])
    claims = [
        at_most("peak memory for SmolLM2 including the runtime, in GB", 1.0, max(whole) / 1e9),
        at_most(
            f"peak memory at {4 * BLOCKS} blocks over that at {BLOCKS}",
            1.05,
            median(peaks[4 * BLOCKS]) / median(peaks[BLOCKS]),
        ),
    ]
    keep("memory", claims, peak_bytes=whole, plain_peak_bytes=peaks)


def measure_kills() -> None:
    """Kill the default ten times at a random block, rerun, and compare with an undisturbed run."""
    chance = random.Random(0)
    expected = _digest(_killed_and_rerun(None))
    blocks = [chance.randrange(1, SHORT) for _ in range(KILLS)]
    same = sum(_digest(_killed_and_rerun(block)) == expected for block in blocks)
    text = "kill -9 at a random block, ten times: reruns with the bytes of an uninterrupted run"
    keep("kills", [at_least(text, KILLS, same)], killed_after_blocks=blocks)


def linear_share(points: dict[int, float]) -> float:
    """Return R² of the least-squares line through the points."""
    return correlation(list(points), list(points.values())) ** 2


def _seconds(blocks: int = SHORT, rows: int = CALIBRATION_ROWS) -> float:
    return float(_run("plain", blocks, rows=rows)["cpu_seconds"])


def _run(variant: str, blocks: int, **more: Any) -> dict[str, Any]:
    cell = Cell("stillroom", variant, *MAIN[0], blocks, repeat=0)
    return run_job(cell, _folder(f"measure-{variant}-{blocks}"), **more)


def _killed_and_rerun(kill_after: int | None) -> Path:
    """Return the folder that our quantizer wrote, killed once if asked for."""
    cell = Cell("stillroom", "default", *MAIN[0], SHORT, repeat=0)
    folder = _folder("measure-kill")
    more: dict[str, Any] = {"rows": CALIBRATION_ROWS // 2, "checkpoints": str(folder / "kept")}
    if kill_after is not None:
        try:
            run_job(cell, folder, **more, kill_after=kill_after)
        except RuntimeError as error:
            if " ended with -9" not in str(error):
                raise
        else:
            raise RuntimeError("the process was to be killed, and ended by itself")
    run_job(cell, folder, **more)
    return folder / "out.packed"


def _folder(name: str) -> Path:
    folder = bench_folder() / "running" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(path.name.encode())
            total.update(path.read_bytes())
    return total.hexdigest()
