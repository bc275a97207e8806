"""Check that a checkpoint loaded afresh is the model that was saved."""

from transformers import PreTrainedModel

from stillroom.data.examples import Examples
from stillroom.errors import MismatchError
from stillroom.evaluation.figures import ReloadCheck
from stillroom.evaluation.quality import evaluating, predict

__all__ = ["ReloadCheck", "measure_reload"]


def measure_reload(
    in_memory: PreTrainedModel, reloaded: PreTrainedModel, examples: Examples, *, rows: int = 2
) -> ReloadCheck:
    """Compare what `predict` says of two models on the first `rows` examples, padding left out.

    Raises:
        MismatchError: the logits have different shapes.
    """
    batch = examples.take(slice(0, rows))
    with evaluating([in_memory, reloaded]):
        before, after = predict(in_memory, batch), predict(reloaded, batch).to("cpu")
    before = before.to("cpu")
    if before.shape != after.shape:
        raise MismatchError(
            f"the saved model gives logits of shape {tuple(before.shape)} and the reloaded one "
            f"{tuple(after.shape)}: the checkpoint is not of this model; export it again"
        )
    if before.dim() == 3:
        real = batch.attention_mask.bool()
        before, after = before[real], after[real]  # (tokens, vocab)
    difference = (before.float() - after.float()).abs().max()
    return ReloadCheck(float(difference), float(before.float().abs().max()))
