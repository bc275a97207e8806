"""The product with a packed weight, y = x Wᵀ + b, as LLVM code: the loops that all products share.

With q the integers of a group's inputs k, z and s the group's zero points and scales:

    y[n] = b[n] + Σ_groups s[n] (Σ_k x[k] q[k, n] − z[n] Σ_k x[k])

Code is written for one number of bits and of tokens, with a register for each running sum: what
a vectorizer makes of loops is not left to chance. The weight is read once, in the order of the
checkpoint's rows, and is unpacked in registers only.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from llvmlite import ir

from stillroom.quantization.kernels.llvm_writer import F16, F32, I32, I64, POINTER, Writer
from stillroom.quantization.packing import WORD, values_per_unit

LAYER = ("qweight", "scales", "zeros", "bias", "chunks", "chunk_count", "inputs", "outputs")
"""The record of a layer, 8 bytes a field: five addresses, then three counts."""
CHUNK = ("start", "stop", "low", "high", "group")
"""One row of `chunks`, int64: inputs from start to stop, whole units; those from low to high are
of the group, the others of its neighbours."""
LONGEST_CHUNK = 128
NARROWEST = 4
"""Outputs are a multiple of it: rows of packed zero points are whole words."""
ROWS_AHEAD = 8
"""Rows of words that are fetched early: the processor does not foresee the next chunk's. It makes
a layer that is in no cache 1.6-2 times as fast, and costs one that is in a cache nothing."""
LINE = 16
"""Words in a cache line."""
PIECES = 3
"""Bytes of an input as an integer."""
MOST_BITS_IN_PAIRS = 4
"""The processor's sums of two byte products are int16, which sums of wider values would leave."""

ByteProducts = Literal[0, 2, 4]

Sums = list[list[list[ir.Value]]]
"""Addresses of the running sums, (tokens, vectors, parts): the optimizer makes them registers."""
Words = list[list[ir.Value]]
"""The words of one unit, (vectors, words)."""


@dataclass(frozen=True)
class Shape:
    """What one product is written for."""

    bits: int
    tokens: int
    lanes: int
    """Floats in a vector register."""
    registers: int
    byte_products: ByteProducts = 0
    """How many products of bytes the processor sums in one instruction."""
    byte_shifts: bool = False
    """Whether it shifts each byte by a distance of its own."""
    wide_scales: bool = False
    """Whether scales are float32 instead of float16."""

    @property
    def unit(self) -> int:
        """Inputs whose values fill whole words."""
        return values_per_unit(self.bits)

    @property
    def rows(self) -> int:
        """Words of a unit."""
        return self.unit * self.bits // WORD

    @property
    def in_integers(self) -> bool:
        """Whether sums are integers: where that is faster, and there are registers for them."""
        if self.byte_products == 2 and (self.bits > MOST_BITS_IN_PAIRS or self.tokens > 2):
            return False
        return self.byte_products > 0 and self._vectors_of(self._integers) > 0

    @property
    def vectors(self) -> int:
        """Vectors of outputs in the widest tile: as many as leave no running sum on the stack."""
        sums = self._integers if self.in_integers else self.tokens
        return max(1, min(4, self._vectors_of(sums)))

    def _vectors_of(self, sums: int) -> int:
        """Return for how many vectors of so many running sums there are registers."""
        needed = sums + self.rows + 1  # and an unpacked value
        return (self.registers - 4) // needed  # 4: masks and inputs

    @property
    def _integers(self) -> int:
        """Running sums of one vector of outputs in integers."""
        sums = PIECES * self.tokens
        return 2 * sums if self.byte_products == 2 else sums  # a unit's, int16, and all units'


class Product(ABC):
    """Writes `columns(layer, x, y, blocks, begin, end)`: the outputs from begin to end."""

    def __init__(self, function: ir.Function, shape: Shape) -> None:
        self.w = Writer(function)
        self.shape = shape
        layer, self.x, self.y, self.blocks, self.begin, self.end = function.args
        addresses = [self.w.load(layer, I64(i), POINTER) for i in range(5)]
        self.qweight, self.scales, self.zeros, self.bias, self.chunks = addresses
        counts = [self.w.load(layer, I64(i), I64) for i in range(5, len(LAYER))]
        self.chunk_count, self.inputs, self.outputs = counts

    def write(self) -> None:
        """Write the loops: over blocks of tokens, chunks of inputs, tiles of outputs."""
        w, shape = self.w, self.shape
        lanes = shape.lanes
        tiles = dict.fromkeys([(lanes, shape.vectors), (lanes, 1), (NARROWEST, 1)])
        with w.loop(w.counter(I64(0)), self.blocks, 1) as block:
            self.first_token = w.build.mul(block, I64(shape.tokens))
            with w.loop(w.counter(I64(0)), self.chunk_count, 1) as self.chunk:
                row = w.build.mul(self.chunk, I64(len(CHUNK)))
                fields = [w.load(self.chunks, w.add(row, I64(i)), I64) for i in range(len(CHUNK))]
                self.start, self.stop, self.low, self.high, self.group = fields
                self._stage()
                column = w.counter(self.begin)
                for width, vectors in tiles:
                    with w.loop(column, self.end, width * vectors) as first:
                        self._tile(first, width, vectors)
        w.build.ret_void()

    @abstractmethod
    def _stage(self) -> None:
        """Lay a chunk of x out as `_unit` reads it, and sum it by token."""

    @abstractmethod
    def _begin(self, lanes: int, vectors: int) -> Sums:
        """Return running sums of a tile, all zero."""

    @abstractmethod
    def _unit(self, offset: ir.Value, words: Words, sums: Sums) -> None:
        """Add x[k] q[k, n] for the inputs k of the unit that begins at `offset` in the chunk."""

    @abstractmethod
    def _finish(self, first: ir.Value, lanes: int, sums: Sums) -> None:
        """Apply zero points and scales, and add the sums to y."""

    def _tile(self, first: ir.Value, lanes: int, vectors: int) -> None:
        """Add a chunk's part to `vectors` times `lanes` outputs."""
        w, shape = self.w, self.shape
        sums = self._begin(lanes, vectors)
        rows = shape.rows
        row = w.build.sdiv(w.build.mul(self.start, I64(shape.bits)), I64(WORD))
        position = w.counter(w.add(w.build.mul(row, self.outputs), first))
        with w.loop(w.counter(self.start), self.stop, shape.unit) as k:
            here = w.build.load(position, typ=I64)
            words = self._words(here, rows, lanes, vectors)
            self._unit(w.build.sub(k, self.start), words, sums)
            w.build.store(w.add(here, w.build.mul(self.outputs, I64(rows))), position)
        self._finish(first, lanes, sums)

    def _words(self, here: ir.Value, rows: int, lanes: int, vectors: int) -> Words:
        w = self.w
        words: Words = [[] for _ in range(vectors)]
        for _ in range(rows):
            for v in range(vectors):
                words[v].append(w.load(self.qweight, w.add(here, I64(v * lanes)), I32, lanes))
            ahead = w.add(here, w.build.mul(self.outputs, I64(ROWS_AHEAD)))
            for line in range(0, vectors * lanes, LINE):
                w.prefetch(self.qweight, w.add(ahead, I64(line)), I32)
            here = w.add(here, self.outputs)
        return words

    def _scale(self, on_grid: ir.Value, lanes: int) -> ir.Value:
        """Return scales as floats, from the place `on_grid` of (groups, outputs) on."""
        w = self.w
        if self.shape.wide_scales:
            return w.load(self.scales, on_grid, F32, lanes)
        return w.build.fpext(w.load(self.scales, on_grid, F16, lanes), ir.VectorType(F32, lanes))

    def _add_to_output(
        self, token: int, column: ir.Value, total: ir.Value, scale: ir.Value
    ) -> None:
        """Add total * scale to y, or to the bias in the first chunk."""
        w, build = self.w, self.w.build
        row = build.mul(self.outputs, w.add(self.first_token, I64(token)))
        target = w.at(self.y, w.add(row, column), F32)
        fresh = build.icmp_signed("==", self.chunk, I64(0))
        before = build.select(fresh, w.at(self.bias, column, F32), target)
        old = w.load(before, I64(0), F32, total.type.count)
        w.store(w.multiply_add(total, scale, old), target, I64(0), F32)
