"""Write a GPTQ checkpoint folder as a GGUF file, which llama.cpp runs on a CPU at full speed."""

import logging
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from stillroom.errors import MismatchError, RecipeError, SourceError
from stillroom.folder import replacing
from stillroom.llama_engine import GGUF_FILE
from stillroom.models import load_config
from stillroom.quantization.formats.gguf_architectures import find_architecture
from stillroom.quantization.formats.gguf_blocks import (
    BLOCK,
    AsymmetricType,
    BlockType,
    choose_type,
    encode_blocks,
    round_scales,
)
from stillroom.quantization.formats.gguf_check import GgufReport, compare_gguf
from stillroom.quantization.formats.gguf_hyperparameters import rope_factors, write_hyperparameters
from stillroom.quantization.formats.gguf_tensors import (
    Place,
    PlainType,
    Reordered,
    encode_plain,
    open_reordered,
    plain_type,
)
from stillroom.quantization.formats.gguf_vocabulary import find_vocabulary, write_vocabulary
from stillroom.quantization.weight import QuantizedWeight
from stillroom.remote_code import refuse_own_code

__all__ = ["GGUF_FILE", "GgufReport", "export_gguf", "require_gguf"]
VocabularyMode = Literal["full", "none"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GgufOptions:
    """How a checkpoint becomes a GGUF."""

    asymmetric: AsymmetricType = "Q4_1"  # Q5_0 is exact and takes a tenth more
    exact_zeros: bool = False  # round the scales of Q4_1 so that it is exact
    embeddings: PlainType = "Q8_0"  # of embeddings and head, where they are not packed
    vocabulary: VocabularyMode = "full"  # none: whoever runs it brings token ids


def export_gguf(
    folder: Path,
    target: Path,
    *,
    asymmetric: AsymmetricType = "Q4_1",
    exact_zeros: bool = False,
    embeddings: PlainType = "Q8_0",
    vocabulary: VocabularyMode = "full",
) -> GgufReport:
    """Write the GPTQ checkpoint in `folder`, with its tokenizer, to `target`, and read it back.

    Integers, scales and zero points are stored as they are, in 2 to 4 bits as Q4_0 where that holds
    them (symmetric grids, and all of 2 and 3 bits), else as `asymmetric`; 8 bits as Q8_0. One
    tensor is in memory at a time. The report's errors are measured on the written file.

    Args:
        folder: GPTQ checkpoint with config.json and tokenizer.json.
        target: file to write; an existing one is replaced once the new one is whole.
        asymmetric: for 4 bits with zero points: Q4_1 rounds scale · zero to float16; Q5_0 is exact
            and takes 10 % more.
        exact_zeros: round the scales of Q4_1 so that scale · zero is a float16.
        embeddings: type of embeddings and head where the checkpoint holds them as floats.
        vocabulary: "none" leaves the tokenizer out; llama.cpp then takes token ids only.

    Raises:
        SourceError: `folder` holds no GPTQ checkpoint, or gguf is not installed.
        MismatchError: GGUF cannot hold the model, its groups or its tokenizer.
        StoreError: `target` cannot be written.
    """
    options = GgufOptions(asymmetric, exact_zeros, embeddings, vocabulary)
    gguf = _import_gguf()
    tensors = open_reordered(folder)
    with (
        replacing(target) as file,
        closing(gguf.GGUFWriter(file, tensors.architecture.name)) as writer,
    ):
        _write(writer, folder, tensors, options)
    report = compare_gguf(folder, target)
    logger.info("%s: %s", target, report)
    return report


def require_gguf(folder: Path, group_size: int) -> None:
    """Make sure, before any work, that the model in `folder` will have a GGUF when quantized.

    Raises:
        SourceError: gguf is not installed.
        MismatchError: GGUF cannot hold the architecture or the tokenizer.
        RecipeError: it cannot hold groups of this size.
    """
    _import_gguf()
    if group_size != -1 and group_size % BLOCK:
        raise RecipeError(
            f"GGUF holds groups in multiples of {BLOCK}, group_size is {group_size}; use {BLOCK} "
            f"or {2 * BLOCK}, or leave out quantization.gguf"
        )
    refuse_own_code(folder, "llama.cpp")
    config = load_config(folder)
    find_architecture(config)
    find_vocabulary(folder, config.vocab_size)


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise SourceError(
            'gguf is not installed: install it with pip install "stillroom[gguf]"'
        ) from error
    return gguf


def _write(writer: Any, folder: Path, tensors: Reordered, options: GgufOptions) -> None:
    """Write the whole file: what comes after needs the sizes, so each tensor is read twice."""
    import gguf

    config = tensors.config
    writer.add_type("model")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_hyperparameters(writer, tensors.architecture, config)
    if options.vocabulary == "full":
        write_vocabulary(writer, folder, config.vocab_size)
    else:
        writer.add_tokenizer_model("none")
    found = tensors.places()
    kinds = {place.name: _announce(writer, place, tensors, options) for place in found}
    factors = rope_factors(tensors.architecture, config)
    extra = {} if factors is None else {"rope_freqs.weight": factors.numpy()}
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.add_file_type(_file_type(kinds))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for place in found:
        writer.write_tensor_data(_encode(place, kinds[place.name], tensors, options))
    for values in extra.values():
        writer.write_tensor_data(values)


def _weight(
    place: Place, tensors: Reordered, options: GgufOptions
) -> tuple[QuantizedWeight, BlockType]:
    """Return a packed layer as it will be stored, and its type."""
    weight = tensors.weight(place.source)
    try:
        kind = choose_type(weight, options.asymmetric)
    except MismatchError as error:
        raise MismatchError(f"{place.source}: {error}") from error
    if kind == "Q4_1" and options.exact_zeros:
        weight = round_scales(weight)
    return weight, kind


def _announce(writer: Any, place: Place, tensors: Reordered, options: GgufOptions) -> str:
    """Add what a tensor will be to the writer, and return its type."""
    import gguf
    import numpy as np

    kind: str
    if place.packed:
        weight, kind = _weight(place, tensors, options)
        shape = tuple(weight.integers.shape)
    else:
        tensor = tensors.plain(place)
        kind, shape = plain_type(place.name, tensor, options.embeddings), tuple(tensor.shape)
    number = gguf.GGMLQuantizationType[kind]
    bytes_shape = gguf.quant_shape_to_byte_shape(shape, number)
    size = int(np.prod(bytes_shape))
    writer.add_tensor_info(place.name, bytes_shape, np.dtype(np.uint8), size, raw_dtype=number)
    return kind


def _encode(place: Place, kind: Any, tensors: Reordered, options: GgufOptions) -> NDArray[Any]:
    if place.packed:
        return encode_blocks(*_weight(place, tensors, options))
    return encode_plain(tensors.plain(place), kind)


def _file_type(kinds: dict[str, str]) -> int:
    """Return GGUF's number for the type of most matrices; readers only show it."""
    import gguf

    counted = [kind for kind in kinds.values() if kind != "F32"]
    most = max(set(counted), key=lambda kind: (counted.count(kind), kind), default="F32")
    return int(gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"])
