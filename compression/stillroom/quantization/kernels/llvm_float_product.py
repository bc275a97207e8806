"""The product in float32, where integers are not faster."""

from llvmlite import ir

from stillroom.quantization.kernels.llvm_product import LONGEST_CHUNK, Product, Shape, Sums, Words
from stillroom.quantization.kernels.llvm_writer import F32, I8, I64, factors, vector

MULTIPLIERS = 8
"""Sums that must be independent to keep two multipliers with a latency of 4 cycles busy."""


class FloatProduct(Product):
    """Σ_k x[k] q[k, n] in float32, q as floats about the middle of their range."""

    def __init__(self, function: ir.Function, shape: Shape) -> None:
        super().__init__(function, shape)
        self.staged = self.w.variable(F32, LONGEST_CHUNK * shape.tokens)  # (chunk, tokens)
        self.totals = self.w.variable(F32, shape.tokens)  # Σ_k x[k]
        self.factors = factors(function.module, shape.bits)

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

    def _begin(self, lanes: int, vectors: int) -> Sums:
        w, shape = self.w, self.shape
        floats = ir.VectorType(F32, lanes)
        # Few sums would each wait for their last addition: they are split into chains.
        chains = max(1, min(shape.unit, MULTIPLIERS // (shape.tokens * vectors)))
        return [
            [[w.cleared(floats) for _ in range(chains)] for _ in range(vectors)]
            for _ in range(shape.tokens)
        ]

    def _unit(self, offset: ir.Value, words: Words, sums: Sums) -> None:
        w, shape = self.w, self.shape
        lanes = words[0][0].type.count
        staged = w.at(self.staged, w.build.mul(offset, I64(shape.tokens)), F32)
        for j in range(shape.unit):
            values = [w.extract(of_vector, j, shape.bits) for of_vector in words]
            for t in range(shape.tokens):
                x = w.broadcast(w.load(staged, I64(j * shape.tokens + t), F32), lanes)
                for v, value in enumerate(values):
                    address = sums[t][v][j % len(sums[t][v])]
                    old = w.build.load(address, typ=x.type)
                    w.build.store(w.multiply_add(value, x, old), address)

    def _finish(self, first: ir.Value, lanes: int, sums: Sums) -> None:
        w, build = self.w, self.w.build
        floats = ir.VectorType(F32, lanes)
        for v in range(len(sums[0])):
            column = w.add(first, I64(v * lanes))
            on_grid = w.add(build.mul(self.group, self.outputs), column)
            scale = self._scale(on_grid, lanes)
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
                self._add_to_output(t, column, shifted, scale)
