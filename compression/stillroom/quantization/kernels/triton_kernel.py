"""Multiply with a packed weight on a GPU.

For the few tokens of decode the time is that of reading the weight, so it is read as it is packed,
by the product itself. For more tokens it is unpacked, one layer at a time, for cuBLAS.
"""

import subprocess
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional

from stillroom.errors import MismatchError
from stillroom.quantization.kernels import triton_product as product
from stillroom.quantization.kernels.dequantization import PackedLinear, TorchKernel, require_fit
from stillroom.quantization.packing import has_plain_groups, unpack_zeros

MOST_TOKENS = 16
"""Tokens up to which the weight is read packed."""
MOST_ROWS = 64
"""Rows of inputs up to which it is: more would not fit into the registers."""
LEAST_ROWS = 16
"""Rows that the tensor cores multiply at once, at least."""
BITS = (2, 3, 4, 8)
UNPACKED_WIDTH = 128
"""Outputs that a program unpacks."""
PROGRAMS = 4
"""Programs a processor of the GPU, about: fewer leave it waiting for memory."""
LEAST_INPUTS = 1024
"""Inputs that a program sums, at least: partial sums are to be a small share of the traffic."""
BLOCK = 1024
"""Outputs whose partial sums one program adds up."""


class TritonKernel:
    """y = x Wᵀ + b on a GPU.

    Sums are float32. float64 goes through torch.
    """

    def __init__(self, layer: PackedLinear, processors: int) -> None:
        """Prepare what a call needs, for a GPU of that many processors.

        Raises:
            CorruptedError: the tensors of the layer do not fit each other.
            MismatchError: `unsupported` says why this layer cannot be multiplied with here.
        """
        require_fit(layer)
        reason = unsupported(layer)
        if reason is not None:
            raise MismatchError(f"expected a layer for the Triton kernel: {reason}; use torch")
        packed = layer.packed
        self.bits = layer.bits
        self.in_features, self.out_features = packed.g_idx.shape[0], packed.scales.shape[1]
        self._torch = TorchKernel(layer)
        self._words = packed.qweight.contiguous()
        self._grid = _pack_grid(layer)
        self._has_half_scales = packed.scales.dtype is torch.float16
        self._groups = packed.g_idx.to(torch.int32).contiguous()
        self._bias = layer.bias
        self._group_size = self.in_features // packed.scales.shape[0]
        self._processors = processors
        # Groups of desc_act are not neighbouring columns: there the weight is always unpacked.
        self._is_plain = has_plain_groups(packed.g_idx, packed.scales.shape[0])
        self._plans: dict[tuple[int, int], Plan | None] = {}
        self.name = f"triton-int{layer.bits}" if self._is_plain else "triton-unpack"

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs, (..., out), of the inputs' dtype, for inputs (..., in).

        Raises:
            MismatchError: the inputs have another width than the weight.
        """
        *leading, width = inputs.shape
        if width != self.in_features:
            raise MismatchError(f"expected inputs of {self.in_features} features, got {width}")
        tokens = inputs.numel() // width
        if not tokens or not self._is_readable(inputs):
            return self._torch(inputs)
        x = inputs.contiguous()
        with torch.cuda.device(x.device if x.is_cuda else -1):  # Triton works on the current one
            plan = self._plan(tokens, product.PIECES if x.dtype is torch.float32 else 1)
            if plan is None:
                bias = None if self._bias is None else self._bias.to(x.dtype)
                y: Tensor = functional.linear(x, self._unpack(x.dtype), bias)
                return y
            y = x.new_empty((*leading, self.out_features))
            self._multiply(x, y, tokens, plan)
        return y

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (out, in), computed in float32."""
        if dtype is torch.float64:
            return self._torch.dequantize(dtype)
        with torch.cuda.device(self._words.device if self._words.is_cuda else -1):
            return self._unpack(dtype)

    def _is_readable(self, inputs: Tensor) -> bool:
        """Return whether these are plain floats where the weight is."""
        return (
            (type(inputs) is Tensor or type(inputs) is nn.Parameter)
            and inputs.device == self._words.device
            and inputs.dtype in (torch.float16, torch.bfloat16, torch.float32)
        )

    def _plan(self, tokens: int, pieces: int) -> "Plan | None":
        if (tokens, pieces) not in self._plans:
            shape = (self.in_features, self.out_features, self._group_size)
            known = self._is_plain and tokens <= MOST_TOKENS
            made = plan(tokens, pieces, self.bits, *shape, self._processors) if known else None
            self._plans[tokens, pieces] = made
        return self._plans[tokens, pieces]

    def _multiply(self, x: Tensor, y: Tensor, tokens: int, plan: "Plan") -> None:
        inputs, outputs, unit = self.in_features, self.out_features, product.unit_of(self.bits)
        layout = {"UNIT": unit, "HEIGHT": product.HEIGHT, "USED": plan.used}
        layout |= {"FEW": plan.few, "STACK": plan.stack}
        dtype = torch.bfloat16 if x.dtype is torch.float32 else x.dtype
        arranged = x.new_empty((plan.tiles, unit, plan.used, product.HEIGHT), dtype=dtype)
        sums = x.new_empty((plan.tiles, plan.used), dtype=torch.float32)
        product.arrange[(plan.tiles,)](
            x, arranged, sums, tokens, inputs, self._group_size,
            PIECES=plan.pieces, num_warps=8, **layout,
        )  # fmt: skip
        target, bias = y, self._bias
        if plan.parts > 1:
            target = y.new_empty((plan.parts, tokens, outputs), dtype=torch.float32)
            bias = None
        product.multiply[(triton.cdiv(outputs, plan.width), plan.parts)](
            arranged, sums, self._words, self._grid, bias, target,
            tokens, inputs, outputs, self._group_size, plan.tiles, plan.part_tiles,
            BITS=self.bits, ROWS=max(LEAST_ROWS, plan.used), WIDTH=plan.width, STAGES=plan.stages,
            WHOLE=inputs % (unit * product.HEIGHT) == 0, HALF_SCALES=self._has_half_scales,
            PTX=x.is_cuda, num_warps=plan.warps, enable_fp_fusion=False, **layout,
        )  # fmt: skip
        if plan.parts > 1:
            size = tokens * outputs
            product.add_parts[(triton.cdiv(size, BLOCK),)](
                target, self._bias, y, plan.parts, size, outputs,
                BLOCK=BLOCK, enable_fp_fusion=False,
            )  # fmt: skip

    def _unpack(self, dtype: torch.dtype) -> Tensor:
        inputs, outputs, unit = self.in_features, self.out_features, product.unit_of(self.bits)
        weight = torch.empty((inputs, outputs), dtype=dtype, device=self._words.device)
        tile = unit * product.HEIGHT
        product.unpack[(triton.cdiv(outputs, UNPACKED_WIDTH), triton.cdiv(inputs, tile))](
            self._words, self._grid, self._groups, weight, inputs, outputs,
            BITS=self.bits, UNIT=unit, HEIGHT=product.HEIGHT, WIDTH=UNPACKED_WIDTH,
            HALF_SCALES=self._has_half_scales, enable_fp_fusion=False,
        )  # fmt: skip
        transposed: Tensor = weight.T
        return transposed


def _pack_grid(layer: PackedLinear) -> Tensor:
    """Return int32 (groups, outputs): the scale's bits below those of centre - zero in float16."""
    zeros = unpack_zeros(layer.packed.qzeros, layer.bits, layer.checkpoint_format)
    offsets = (2 ** (layer.bits - 1) - zeros.int()).half()  # exact: at most 128
    below = layer.packed.scales.contiguous().view(torch.int16).int() & 0xFFFF
    grid: Tensor = offsets.contiguous().view(torch.int16).int() << 16 | below
    return grid


@dataclass(frozen=True)
class Plan:
    """How a product is laid out, for so many tokens."""

    few: int  # the tokens, rounded up to a power of two
    stack: int  # groups that one tile may touch, rounded up likewise
    pieces: int  # 1, or the bfloat16 that hold one float32
    used: int  # rows of inputs: the product of the three, the last rounded up likewise
    tiles: int  # of all inputs
    part_tiles: int  # that one program sums
    parts: int  # programs that share the inputs of an output
    width: int  # outputs of a program
    warps: int
    stages: int  # tiles that a program holds: one, and those that are read ahead


def plan(
    tokens: int,
    pieces: int,
    bits: int,
    inputs: int,
    outputs: int,
    group_size: int,
    processors: int,
) -> Plan | None:
    """Return a plan that depends on the shapes and the GPU alone, or None where rows are too many.

    The inputs are split where the outputs alone would not keep the processors busy. The widths were
    the fastest of those tried on an H100.
    """
    tile = product.HEIGHT * product.unit_of(bits)
    # A tile that does not start with a group touches one more.
    aligned = group_size % tile == 0 or tile % group_size == 0
    touched = max(1, tile // group_size) if aligned else (tile - 2) // group_size + 2
    few = triton.next_power_of_2(tokens)
    stack = triton.next_power_of_2(min(touched, inputs // group_size))
    used = few * stack * triton.next_power_of_2(pieces)
    if used > MOST_ROWS:
        return None
    width, warps = (64, 2) if used <= LEAST_ROWS else (128, 4)
    tiles, columns = triton.cdiv(inputs, tile), triton.cdiv(outputs, width)
    parts = max(1, min(PROGRAMS * processors // columns, inputs // LEAST_INPUTS))
    part_tiles = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, part_tiles)
    stages = 2 if bits == 3 else 3  # a tile of 3 bits is four times as long
    return Plan(few, stack, pieces, used, tiles, part_tiles, parts, width, warps, stages)


def unsupported(layer: PackedLinear) -> str | None:
    """Return why the kernel cannot multiply with this layer, or None."""
    if layer.bits not in BITS:
        return f"the Triton kernel knows {BITS} bits, not {layer.bits}"
    if layer.packed.scales.dtype not in (torch.float16, torch.bfloat16):
        return f"the Triton kernel knows scales of 16 bits, not {layer.packed.scales.dtype}"
    return None


@cache
def cannot_compile() -> str | None:
    """Return why Triton cannot make programs for the current GPU, or None."""
    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        # It compiles its launchers in C: without a compiler or Python's headers it cannot.
        return f"triton finds no GPU or no C compiler ({error})"
    return None
