"""Which rows an adapter may be trained on."""

from dataclasses import replace

import pytest

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.options import LoraOptions
from stillroom.adapters.training import train_adapter
from stillroom.errors import MismatchError
from stillroom.training.options import TrainingOptions
from tests.stillroom.rows import labelled_rows
from tests.stillroom.tiny import tiny_bert_classifier

NAMED = ("negative", "neutral", "positive")
GENERIC = ("LABEL_0", "LABEL_1", "LABEL_2")


def train(own, of_text):
    base = tiny_bert_classifier()
    base.config.id2label = dict(enumerate(own))
    model = AdaptedModel(base)
    model.add("a", LoraOptions(rank=2), task="sequence_classification")
    rows = replace(labelled_rows(), label_names=of_text)
    train_adapter(model, "a", rows, TrainingOptions(steps=1, batch_rows=2))


@pytest.mark.parametrize(
    ("own", "of_text"),
    [(NAMED, NAMED), (GENERIC, ("sports", "tech", "war")), (NAMED, ("0", "1", "2"))],
)
def test_classes_of_the_base_are_learned(own, of_text):
    train(own, of_text)


@pytest.mark.parametrize("own", [NAMED, GENERIC])
@pytest.mark.parametrize("of_text", [NAMED[:2], (*NAMED, "unsure")])
def test_another_number_of_classes_is_refused(own, of_text):
    with pytest.raises(
        MismatchError, match=rf"adapter a: .* its 3 classes .*; {len(of_text)} came"
    ):
        train(own, of_text)


@pytest.mark.parametrize("of_text", [("sports", "tech", "war"), NAMED[::-1]])
def test_other_classes_and_another_order_are_refused(of_text):
    with pytest.raises(MismatchError, match=f"negative, neutral, positive; 3 came, {of_text[0]}"):
        train(NAMED, of_text)
