"""Functions of Python whose body is machine code: a call converts less than one through ctypes.

Written against Python's C API (docs.python.org/3/c-api): PyMethodDef, METH_FASTCALL.
"""

import ctypes
from collections.abc import Callable

import llvmlite.binding as llvm
from llvmlite import ir

from stillroom.quantization.kernels.llvm_writer import I64, POINTER, VOID, Writer

METH_FASTCALL = 0x0080
API = {
    "PyLong_AsLongLong": (I64, [POINTER]),
    "PyEval_SaveThread": (POINTER, []),
    "PyEval_RestoreThread": (VOID, [POINTER]),
    "Py_IncRef": (VOID, [POINTER]),
}


class _Method(ctypes.Structure):
    """PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_METHODS: list[_Method] = []
"""Python keeps the addresses of these."""


def add_api() -> None:
    """Let machine code call the interpreter it runs in."""
    for name in API:
        address = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value
        llvm.add_symbol(name, address)


def write_function(work: ir.Function, name: str) -> None:
    """Write a function of Python that calls `work`, of void and int64s, with its arguments.

    It must get as many integers as `work` takes: it does not look. Other Python threads run
    meanwhile.
    """
    module = work.module
    api = {
        called: ir.Function(module, ir.FunctionType(returned, taken), called)
        for called, (returned, taken) in API.items()
    }
    # function(self, arguments, count)
    function = ir.Function(module, ir.FunctionType(POINTER, [POINTER, POINTER, I64]), name)
    w = Writer(function)
    build = w.build
    integers = [
        build.call(api["PyLong_AsLongLong"], [w.load(function.args[1], I64(i), POINTER)])
        for i in range(len(work.args))
    ]
    thread = build.call(api["PyEval_SaveThread"], [])
    build.call(work, integers)
    build.call(api["PyEval_RestoreThread"], [thread])
    none = build.inttoptr(I64(id(None)), POINTER)
    build.call(api["Py_IncRef"], [none])
    build.ret(none)


def python_function(address: int, name: str) -> Callable[..., None]:
    """Return the function that `write_function` wrote, of whose code this is the address."""
    method = _Method(name.encode(), address, METH_FASTCALL, None)
    _METHODS.append(method)
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.argtypes = [ctypes.POINTER(_Method), ctypes.c_void_p, ctypes.c_void_p]
    make.restype = ctypes.py_object
    function: Callable[..., None] = make(ctypes.byref(method), None, None)
    return function
