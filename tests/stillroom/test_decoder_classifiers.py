"""Decoders that sort texts by their last token before padding, whatever rows are padded with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.contents import Contents
from stillroom.data.documents import Document
from stillroom.data.examples import Examples
from stillroom.data.tokens import tokenise_classification
from stillroom.evaluation.quality import evaluating, predict
from stillroom.fine_tuning import fine_tune
from stillroom.models import load_model, load_pretrained, load_tokenizer, read_config, save_model
from stillroom.serving import ServedModel
from stillroom.streamed import open_streamed
from stillroom.training.options import TrainingOptions
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer
from tests.stillroom.tiny_masked import tiny_roberta_masked

TASK = "sequence_classification"
NAMES = ("x", "y")
TEXTS = ["abc", "a much longer text", "abcdef", "xyz abc"]


def write_decoder(folder: Path, *, config: int | None, padded: bool) -> Any:
    """Write a Llama and a tokenizer that has a padding token or none; return the tokenizer."""
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    if not padded:
        tokenizer.pad_token = None
    model.config.pad_token_id = config
    save_model(model, tokenizer, folder)
    return tokenizer


def rows_of(tokenizer: Any) -> Examples:
    documents = [Document(text=text, label=NAMES[i % 2]) for i, text in enumerate(TEXTS)]
    return tokenise_classification(documents, tokenizer, 32, NAMES, tokenizer_hash="h").examples


def alone(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    with evaluating([model]):
        return torch.cat([model(input_ids=each).logits for each in ids])


def together(model: Any, rows: Examples) -> torch.Tensor:
    with evaluating([model]):
        return predict(model, rows)


@pytest.mark.parametrize(("config", "padded"), [(None, True), (None, False), (0, False), (0, True)])
def test_a_text_is_sorted_alone_as_among_others(
    tmp_path: Path, config: int | None, padded: bool
) -> None:
    tokenizer = write_decoder(tmp_path / "plain", config=config, padded=padded)
    rows = rows_of(tokenizer)
    model = load_pretrained(tmp_path / "plain", task=TASK, label_names=NAMES)
    fine_tune(model, rows, TrainingOptions(steps=2, batch_rows=4), evaluation=rows)
    torch.testing.assert_close(together(model, rows), alone(model, tokenizer), atol=1e-5, rtol=0)

    save_model(model, tokenizer, tmp_path / "tuned")
    assert read_config(tmp_path / "tuned")["pad_token_id"] == (0 if padded else 2)
    loaded = load_model(tmp_path / "tuned", task=TASK)
    assert torch.equal(together(loaded, rows), together(model, rows))
    served = ServedModel(tmp_path / "tuned", Contents("base", TASK, "a" * 64, "none", ()), {})
    scores = torch.tensor(served.predict(TEXTS)["scores"].tolist())
    torch.testing.assert_close(scores, together(model, rows).softmax(-1), atol=1e-5, rtol=0)


def test_a_model_that_is_read_block_by_block_knows_the_padding_too(tmp_path: Path) -> None:
    write_decoder(tmp_path / "plain", config=0, padded=False)
    model = load_pretrained(tmp_path / "plain", task=TASK, label_names=NAMES)
    model.config.pad_token_id = 0
    save_model(model, load_tokenizer(tmp_path / "plain"), tmp_path / "ready")
    assert open_streamed(tmp_path / "ready", task=TASK)[0].config.pad_token_id == 2


def test_an_encoder_keeps_the_padding_that_its_positions_begin_behind(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    save_model(tiny_roberta_masked(), tokenizer, tmp_path)
    model = load_pretrained(tmp_path, task=TASK, label_names=NAMES)
    assert model.config.pad_token_id == 0
