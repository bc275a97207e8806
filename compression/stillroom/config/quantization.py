"""The section of a recipe that says how weights become integers."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillroom.config.section import Count, Section


class MixedBits(Section):
    """Different bits for different layers, so that a budget of bytes buys the least loss."""

    max_bytes: Count
    """Bytes of all quantized layers together, with scales and zero points, at most."""
    bits: Annotated[tuple[Literal[2, 3, 4, 8], ...], Field(min_length=1)] = (2, 3, 4, 8)
    """Bits that a layer may get."""
    group_sizes: tuple[Annotated[int, Field(ge=-1, le=65536)], ...] = ()
    """Group sizes that a layer may get; empty: quantization.group_size alone."""
    measured_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Tokens of calibration text on which each choice is measured."""


class Quantization(Section):
    """How the weights inside the blocks become integers."""

    method: Literal["gptq", "obq", "rtn"] = "gptq"
    """gptq: rounding errors are made good in the columns that follow; obq: the cheapest weight
    first, for small layers; rtn: round to nearest."""
    engine: Literal["stillroom", "gptqmodel"] = "stillroom"
    """Who does it: gptqmodel is an optional package, for GPU workers that have it."""
    bits: Literal[2, 3, 4, 8] = 4
    """Bits a weight."""
    group_size: Annotated[int, Field(ge=-1, le=65536)] = 64
    """Columns that share a scale; it must divide every layer's input; -1: one scale a row."""
    symmetric: bool = False
    """Grids centred on zero; asymmetric ones lose less and cost one zero point a group."""
    act_order: bool = True
    """Columns with the largest activations first; grids stay in place, so files stay plain."""
    damping: Annotated[float, Field(gt=0, le=10)] | None = None
    """Added to the Hessian's diagonal, as a share of its mean; absent: chosen for each layer on
    held-out calibration rows."""
    true_sequential: bool = True
    """Inside a block, later layers are calibrated behind the earlier quantized ones."""
    refinements: Annotated[int, Field(ge=0, le=20)] = 2
    """Rounds of coordinate descent with refitted scales, where one of them helps held-out rows."""
    cross_layer: bool = True
    """Let each layer make good what the layers before it lost, as far as held-out rows gain."""
    bias_correction: bool = True
    """Let biases take up the mean of what rounding loses."""
    matmul_precision: Literal["highest", "high", "medium"] = "medium"
    """torch's name for how the calibration rows are multiplied: medium uses bfloat16 products
    where the processor has them, high TF32 on a GPU; what is written is computed in float32."""
    embedding_bits: Literal[8] | None = None
    """Bits of embeddings and head; absent: as they are. Other libraries than this one and llama.cpp
    do not read GPTQ checkpoints with packed embeddings."""
    mixed: MixedBits | None = None
    """Bits chosen for each layer under a budget; absent: the same bits everywhere."""
    max_perplexity_ratio: Annotated[float, Field(ge=1)] | None = None
    """Perplexity on calibration rows over that of the original, at most (causal_lm); beyond
    it the stage fails."""
    gguf: bool = False
    """Write model.gguf too, which llama.cpp runs on a CPU at full speed."""
    skip: tuple[str, ...] = ()
    """Layers left as they are, as name patterns such as *.mlp.down_proj."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Quantization":
        sizes = (self.group_size, *(self.mixed.group_sizes if self.mixed else ()))
        for size in sizes:
            if size in (0, 1):
                raise ValueError(
                    f"group_size: {size} is no group; use 32, 64, 128, or -1 for one a row"
                )
        if self.engine == "gptqmodel" and (self.mixed or self.method != "gptq"):
            raise ValueError(
                "engine gptqmodel does gptq with the same bits everywhere; use the engine "
                "stillroom for other methods and for mixed bits"
            )
        if self.engine == "gptqmodel" and self.embedding_bits:
            raise ValueError("engine gptqmodel leaves embeddings as they are: drop embedding_bits")
        if self.engine == "gptqmodel" and self.max_perplexity_ratio:
            raise ValueError(
                "engine gptqmodel compares no perplexities: drop max_perplexity_ratio and set "
                "gates.max_perplexity_ratio, or use the engine stillroom"
            )
        if self.engine == "gptqmodel" and self.damping is not None and self.damping >= 1:
            raise ValueError(
                f"engine gptqmodel takes a damping below 1, got {self.damping:g}; lower it, or use "
                "the engine stillroom"
            )
        return self
