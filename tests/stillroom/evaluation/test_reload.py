"""The reload check sees a changed weight and ignores padding."""

import pytest
import torch

from stillroom.errors import MismatchError
from stillroom.evaluation.reload import ReloadCheck, measure_reload
from stillroom.models import load_model, save_model
from tests.stillroom.evaluation.test_quality import sentences, text
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama, tiny_tokenizer


def test_a_saved_model_loads_as_itself(tmp_path):
    model = tiny_llama()
    save_model(model, tiny_tokenizer(), tmp_path)
    check = measure_reload(model, load_model(tmp_path), text())
    assert check.max_difference == 0
    assert check.relative == 0
    assert check.max_logit > 0


def test_a_changed_weight_is_seen():
    model, other = tiny_llama(), tiny_llama()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.1)
    check = measure_reload(model, other, text())
    with torch.no_grad():
        inputs = {"input_ids": text().input_ids[:1]}
        difference = (model(**inputs).logits - other(**inputs).logits).abs().max()
    assert check.max_difference >= float(difference) * 0.999
    assert check.relative == pytest.approx(0.1, rel=0.01)


def test_a_classifier_is_compared_too():
    model = tiny_bert_classifier()
    assert measure_reload(model, model, sentences(), rows=3).relative == 0


def test_another_shape_is_refused():
    with pytest.raises(MismatchError, match="export it again"):
        measure_reload(tiny_llama(), tiny_llama(vocab=96), text())


def test_logits_of_zero_that_changed_are_infinitely_far():
    assert ReloadCheck(0.5, 0.0).relative == float("inf")
