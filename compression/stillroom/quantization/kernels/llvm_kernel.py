"""Multiply with a packed weight on a CPU, in machine code that LLVM makes for this machine.

llvmlite is a wheel and carries LLVM: no compiler is needed, and none of the code is kept on disk.
Making the code for one number of bits and tokens takes 0.1 to 1 s, once a process.
"""

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm
import torch
from torch import Tensor, nn

from stillroom.errors import MismatchError
from stillroom.quantization.kernels.dequantization import PackedLinear, TorchKernel, require_fit
from stillroom.quantization.kernels.llvm_module import LAUNCH, write_module
from stillroom.quantization.kernels.llvm_product import LONGEST_CHUNK, ByteProducts, Shape
from stillroom.quantization.kernels.native_function import add_api, python_function
from stillroom.quantization.packing import (
    pack_rows,
    unpack_rows,
    unpack_zeros,
    values_per_unit,
)

BLOCK = 8
"""Tokens that are worked on at once; more come in blocks."""
WORTH_A_TEAM = 2**23
"""Multiplications from which other threads are woken: about 0.1 ms of one thread. Where they share
their cores with other work, waiting for them takes far longer than that."""
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")

Launch = Callable[[int, int, int, int, int], None]

_ENGINES: list[llvm.ExecutionEngine] = []
"""Machine code lives as long as its engine."""


@dataclass
class Machine:
    """What this processor has."""

    lanes: int
    registers: int
    features: str
    byte_products: ByteProducts
    """How many products of bytes it sums in one instruction."""
    byte_shifts: bool
    """Whether it shifts each byte by a distance of its own."""
    has_openmp: bool
    """Whether torch's OpenMP was found, whose threads work here too: others would fight them."""
    has_team: bool
    """The same, but False in a forked child."""

    def leave_team(self) -> None:
        """Work on one thread from now on."""
        self.has_team = False


def unsupported() -> str | None:
    """Return why this processor cannot run these kernels, or None."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    if is_x86 and not llvm.get_host_cpu_features().get("f16c", False):
        return "this processor lacks the F16C instructions"
    return None


@cache
def this_machine() -> Machine:
    """Return what this processor has, and make LLVM ready for it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    host = llvm.get_host_cpu_features()
    features = host.flatten()
    byte_products: ByteProducts = 0
    byte_shifts = False
    if host.get("avx512f", False):
        lanes, registers = 16, 32
        if host.get("avx512bw", False) and host.get("avx512vl", False):
            byte_products = 4 if host.get("avx512vnni", False) else 2
            byte_shifts = host.get("avx512vbmi", False)
        features += ",-prefer-256-bit"  # which would split each vector in two
    elif host.get("avx2", False):
        lanes, registers = 8, 16
        byte_products = 4 if host.get("avxvnni", False) else 2
    else:
        lanes, registers = 4, 32 if platform.machine() in ("arm64", "aarch64") else 16
    add_api()
    found = _find_openmp()
    machine = Machine(lanes, registers, features, byte_products, byte_shifts, found, has_team=found)
    if hasattr(os, "register_at_fork"):
        # A child has none of its parent's threads, and OpenMP would wait for them for ever.
        os.register_at_fork(after_in_child=machine.leave_team)
    return machine


def _find_openmp() -> bool:
    """Let kernels call the OpenMP that torch has loaded; return whether there is one."""
    loaded = ctypes.CDLL(None) if os.name == "posix" else None
    for name in OPENMP:
        function = getattr(loaded, name, None)
        if function is None:
            return False
        llvm.add_symbol(f"stillroom_{name}", ctypes.cast(function, ctypes.c_void_p).value)
    return True


@cache
def compile_product(shape: Shape) -> Launch:
    """Return LAUNCH of llvm_module for a shape, made once a process."""
    machine = this_machine()
    module = llvm.parse_assembly(str(write_module(shape, machine.has_openmp)))
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=machine.features, opt=3
    )
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    # The code is laid out by hand: what is left to do is to put variables into registers.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    _ENGINES.append(engine)
    return python_function(engine.get_function_address(LAUNCH), LAUNCH)


class LlvmKernel:
    """y = x Wᵀ + b on the CPU; no more of W than some registers full is unpacked at a time.

    Sums are as exact as in float32 or more, whatever the inputs are; float64 goes through torch.
    Several Python threads may call it at once: the interpreter's lock is not held meanwhile.
    """

    def __init__(self, layer: PackedLinear) -> None:
        """Prepare what a call needs: a record of addresses, and the table of chunks.

        Raises:
            CorruptedError: the tensors of the layer do not fit each other.
        """
        require_fit(layer)
        packed, bits = layer.packed, layer.bits
        self.name = f"llvm-int{bits}"
        self.bits = bits
        self.in_features, self.out_features = packed.g_idx.shape[0], packed.scales.shape[1]
        self._weights = self.in_features * self.out_features
        self._torch = TorchKernel(layer)
        qweight, g_idx = packed.qweight, packed.g_idx.long()
        self._order: Tensor | None = None
        if bool((g_idx.diff() < 0).any()):
            # Rows in the order of their groups; each call puts its inputs in that order.
            self._order = torch.argsort(g_idx, stable=True)
            qweight = pack_rows(unpack_rows(qweight, bits)[self._order], bits)
            g_idx = g_idx[self._order]
        self._wide_scales = packed.scales.dtype != torch.float16
        tensors = (
            qweight,
            packed.scales.float() if self._wide_scales else packed.scales,
            unpack_zeros(packed.qzeros, bits, layer.checkpoint_format),
            torch.zeros(self.out_features) if layer.bias is None else layer.bias.float(),
            chunk_table(g_idx, values_per_unit(bits)),
        )
        # The record holds addresses: the tensors must live as long as it does.
        self._kept = [tensor.contiguous() for tensor in tensors]
        fields = [tensor.data_ptr() for tensor in self._kept]
        fields += [len(self._kept[-1]), self.in_features, self.out_features]
        self._record = (ctypes.c_int64 * len(fields))(*fields)
        self._address = ctypes.addressof(self._record)
        self._machine = this_machine()
        self._launches: list[Launch | None] = [None] * (BLOCK + 1)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs, (..., out), of the inputs' dtype, for inputs (..., in).

        Raises:
            MismatchError: the inputs have another width than the weight.
        """
        # In a small layer each of these lines takes as long as the product of some rows.
        dtype, shape = inputs.dtype, inputs.shape
        kind = type(inputs)
        is_readable = (kind is Tensor or kind is nn.Parameter) and inputs.is_cpu
        if not is_readable or dtype is torch.float64:
            return self._torch(inputs)
        width = shape[-1]
        if width != self.in_features:
            raise MismatchError(f"expected inputs of {self.in_features} features, got {width}")
        x = inputs if dtype is torch.float32 else inputs.float()
        x = x.contiguous() if self._order is None else x.index_select(-1, self._order)
        y = x.new_empty(*shape[:-1], self.out_features)
        tokens = x.numel() // width
        if tokens <= BLOCK:
            self._run(tokens, 1, x.data_ptr(), y.data_ptr())
        else:
            self._run_blocks(tokens, x.data_ptr(), y.data_ptr())
        return y if dtype is torch.float32 else y.to(dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (out, in), computed in float32."""
        return self._torch.dequantize(dtype)

    def _run_blocks(self, tokens: int, x: int, y: int) -> None:
        blocks, rest = divmod(tokens, BLOCK)
        self._run(BLOCK, blocks, x, y)
        done = 4 * BLOCK * blocks  # bytes a feature
        self._run(rest, 1, x + done * self.in_features, y + done * self.out_features)

    def _run(self, tokens: int, blocks: int, x: int, y: int) -> None:
        """Multiply `blocks` times `tokens` rows at the address x, and write to the address y."""
        if tokens == 0:
            return
        launch = self._launches[tokens] or self._compile(tokens)
        threads = 1
        if blocks * tokens * self._weights >= WORTH_A_TEAM and self._machine.has_team:
            threads = torch.get_num_threads()
        launch(self._address, x, y, blocks, threads)

    def _compile(self, tokens: int) -> Launch:
        machine = self._machine
        shape = Shape(
            self.bits,
            tokens,
            machine.lanes,
            machine.registers,
            machine.byte_products,
            machine.byte_shifts,
            self._wide_scales,
        )
        launch = self._launches[tokens] = compile_product(shape)
        return launch


def chunk_table(g_idx: Tensor, unit: int) -> Tensor:
    """Return a row of llvm_product.CHUNK for each chunk, (chunks, 5) int64.

    `g_idx`, (in,), is ascending. A chunk is whole units, of which some may be shared by groups.
    """
    groups, counts = torch.unique_consecutive(g_idx, return_counts=True)
    longest = LONGEST_CHUNK // unit * unit
    rows, low = [], 0
    for group, count in zip(groups.tolist(), counts.tolist(), strict=True):
        high = low + count
        end = -(-high // unit) * unit
        for start in range(low // unit * unit, high, longest):
            rows.append((start, min(start + longest, end), low, high, group))
        low = high
    return torch.tensor(rows, dtype=torch.int64)
