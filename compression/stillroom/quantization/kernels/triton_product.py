# ruff: noqa: RET505 - Triton goes on behind a return unless it stands in a branch
"""The Triton code that multiplies with a packed weight, and that unpacks one.

A product with tensor cores sums over the inputs in any order. So the words are never unpacked into
the order of the inputs: of all words of a tile, the first weights are one operand, the second ones
the next, and `arrange` lays the inputs out to fit. What a word holds then stays in the thread that
read it, and a pair of weights costs four instructions.

A weight less the centre of its range is an integer of at most 8 bits: exact in float16 and
bfloat16. The products are summed in float32, for each group apart: its zero point's distance from
the centre times the sum of its inputs is added, and then its scale multiplies the sum. Where a tile
spans several groups, the inputs of each stand in rows of their own, with zeros for the others.
"""

import triton
import triton.language as tl

HEIGHT = 16
"""Units of a tile: as many inputs as one product of the tensor cores sums."""
PIECES = 3
"""bfloat16 that hold a float32: each has 8 of its 24 bits."""


@triton.constexpr_function
def unit_of(bits):  # type: ignore[no-untyped-def]
    """Return how many weights fill whole words."""
    return 32 if bits == 3 else 32 // bits


@triton.constexpr_function
def _can_pair(shift, bits, is_half):  # type: ignore[no-untyped-def]
    """Return whether the weight lies in one half of the word, and fits a mantissa of the type."""
    return shift // 16 == (shift + bits - 1) // 16 and (is_half or bits < 8)


@triton.constexpr_function
def _pair_code(shift, bits, is_half):  # type: ignore[no-untyped-def]
    """Return PTX that makes two weights, less the centre, of two words: $0 of $1 and $2.

    The halves of the words that hold them are put side by side. Each weight becomes bits of the
    mantissa of a float whose last bit counts one, 1024 in float16, 128 in bfloat16: where it stands
    if it fits there, so that few are shifted. What it is then too large by goes in one step.
    """
    mantissa, bias = (10, 15) if is_half else (7, 127)
    place, step = shift % 16, mantissa // bits * bits
    first = (mantissa - place % bits) // bits * bits + place % bits  # that does not fit
    moved = 0 if place < first else first + (place - first) // step * step
    place -= moved
    one_counts = (bias + mantissa) << mantissa
    by = (bias - place) << mantissa  # 2^-place
    less = 0x8000 | (bias + mantissa - place) << mantissa | 1 << (bits - 1 + place)
    pair = 0x10001
    return (
        f"{{ .reg .b32 t, by, less; prmt.b32 t, $1, $2, {0x7632 if shift >= 16 else 0x5410}; "
        f"shr.u32 t, t, {moved}; "
        f"lop3.b32 t, t, {((2**bits - 1) << place) * pair}, {one_counts * pair}, 0xEA; "
        f"mov.b32 by, {by * pair}; mov.b32 less, {less * pair}; "
        f"fma.rn.{'f16x2' if is_half else 'bf16x2'} $0, t, by, less; }}"
    )


@triton.jit  # type: ignore[untyped-decorator]
def _weights_at(  # type: ignore[no-untyped-def]
    word, SHIFT: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr
):
    """Return the weights at a place of the words, less the centre, as floats of a dtype."""
    if PTX and _can_pair(SHIFT, BITS, dtype == tl.float16):
        CODE: tl.constexpr = _pair_code(SHIFT, BITS, dtype == tl.float16)
        if dtype == tl.float16:
            return tl.inline_asm_elementwise(CODE, "=r,r,r", [word], tl.float16, True, 2)
        else:
            return tl.inline_asm_elementwise(CODE, "=r,r,r", [word], tl.bfloat16, True, 2)
    elif PTX and dtype != tl.float32 and BITS < 8:
        return _weights_at(word >> SHIFT, 0, BITS, dtype, PTX)
    else:
        # The last bit of 2^23 counts one: the integer becomes its mantissa.
        lifted = (((word >> SHIFT) & (2**BITS - 1)) | 0x4B000000).to(tl.float32, bitcast=True)
        LESS: tl.constexpr = 2.0**23 + 2.0 ** (BITS - 1)
        return (lifted - LESS).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _weights(  # type: ignore[no-untyped-def]
    first,
    second,
    third,
    J: tl.constexpr,
    BITS: tl.constexpr,
    dtype: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return the J-th weights of units of one word, or of three where they have 3 bits."""
    if BITS != 3:
        return _weights_at(first, J * BITS, BITS, dtype, PTX)
    elif J == 10:
        return _weights_at(((first >> 30) & 3) | (second << 2), 0, 3, dtype, PTX)
    elif J == 21:
        return _weights_at(((second >> 31) & 1) | (third << 1), 0, 3, dtype, PTX)
    elif J < 10:
        return _weights_at(first, J * 3, 3, dtype, PTX)
    elif J < 21:
        return _weights_at(second, J * 3 - 32, 3, dtype, PTX)
    else:
        return _weights_at(third, J * 3 - 64, 3, dtype, PTX)


@triton.jit  # type: ignore[untyped-decorator]
def _grid_of(both, HALF_SCALES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scales, and the centre less the zero points, that share words, as float32."""
    if HALF_SCALES:
        scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scale = (both << 16).to(tl.float32, bitcast=True)
    return scale, (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "group_size"])  # type: ignore[untyped-decorator]
def arrange(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    x,  # (tokens, inputs)
    arranged,  # (tiles, UNIT, USED, HEIGHT): float16 or bfloat16
    sums,  # (tiles, USED) float32
    tokens,
    inputs,
    group_size,
    UNIT: tl.constexpr,
    USED: tl.constexpr,  # rows: the product of the next three, the last rounded up too
    FEW: tl.constexpr,  # tokens, rounded up to a power of two
    STACK: tl.constexpr,  # groups that a tile may touch, rounded up likewise
    PIECES: tl.constexpr,  # 1, or what a float32 is split into
    HEIGHT: tl.constexpr,
):
    """Lay a tile's inputs out as its weights come, a row for each piece, group and token.

    `sums` is each row's sum.
    """
    tile = tl.program_id(0)
    j = tl.arange(0, UNIT)[:, None, None]
    row = tl.arange(0, USED)[None, :, None]
    height = tl.arange(0, HEIGHT)[None, None, :]
    first = tile * (UNIT * HEIGHT)
    at = first + height * UNIT + j
    token = row % FEW
    piece = row // (FEW * STACK)
    in_group = at // group_size == first // group_size + row // FEW % STACK
    exists = (at < inputs) & in_group & (token < tokens) & (piece < PIECES)
    value = tl.load(x + token.to(tl.int64) * inputs + at, mask=exists, other=0.0)
    if PIECES > 1:
        for k in tl.static_range(1, PIECES):
            rounded = value.to(tl.bfloat16).to(tl.float32)
            value = tl.where(piece >= k, value - rounded, value)
    value = value.to(arranged.dtype.element_ty)
    tl.store(arranged + ((tile * UNIT + j) * USED + row) * HEIGHT + height, value)
    sum_of_row = tl.sum(tl.sum(value.to(tl.float32), axis=2), axis=0)
    tl.store(sums + tile * USED + tl.arange(0, USED), sum_of_row)


@triton.jit(do_not_specialize=["tokens", "group_size", "tiles", "part_tiles"])  # type: ignore[untyped-decorator]
def multiply(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    x,  # as `arrange` wrote it
    sums_of_x,
    words,  # (inputs * BITS / 32, outputs) int32
    grid,  # (groups, outputs) int32: a scale, and above it the centre less the zero point
    bias,  # (outputs,) or None
    y,  # (parts, tokens, outputs)
    tokens,
    inputs,
    outputs,
    group_size,
    tiles,
    part_tiles,  # tiles of a part
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,  # of x: USED, and at least what the tensor cores take
    USED: tl.constexpr,
    FEW: tl.constexpr,
    STACK: tl.constexpr,
    HEIGHT: tl.constexpr,  # units of a tile
    WIDTH: tl.constexpr,  # outputs of a program
    STAGES: tl.constexpr,  # tiles that are read ahead, and one
    WHOLE: tl.constexpr,  # whether the inputs fill all tiles
    HALF_SCALES: tl.constexpr,  # whether scales are float16, not bfloat16
    PTX: tl.constexpr,  # False for an interpreter: it knows neither this nor sums of bfloat16
):
    """Write y[part] = x Wᵀ over the part's inputs, plus the bias where there is one."""
    WORDS: tl.constexpr = UNIT * BITS // 32  # of a unit
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    exists = columns < outputs
    part = tl.program_id(1)
    height = tl.arange(0, HEIGHT)
    row = tl.arange(0, ROWS)[:, None]
    is_used = row < USED
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    first = part * part_tiles
    last = tl.minimum(first + part_tiles, tiles)
    for tile in tl.range(first, last, num_stages=STAGES):
        unit = (tile * HEIGHT + height)[:, None]
        at = (unit * WORDS).to(tl.int64) * outputs + columns
        held = exists if WHOLE else exists & (unit * UNIT < inputs)
        word0 = tl.load(words + at, mask=held, other=0)  # (HEIGHT, WIDTH)
        word1 = word0
        word2 = word0
        if WORDS == 3:
            word1 = tl.load(words + at + outputs, mask=held, other=0)
            word2 = tl.load(words + at + 2 * outputs, mask=held, other=0)
        group = tile * (UNIT * HEIGHT) // group_size
        if STACK > 1:  # beyond the last group x is 0
            group = tl.minimum(group + row // FEW % STACK, inputs // group_size - 1)
        both = tl.load(grid + group * outputs + columns, mask=exists, other=0)
        scale, offset = _grid_of(both, HALF_SCALES)
        sum_of_x = tl.load(sums_of_x + tile * USED + row, mask=is_used, other=0.0)
        products = tl.broadcast_to(offset, (ROWS, WIDTH)) * sum_of_x
        for j in tl.static_range(UNIT):
            at = ((tile * UNIT + j) * USED + row) * HEIGHT + height[None, :]
            value = tl.load(x + at, mask=is_used, other=0.0)  # (ROWS, HEIGHT)
            weights = _weights(word0, word1, word2, j, BITS, value.dtype, PTX)
            if not PTX:
                value = value.to(tl.float32)
                weights = weights.to(tl.float32)
            products = tl.dot(value, weights, products, input_precision="ieee")
        sums = tl.fma(products, tl.broadcast_to(scale, (ROWS, WIDTH)), sums)
    if ROWS > FEW:
        sums = tl.sum(tl.reshape(sums, (ROWS // FEW, FEW, WIDTH)), axis=0)
    if bias is not None:
        sums += tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)
    token = tl.arange(0, FEW)[:, None]
    at = (part * tokens + token).to(tl.int64) * outputs + columns
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(token < tokens) & exists)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
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


@triton.jit  # type: ignore[untyped-decorator]
def unpack(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    words,  # (inputs * BITS / 32, outputs) int32
    grid,  # (groups, outputs) int32, as above
    groups,  # (inputs,) int32: the group of each input
    weight,  # (inputs, outputs)
    inputs,
    outputs,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF_SCALES: tl.constexpr,
):
    """Write the weight, (w - zero) * scale in float32, rounded to the dtype of `weight`."""
    WORDS: tl.constexpr = UNIT * BITS // 32
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    unit = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    exists = (columns < outputs) & (unit * UNIT < inputs)
    at = (unit * WORDS).to(tl.int64) * outputs + columns
    word0 = tl.load(words + at, mask=exists, other=0)
    word1 = word0
    word2 = word0
    if WORDS == 3:
        word1 = tl.load(words + at + outputs, mask=exists, other=0)
        word2 = tl.load(words + at + 2 * outputs, mask=exists, other=0)
    for j in tl.static_range(UNIT):
        row = unit * UNIT + j
        group = tl.load(groups + row, mask=row < inputs, other=0)
        both = tl.load(grid + group * outputs + columns, mask=exists, other=0)
        scale, offset = _grid_of(both, HALF_SCALES)
        integer = _weights(word0, word1, word2, j, BITS, tl.float32, False)
        at = row.to(tl.int64) * outputs + columns
        value = (integer + offset) * scale
        tl.store(weight + at, value.to(weight.dtype.element_ty), mask=exists)
