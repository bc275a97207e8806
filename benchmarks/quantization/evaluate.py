"""One measure for every quantizer: perplexity and KL to fp32, row by row."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quantization.places import bench_folder
from benchmarks.quantization.work import Rows, evaluation_rows, model_folder

BATCH = 4  # rows that go through the model at once


@dataclass(frozen=True)
class Evaluation:
    """What a model predicts on the test rows; each sum is over the row's predicted tokens."""

    kl: tuple[float, ...]  # nats, fp32 against this model, a sum for each row
    nll: tuple[float, ...]  # nats, a sum for each row
    tokens: int  # predicted in each row

    @property
    def mean_kl(self) -> float:
        """Return KL to fp32 in nats a token."""
        return sum(self.kl) / len(self.kl) / self.tokens

    @property
    def perplexity(self) -> float:
        """Return exp of the mean negative log-likelihood."""
        return math.exp(sum(self.nll) / len(self.nll) / self.tokens)


class Evaluator:
    """The fp32 model and what it says of the test rows; quantized weights are put in its place."""

    def __init__(self, folder: Path | None = None, rows: Rows | None = None) -> None:
        from stillroom.models import load_model

        self.rows = rows or evaluation_rows()
        self.model = load_model(folder or model_folder(), dtype=torch.float32)
        cache = bench_folder() / "reference.safetensors" if folder is rows is None else None
        self.reference = _reference(self.model, self.rows, cache)

    @torch.no_grad()
    def evaluate(self, weights: Mapping[str, Tensor]) -> Evaluation:
        """Measure the model with these dense weights, (out, in), by the dotted name of the linear.

        All other weights are fp32; the model is as before afterwards.
        """
        original: dict[str, Tensor] = {}
        for name, values in weights.items():
            weight = self.model.get_submodule(name).weight
            original[name] = weight.detach().clone()
            weight.copy_(values)
        try:
            return self._measure()
        finally:
            for name, values in original.items():
                self.model.get_submodule(name).weight.copy_(values)

    def _measure(self) -> Evaluation:
        kl: list[float] = []
        nll: list[float] = []
        head = self.model.get_output_embeddings()
        for row, hidden in enumerate(_last_hidden(self.model, self.rows)):
            expected = torch.log_softmax(head(self.reference[row]), dim=-1)  # (length - 1, words)
            got = torch.log_softmax(head(hidden), dim=-1)
            targets = self.rows.input_ids[row, 1:, None]
            nll.append(-float(got.gather(1, targets).sum(dtype=torch.float64)))
            by_token = (expected.exp() * (expected - got)).sum(dim=1)
            kl.append(float(by_token.sum(dtype=torch.float64)))
        return Evaluation(tuple(kl), tuple(nll), self.rows.input_ids.shape[1] - 1)


@torch.no_grad()
def _last_hidden(model: torch.nn.Module, rows: Rows) -> Iterator[Tensor]:
    """Yield what the head reads at each row's predicting tokens, (length - 1, hidden)."""
    for ids in torch.split(rows.input_ids, BATCH):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        yield from hidden[:, :-1]


def _reference(model: torch.nn.Module, rows: Rows, cache: Path | None) -> Tensor:
    """Return the fp32 model's last hidden states, (rows, length - 1, hidden)."""
    from safetensors.torch import load_file, save_file

    if cache is not None and cache.exists():
        return load_file(cache)["hidden"]
    hidden = torch.stack(list(_last_hidden(model, rows)))
    if cache is not None:
        save_file({"hidden": hidden}, cache)
    return hidden
