"""Write LLVM code: loops, addresses, and values of 2 to 8 bits as vectors of floats."""

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from stillroom.quantization.packing import WORD, values_per_unit

I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER, VOID = ir.PointerType(), ir.VoidType()
LINE_BYTES = 64
"""Of the cache. Where all on the stack begins with a line, no vector that is spilled lies in two:
otherwise some products take longer in threads whose stack begins elsewhere."""
_BYTES = {I8: 1, F16: 2, I32: 4, F32: 4, I64: 8, POINTER: 8}


class Writer:
    """A builder at work on one function."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.build = ir.IRBuilder(function.append_basic_block())

    def variable(self, kind: ir.Type, count: int = 1) -> ir.Value:
        """Return the address of `count` values on the stack, reserved once a call."""
        with self.build.goto_entry_block():
            address = self.build.alloca(kind, size=I64(count))
        address.align = LINE_BYTES
        address.type = POINTER  # so that llvmlite lets vectors be stored, too
        return address

    def cleared(self, kind: ir.VectorType) -> ir.Value:
        """Return the address of a vector on the stack, set to zero here."""
        address = self.variable(kind)
        self.build.store(vector(kind, 0), address)
        return address

    def add(self, *terms: ir.Value) -> ir.Value:
        """Return the sum of integers."""
        total = terms[0]
        for term in terms[1:]:
            total = self.build.add(total, term)
        return total

    def at(self, base: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
        """Return the address of one element of an array."""
        return self.build.gep(base, [index], source_etype=element)

    def load(self, base: ir.Value, index: ir.Value, element: ir.Type, lanes: int = 0) -> ir.Value:
        """Return one element of an array, or the `lanes` elements from there on as a vector."""
        kind = ir.VectorType(element, lanes) if lanes else element
        # A vector may begin at any element.
        return self.build.load(self.at(base, index, element), align=_BYTES[element], typ=kind)

    def store(self, value: ir.Value, base: ir.Value, index: ir.Value, element: ir.Type) -> None:
        """Store an element, or a vector of them, from `index` on."""
        self.build.store(value, self.at(base, index, element), align=_BYTES[element])

    def prefetch(self, base: ir.Value, index: ir.Value, element: ir.Type) -> None:
        """Have the cache line of an element fetched; beyond an array's end nothing happens."""
        read, keep, data = I32(0), I32(3), I32(1)
        address = self.at(base, index, element)
        self.intrinsic("llvm.prefetch.p0", VOID, address, read, keep, data)

    def counter(self, start: ir.Value) -> ir.Value:
        """Return the address of a loop's variable, set to `start`."""
        variable = self.variable(I64)
        self.build.store(start, variable)
        return variable

    @contextmanager
    def loop(self, counter: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
        """Repeat the body, and count up by `step`, while a whole step fits below `stop`."""
        last = self.build.sub(stop, I64(step - 1))
        with self.loop_over(counter, last, step) as value:
            yield value

    @contextmanager
    def loop_over(self, counter: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
        """Repeat the body, and count up by `step`, while a step begins below `stop`."""
        build = self.build
        head, body, end = (self.function.append_basic_block() for _ in range(3))
        build.branch(head)
        build.position_at_end(head)
        value = build.load(counter, typ=I64)
        after = build.add(value, I64(step))
        build.cbranch(build.icmp_signed("<", value, stop), body, end)
        build.position_at_end(body)
        yield value
        build.store(after, counter)
        build.branch(head)
        build.position_at_end(end)

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Return a * b + c of float vectors, in one instruction where there is one."""
        return self.intrinsic(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)

    def quads_of_bytes(self, sums: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """Return sums + Σ of the products of each lane's four bytes, all vectors of int32."""
        kind = sums.type
        name = f"llvm.x86.avx512.vpdpbusd.{kind.count * I32.width}"
        return self.intrinsic(name, kind, sums, unsigned, signed)

    def pairs_of_bytes(self, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """Return Σ of the products of two neighbouring bytes, as int16, of vectors of int32."""
        lanes = unsigned.type.count
        name = {
            4: "ssse3.pmadd.ub.sw.128", 8: "avx2.pmadd.ub.sw", 16: "avx512.pmaddubs.w.512",
        }[lanes]  # fmt: skip
        return self._pairs(name, I8, I16, unsigned, signed)

    def pairs_of_shorts(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return Σ of the products of two neighbouring int16, as int32, of vectors of 32 bits."""
        lanes = a.type.count * a.type.element.width // I32.width
        name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[lanes]
        return self._pairs(name, I16, I32, a, b)

    def _pairs(
        self, name: str, taken: ir.IntType, returned: ir.IntType, *vectors: ir.Value
    ) -> ir.Value:
        width = vectors[0].type.count * vectors[0].type.element.width
        kind = ir.VectorType(taken, width // taken.width)
        cast = [self.build.bitcast(each, kind) for each in vectors]
        return self.intrinsic(
            f"llvm.x86.{name}", ir.VectorType(returned, width // returned.width), *cast
        )

    def round(self, floats: ir.Value) -> ir.Value:
        """Return floats as the nearest int32; any where there is none."""
        lanes = floats.type.count
        kind = ir.VectorType(I32, lanes)
        return self.intrinsic(f"llvm.lrint.v{lanes}i32.v{lanes}f32", kind, floats)

    def larger(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the larger of unsigned int32, or of each lane of two vectors."""
        lanes = f"v{a.type.count}" if isinstance(a.type, ir.VectorType) else ""
        return self.intrinsic(f"llvm.umax.{lanes}i32", a.type, a, b)

    def largest(self, integers: ir.Value) -> ir.Value:
        """Return the largest lane of a vector of unsigned int32."""
        name = f"llvm.vector.reduce.umax.v{integers.type.count}i32"
        return self.intrinsic(name, I32, integers)

    def total(self, integers: ir.Value) -> ir.Value:
        """Return the sum of the lanes of a vector of int32."""
        return self.intrinsic(f"llvm.vector.reduce.add.v{integers.type.count}i32", I32, integers)

    def masked_load(self, address: ir.Value, mask: ir.Value, kind: ir.VectorType) -> ir.Value:
        """Return the floats of a vector whose mask is set, and zeros; others are not read."""
        name = f"llvm.masked.load.v{kind.count}f32.p0"
        align = I32(_BYTES[kind.element])
        return self.intrinsic(name, kind, address, align, mask, vector(kind, 0.0))

    def intrinsic(self, name: str, returned: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call a function that LLVM knows."""
        module = self.function.module
        kind = ir.FunctionType(returned, [argument.type for argument in arguments])
        callee = module.globals.get(name) or ir.Function(module, kind, name)
        return self.build.call(callee, list(arguments))

    def broadcast(self, value: ir.Value, lanes: int) -> ir.Value:
        """Return a vector that has a value in each lane."""
        nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        first = self.build.insert_element(nothing, value, I32(0))
        every = ir.Constant(ir.VectorType(I32, lanes), [I32(0)] * lanes)
        return self.build.shuffle_vector(first, nothing, every)

    def extract(self, words: list[ir.Value], j: int, bits: int) -> ir.Value:
        """Return value j of a unit as floats, times 2^place(j): masked where it stands.

        A shift to the lowest bit is saved where the power of two can be taken out of x.
        """
        word, shift = divmod(j * bits, WORD)
        kind = words[word].type
        kept = WORD - shift
        if kept > bits:
            integer = self.build.and_(words[word], vector(kind, (2**bits - 1) << shift))
        else:
            integer = self.build.lshr(words[word], vector(kind, shift))
        if kept < bits:  # the upper bits begin the next word
            rest = self.build.and_(words[word + 1], vector(kind, 2 ** (bits - kept) - 1))
            integer = self.build.or_(integer, self.build.shl(rest, vector(kind, kept)))
        value = self.build.sitofp(integer, ir.VectorType(F32, kind.count))
        return self.build.fsub(value, vector(value.type, 2.0 ** (bits - 1 + place(j, bits))))

    def gather(
        self, words: list[ir.Value], values: list[int], bits: int, byte_shifts: bool
    ) -> ir.Value:
        """Return four values of a unit as the bytes of each lane, the first in the lowest.

        byte_shifts: whether the processor shifts each byte by a distance of its own.
        """
        masks: dict[tuple[int, int], int] = {}  # bits of the outcome by word and shift
        for byte, j in enumerate(values):
            for bit in range(bits):
                word, at = divmod(j * bits + bit, WORD)
                to = 8 * byte + bit
                key = word, at - to
                masks[key] = masks.get(key, 0) | 1 << to
        kind = words[0].type
        (word, *others) = {word for word, _ in masks}
        if byte_shifts and not others and len(masks) > 1:
            moved = self._shift_bytes(words[word], [j * bits % WORD for j in values])
            return self.build.and_(moved, vector(kind, sum(masks.values())))
        parts = []
        for (word, shift), mask in masks.items():
            move = self.build.lshr if shift > 0 else self.build.shl
            moved = move(words[word], vector(kind, abs(shift))) if shift else words[word]
            full = mask == 2**WORD - 1
            parts.append(moved if full else self.build.and_(moved, vector(kind, mask)))
        whole = parts[0]
        for part in parts[1:]:
            whole = self.build.or_(whole, part)
        return whole

    def _shift_bytes(self, integers: ir.Value, first_bits: list[int]) -> ir.Value:
        """Return int32 whose bytes are the eight bits from each of `first_bits` on."""
        lanes = integers.type.count
        kind = ir.VectorType(I8, 4 * lanes)
        # The instruction knows int64: every other int32 is the upper half of one.
        where = [32 * (lane % 2) + first for lane in range(lanes) for first in first_bits]
        control = ir.Constant(kind, [I8(bit) for bit in where])
        name = f"llvm.x86.avx512.pmultishift.qb.{lanes * I32.width}"
        moved = self.intrinsic(name, kind, control, self.build.bitcast(integers, kind))
        return self.build.bitcast(moved, integers.type)


def place(j: int, bits: int) -> int:
    """Return by how many bits `extract` leaves value j of a unit too high."""
    shift = j * bits % WORD
    # A value that reaches the sign bit is shifted down: converting reads words as signed.
    return shift if shift + bits < WORD else 0


def vector(kind: ir.VectorType, value: float) -> ir.Constant:
    """Return a constant with the same value in each lane."""
    return ir.Constant(kind, [kind.element(value)] * kind.count)


def factors(module: ir.Module, bits: int) -> ir.Value:
    """Return the address of 2^-place(j) for each value j of a unit, float32."""
    values = [2.0 ** -place(j, bits) for j in range(values_per_unit(bits))]
    kind = ir.ArrayType(F32, len(values))
    table = ir.GlobalVariable(module, kind, "factors")
    table.linkage, table.global_constant = "internal", True
    table.initializer = kind(values)
    return table
