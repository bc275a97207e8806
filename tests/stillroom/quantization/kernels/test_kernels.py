import copy
import gc
import io
import os
import sys
import threading
import time
from dataclasses import replace
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quantization.kernels import SHAPES, compare
from stillroom.errors import CorruptedError, MismatchError
from stillroom.quantization.kernels import llvm_kernel
from stillroom.quantization.kernels.llvm_kernel import chunk_table
from stillroom.quantization.kernels.report import output_difference, report_kernels
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.packing import pack
from stillroom.quantization.weight import QuantizedWeight

FLOAT32 = 2e-6
"""Largest difference that a sum in float32 may have, over the largest output."""
SMALL = (576, 192)  # (in, out)
LARGE = (2048, 520)  # worth two threads at 8 tokens


def _layer(inputs, outputs, bits=4, group=64, symmetric=False, bias=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    top = 2**bits
    groups = inputs // group
    shape = (outputs, inputs)
    middle = torch.full((outputs, groups), top // 2, dtype=torch.uint8)
    low = torch.randint(1, top, (outputs, groups), generator=draw, dtype=torch.uint8)
    weight = QuantizedWeight(
        integers=torch.randint(0, top, shape, generator=draw, dtype=torch.uint8),
        scales=(torch.rand(outputs, groups, generator=draw) / top + 0.01).half(),
        zeros=middle if symmetric else low,
        bits=bits,
    )
    offset = torch.randn(outputs, generator=draw) if bias else None
    return QuantizedLinear(pack(weight), offset, bits)


def _inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 21])
def test_outputs_are_those_of_the_dense_product(bits, tokens):
    layer = _layer(*SMALL, bits)
    assert layer.kernel == f"llvm-int{bits}"
    assert output_difference(layer, _inputs(tokens, SMALL[0])) < FLOAT32


def _machines():
    """Return this machine, and every lesser one that it can be."""
    this = llvm_kernel.this_machine()
    found = []
    for lanes in (4, 8, 16):
        registers = 32 if lanes > 8 else 16
        for products in range(0, this.byte_products + 1, 2):
            for shifts in sorted({False, this.byte_shifts and products == 4}):
                traits = {"byte_products": products, "byte_shifts": shifts}
                found.append(replace(this, lanes=lanes, registers=registers, **traits))
    return [machine for machine in found if machine.lanes <= this.lanes]


def _named(machine):
    traits = [f"{machine.byte_products}_products"] + ["byte_shifts"] * machine.byte_shifts
    return "-".join([f"{machine.lanes}_lanes", *traits])


@pytest.mark.parametrize("machine", _machines(), ids=_named)
def test_lesser_machines_give_the_same(machine, monkeypatch):
    monkeypatch.setattr(llvm_kernel, "this_machine", lambda: machine)
    for tokens in (1, 2, 4, 8):
        for bits in (2, 3, 4, 8):
            outputs = 96 if bits in (2, 3) else 104
            layer = _layer(96, outputs, bits, group=32)
            assert output_difference(layer, _inputs(tokens, 96)) < FLOAT32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1.0, 1e20, 1e34])
def test_inputs_of_any_magnitude(bits, magnitude):
    layer = _layer(*SMALL, bits, bias=False)
    assert output_difference(layer, _inputs(2, SMALL[0]) * magnitude) < FLOAT32


def test_one_input_far_above_the_others():
    layer = _layer(*SMALL, bias=False)
    inputs = _inputs(2, SMALL[0])
    inputs[0, 5] = 3e4
    assert output_difference(layer, inputs) < FLOAT32
    inputs[0] = 0
    assert not layer(inputs)[0].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_token(value):
    layer, inputs = _layer(*SMALL), _inputs(3, SMALL[0])
    expected = layer(inputs)
    inputs[1, 70] = value
    outputs = layer(inputs)
    assert not outputs[1].isfinite().any()
    assert torch.equal(outputs[[0, 2]], expected[[0, 2]])


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    units=st.integers(1, 9),
    groups=st.sampled_from([1, 2, 4]),
    words=st.integers(1, 12),
    tokens=st.integers(1, 8),
    symmetric=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_width_group_and_grid(bits, units, groups, words, tokens, symmetric, bias, seed):
    unit = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    inputs, outputs = unit * units * groups, unit * words
    # Groups that are shorter than a unit share its words.
    group = inputs // groups if seed % 2 else inputs // groups // 4 or 1
    layer = _layer(inputs, outputs, bits, group, symmetric, bias, seed)
    assert output_difference(layer, _inputs(tokens, inputs)) < 2 * FLOAT32


def test_one_scale_a_row():
    layer = _layer(576, 64, group=576)
    assert output_difference(layer, _inputs(3, 576)) < FLOAT32


def test_large_means_do_not_cancel():
    layer = _layer(*SMALL, bits=8)
    assert output_difference(layer, _inputs(8, SMALL[0]) + 10) < FLOAT32


@pytest.mark.parametrize("even", [True, False])
def test_groups_in_any_order(even):
    layer = _layer(*SMALL, bias=False)
    draw = torch.Generator().manual_seed(3)
    if even:
        order = torch.randperm(SMALL[0], generator=draw)
        layer.g_idx = layer.g_idx[order]
    else:
        layer.g_idx = torch.randint(0, 9, (SMALL[0],), generator=draw, dtype=torch.int32)
    assert layer.kernel == "llvm-int4"
    assert output_difference(layer, _inputs(2, 3, SMALL[0])) < FLOAT32


def test_chunks_cover_each_group_with_whole_units():
    g_idx = torch.tensor([0] * 40 + [1] * 24 + [5] * 320)
    rows = chunk_table(g_idx, 32).tolist()
    assert rows[:3] == [[0, 64, 0, 40, 0], [32, 64, 40, 64, 1], [64, 192, 64, 384, 5]]
    assert rows[-1] == [320, 384, 64, 384, 5]


def test_inputs_of_any_layout_and_shape():
    layer = _layer(*SMALL)
    wide = _inputs(2, 3, 2 * SMALL[0])
    assert output_difference(layer, wide[..., ::2]) < FLOAT32
    assert output_difference(layer, wide[:, 1:, : SMALL[0]]) < FLOAT32
    assert output_difference(layer, _inputs(SMALL[0], 4).T) < FLOAT32
    assert layer(_inputs(SMALL[0])).shape == (SMALL[1],)
    assert layer(_inputs(2, 0, SMALL[0])).shape == (2, 0, SMALL[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_computed_at_least_in_float32(dtype):
    layer = _layer(*SMALL)
    inputs = _inputs(4, SMALL[0]).to(dtype)
    exact = inputs.double() @ layer.dequantize().double().T + layer.bias.double()
    outputs = layer(inputs)
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs, exact.to(dtype), rtol=8e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_wider_dtypes_are_taken_as_they_are(dtype):
    layer = _layer(*SMALL)
    layer.scales = (layer.scales.float() * 1e-7).to(dtype)  # too small for float16
    layer.bias.zero_()
    assert output_difference(layer, _inputs(2, SMALL[0])) < FLOAT32


def test_zero_points_of_both_versions():
    weight = _layer(*SMALL)
    second = QuantizedLinear(weight._parts().packed, None, 4, "gptq_v2")
    assert output_difference(second, _inputs(2, SMALL[0])) < FLOAT32


def test_changes_of_the_tensors_are_noticed():
    layer, other = _layer(*SMALL), _layer(*SMALL, seed=9)
    inputs = _inputs(2, SMALL[0])
    layer(inputs)
    layer.qzeros = other.qzeros
    assert output_difference(layer, inputs) < FLOAT32
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(inputs), other(inputs))
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert output_difference(layer, inputs) < FLOAT32
    layer.share_memory()
    assert output_difference(layer, inputs) < FLOAT32


def test_copies_and_pickles_work_on_their_own():
    layer, inputs = _layer(*SMALL), _inputs(2, SMALL[0])
    expected = layer(inputs)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        layer.qweight.zero_()
        assert torch.equal(again(inputs), expected)


def test_inputs_that_do_not_fit_are_refused():
    layer = _layer(*SMALL)
    with pytest.raises(MismatchError, match="expected inputs of 576 features, got 575"):
        layer(_inputs(1, 575))


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_tensors_that_do_not_fit_are_refused(part):
    layer = _layer(*SMALL)
    tensor = getattr(layer, part)
    setattr(layer, part, tensor + 1 if part == "g_idx" else tensor[:-1])
    with pytest.raises(CorruptedError, match="write the checkpoint again"):
        layer(_inputs(1, 576))


def test_gradients_reach_the_inputs_only():
    layer, inputs = _layer(*SMALL), _inputs(3, SMALL[0]).requires_grad_()
    outputs = layer(inputs)
    outputs.sum().backward()
    torch.testing.assert_close(inputs.grad, layer.dequantize().sum(0).expand(3, -1))
    with torch.no_grad():
        assert not layer(inputs).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(inputs), outputs)


def test_two_python_threads_at_once(two_threads):
    layer = _layer(*LARGE, group=128)
    batches = [_inputs(8, LARGE[0], seed=seed) for seed in range(4)]
    expected = [layer(inputs) for inputs in batches]
    wrong = []

    def work(inputs, outputs):
        for _ in range(30):
            if not torch.equal(layer(inputs), outputs):
                wrong.append(inputs)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_each_number_of_threads_gives_the_same_bytes(two_threads):
    layer, inputs = _layer(*LARGE, group=128), _inputs(21, LARGE[0])
    outputs = layer(inputs)
    assert output_difference(layer, inputs) < FLOAT32
    torch.set_num_threads(1)
    assert torch.equal(layer(inputs), outputs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12: fork beside threads
def test_a_forked_child_does_not_wait_for_its_parents_threads(two_threads):
    layer, inputs = _layer(*LARGE, group=128), _inputs(8, LARGE[0])
    expected = layer(inputs)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(layer(inputs), expected) else 1)
    for _ in range(200):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0


def test_without_llvmlite_torch_dequantizes_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "stillroom.quantization.kernels.llvm_kernel", None)
    layer = _layer(*SMALL)
    with pytest.warns(RuntimeWarning, match="pip install llvmlite"):
        assert layer.kernel == "torch"
    assert output_difference(layer, _inputs(2, SMALL[0])) < FLOAT32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_runs_on_the_kernels(backend):
    model = torch.nn.Sequential(_layer(*SMALL), torch.nn.Linear(SMALL[1], SMALL[0]), _layer(*SMALL))
    graph = torch.compile(model, backend=backend, fullgraph=True)
    for seed in range(3):
        inputs = _inputs(2, SMALL[0], seed=seed)
        with torch.no_grad():
            assert torch.equal(graph(inputs), model(inputs))
    twin = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    del model, graph
    gc.collect()
    with torch.no_grad():
        assert torch.isfinite(twin(inputs)).all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own way of tracing
def test_a_compiled_graph_has_gradients():
    layer = _layer(*SMALL)
    gradients = []
    for module in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        inputs = _inputs(2, SMALL[0]).requires_grad_()
        module(inputs).square().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_an_exported_graph_needs_no_layer():
    layer, inputs = _layer(*SMALL), _inputs(2, SMALL[0])
    program = torch.export.export(layer, (inputs,))
    assert not any("multiply_packed" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(inputs), layer(inputs), rtol=1e-4, atol=1e-4)


def test_without_memory_there_is_no_machine_code():
    assert _layer(*SMALL).to("meta").kernel == "torch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_product_is_the_same():
    layer, inputs = _layer(*SMALL), _inputs(4, SMALL[0])
    expected = layer(inputs)
    layer.cuda()
    torch.testing.assert_close(layer(inputs.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


def test_the_report_names_kernels_and_measures_logits():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(10, 576)
            self.head = _layer(*SMALL)

        def forward(self, input_ids):
            return type("Output", (), {"logits": self.head(self.embed(input_ids))})()

    report = report_kernels(Model(), torch.arange(6).view(2, 3))
    assert report.layers == {"llvm-int4": 1}
    assert 0 <= report.logit_difference < FLOAT32


def test_the_kernel_is_printed():
    assert "bits=3, kernel=llvm-int3" in repr(_layer(*SMALL, bits=3))


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if max(shape) <= 1536])
def test_decode_is_not_slower_than_dense_layers(bits, shape):
    before = torch.get_num_threads()
    try:
        rows = list(compare((shape,), (bits,), (1, 2, 4, 8), (1,), 5, time.perf_counter))
    finally:
        torch.set_num_threads(before)
    # A model decodes "cold". "hot", one small layer again and again, is no promise: where the
    # processor lacks sums of four byte products, MKL's dense product can be the faster one.
    limits = {"cold": 1.0}
    if llvm_kernel.this_machine().byte_products == 4:
        limits["hot"] = 1.1
    slow = [row for row in rows if row.ratio >= limits.get(row.state, inf)]
    assert not slow


def test_the_reference_kernel_is_the_dense_product():
    layer = _layer(*SMALL)
    layer.use_torch()
    assert layer.kernel == "torch"
    assert output_difference(layer, _inputs(2, SMALL[0])) < FLOAT32
