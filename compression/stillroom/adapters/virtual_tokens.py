"""Where virtual tokens stand among those of a row, whichever side its padding is on."""

from dataclasses import dataclass

import torch
from torch import Tensor

Template = tuple[tuple[int, int], ...]
"""Pairs of a place and how many virtual tokens stand there, as `PTuningOptions` says."""


@dataclass(frozen=True)
class Layout:
    """The columns of extended rows: `virtual` (batch, count), and `kept` (batch, length)."""

    virtual: Tensor
    kept: Tensor

    def extend(self, values: Tensor, of_virtual: Tensor | int) -> Tensor:
        """Return `values` (batch, length) with `of_virtual`, (batch, count) or one, among them."""
        rows, length = values.shape
        extended = values.new_empty((rows, length + self.virtual.shape[1]))
        extended.scatter_(1, self.kept, values)
        return extended.scatter_(1, self.virtual, of_virtual)

    def beside(self, values: Tensor) -> Tensor:
        """Return each virtual token's neighbour in `values` (batch, length): (batch, count).

        That is the real token it stands before, or at the row's end the last one.
        """
        before = torch.arange(self.virtual.shape[1], device=self.virtual.device)
        columns = self.virtual - before  # of the text
        ends = self.kept.new_full((len(values), 1), values.shape[1] - 1)
        return values.gather(1, torch.minimum(columns, ends))

    def replace(self, embeddings: Tensor, learned: Tensor) -> Tensor:
        """Return `embeddings` (batch, extended, hidden) with `learned` (count, hidden) in them."""
        rows, _, hidden = embeddings.shape
        places = self.virtual[:, :, None].expand(-1, -1, hidden)
        values = learned.to(embeddings.dtype).expand(rows, -1, -1)
        return embeddings.scatter(1, places, values)

    def drop(self, values: Tensor) -> Tensor:
        """Return `values` (batch, extended, …) without the virtual tokens: (batch, length, …)."""
        rows = torch.arange(len(values), device=values.device)
        return values[rows[:, None], self.kept.to(values.device)]

    def last(self, count: int) -> "Layout":
        """Return the layout of the last `count` tokens of the text, for their last columns.

        With all virtual tokens they are so many columns, of which the first is column 0.
        """
        kept = self.kept[:, self.kept.shape[1] - count :]
        first = self.kept.shape[1] - count
        return Layout(self.virtual - first, kept - first)

    def repeated(self, rows: int) -> "Layout":
        """Return the layout for `rows` rows, each of its own so many times in a row."""
        times = rows // len(self.kept)
        return Layout(*(each.repeat_interleave(times, 0) for each in (self.virtual, self.kept)))


def in_reading_order(template: Template) -> Template:
    """Return the template from the row's first token to its end, which is -1."""
    return tuple(sorted(template, key=lambda pair: (pair[0] == -1, pair[0])))


def lay_out(mask: Tensor, template: Template) -> Layout:
    """Return where the virtual tokens of a template in reading order stand in rows.

    Args:
        mask: (batch, length), 0 at padding.
        template: places from 0, counted in the row's real tokens; the end for -1 and for those
            beyond it, which is right before padding on the right.
    """
    length = mask.shape[1]
    columns = torch.arange(length, device=mask.device)
    real = mask.bool()
    ordered = torch.where(real, columns, length).sort(1).values  # real tokens' columns first
    ends = torch.where(real, columns + 1, 0).amax(1)  # (batch,)
    starts = []
    for place, count in template:
        at = ordered[:, place] if 0 <= place < length else torch.full_like(ends, length)
        starts += [torch.where(at < length, at, ends)] * count
    before = torch.stack(starts, 1)  # columns of text before each virtual token
    virtual = before + torch.arange(before.shape[1], device=mask.device)
    kept = columns + (before[:, None, :] <= columns[:, None]).sum(2)
    return Layout(virtual, kept)
