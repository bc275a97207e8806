"""The least that plain GPTQ can cost on this machine: its matrix products at sgemm's rate."""

import time
from dataclasses import dataclass

from benchmarks.quantization.peers.costs import cpu_seconds


@dataclass(frozen=True)
class BlockShape:
    """The linears of a Llama block."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Return (out, in) of q, k, v, o, gate, up and down."""
        h, m = self.hidden, self.intermediate
        narrow = h // self.heads * self.key_value_heads
        return [(h, h), (narrow, h), (narrow, h), (h, h), (m, h), (m, h), (h, m)]

    @property
    def inputs(self) -> list[int]:
        """Return the width of each input that linears share: of q, k, v; of o; gate, up; down."""
        return [self.hidden, self.hidden, self.hidden, self.intermediate]


SMOLLM2 = BlockShape(hidden=576, intermediate=1536, heads=9, key_value_heads=3)


def floor_flops(shape: BlockShape, blocks: int, rows: int, length: int) -> dict[str, float]:
    """Return the floating-point operations of plain GPTQ, by what they are for.

    Two forward passes: each linear 2 x out x in a token, and causal attention's two products,
    2 x length x hidden a token. The Hessian of each shared input: in² a token, as a symmetric
    update computes half. The solver: 4/3 in³ for each Hessian (Cholesky, inverse, Cholesky),
    out x in² for each linear, as column i corrects the columns behind it.
    """
    tokens = rows * length
    linear = sum(2 * out * columns for out, columns in shape.linears)
    attention = 2 * length * shape.hidden
    solver = sum(4 / 3 * n**3 for n in shape.inputs)
    solver += sum(out * columns**2 for out, columns in shape.linears)
    return {
        "forward": 2.0 * blocks * tokens * (linear + attention),
        "hessian": float(blocks * tokens * sum(n**2 for n in shape.inputs)),
        "solver": blocks * solver,
    }


def sgemm_rate(seconds: float = 3.0) -> float:
    """Return the fp32 operations in a CPU second of torch's matrix product at the work's shape."""
    import torch

    X, W = torch.randn(2048, 576), torch.randn(576, 1536)
    out = torch.empty(2048, 1536)
    torch.mm(X, W, out=out)
    products, best = 20, 0.0
    ending = time.monotonic() + seconds
    while time.monotonic() < ending:
        before = cpu_seconds()
        for _ in range(products):
            torch.mm(X, W, out=out)
        best = max(best, products * 2.0 * X.numel() * W.shape[1] / (cpu_seconds() - before))
    return best


def floor_seconds(blocks: int, rows: int, length: int, rate: float) -> float:
    """Return the CPU seconds of `floor_flops` for SmolLM2 at this rate."""
    return sum(floor_flops(SMOLLM2, blocks, rows, length).values()) / rate
