"""The product in integers, for processors that sum products of bytes in one instruction.

In each chunk a token's inputs become integers of three bytes, x = u (X₀ + 2⁸ X₁ + 2¹⁶ X₂) with
bytes of -128 to 127 and u a power of two. Each is off by at most u / 2, which is one unit in the
last place of the chunk's largest input (two, where that is 127/128 of a power of two or more):
about what float32 loses when it adds the largest to the others. Then

    Σ_k x[k] (q[k, n] − z[n]) = u Σ_i 2^(8 i) (Σ_k X_i[k] q[k, n] − z[n] Σ_k X_i[k])

in which every sum in brackets is an integer below 2^24, so exact, also as a float. Four values of
a weight cost one masking and, where products of four bytes are summed at once, three instructions
a token; where two, six and what a unit's sums in int16 take to become int32; as floats twelve
and four.

Where an input of the chunk is infinite or not a number, all outputs are not a number.
"""

from llvmlite import ir

from stillroom.quantization.kernels.llvm_product import (
    LONGEST_CHUNK,
    PIECES,
    Product,
    Shape,
    Sums,
    Words,
)
from stillroom.quantization.kernels.llvm_writer import F32, I8, I32, I64, vector
from stillroom.quantization.packing import values_per_unit

QUAD = 4
"""Values whose products are summed by one instruction."""
THREE_BITS = [
    [0, 3, 6, 8],
    [1, 4, 7, 9],
    [11, 14, 16, 19],
    [12, 15, 17, 20],
    [22, 24, 27, 30],
    [23, 25, 28, 31],
    [2, 5, 18, 10],
    [13, 26, 29, 21],
]
"""Quads of one word each, of values that need few shifts; then of what is left, and of the two
values that two words share."""
STEP = 16
"""Inputs that are staged at once, unless a unit has more."""

INFINITE = 0x7F800000
"""The bits of infinity; those of what is no number are larger."""
ROOM = 0x20000
"""Added to the largest input's bits before its exponent is read: 127/128 of a power of two and
more count as the next, for which 2^23 fits into three signed bytes."""
BIAS = 127
TOP = 22
"""The exponent of the largest integer."""
SMALLEST = 23
"""The least biased exponent for which u is no subnormal number: where all inputs of a chunk are
below 2^-103, they are exact to 2^-127 only."""


class IntegerProduct(Product):
    """Σ_k x[k] q[k, n] in int32, for each of the three bytes of x."""

    def __init__(self, function: ir.Function, shape: Shape) -> None:
        super().__init__(function, shape)
        self.step = max(STEP, shape.unit)
        pieces = shape.tokens * PIECES
        self.staged = self.w.variable(I8, LONGEST_CHUNK * pieces)  # (tokens, pieces, chunk)
        self.totals = self.w.variable(I32, pieces)  # -Σ_k X_i[k], as 16 bits
        self.units = self.w.variable(F32, shape.tokens)  # u

    def _stage(self) -> None:
        rows = [
            self.w.build.mul(self.inputs, self.w.add(self.first_token, I64(t)))
            for t in range(self.shape.tokens)
        ]
        self._write_pieces(rows, self._choose_units(rows))

    def _choose_units(self, rows: list[ir.Value]) -> list[ir.Value]:
        """Store each token's u, and return 1 / u."""
        w, build = self.w, self.w.build
        integers = ir.VectorType(I32, self.step)
        largest = [w.cleared(integers) for _ in rows]
        with w.loop_over(w.counter(self.start), self.stop, self.step) as k:
            own = self._own(k)
            for row, address in zip(rows, largest, strict=True):
                bits = build.bitcast(self._inputs(row, k, own), integers)
                bits = build.and_(bits, vector(integers, 2**31 - 1))  # in the order of |x|
                build.store(w.larger(build.load(address, typ=integers), bits), address)
        return [self._choose_unit(t, address) for t, address in enumerate(largest)]

    def _choose_unit(self, token: int, largest: ir.Value) -> ir.Value:
        w, build = self.w, self.w.build
        bits = w.largest(build.load(largest, typ=ir.VectorType(I32, self.step)))
        exponent = build.lshr(w.add(bits, I32(ROOM)), I32(23))
        exponent = w.larger(exponent, I32(SMALLEST))

        def power(biased: ir.Value) -> ir.Value:
            return build.bitcast(build.shl(biased, I32(23)), F32)

        is_finite = build.icmp_unsigned("<", bits, I32(INFINITE))
        unit = build.select(is_finite, power(build.sub(exponent, I32(TOP))), F32(float("nan")))
        w.store(unit, self.units, I64(token), F32)
        return power(build.sub(I32(2 * BIAS + TOP), exponent))

    def _write_pieces(self, rows: list[ir.Value], inverses: list[ir.Value]) -> None:
        """Store the bytes of x / u, four neighbours for each quad, and their negative sums."""
        w, build = self.w, self.w.build
        integers, step = ir.VectorType(I32, self.step), self.step
        totals = [[w.cleared(integers) for _ in range(PIECES)] for _ in rows]
        inverses = [w.broadcast(inverse, step) for inverse in inverses]
        with w.loop_over(w.counter(self.start), self.stop, step) as k:
            own = self._own(k)
            offset = build.sub(k, self.start)
            for t, row in enumerate(rows):
                rest = w.round(build.fmul(self._inputs(row, k, own), inverses[t]))
                for p, address in enumerate(totals[t]):
                    build.store(build.add(build.load(address, typ=integers), rest), address)
                    piece = build.trunc(rest, ir.VectorType(I8, step))
                    where = w.add(offset, I64((t * PIECES + p) * LONGEST_CHUNK))
                    w.store(self._in_quads(piece), self.staged, where, I8)
                    rest = build.ashr(build.add(rest, vector(integers, 128)), vector(integers, 8))
        # X = X₀ + 2⁸ (X₁ + 2⁸ X₂), so the sum of X₀ is that of X less 2⁸ that of the bracket.
        for t, of_token in enumerate(totals):
            sums = [w.total(build.load(address, typ=integers)) for address in of_token]
            for p, upper in enumerate([*sums[1:], I32(0)]):
                negative = build.sub(build.shl(upper, I32(8)), sums[p])
                low = build.and_(negative, I32(2**16 - 1))
                w.store(low, self.totals, I64(t * PIECES + p), I32)

    def _own(self, k: ir.Value) -> ir.Value:
        """Return which of the inputs from k on are the chunk's and of its group."""
        build, lanes = self.w.build, self.step
        indices = ir.VectorType(I32, lanes)

        def spread(value: ir.Value) -> ir.Value:
            return self.w.broadcast(build.trunc(value, I32), lanes)

        here = ir.Constant(indices, [I32(i) for i in range(lanes)])
        here = build.add(here, spread(k))
        is_chunks = build.icmp_signed("<", here, spread(self.stop))
        is_groups = build.and_(
            build.icmp_signed(">=", here, spread(self.low)),
            build.icmp_signed("<", here, spread(self.high)),
        )
        return build.and_(is_chunks, is_groups)

    def _inputs(self, row: ir.Value, k: ir.Value, own: ir.Value) -> ir.Value:
        """Return x from k on, zero where it is not the group's."""
        address = self.w.at(self.x, self.w.add(row, k), F32)
        return self.w.masked_load(address, own, ir.VectorType(F32, self.step))

    def _in_quads(self, piece: ir.Value) -> ir.Value:
        """Return bytes in the order of their quads."""
        unit = self.shape.unit
        order = [
            first + j
            for first in range(0, self.step, unit)
            for quad in quads(self.shape.bits)
            for j in quad
        ]
        indices = ir.Constant(ir.VectorType(I32, self.step), [I32(i) for i in order])
        return self.w.build.shuffle_vector(piece, ir.Constant(piece.type, ir.Undefined), indices)

    def _begin(self, lanes: int, vectors: int) -> Sums:
        integers = ir.VectorType(I32, lanes)
        return [
            [[self.w.cleared(integers) for _ in range(PIECES)] for _ in range(vectors)]
            for _ in range(self.shape.tokens)
        ]

    def _unit(self, offset: ir.Value, words: Words, sums: Sums) -> None:
        w, shape = self.w, self.shape
        in_pairs = shape.byte_products == 2
        kind = words[0][0].type
        staged = w.at(self.staged, offset, I8)
        of_unit: dict[ir.Value, ir.Value] = {}  # by the address of the sum that they go to
        for i, quad in enumerate(quads(shape.bits)):
            values = [
                w.gather(of_vector, quad, shape.bits, shape.byte_shifts) for of_vector in words
            ]
            for t in range(shape.tokens):
                for p in range(PIECES):
                    where = (t * PIECES + p) * LONGEST_CHUNK + i * QUAD
                    x = w.build.load(w.at(staged, I64(where), I8), align=QUAD, typ=I32)
                    x = w.broadcast(x, kind.count)
                    for v, value in enumerate(values):
                        address = sums[t][v][p]
                        if in_pairs:
                            pairs = w.pairs_of_bytes(value, x)
                            before = of_unit.get(address)
                            of_unit[address] = w.build.add(before, pairs) if before else pairs
                        else:
                            old = w.build.load(address, typ=kind)
                            w.build.store(w.quads_of_bytes(old, value, x), address)
        for address, pairs in of_unit.items():
            old = w.build.load(address, typ=kind)
            fours = w.pairs_of_shorts(pairs, vector(pairs.type, 1))
            w.build.store(w.build.add(old, fours), address)

    def _finish(self, first: ir.Value, lanes: int, sums: Sums) -> None:
        w, build = self.w, self.w.build
        integers, floats = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)
        for v in range(len(sums[0])):
            column = w.add(first, I64(v * lanes))
            on_grid = w.add(build.mul(self.group, self.outputs), column)
            scale = self._scale(on_grid, lanes)
            zero = build.zext(w.load(self.zeros, on_grid, I8, lanes), integers)
            for t, by_vector in enumerate(sums):
                total = None
                for p, address in reversed(list(enumerate(by_vector[v]))):
                    of_x = w.load(self.totals, I64(t * PIECES + p), I32)
                    own = build.load(address, typ=integers)
                    exact = build.add(own, w.pairs_of_shorts(zero, w.broadcast(of_x, lanes)))
                    part = build.sitofp(exact, floats)
                    shifted = vector(floats, 2.0**8)
                    total = part if total is None else w.multiply_add(total, shifted, part)
                unit = w.broadcast(w.load(self.units, I64(t), F32), lanes)
                self._add_to_output(t, column, build.fmul(total, unit), scale)


def quads(bits: int) -> list[list[int]]:
    """Return which values of a unit are masked at once, in the order of the bytes they go to."""
    if bits == 3:
        return THREE_BITS
    apart = values_per_unit(bits) // QUAD  # the values that stand alike in the four bytes
    return [[i + apart * byte for byte in range(QUAD)] for i in range(apart)]
