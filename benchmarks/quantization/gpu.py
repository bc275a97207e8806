"""Quantized models on a CUDA device: `python -m benchmarks.quantization.gpu`.

Decode at the shape of OPT-175B's widest layer and of a whole model of 7 billion weights, both
against fp16 in the same run, and the time that GPTQ takes for large layers. Weights are random:
times do not depend on them. Everything is timed as a CUDA graph, so that Python counts for nothing.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.claims import Claim, at_least, print_claims, write_measure
from benchmarks.quantization.measures import measure_path
from stillroom.quantization.gptq import gptq
from stillroom.quantization.hessian import HessianAccumulator
from stillroom.quantization.layer import quantize_together
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.options import QuantizationOptions, plain
from stillroom.quantization.packing import PackedWeight

GPU_SHAPE = (12288, 49152)  # (inputs, outputs) of OPT-175B's widest layer
GROUP_SIZE = 64
SETTINGS = (  # bits, group size, tokens
    *((bits, GROUP_SIZE, 1) for bits in (2, 3, 4, 8)),
    *((bits, 128, 1) for bits in (3, 4)),
    *((4, GROUP_SIZE, tokens) for tokens in (2, 4, 8, 16, 2048)),
    (4, 128, 16),
)
CLAIMED = 3.24  # the lecture's, of 3 bits
CALLS = 10  # in a graph
REPEATS = 9
SOLVED = ((12288, 12288), (12288, 49152), (4096, 4096), (4096, 11008), (11008, 4096))
TOKENS = 16384  # of the calibration text
SEVEN_BILLION = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Decoded:
    """One layer, packed and in fp16; times are medians of a call, in microseconds."""

    bits: int
    group_size: int
    tokens: int
    kernel: str
    packed_us: float
    fp16_us: float
    times_faster: float  # median of fp16 over packed in the same repetition
    difference: float  # largest, over the largest output, against float64


def random_packed(inputs: int, outputs: int, bits: int, group_size: int) -> QuantizedLinear:
    """Return a layer of random integers, with scales that keep outputs near the inputs' size."""
    draw = torch.Generator("cuda").manual_seed(0)
    groups = inputs // group_size
    with torch.device("cuda"):
        packed = PackedWeight(
            torch.randint(
                -(2**31), 2**31, (inputs * bits // 32, outputs), generator=draw, dtype=torch.int32
            ),
            torch.full((groups, outputs * bits // 32), 0x11111111, dtype=torch.int32),
            (torch.rand(groups, outputs, generator=draw) * 2**-bits / inputs**0.5).half(),
            torch.arange(inputs, dtype=torch.int32) // group_size,
        )
    return QuantizedLinear(packed, None, bits)


@torch.inference_mode()
def decode_on_gpu(
    inputs: int, outputs: int, bits: int, group_size: int, tokens: int, repeats: int = REPEATS
) -> Decoded:
    """Time tokens through a packed layer and its fp16 twin, one after the other, again and again.

    The weights are to be larger than the GPU's cache.
    """
    layer = random_packed(inputs, outputs, bits, group_size)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.float16)
    dense = layer.to_linear(torch.float16)
    replays = [_recorded(lambda: layer(x)), _recorded(lambda: dense(x))]
    times = [[_replay_us(replay) for replay in replays] for _ in range(repeats + 1)][1:]
    # Some outputs tell as much as all, and leave float64 enough memory.
    exact = x.double() @ dense.weight[:1024].double().T
    difference = float((layer(x)[:, :1024].double() - exact).abs().max() / exact.abs().max())
    packed_us, fp16_us = (median(each) for each in zip(*times, strict=True))
    faster = median(theirs / ours for ours, theirs in times)
    kernel = layer.kernel
    return Decoded(bits, group_size, tokens, kernel, packed_us, fp16_us, faster, difference)


@torch.inference_mode()
def decode_model(bits: int | None, repeats: int = REPEATS) -> dict[str, float]:
    """Return the tokens a second of a model of 7 billion weights, one sequence, and its memory.

    Linears in the blocks have `bits`, or are fp16; embeddings and head are fp16.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(SEVEN_BILLION)).half().eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and bits is not None:
            made = random_packed(module.in_features, module.out_features, bits, GROUP_SIZE)
            model.set_submodule(name, made)
    packed = {id(t) for m in model.modules() if isinstance(m, QuantizedLinear) for t in m.buffers()}
    for module in model.modules():
        for key, value in list(module._parameters.items()):
            if value is not None:
                drawn = torch.randn(value.shape, device="cuda", dtype=value.dtype) / 64
                module._parameters[key] = nn.Parameter(drawn, requires_grad=False)
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and id(buffer) not in packed:
                module._buffers[key] = torch.ones(buffer.shape, device="cuda", dtype=buffer.dtype)
    weights = torch.cuda.memory_allocated() - before
    cache = StaticCache(config=model.config, max_cache_len=256)
    ids = torch.ones(1, 1, dtype=torch.long, device="cuda")
    model(input_ids=ids, past_key_values=cache)

    def step() -> None:
        model(input_ids=ids, past_key_values=cache)

    replay = _recorded(step, calls=1)
    times = [_replay_us(replay, calls=1) for _ in range(repeats + 1)][1:]
    return {"tokens_per_second": 1e6 / median(times), "gigabytes_of_weights": weights / 1e9}


def solve_seconds(inputs: int, outputs: int) -> dict[str, float]:
    """Return the seconds that GPTQ as its paper has it, and our default, take for one layer."""
    draw = torch.Generator("cuda").manual_seed(0)
    W = torch.randn(outputs, inputs, generator=draw, device="cuda") / inputs**0.5
    scale = torch.rand(inputs, generator=draw, device="cuda") + 0.1
    accumulators = [HessianAccumulator(inputs) for _ in range(2)]
    shared = torch.randn(256, inputs, generator=draw, device="cuda") / 16
    for accumulator, tokens in zip(accumulators, (TOKENS * 7 // 8, TOKENS // 8), strict=True):
        for start in range(0, tokens, 2048):
            rows = min(2048, tokens - start)
            mixed = torch.randn(rows, 256, generator=draw, device="cuda") @ shared
            own = torch.randn(rows, inputs, generator=draw, device="cuda")
            accumulator.add((mixed + own) * scale)
    train, held_out = (accumulator.statistics() for accumulator in accumulators)
    assert train is not None
    assert held_out is not None
    options = QuantizationOptions(4, GROUP_SIZE)
    gptq(W[:256], train.hessian, plain(options))  # compiles
    return {
        "plain": _seconds(lambda: gptq(W, train.hessian, plain(options))),
        "default": _seconds(
            lambda: quantize_together(W, (outputs,), None, train, held_out, options)
        ),
    }


def _recorded(work: Callable[[], object], calls: int = CALLS) -> Callable[[], None]:
    """Return what replays so many calls, recorded as one CUDA graph."""
    apart: Any = torch.cuda.Stream()
    apart.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(apart):
        for _ in range(3):  # compiles, and fills the allocator
            work()
    torch.cuda.current_stream().wait_stream(apart)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    replay: Callable[[], None] = graph.replay
    return replay


def _replay_us(replay: Callable[[], None], calls: int = CALLS) -> float:
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    replay()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end)) / calls


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def has_gpu() -> bool:
    """Return whether there is a CUDA device to measure on."""
    return torch.cuda.is_available()


def measure_gpu(path: Path | None = None) -> None:
    """Measure all of it on the current CUDA device, print it, and keep it."""
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; a layer of {GPU_SHAPE[0]} x {GPU_SHAPE[1]}")
    print("bits group tokens kernel        packed µs  fp16 µs  times faster  difference")
    layers = []
    for bits, group_size, tokens in SETTINGS:
        row = decode_on_gpu(*GPU_SHAPE, bits, group_size, tokens)
        layers.append(row)
        print(
            f"{bits:4} {group_size:5} {tokens:6} {row.kernel:12} {row.packed_us:10.1f} "
            f"{row.fp16_us:8.1f} {row.times_faster:13.2f} {row.difference:11.1e}",
            flush=True,
        )
    models = {}
    for wide in (None, 4, 3):
        key = "fp16" if wide is None else f"{wide} bits"
        models[key] = decode_model(wide)
        print(f"7 billion weights, {key}: {models[key]}", flush=True)
    solved = {}
    for inputs, outputs in SOLVED:
        solved[f"{inputs} x {outputs}"] = found = solve_seconds(inputs, outputs)
        print(f"GPTQ of a layer of {inputs} x {outputs}, seconds: {found}", flush=True)
    claims = _claims(layers)
    print_claims(claims)
    circumstances = {"gpu": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    rows = [asdict(row) for row in layers]
    where = path or measure_path("gpu")
    write_measure(where, claims, **circumstances, layers=rows, models=models, solved=solved)


def _claims(layers: list[Decoded]) -> list[Claim]:
    claims = []
    for bits in (4, 3):
        (row,) = (r for r in layers if (r.bits, r.group_size, r.tokens) == (bits, GROUP_SIZE, 1))
        text = (
            f"GPU: one token through a packed layer of {GPU_SHAPE[0]} x {GPU_SHAPE[1]}, "
            f"{bits} bits in groups of {GROUP_SIZE}: fp16's time over its"
        )
        claims.append(at_least(text, CLAIMED, row.times_faster))
    return claims


def main() -> None:
    """Measure, and say where there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to keep it in, instead of the usual one")
    options = parser.parse_args()
    if not has_gpu():
        raise SystemExit("this benchmark needs a CUDA device, and torch finds none")
    measure_gpu(options.json)


if __name__ == "__main__":
    main()
