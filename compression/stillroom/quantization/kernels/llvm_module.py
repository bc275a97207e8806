"""The code of one product as a module: one thread's call of it, or a team's."""

from llvmlite import ir

from stillroom.quantization.kernels.llvm_float_product import FloatProduct
from stillroom.quantization.kernels.llvm_integer_product import IntegerProduct
from stillroom.quantization.kernels.llvm_product import LAYER, Shape
from stillroom.quantization.kernels.llvm_writer import I32, I64, POINTER, VOID, Writer
from stillroom.quantization.kernels.native_function import write_function

LAUNCH = "launch"
RUN = ("layer", "x", "y", "blocks")


def write_module(shape: Shape, parallel: bool) -> ir.Module:
    """Return a module with LAUNCH, a function of Python: launch(layer, x, y, blocks, threads).

    layer, x and y are addresses. x is (blocks * tokens, inputs) and y (blocks * tokens, outputs),
    float32, contiguous. `layer` points to a record with the fields of LAYER: qweight
    (inputs * bits / 32, outputs) int32, scales (groups, outputs), zeros (groups, outputs) uint8,
    bias (outputs,) float32, chunks (chunk_count, 5) int64 with the fields of CHUNK.
    """
    module = ir.Module(name=f"packed_{shape.bits}_bits_{shape.tokens}_tokens")
    kind = ir.FunctionType(VOID, [POINTER, POINTER, POINTER, I64, I64, I64])
    columns = ir.Function(module, kind, "columns")
    columns.linkage = "internal"
    product = IntegerProduct if shape.in_integers else FloatProduct
    product(columns, shape).write()
    start = ir.Function(module, ir.FunctionType(VOID, [I64] * 5), "start")
    start.linkage = "internal"
    _write_start(start, columns, shape.lanes, parallel)
    write_function(start, LAUNCH)
    return module


def _write_start(start: ir.Function, columns: ir.Function, lanes: int, parallel: bool) -> None:
    *addresses, blocks, threads = start.args
    w = Writer(start)
    if parallel:
        module = start.module
        task = ir.Function(module, ir.FunctionType(VOID, [POINTER]), "task")
        task.linkage = "internal"
        _write_task(task, columns, lanes)
        kind = ir.FunctionType(VOID, [POINTER, POINTER, I32, I32])
        team = ir.Function(module, kind, "stillroom_GOMP_parallel")
        run = w.variable(I64, len(RUN))
        with w.build.if_then(w.build.icmp_signed(">", threads, I64(1))):
            for i, value in enumerate((*addresses, blocks)):
                w.store(value, run, I64(i), I64)
            w.build.call(team, [task, run, w.build.trunc(threads, I32), I32(0)])
            w.build.ret_void()
    layer, x, y = (w.build.inttoptr(address, POINTER) for address in addresses)
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
