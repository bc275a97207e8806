"""Integers of 2, 3, 4 and 8 bits in 32-bit words, as GPTQ checkpoints store them.

Values follow each other bit by bit, lowest bits first, across word borders: 3-bit values fill
three words with 32 values. Version 1 of the format stores zero points less one, version 2 as
they are. Zero points here are at least 1: what others make of a 0 in version 1 differs.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.quantization.weight import QuantizedWeight

CheckpointFormat = Literal["gptq", "gptq_v2"]
WORD = 32
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class PackedWeight:
    """The tensors of one linear layer in a GPTQ checkpoint."""

    qweight: Tensor  # (in * bits / 32, out) int32
    qzeros: Tensor  # (groups, out * bits / 32) int32
    scales: Tensor  # (groups, out) float16
    g_idx: Tensor  # (in,) int32: the group of each column

    @property
    def shape(self) -> tuple[int, int]:
        """The layer's (out, in)."""
        return self.scales.shape[1], self.g_idx.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names in a checkpoint."""
        return {part: getattr(self, part) for part in PARTS}


def values_per_unit(bits: int) -> int:
    """Return the smallest number of values that fill whole words."""
    return WORD // math.gcd(WORD, bits)


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Return values (n, m), each below 2^bits, as words (n * bits / 32, m) int32.

    Raises:
        MismatchError: n values do not fill whole words.
    """
    unit = values_per_unit(bits)
    if values.shape[0] % unit:
        raise MismatchError(
            f"expected a multiple of {unit} values of {bits} bits, got {values.shape[0]}"
        )
    grouped = values.reshape(-1, unit, values.shape[1]).int()  # (units, unit, m)
    words = grouped.new_zeros(grouped.shape[0], unit * bits // WORD, grouped.shape[2])
    for j in range(unit):
        word, shift = divmod(j * bits, WORD)
        words[:, word] |= grouped[:, j] << shift
        if shift + bits > WORD:
            words[:, word + 1] |= grouped[:, j] >> (WORD - shift)
    return words.reshape(-1, values.shape[1])


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """Return words (n * bits / 32, m) int32 as values (n, m) uint8."""
    unit = values_per_unit(bits)
    grouped = words.reshape(-1, unit * bits // WORD, words.shape[1])  # (units, words, m)
    values = torch.empty(
        (grouped.shape[0], unit, words.shape[1]), dtype=torch.uint8, device=words.device
    )
    for j in range(unit):
        word, shift = divmod(j * bits, WORD)
        value = grouped[:, word] >> shift
        kept = WORD - shift
        if kept < bits:
            # The shift copied the sign into the upper bits; they belong to the next word.
            value = (value & ((1 << kept) - 1)) | (grouped[:, word + 1] << kept)
        values[:, j] = value & ((1 << bits) - 1)
    return values.reshape(-1, words.shape[1])


def pack(weight: QuantizedWeight, checkpoint_format: CheckpointFormat = "gptq") -> PackedWeight:
    """Return the tensors that a GPTQ checkpoint holds for this weight."""
    columns = weight.integers.shape[1]
    zeros = weight.zeros - 1 if checkpoint_format == "gptq" else weight.zeros
    qzeros = pack_rows(zeros, weight.bits).T  # (groups, out * bits / 32)
    g_idx = torch.arange(columns, dtype=torch.int32, device=qzeros.device) // weight.group_size
    return PackedWeight(
        qweight=pack_rows(weight.integers.T, weight.bits),
        qzeros=qzeros.contiguous(),
        scales=weight.scales.T.contiguous(),
        g_idx=g_idx,
    )


def unpack_zeros(qzeros: Tensor, bits: int, checkpoint_format: CheckpointFormat) -> Tensor:
    """Return the zero points, (groups, out) uint8, of either version of the format."""
    if checkpoint_format == "gptq_v2":
        return unpack_rows(qzeros.T, bits).T
    if WORD % bits:
        return (unpack_rows(qzeros.T, bits).T + 1).bitwise_and_(2**bits - 1)
    # gptqmodel turns version 2 into 1 on whole words: a zero point of 0 borrows from the next
    # value. Adding on whole words gives it back, and without a 0 it is the same.
    ones = pack_rows(torch.ones(WORD // bits, 1, dtype=torch.uint8), bits).item()
    return unpack_rows((qzeros + ones).T, bits).T


def unpack(
    packed: PackedWeight, bits: int, checkpoint_format: CheckpointFormat = "gptq"
) -> QuantizedWeight:
    """Return the weight whose packed tensors these are.

    Raises:
        MismatchError: the groups are not runs of neighbouring columns.
    """
    columns, groups = packed.g_idx.shape[0], packed.scales.shape[0]
    if not has_plain_groups(packed.g_idx, groups):
        raise MismatchError(
            f"expected groups of {columns // groups} neighbouring columns; "
            f"this checkpoint was written with desc_act and has its columns reordered"
        )
    return QuantizedWeight(
        integers=unpack_rows(packed.qweight, bits).T.contiguous(),
        scales=packed.scales.T.contiguous(),
        zeros=unpack_zeros(packed.qzeros, bits, checkpoint_format).T.contiguous(),
        bits=bits,
    )


def has_plain_groups(g_idx: Tensor, groups: int) -> bool:
    """Return whether each group is a run of neighbouring columns, all of the same length."""
    columns = g_idx.shape[0]
    if columns % groups:
        return False
    plain = torch.arange(columns, dtype=g_idx.dtype, device=g_idx.device) // (columns // groups)
    return torch.equal(g_idx, plain)
