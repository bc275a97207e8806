"""The rows of one forward pass, and the order in which rows come."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stillroom.data.examples import Examples
from stillroom.training.options import derived_seed

BATCHES_A_BUCKET = 50


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, on the model's device.

    `rows` (batch,) are their numbers in the examples, on the CPU; `input_ids` and
    `attention_mask` are (batch, length); `labels` is (batch, length) for a language model, not
    shifted, or (batch,) for classification; -100 is no label. `masked` says that the rows are a
    masked language model's. `length` is that of the longest row, up to seven more: other columns
    that are padding in all rows are not there. `token_weight` is what the loop wants a mean over
    the batch's tokens multiplied by: it weighs batches by their predictions.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    masked: bool = False
    token_weight: float = 1.0

    @classmethod
    def of(cls, examples: Examples, rows: Tensor, device: torch.device) -> "Batch":
        """Return the rows with these numbers (batch,), without what is padding in all of them."""
        taken = examples.take(rows).without_shared_padding()
        return cls(
            rows,
            taken.input_ids.to(device),
            taken.attention_mask.to(device),
            taken.labels.to(device),
            taken.masked,
        )

    @property
    def length(self) -> int:
        """The number of columns."""
        return self.input_ids.shape[1]

    @property
    def is_causal(self) -> bool:
        """Whether each position predicts the next token, not its own or the row's class."""
        return self.labels.dim() == 2 and not self.masked

    @property
    def predictions(self) -> int:
        """The number of labels that a loss is taken at; a causal row's first token is not one."""
        labels = self.labels[:, 1:] if self.is_causal else self.labels
        return int((labels != -100).sum())

    @property
    def tokens(self) -> int:
        """The number of tokens that are no padding."""
        return int(self.attention_mask.sum())


def of_one_step(batches: Sequence[Batch]) -> list[Batch]:
    """Return a step's batches, each with its token weight among them.

    Means over tokens times this weight, averaged by predictions, are the mean over all tokens.
    """
    tokens = max(sum(batch.tokens for batch in batches), 1)
    predictions = sum(batch.predictions for batch in batches)
    weighted = []
    for batch in batches:
        # Of batches alike both shares are rounded alike, and the weight is exactly 1.
        share = batch.predictions / predictions if predictions else 0.0
        weight = batch.tokens / tokens / share if share else 0.0
        weighted.append(replace(batch, token_weight=weight))
    return weighted


class RowOrder:
    """The endless stream of row numbers: one seeded permutation an epoch, joined end to end.

    Position p of the stream depends on (seed, p) alone, so a resumed run needs no state. With
    `lengths` (rows,) rows of about one length come together: of every 50 batches' rows the sorted
    ones are cut into batches of `batch_rows`, and these come in random order.
    """

    def __init__(
        self, rows: int, seed: int, *, batch_rows: int = 1, lengths: Tensor | None = None
    ) -> None:
        self.rows = rows
        self.seed = seed
        self.batch_rows = batch_rows
        self.lengths = lengths
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.long)

    def rows_at(self, start: int, count: int) -> Tensor:
        """Return the row numbers (count,) at positions start … start + count - 1."""
        return torch.stack([self._row(position) for position in range(start, start + count)])

    def _row(self, position: int) -> Tensor:
        epoch, offset = divmod(position, self.rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
            self._permutation = torch.randperm(self.rows, generator=generator)
            if self.lengths is not None:
                self._permutation = self._bucketed(epoch, self.lengths, generator)
            self._epoch = epoch
        return self._permutation[offset]

    def _bucketed(self, epoch: int, lengths: Tensor, generator: torch.Generator) -> Tensor:
        # The batch that began in the epoch before takes its last rows from this one.
        begun = min(-epoch * self.rows % self.batch_rows, self.rows)
        first, rest = self._permutation[:begun], self._permutation[begun:]
        buckets = torch.split(rest, BATCHES_A_BUCKET * self.batch_rows)
        # Stable, so that rows of one length keep their random order.
        ordered = [bucket[lengths[bucket].argsort(stable=True)] for bucket in buckets]
        batches = [batch for bucket in ordered for batch in torch.split(bucket, self.batch_rows)]
        whole = len(batches) - bool(len(rest) % self.batch_rows)
        chosen = [batches[i] for i in torch.randperm(whole, generator=generator).tolist()]
        return torch.cat([first, *chosen, *batches[whole:]])
