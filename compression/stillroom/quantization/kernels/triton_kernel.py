"""Multiply with a packed weight on a GPU: few tokens at once, as in decode.

There the time is that of reading the weight, so it is read as it is packed. A weight less its zero
point is an integer of at most 8 bits and a sign: exact in float16 and bfloat16. So the products
are those of the inputs with integers, summed in float32, and each group's sum is scaled there.
"""

import subprocess
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from stillroom.errors import MismatchError
from stillroom.quantization.kernels.dequantization import PackedLinear, TorchKernel, require_fit
from stillroom.quantization.packing import has_plain_groups, unpack_zeros

MOST_TOKENS = 16
"""Tokens up to which the weight is read packed; more go through torch, which unpacks it once."""
BITS = (2, 4, 8)
SHORTEST_TILE = 16
"""Inputs that are worked on at once, at least, and all of one group: the tensor cores ask it."""
WIDTH = 128
"""Outputs of a program, about: tuning halves and doubles it."""
PROGRAMS = 4
"""Programs a processor of the GPU, about: fewer leave it waiting for memory."""
BLOCK = 1024
"""Outputs whose partial sums one program adds up."""

# They are timed once a shape, and the fastest is kept on disk: for one token the last bits of a sum
# depend on the choice, and so another process makes the same.
CONFIGS = [
    triton.Config({"WIDTH": WIDTH}, num_warps=4, num_stages=3),
    triton.Config({"WIDTH": WIDTH // 2}, num_warps=4, num_stages=4),
    triton.Config({"WIDTH": WIDTH}, num_warps=8, num_stages=3),
    triton.Config({"WIDTH": 2 * WIDTH}, num_warps=4, num_stages=3),
]


@triton.jit
def _lift(integer):  # type: ignore[no-untyped-def]
    """Return 2^23 plus an integer of up to 23 bits, as float32.

    The last bit of 2^23 counts one: the integer becomes its mantissa. A GPU converts more slowly.
    """
    return (integer | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _add_product(products, value, word, zero, J: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return products (rows, columns) + value (rows,) times the J-th weight of each word.

    Bits stay where they are in the word as long as a mantissa holds them, and the value is divided
    for it: that is exact, and done once a row, while a shift would be done for each weight.
    """
    FIT: tl.constexpr = 23 // BITS
    PLACE: tl.constexpr = 2 ** (J % FIT * BITS)
    held = (word >> (J // FIT * FIT * BITS)) & ((2**BITS - 1) * PLACE)
    integer = _lift(held) - (zero * PLACE + 2.0**23)[None, :]
    return tl.fma((value * (1 / PLACE))[:, None], integer, products)


@triton.autotune(configs=CONFIGS, key=["inputs", "outputs", "FEW", "BITS"], cache_results=True)  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator]
def multiply_packed(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    x,  # (tokens, inputs)
    words,  # (inputs * BITS / 32, outputs) int32
    scales,  # (groups, outputs)
    zeros,  # (groups, outputs) uint8
    bias,  # (outputs,) or None
    y,  # (parts, tokens, outputs)
    tokens,
    inputs,
    outputs,
    group_size,
    part_tiles,  # tiles of a part
    FEW: tl.constexpr,  # most tokens; 1 goes without tensor cores
    BITS: tl.constexpr,
    TILE: tl.constexpr,  # inputs of a tile; it lies in one group
    WIDTH: tl.constexpr,  # outputs of a program
):
    """Write y[part] = x Wᵀ over the part's inputs, plus the bias where there is one."""
    UNIT: tl.constexpr = 32 // BITS
    HEIGHT: tl.constexpr = TILE // UNIT
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = columns < outputs
    part = tl.program_id(1)
    first = part * part_tiles
    last = tl.minimum(first + part_tiles, inputs // TILE)
    height = tl.arange(0, HEIGHT)
    token = tl.arange(0, FEW)
    sums = tl.zeros((HEIGHT if FEW == 1 else FEW, WIDTH), tl.float32)
    for tile in tl.range(first, last):
        group = tile * TILE // group_size * outputs + columns
        scale = tl.load(scales + group, mask=exists, other=0.0).to(tl.float32)[None, :]
        zero = tl.load(zeros + group, mask=exists, other=0).to(tl.float32)
        rows = (tile * HEIGHT + height).to(tl.int64) * outputs
        at = rows[:, None] + columns[None, :]
        word = tl.load(words + at, mask=exists[None, :], other=0)  # (HEIGHT, WIDTH)
        if FEW == 1:
            products = tl.zeros((HEIGHT, WIDTH), tl.float32)
            for j in tl.static_range(UNIT):
                value = tl.load(x + tile * TILE + height * UNIT + j).to(tl.float32)
                products = _add_product(products, value, word, zero, j, BITS)
        else:
            column = tile * TILE + tl.arange(0, TILE)
            at = token[:, None] * inputs + column[None, :]
            value = tl.load(x + at, mask=token[:, None] < tokens, other=0.0)  # (FEW, TILE)
            shift = (tl.arange(0, UNIT) * BITS)[None, :, None]
            spread = tl.broadcast_to(word[:, None, :], (HEIGHT, UNIT, WIDTH))
            integer = _lift((spread >> shift) & (2**BITS - 1)) - (zero + 2.0**23)[None, None, :]
            integer = tl.reshape(integer, (TILE, WIDTH)).to(value.dtype)
            products = tl.dot(value, integer, input_precision="ieee", out_dtype=tl.float32)
        sums = tl.fma(products, scale, sums)
    if FEW == 1:
        sums = tl.sum(sums, axis=0, keep_dims=True)
    if bias is not None:
        sums += tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    at = (part * tokens + token[:, None]) * outputs + columns[None, :]
    written = (token[:, None] < tokens) & exists[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=written)


@triton.jit  # type: ignore[untyped-decorator]
def add_parts(parts, bias, y, count, size, outputs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write y (tokens, outputs) = the sum of the parts (count, tokens, outputs), plus the bias.

    In the order of the parts, always: atomic additions would end in other bits at each call.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.range(0, count):
        total += tl.load(parts + part * size + at, mask=exists, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % outputs, mask=exists, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=exists)


class TritonKernel:
    """y = x Wᵀ + b on a GPU, for 1 to 16 tokens of float16, bfloat16 or float32.

    Sums are float32. More tokens, and float64, go through torch, which dequantizes the weight.
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
        self.name = f"triton-int{layer.bits}"
        self.bits = layer.bits
        self.in_features, self.out_features = packed.g_idx.shape[0], packed.scales.shape[1]
        self._torch = TorchKernel(layer)
        self._words = packed.qweight.contiguous()
        self._scales = packed.scales.contiguous()
        # A byte each: in the checkpoint's words two versions and a borrow would be told apart.
        zeros = unpack_zeros(packed.qzeros, layer.bits, layer.checkpoint_format)
        self._zeros = zeros.contiguous()
        self._bias = layer.bias
        self._group_size = self.in_features // packed.scales.shape[0]
        shape = (self.in_features, self.out_features, self._group_size, processors)
        self._one, self._some = plan(1, 128, *shape), plan(MOST_TOKENS, 64, *shape)
        # Without tensor cores, a longer tile does not fit into the registers.
        self._some_float32 = plan(MOST_TOKENS, SHORTEST_TILE, *shape)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs, (..., out), of the inputs' dtype, for inputs (..., in).

        Raises:
            MismatchError: the inputs have another width than the weight.
        """
        *leading, width = inputs.shape
        if width != self.in_features:
            raise MismatchError(f"expected inputs of {self.in_features} features, got {width}")
        tokens = inputs.numel() // width
        if not 0 < tokens <= MOST_TOKENS or not self._is_readable(inputs):
            return self._torch(inputs)
        x = inputs.contiguous()
        y = x.new_empty((*leading, self.out_features))
        with torch.cuda.device(x.device if x.is_cuda else -1):  # Triton works on the current one
            self._run(x, y, tokens)
        return y

    def _is_readable(self, inputs: Tensor) -> bool:
        """Return whether these are plain floats where the weight is."""
        return (
            (type(inputs) is Tensor or type(inputs) is nn.Parameter)
            and inputs.device == self._words.device
            and inputs.dtype in (torch.float16, torch.bfloat16, torch.float32)
        )

    def _run(self, x: Tensor, y: Tensor, tokens: int) -> None:
        several = self._some_float32 if x.dtype is torch.float32 else self._some
        plan, outputs = self._one if tokens == 1 else several, self.out_features
        target, bias = y, self._bias
        if plan.parts > 1:
            target = y.new_empty((plan.parts, tokens, outputs), dtype=torch.float32)
            bias = None
        multiply_packed[lambda meta: (triton.cdiv(outputs, meta["WIDTH"]), plan.parts)](
            x, self._words, self._scales, self._zeros, bias, target,
            tokens, self.in_features, outputs, self._group_size, plan.part_tiles,
            FEW=plan.few, BITS=self.bits, TILE=plan.tile, enable_fp_fusion=False,
        )  # fmt: skip
        if plan.parts > 1:
            size = tokens * outputs
            grid = (triton.cdiv(size, BLOCK),)
            sizes = (plan.parts, size, outputs)
            add_parts[grid](target, self._bias, y, *sizes, BLOCK=BLOCK, enable_fp_fusion=False)


@dataclass(frozen=True)
class Plan:
    """How the work is laid out for so many tokens."""

    few: int  # most tokens
    tile: int  # inputs that are worked on at once
    part_tiles: int  # tiles that one program sums
    parts: int  # programs that share the inputs of an output


def plan(
    few: int, longest: int, inputs: int, outputs: int, group_size: int, processors: int
) -> Plan:
    """Return a plan that depends on the shapes and the GPU alone, not on what else was computed.

    The inputs are split where the outputs alone would not keep the processors busy, but not so
    far that partial sums become much of the traffic.
    """
    tile = _tile(group_size, longest)
    columns = triton.cdiv(outputs, WIDTH)
    least = 256 if few == 1 else 1024
    parts = max(1, min(PROGRAMS * processors // columns, inputs // least))
    part_tiles = triton.cdiv(inputs // tile, parts)
    return Plan(few, tile, part_tiles, triton.cdiv(inputs // tile, part_tiles))


def unsupported(layer: PackedLinear) -> str | None:
    """Return why the kernel cannot multiply with this layer, or None."""
    packed = layer.packed
    columns, groups = packed.g_idx.shape[0], packed.scales.shape[0]
    if layer.bits not in BITS:
        return f"the Triton kernel knows {BITS} bits, not {layer.bits}"
    if not has_plain_groups(packed.g_idx, groups):
        return "the Triton kernel knows no desc_act, whose groups are not neighbouring columns"
    if _tile(columns // groups, SHORTEST_TILE) < SHORTEST_TILE:
        return f"the Triton kernel knows groups of multiples of 16, not of {columns // groups}"
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


def _tile(group_size: int, longest: int) -> int:
    """Return the longest power of two, up to `longest`, that divides the group."""
    return min(group_size & -group_size, longest)
