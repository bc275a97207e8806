import random
import re
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks.quantization.gpu import GPU_SHAPE, GROUP_SIZE, decode_on_gpu
from stillroom.quantization.kernels import choose
from stillroom.quantization.kernels.dequantization import PackedLinear
from stillroom.quantization.kernels.report import output_difference
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.packing import PackedWeight
from tests.stillroom.quantization.interpreter import interpreted

# Sums are float32; what is left in the others is the rounding of the outputs.
TOLERANCES = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed; CUDA builds of torch bring it"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_triton
def test_in_the_interpreter_the_product_is_the_dense_one():
    rows = interpreted("tests.stillroom.quantization.kernels.interpreted_triton")
    assert {row["name"] for row in rows} == {f"triton-int{bits}" for bits in (2, 3, 4, 8)}
    for row in rows:
        assert row["shape"], row
        assert row["same_again"], row
        assert row["unpacked"], row
        assert f"torch.{row['dtype']}," in row["case"], row
        assert row["difference"] < TOLERANCES[row["dtype"]], row


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("bits", "tokens"), [(2, 1), (3, 2), (4, 1), (4, 16), (8, 4)])
def test_it_compiles_for_gpus_that_are_not_here(capability, dtype, bits, tokens):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stillroom.quantization.kernels.triton_kernel import LEAST_ROWS, plan
    from stillroom.quantization.kernels.triton_product import HEIGHT, multiply, unit_of

    made = plan(tokens, 1, bits, *GPU_SHAPE, GROUP_SIZE, 132)
    floats = [f"*{dtype}", "*fp32", "*i32", "*i32", f"*{dtype}", f"*{dtype}"]
    types = [*floats, *["i32"] * 6, *["constexpr"] * 12]
    values = {
        "BITS": bits,
        "UNIT": unit_of(bits),
        "ROWS": max(LEAST_ROWS, made.used),
        "USED": made.used,
        "FEW": made.few,
        "STACK": made.stack,
        "HEIGHT": HEIGHT,
        "WIDTH": made.width,
        "STAGES": made.stages,
        "WHOLE": True,
        "HALF_SCALES": True,
        "PTX": True,
    }
    aligned = ("x", "words", "grid", "bias", "y", "inputs", "outputs")
    names = multiply.arg_names
    source = ASTSource(
        multiply,
        dict(zip(names, types, strict=True)),
        {(names.index(name),): value for name, value in values.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": made.warps, "enable_fp_fusion": False}
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "mma.sync" in code.asm["ptx"]
    assert "cp.async" in code.asm["ptx"]
    assert code.metadata.shared < 99 * 1024  # the smallest of compute capability 8.x
    if (bits, dtype) != (8, "bf16"):
        assert "lop3.b32 t, t" in code.asm["ptx"]


def ptx_value(code, first, second, dtype):
    """Compute what the PTX for a pair of weights says; it must be exact."""
    numbers = re.search(
        r"\$2, (\d+); shr.u32 t, t, (\d+); lop3.b32 t, t, (\d+), (\d+), 0xEA; "
        r"mov.b32 by, (\d+); mov.b32 less, (\d+);",
        code,
    ).groups()
    halves, shift, mask, one_counts, by, less = map(int, numbers)
    place = {0x5410: 0, 0x7632: 16}[halves]
    word = (first >> place & 0xFFFF) | (second >> place & 0xFFFF) << 16
    word = (word >> shift & mask) | one_counts

    def pair(bits):
        halves = torch.tensor([bits & 0xFFFF, bits >> 16]).to(torch.int16)
        return halves.view(dtype).double()

    value = pair(word) * pair(by) + pair(less)
    assert torch.equal(value.to(dtype).double(), value)
    return value.tolist()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_ptx_for_a_pair_makes_the_weights_of_two_words(bits, dtype):
    from stillroom.quantization.kernels.triton_product import _can_pair, _pair_code

    draw, places, is_half = random.Random(0), 0, dtype is torch.float16
    for shift in range(33 - bits):
        if _can_pair(shift, bits, is_half):
            places += 1
            for _ in range(20):
                words = draw.getrandbits(32), draw.getrandbits(32)
                exact = [(word >> shift) % 2**bits - 2 ** (bits - 1) for word in words]
                assert ptx_value(_pair_code(shift, bits, is_half), *words, dtype) == exact
    assert places == (0 if (bits, is_half) == (8, False) else 2 * (17 - bits))


@needs_triton
def test_the_plan_splits_the_inputs_where_outputs_are_few():
    from stillroom.quantization.kernels.triton_kernel import plan

    one = plan(1, 1, 4, *GPU_SHAPE, 128, 132)
    assert (one.few, one.stack, one.used, one.tiles, one.parts) == (1, 1, 1, 96, 1)
    small = plan(1, 1, 4, 4096, 4096, 128, 132)
    assert small.parts > 1
    assert (small.parts - 1) * small.part_tiles < small.tiles <= small.parts * small.part_tiles


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "pieces", "bits", "group", "stack", "used"),
    [
        (3, 1, 4, 128, 1, 4),
        (8, 1, 4, 64, 2, 16),
        (16, 1, 4, 64, 2, 32),
        (1, 3, 4, 64, 2, 8),  # a float32 in three pieces, rounded up to four
        (1, 1, 3, 64, 8, 8),  # a tile of 512 inputs
        (1, 1, 4, 96, 4, 4),  # the tile from 128 on touches 2 groups, that from 256 on 3
        (1, 1, 4, 12288, 1, 1),
        (1, 1, 3, 12288, 1, 1),
    ],
)
def test_groups_of_a_tile_stand_in_rows_of_their_own(tokens, pieces, bits, group, stack, used):
    from stillroom.quantization.kernels.triton_kernel import plan

    made = plan(tokens, pieces, bits, 12288, 4096, group, 132)
    assert (made.stack, made.used) == (stack, used)


@needs_triton
def test_too_many_rows_are_left_to_cublas():
    from stillroom.quantization.kernels.triton_kernel import plan

    assert plan(16, 1, 3, 12288, 4096, 32, 132) is None


@needs_triton
def test_layers_that_it_does_not_know_are_named():
    from stillroom.quantization.kernels.triton_kernel import unsupported

    layer = make_packed(4, inputs=96, group=32)
    assert unsupported(layer) is None
    assert "not 5" in str(unsupported(PackedLinear(layer.packed, None, 5, "gptq")))


def test_without_triton_the_reason_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "stillroom.quantization.kernels.triton_kernel", None)
    reason = choose._why_not_triton(make_packed(4))
    assert reason is not None
    assert "pip install triton" in reason


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_cannot_compile():
    from stillroom.quantization.kernels.triton_kernel import cannot_compile

    assert "no GPU or no C compiler" in str(cannot_compile())


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_a_gpu_that_is_new_enough_takes_triton(capability, monkeypatch):
    module = SimpleNamespace(
        TritonKernel=lambda layer, processors: f"triton on {processors}",
        cannot_compile=lambda: None,
        unsupported=lambda layer: None,
    )
    monkeypatch.setitem(sys.modules, "stillroom.quantization.kernels.triton_kernel", module)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weight = SimpleNamespace(device=torch.device("cuda"))
    layer = SimpleNamespace(packed=SimpleNamespace(qweight=weight))
    if capability >= (8, 0):
        assert choose.choose_kernel(layer) == "triton on 132"
    else:
        with pytest.warns(RuntimeWarning, match=r"compute capability 8.0, this GPU has \(7, 5\)"):
            assert choose.choose_kernel(layer).name == "torch"


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
@pytest.mark.parametrize("group", [64, 128, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_the_product_is_the_dense_one(bits, tokens, group, dtype):
    layer = make_packed(bits, inputs=4096, outputs=1056, group=group)
    layer = QuantizedLinear(layer.packed, torch.randn(1056), bits).cuda()
    x = torch.randn(tokens, 4096, generator=torch.Generator().manual_seed(1)).cuda().to(dtype)
    assert layer.kernel == f"triton-int{bits}"
    assert output_difference(layer, x) < 2 * TOLERANCES[str(dtype).removeprefix("torch.")]
    assert torch.equal(layer(x), layer(x))


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_on_a_gpu_the_weight_is_unpacked_to_the_same_bits(bits):
    packed = make_packed(bits, inputs=192, outputs=1056, group=64).packed
    shuffled = packed.g_idx[torch.randperm(192, generator=torch.Generator().manual_seed(0))]
    for groups in (packed.g_idx, shuffled):
        parts = PackedWeight(**{**packed.tensors(), "g_idx": groups})
        layer = QuantizedLinear(parts, None, bits).cuda()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            ours = layer._unpacked(dtype)
            assert torch.equal(ours, layer.dequantize(dtype))
        x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1)).cuda()
        assert output_difference(layer, x) < 2 * TOLERANCES["float32"]


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_the_time_of_decode_on_a_gpu_is_printed():
    row = decode_on_gpu(*GPU_SHAPE, bits=4, group_size=GROUP_SIZE, tokens=1, repeats=5)
    print(row)
    assert row.kernel == "triton-int4"
    assert row.difference < 2 * TOLERANCES["float16"]


def make_packed(bits, inputs=64, outputs=32, group=64):
    draw = torch.Generator().manual_seed(0)
    groups = inputs // group
    words = (inputs * bits // 32, outputs)
    packed = PackedWeight(
        torch.randint(-(2**31), 2**31, words, generator=draw, dtype=torch.int32),
        torch.full((groups, outputs * bits // 32), 0x11111111, dtype=torch.int32),
        (torch.rand(groups, outputs, generator=draw) / 2**bits + 0.01).half(),
        torch.arange(inputs, dtype=torch.int32) // group,
    )
    return PackedLinear(packed, None, bits, "gptq")
