"""Which cells the table has: every quantizer at every setting."""

import os
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.quantization.work import BLOCKS, DRAWS

Method = Literal["stillroom", "gptqmodel", "llmcompressor", "bitsandbytes"]
SHORT = 6  # blocks, where a peer's full run does not fit the time
CALIBRATED = ("gptqmodel", "llmcompressor")
# bits, group size (-1: per channel), symmetric
SETTINGS = [
    (bits, group, symmetric)
    for bits, group in ((4, 64), (3, 64), (4, -1))
    for symmetric in (True, False)
]
MAIN = ((4, 64, True), (3, 64, True))  # measured on all three draws, and on all blocks


@dataclass(frozen=True)
class Cell:
    """One quantizer at one setting on one calibration draw."""

    method: Method
    variant: str
    bits: int
    group_size: int
    symmetric: bool
    blocks: int
    draw: int = 0
    repeat: int | None = None  # a number where only the time is measured
    instructions: Literal["native", "avx2"] = "native"  # that the processor is used with

    @property
    def name(self) -> str:
        """Return the name of the cell's row."""
        grid = "channel" if self.group_size == -1 else f"g{self.group_size}"
        side = "sym" if self.symmetric else "asym"
        last = f"draw{self.draw}" if self.repeat is None else f"time{self.repeat}"
        last += "" if self.instructions == "native" else f"-{self.instructions}"
        return f"{self.method}-{self.variant}-{self.bits}bit-{grid}-{side}-{self.blocks}-{last}"

    @property
    def setting(self) -> tuple[int, int, bool, int]:
        """Return what two cells share that are compared."""
        return self.bits, self.group_size, self.symmetric, self.blocks

    def job(self) -> dict[str, Any]:
        """Return what the quantizer's script needs to know besides paths."""
        return asdict(self)


def table_cells() -> list[Cell]:
    """Return the cells of the table, the most wanted first.

    By default the peers run on the first 6 blocks, but for GPTQModel's defaults at the two main
    settings, and only the main settings have all draws; with FULL=1 everything is whole.
    """
    full = os.environ.get("FULL") == "1"
    cells: list[Cell] = []
    for draw in range(DRAWS):
        for setting in SETTINGS:
            if draw == 0 or full or setting in MAIN:
                cells += _cells(setting, BLOCKS if full else SHORT, draw)
    if not full:
        for setting in SETTINGS:
            cells += [_ours(setting, BLOCKS), _ours(setting, BLOCKS, variant="rtn")]
        cells += [Cell("gptqmodel", "default", *setting, BLOCKS) for setting in MAIN]
    return list(dict.fromkeys(cells))


def timing_cells(repeats: int = 3) -> list[Cell]:
    """Return the cells whose time counts, interleaved, at 4 bits in groups of 64, symmetric.

    The last round keeps every library to AVX2, which most machines have: with native bfloat16
    instructions GPTQModel computes in bfloat16 several times faster.
    """
    kinds: tuple[tuple[Method, str], ...] = (
        ("stillroom", "plain"),
        ("gptqmodel", "default"),
        ("stillroom", "default"),
        ("llmcompressor", "default"),
    )
    return [
        Cell(method, variant, *MAIN[0], SHORT, repeat=repeat)
        for repeat in range(repeats)
        for method, variant in kinds
    ] + [
        Cell(method, variant, *MAIN[0], SHORT, repeat=0, instructions="avx2")
        for method, variant in kinds
    ]


def _cells(setting: tuple[int, int, bool], blocks: int, draw: int) -> list[Cell]:
    peers = [
        Cell(method, variant, *setting, blocks, draw)  # type: ignore[arg-type]
        for method in CALIBRATED
        for variant in ("best", "default")
    ]
    without_text = [_ours(setting, blocks, variant="rtn")]
    if setting == MAIN[0]:
        without_text.append(Cell("bitsandbytes", "default", *setting, blocks))
    return [*peers, *without_text, _ours(setting, blocks, draw)]


def _ours(
    setting: tuple[int, int, bool], blocks: int, draw: int = 0, variant: str = "default"
) -> Cell:
    return Cell("stillroom", variant, *setting, blocks, draw)
