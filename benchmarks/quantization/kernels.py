"""Time the packed linear against fp32 nn.Linear: `python -m benchmarks.quantization.kernels`.

Both are called in turn and the medians compared. "hot": one layer again and again, from the
caches. "cold": as many layers in turn as a model has, each from memory, as in decode.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.quantization.kernels.report import output_difference
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.packing import pack
from stillroom.quantization.rounding import round_to_nearest

SHAPES = ((576, 192), (576, 576), (576, 1536), (1536, 576), (4096, 4096), (4096, 11008))
"""(inputs, outputs): the linears of SmolLM2-135M, and of a model of 7 billion weights."""
GROUP_SIZE = 64
COLD_BYTES = 2**28  # of fp32 weights: more than a cache holds, of the packed ones too
LONGEST = 0.05  # seconds that one repetition of one side takes, about


@dataclass(frozen=True)
class Row:
    """One comparison; times are medians of a call."""

    inputs: int
    outputs: int
    bits: int
    tokens: int
    threads: int
    state: Literal["hot", "cold"]
    kernel: str
    packed_us: float
    fp32_us: float
    ratio: float  # median of packed over fp32 in the same repetition
    difference: float  # largest, over the largest output, against float64


def compare(
    shapes: tuple[tuple[int, int], ...],
    bits: tuple[int, ...],
    tokens: tuple[int, ...],
    threads: tuple[int, ...],
    repeats: int,
    clock: Callable[[], float],
) -> Iterator[Row]:
    """Yield a row for each combination; layers are made once a shape and number of bits."""
    for inputs, outputs in shapes:
        copies = max(2, COLD_BYTES // (4 * inputs * outputs))
        for each in bits:
            packed = [_packed(inputs, outputs, each)]
            dense = [packed[0].to_linear()]
            # The time depends on where the weights lie, not on what they are.
            packed += [copy.deepcopy(packed[0]) for _ in range(copies - 1)]
            dense += [copy.deepcopy(dense[0]) for _ in range(copies - 1)]
            for team in threads:
                torch.set_num_threads(team)
                for count in tokens:
                    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(0))
                    for state, some in (("hot", 1), ("cold", copies)):
                        sides = (packed[:some], dense[:some])
                        ours, theirs, ratio = _time(*sides, x, repeats, clock)
                        yield Row(
                            inputs, outputs, each, count, team, state, packed[0].kernel,
                            ours, theirs, ratio, output_difference(packed[0], x),
                        )  # fmt: skip


def _packed(inputs: int, outputs: int, bits: int) -> QuantizedLinear:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    options = QuantizationOptions(bits, GROUP_SIZE)  # type: ignore[arg-type]
    return QuantizedLinear(pack(round_to_nearest(weight, options).weight), None, bits)


@torch.inference_mode()
def _time(
    packed: list[QuantizedLinear],
    dense: list[nn.Linear],
    x: Tensor,
    repeats: int,
    clock: Callable[[], float],
) -> tuple[float, float, float]:
    """Return the medians in microseconds a call, and that of the ratio."""
    sides: tuple[list[nn.Module], list[nn.Module]] = ([*packed], [*dense])
    for layers in sides:
        for layer in layers:
            layer(x)
    start = time.perf_counter()
    for layer in sides[1]:
        layer(x)
    rounds = max(1, min(50, int(LONGEST / (time.perf_counter() - start))))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for layers, taken in zip(sides, seconds, strict=True):
            start = clock()
            for _ in range(rounds):
                for layer in layers:
                    layer(x)
            taken.append((clock() - start) / rounds / len(layers))
    ours, theirs = (1e6 * statistics.median(taken) for taken in seconds)
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    return ours, theirs, ratio


def main() -> None:
    """Print the table, and write it as JSON where --json says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--cpu-time", action="store_true", help="on a busy machine, with one thread: CPU time"
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    rows = _print_rows(options)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _print_rows(options: argparse.Namespace) -> list[Row]:
    clock = time.process_time if options.cpu_time else time.perf_counter
    choices = (tuple(options.bits), tuple(options.tokens), tuple(options.threads))
    rows = []
    print("inputs outputs bits tokens threads state  packed µs   fp32 µs  ratio  difference")
    for row in compare(SHAPES[: options.shapes], *choices, options.repeats, clock):
        rows.append(row)
        print(
            f"{row.inputs:6} {row.outputs:7} {row.bits:4} {row.tokens:6} {row.threads:7} "
            f"{row.state:5} {row.packed_us:10.1f} {row.fp32_us:9.1f} {row.ratio:6.2f} "
            f"{row.difference:11.1e}",
            flush=True,
        )
    worst = max(rows, key=lambda row: row.ratio)
    print(f"largest ratio {worst.ratio:.2f}: {worst}")
    return rows


if __name__ == "__main__":
    main()
