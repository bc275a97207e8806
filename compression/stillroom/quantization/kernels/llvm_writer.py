"""Write LLVM code: loops, addresses, and values of 2 to 8 bits as vectors of floats."""

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from stillroom.quantization.packing import WORD, values_per_unit

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER, VOID = ir.PointerType(), ir.VoidType()
_BYTES = {I8: 1, F16: 2, I32: 4, F32: 4, I64: 8, POINTER: 8}


class Writer:
    """A builder at work on one function."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.build = ir.IRBuilder(function.append_basic_block())

    def variable(self, kind: ir.Type, count: int = 1) -> ir.Value:
        """Return the address of `count` values on the stack, reserved once a call."""
        with self.build.goto_entry_block():
            return self.build.alloca(kind, size=I64(count))

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
        module = self.function.module
        name = "llvm.prefetch.p0"
        kind = ir.FunctionType(VOID, [POINTER, I32, I32, I32])
        callee = module.globals.get(name) or ir.Function(module, kind, name)
        read, keep, data = I32(0), I32(3), I32(1)
        self.build.call(callee, [self.at(base, index, element), read, keep, data])

    def counter(self, start: ir.Value) -> ir.Value:
        """Return the address of a loop's variable, set to `start`."""
        variable = self.variable(I64)
        self.build.store(start, variable)
        return variable

    @contextmanager
    def loop(self, counter: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
        """Repeat the body, and count up by `step`, while a whole step fits below `stop`."""
        build = self.build
        head, body, end = (self.function.append_basic_block() for _ in range(3))
        build.branch(head)
        build.position_at_end(head)
        value = build.load(counter, typ=I64)
        after = build.add(value, I64(step))
        build.cbranch(build.icmp_signed("<=", after, stop), body, end)
        build.position_at_end(body)
        yield value
        build.store(after, counter)
        build.branch(head)
        build.position_at_end(end)

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Return a * b + c of float vectors, in one instruction where there is one."""
        kind, module = a.type, self.function.module
        name = f"llvm.fmuladd.v{kind.count}f32"
        known = module.globals.get(name)
        callee = known or ir.Function(module, ir.FunctionType(kind, [kind] * 3), name)
        return self.build.call(callee, [a, b, c])

    def broadcast(self, value: ir.Value, lanes: int) -> ir.Value:
        """Return a vector that has a float in each lane."""
        nothing = ir.Constant(ir.VectorType(F32, lanes), ir.Undefined)
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
