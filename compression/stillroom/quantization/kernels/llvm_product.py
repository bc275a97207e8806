"""The product with a packed weight, y = x Wᵀ + b, as LLVM code.

With q the integers of a group's inputs k, z and s the group's zero points and scales:

    y[n] = b[n] + Σ_groups s[n] (Σ_k x[k] q[k, n] − z[n] Σ_k x[k])

Code is written for one number of bits and of tokens, with a register for each running sum: what
a vectorizer makes of loops is not left to chance. The weight is read once, in the order of the
checkpoint's rows, and is unpacked in registers only.
"""

from dataclasses import dataclass

from llvmlite import ir

from stillroom.quantization.kernels.llvm_writer import (
    F16,
    F32,
    I8,
    I32,
    I64,
    POINTER,
    VOID,
    Writer,
    factors,
    vector,
)
from stillroom.quantization.packing import WORD, values_per_unit

LAYER = ("qweight", "scales", "zeros", "bias", "chunks", "chunk_count", "inputs", "outputs")
"""The record of a layer, 8 bytes a field: five addresses, then three counts."""
CHUNK = ("start", "stop", "low", "high", "group")
"""One row of `chunks`, int64: inputs from start to stop, whole units; those from low to high are
of the group, the others of its neighbours."""
LONGEST_CHUNK = 128
RUN = ("layer", "x", "y", "blocks")
NARROWEST = 4
"""Outputs are a multiple of it: rows of packed zero points are whole words."""
ROWS_AHEAD = 8
"""Rows of words that are fetched early: the processor does not foresee the next chunk's. It makes
a layer that is in no cache 1.6-2 times as fast, and costs one that is in a cache nothing."""
LINE = 16
"""Words in a cache line."""
MULTIPLIERS = 8
"""Sums that must be independent to keep two multipliers with a latency of 4 cycles busy."""

Sums = list[list[list[ir.Value]]]
"""Addresses of the running sums, (tokens, vectors, chains): the optimizer makes them registers."""


@dataclass(frozen=True)
class Shape:
    """What one product is written for."""

    bits: int
    tokens: int
    lanes: int
    """Floats in a vector register."""
    registers: int
    wide_scales: bool = False
    """Whether scales are float32 instead of float16."""

    @property
    def unit(self) -> int:
        """Inputs whose values fill whole words."""
        return values_per_unit(self.bits)

    @property
    def vectors(self) -> int:
        """Vectors of outputs in the widest tile."""
        free = self.registers - 6  # for words, masks, unpacked values and an input
        return max(1, min(4, free // self.tokens))


def write_module(shape: Shape, parallel: bool) -> ir.Module:
    """Return a module with `launch(layer, x, y, blocks, threads)`.

    x is (blocks * tokens, inputs) and y (blocks * tokens, outputs), float32, contiguous. `layer`
    points to a record with the fields of LAYER: qweight (inputs * bits / 32, outputs) int32,
    scales (groups, outputs), zeros (groups, outputs) uint8, bias (outputs,) float32, chunks
    (chunk_count, 5) int64 with the fields of CHUNK.
    """
    module = ir.Module(name=f"packed_{shape.bits}_bits_{shape.tokens}_tokens")
    kind = ir.FunctionType(VOID, [POINTER, POINTER, POINTER, I64, I64, I64])
    columns = ir.Function(module, kind, "columns")
    columns.linkage = "internal"
    Product(columns, shape).write()
    launch = ir.FunctionType(VOID, [POINTER, POINTER, POINTER, I64, I64])
    _write_launch(ir.Function(module, launch, "launch"), columns, shape.lanes, parallel)
    return module


def _write_launch(launch: ir.Function, columns: ir.Function, lanes: int, parallel: bool) -> None:
    layer, x, y, blocks, threads = launch.args
    w = Writer(launch)
    if parallel:
        module = launch.module
        task = ir.Function(module, ir.FunctionType(VOID, [POINTER]), "task")
        task.linkage = "internal"
        _write_task(task, columns, lanes)
        kind = ir.FunctionType(VOID, [POINTER, POINTER, I32, I32])
        team = ir.Function(module, kind, "stillroom_GOMP_parallel")
        run = w.variable(I64, len(RUN))
        with w.build.if_then(w.build.icmp_signed(">", threads, I64(1))):
            addresses = [w.build.ptrtoint(address, I64) for address in (layer, x, y)]
            for i, value in enumerate((*addresses, blocks)):
                w.store(value, run, I64(i), I64)
            w.build.call(team, [task, run, w.build.trunc(threads, I32), I32(0)])
            w.build.ret_void()
    outputs = w.load(layer, I64(LAYER.index("outputs")), I64)
    w.build.call(columns, [layer, x, y, blocks, I64(0), outputs])
    w.build.ret_void()


def _write_task(task: ir.Function, columns: ir.Function, lanes: int) -> None:
    """One thread's outputs: its share of the whole vectors; the last thread's, to the end."""
    number, count = (
        ir.Function(task.module, ir.FunctionType(I32, []), f"stillroom_omp_get_{name}")
        for name in ("thread_num", "num_threads")
    )
    w = Writer(task)
    layer, x, y = (w.load(task.args[0], I64(i), POINTER) for i in range(3))
    blocks = w.load(task.args[0], I64(3), I64)
    outputs = w.load(layer, I64(LAYER.index("outputs")), I64)
    thread = w.build.sext(w.build.call(number, []), I64)
    threads = w.build.sext(w.build.call(count, []), I64)
    whole = w.build.sdiv(outputs, I64(lanes))

    def border(index: ir.Value) -> ir.Value:
        return w.build.mul(w.build.sdiv(w.build.mul(whole, index), threads), I64(lanes))

    after = w.add(thread, I64(1))
    is_last = w.build.icmp_signed("==", after, threads)
    end = w.build.select(is_last, outputs, border(after))
    w.build.call(columns, [layer, x, y, blocks, border(thread), end])
    w.build.ret_void()


class Product:
    """Writes `columns(layer, x, y, blocks, begin, end)`: the outputs from begin to end."""

    def __init__(self, function: ir.Function, shape: Shape) -> None:
        self.w = Writer(function)
        self.shape = shape
        layer, self.x, self.y, self.blocks, self.begin, self.end = function.args
        addresses = [self.w.load(layer, I64(i), POINTER) for i in range(5)]
        self.qweight, self.scales, self.zeros, self.bias, self.chunks = addresses
        counts = [self.w.load(layer, I64(i), I64) for i in range(5, len(LAYER))]
        self.chunk_count, self.inputs, self.outputs = counts
        self.staged = self.w.variable(F32, LONGEST_CHUNK * shape.tokens)  # (chunk, tokens)
        self.totals = self.w.variable(F32, shape.tokens)  # Σ_k x[k]
        self.factors = factors(function.module, shape.bits)

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

    def _stage(self) -> None:
        """Copy a chunk of x so that an input's tokens are neighbours, and sum it by token."""
        w, shape = self.w, self.shape
        for t in range(shape.tokens):
            w.store(F32(0.0), self.totals, I64(t), F32)
        with w.loop(w.counter(self.start), self.stop, 1) as k:
            build = w.build
            offset = build.sub(k, self.start)
            own = build.and_(
                build.icmp_signed(">=", k, self.low), build.icmp_signed("<", k, self.high)
            )
            factor = w.load(self.factors, build.urem(offset, I64(shape.unit)), F32)
            for t in range(shape.tokens):
                row = build.mul(self.inputs, w.add(self.first_token, I64(t)))
                value = build.select(own, w.load(self.x, w.add(row, k), F32), F32(0.0))
                where = w.add(build.mul(offset, I64(shape.tokens)), I64(t))
                w.store(build.fmul(value, factor), self.staged, where, F32)
                total = build.fadd(w.load(self.totals, I64(t), F32), value)
                w.store(total, self.totals, I64(t), F32)

    def _tile(self, first: ir.Value, lanes: int, vectors: int) -> None:
        """Add a chunk's part to `vectors` times `lanes` outputs."""
        w, shape = self.w, self.shape
        floats = ir.VectorType(F32, lanes)
        # Few sums would each wait for their last addition: they are split into chains.
        chains = max(1, min(shape.unit, MULTIPLIERS // (shape.tokens * vectors)))
        sums: Sums = [
            [[w.variable(floats) for _ in range(chains)] for _ in range(vectors)]
            for _ in range(shape.tokens)
        ]
        for address in (a for by_vector in sums for by_chain in by_vector for a in by_chain):
            w.build.store(vector(floats, 0.0), address)
        words = shape.unit * shape.bits // WORD
        row = w.build.sdiv(w.build.mul(self.start, I64(shape.bits)), I64(WORD))
        position = w.counter(w.add(w.build.mul(row, self.outputs), first))
        with w.loop(w.counter(self.start), self.stop, shape.unit) as k:
            here = w.build.load(position, typ=I64)
            self._unit(w.build.sub(k, self.start), here, sums, lanes)
            w.build.store(w.add(here, w.build.mul(self.outputs, I64(words))), position)
        self._finish(first, sums, lanes)

    def _unit(self, offset: ir.Value, here: ir.Value, sums: Sums, lanes: int) -> None:
        """Add x[k] q[k, n] for the inputs k of one unit."""
        w, shape = self.w, self.shape
        vectors = range(len(sums[0]))
        words: list[list[ir.Value]] = [[] for _ in vectors]  # (vectors, words)
        for _ in range(shape.unit * shape.bits // WORD):
            for v in vectors:
                words[v].append(w.load(self.qweight, w.add(here, I64(v * lanes)), I32, lanes))
            ahead = w.add(here, w.build.mul(self.outputs, I64(ROWS_AHEAD)))
            for line in range(0, len(vectors) * lanes, LINE):
                w.prefetch(self.qweight, w.add(ahead, I64(line)), I32)
            here = w.add(here, self.outputs)
        staged = w.at(self.staged, w.build.mul(offset, I64(shape.tokens)), F32)
        for j in range(shape.unit):
            values = [w.extract(words[v], j, shape.bits) for v in vectors]
            for t in range(shape.tokens):
                x = w.broadcast(w.load(staged, I64(j * shape.tokens + t), F32), lanes)
                for v in vectors:
                    address = sums[t][v][j % len(sums[t][v])]
                    old = w.build.load(address, typ=x.type)
                    w.build.store(w.multiply_add(values[v], x, old), address)

    def _finish(self, first: ir.Value, sums: Sums, lanes: int) -> None:
        """Apply zero points and scales, and add to y, or to the bias in the first chunk."""
        w, build = self.w, self.w.build
        floats = ir.VectorType(F32, lanes)
        fresh = build.icmp_signed("==", self.chunk, I64(0))
        for v in range(len(sums[0])):
            column = w.add(first, I64(v * lanes))
            on_grid = w.add(build.mul(self.group, self.outputs), column)
            if self.shape.wide_scales:
                scale = w.load(self.scales, on_grid, F32, lanes)
            else:
                scale = build.fpext(w.load(self.scales, on_grid, F16, lanes), floats)
            zero = build.uitofp(w.load(self.zeros, on_grid, I8, lanes), floats)
            zero = build.fsub(zero, vector(floats, 2.0 ** (self.shape.bits - 1)))
            for t, by_vector in enumerate(sums):
                parts = [build.load(address, typ=floats) for address in by_vector[v]]
                while len(parts) > 1:
                    parts = [
                        build.fadd(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i]
                        for i in range(0, len(parts), 2)
                    ]
                total = build.fneg(w.load(self.totals, I64(t), F32))
                shifted = w.multiply_add(zero, w.broadcast(total, lanes), parts[0])
                row = build.mul(self.outputs, w.add(self.first_token, I64(t)))
                target = w.at(self.y, w.add(row, column), F32)
                before = build.select(fresh, w.at(self.bias, column, F32), target)
                old = w.load(before, I64(0), F32, lanes)
                w.store(w.multiply_add(shifted, scale, old), target, I64(0), F32)
