import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.quantization.kernels import GPU_SHAPE, decode_on_gpu
from stillroom.quantization.kernels import choose
from stillroom.quantization.kernels.dequantization import PackedLinear
from stillroom.quantization.kernels.report import output_difference
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.packing import PackedWeight

ROOT = Path(__file__).parents[4]
# Sums are float32; what is left in the others is the rounding of the outputs.
TOLERANCES = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed; CUDA builds of torch bring it"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_triton
def test_in_the_interpreter_the_product_is_the_dense_one():
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "compression"), str(ROOT), *sys.path]),
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.stillroom.quantization.kernels.interpreted_triton"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in run.stderr:
        pytest.skip("the interpreter of this Triton (3.6) does not work with NumPy 2.4")
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert {row["name"] for row in rows} == {"triton-int2", "triton-int4", "triton-int8"}
    for row in rows:
        assert row["shape"], row
        assert row["same_again"], row
        assert f"torch.{row['dtype']}," in row["case"], row
        assert row["difference"] < TOLERANCES[row["dtype"]], row


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "few", "tile"),
    [("fp16", 1, 128), ("fp16", 16, 64), ("bf16", 16, 64), ("fp32", 16, 16)],
)
def test_it_compiles_for_gpus_that_are_not_here(capability, dtype, few, tile):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stillroom.quantization.kernels.triton_kernel import CONFIGS, multiply_packed

    kernel, widest = multiply_packed.fn, CONFIGS[-1]
    floats, integers = f"*{dtype}", "i32"
    types = [floats, "*i32", "*fp16", "*u8", floats, floats, *[integers] * 5, *["constexpr"] * 4]
    values = {"FEW": few, "BITS": 4, "TILE": tile, "WIDTH": widest.kwargs["WIDTH"]}
    source = ASTSource(
        kernel,
        dict(zip(kernel.arg_names, types, strict=True)),
        {(kernel.arg_names.index(name),): value for name, value in values.items()},
    )
    options = {
        "num_warps": widest.num_warps,
        "num_stages": widest.num_stages,
        "enable_fp_fusion": False,
    }
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert ("mma" in made.asm["ptx"]) == (few > 1 and dtype != "fp32")
    assert made.metadata.shared < 99 * 1024  # the smallest of compute capability 8.x


@needs_triton
def test_the_plan_splits_the_inputs_where_outputs_are_few():
    from stillroom.quantization.kernels.triton_kernel import Plan, plan

    assert plan(1, 128, *GPU_SHAPE, 128, 132) == Plan(1, 128, 96, 1)
    assert plan(1, 128, 4096, 4096, 128, 132) == Plan(1, 128, 2, 16)
    assert plan(16, 64, 4096, 4096, 128, 132) == Plan(16, 64, 16, 4)
    assert plan(1, 128, 576, 192, 576, 132) == Plan(1, 64, 5, 2)


@needs_triton
def test_layers_that_it_does_not_know_are_named():
    from stillroom.quantization.kernels.triton_kernel import unsupported

    layer = make_packed(4, inputs=96, group=32)
    assert unsupported(layer) is None
    assert "not 3" in str(unsupported(make_packed(3, inputs=96, group=32)))
    assert "not of 24" in str(unsupported(make_packed(4, inputs=96, group=24)))
    packed = PackedWeight(**{**layer.packed.tensors(), "g_idx": layer.packed.g_idx.flip(0)})
    assert "desc_act" in str(unsupported(PackedLinear(packed, None, 4, "gptq")))


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
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_the_product_is_the_dense_one(bits, tokens, dtype):
    layer = make_packed(bits, inputs=4096, outputs=1040, group=128)
    layer = QuantizedLinear(layer.packed, torch.randn(1040), bits).cuda()
    x = torch.randn(tokens, 4096, generator=torch.Generator().manual_seed(1)).cuda().to(dtype)
    assert layer.kernel == f"triton-int{bits}"
    assert output_difference(layer, x) < 2 * TOLERANCES[str(dtype).removeprefix("torch.")]
    assert torch.equal(layer(x), layer(x))


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_the_time_of_decode_on_a_gpu_is_printed():
    row = decode_on_gpu(*GPU_SHAPE, bits=4, repeats=5)
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
