import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import pytest
import torch

from stillroom.quantization.columns import descend_columns, round_columns
from stillroom.quantization.gptq import find_grids, find_grids_at_once
from stillroom.quantization.options import QuantizationOptions
from tests.stillroom.quantization.interpreter import interpreted

TOP = 15
BLOCKS = ((1, 128, 50), (3, 100, 33), (2, 32, 7), (1, 40, 70))  # versions, block, out
STEPS = ((32, 70), (17, 5))  # block, out


@dataclass(frozen=True)
class Apart:
    """How far the rounding by Triton is from that by torch."""

    integers: float  # share that differ
    errors: float  # largest difference
    clipped: int  # that torch counted
    clipped_difference: int


def block_of(versions, block, out, device):
    draw = torch.Generator().manual_seed(block)
    T = torch.randn(versions, block + 9, out, generator=draw)[:, 4 : 4 + block]
    V = torch.randn(versions, block, block, generator=draw).triu() * 0.05
    scales = torch.rand(block, out, generator=draw) * 0.1 + 0.2
    scales *= torch.randn(block, out, generator=draw).sign()
    zeros = torch.randint(1, TOP, (block, out), generator=draw).float()
    return [each.to(device) for each in (T, V, scales, zeros)]


def rounded_apart(shape, device):
    from stillroom.quantization.triton_columns import launch_round

    integers, errors, clipped = (x.cpu() for x in launch_round(*block_of(*shape, device), TOP))
    expected = round_columns(*block_of(*shape, "cpu"), TOP)
    return Apart(
        float((integers != expected.integers).float().mean()),
        float((errors - expected.errors).abs().max()),
        int(expected.clipped.sum()),
        int((clipped - expected.clipped).abs().max()),
    )


def steps_of(block, out, device):
    draw = torch.Generator().manual_seed(block)
    steps = torch.randint(-8, 8, (block, out), generator=draw).float()
    wish, C = torch.randn(block, out, generator=draw), torch.randn(block, block, generator=draw)
    zeros = torch.randint(1, TOP, (out,), generator=draw).float()
    return [x.to(device) for x in (steps, wish, C * 0.1)], (
        -zeros.to(device),
        (TOP - zeros).to(device),
    )


def descended_apart(shape, device):
    from stillroom.quantization.triton_columns import launch_descend

    tensors, bounds = steps_of(*shape, device)
    moved = launch_descend(*tensors, bounds).cpu()
    tensors, bounds = steps_of(*shape, "cpu")
    return float((moved != descend_columns(*tensors, bounds)).float().mean())


def check(rounded, descended):
    for apart in rounded:
        assert apart["integers"] == 0
        assert apart["errors"] < 1e-5
        assert apart["clipped"] > 0
        assert apart["clipped_difference"] == 0
    assert descended == [0.0] * len(descended)


@pytest.mark.skipif(find_spec("triton") is None, reason="CUDA builds of torch bring triton")
def test_in_the_interpreter_triton_rounds_as_torch_does():
    check(*interpreted("tests.stillroom.quantization.test_columns"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_triton_rounds_as_torch_does():
    rounded = [asdict(rounded_apart(shape, "cuda")) for shape in BLOCKS]
    check(rounded, [descended_apart(shape, "cuda") for shape in STEPS])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_grids_that_are_searched_together_are_the_same(symmetric, weighted):
    draw = torch.Generator().manual_seed(0)
    W, diagonal = torch.randn(70, 192, generator=draw), torch.rand(192, generator=draw)
    diagonal[:64] = 0  # a group that never gets an input
    options = QuantizationOptions(4, 64, symmetric, weighted_grid=weighted)
    one_by_one = find_grids(W, torch.diag(diagonal), options)
    together = find_grids_at_once(W, 64, diagonal if weighted else None, options)
    assert torch.equal(one_by_one.scale, together.scale)
    assert torch.equal(one_by_one.zero, together.zero)


if __name__ == "__main__":
    rounded = [asdict(rounded_apart(shape, "cpu")) for shape in BLOCKS]
    print(json.dumps([rounded, [descended_apart(shape, "cpu") for shape in STEPS]]))
