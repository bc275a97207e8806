"""Heads of an adapter's own, on classifiers whose head is one module or two."""

import pytest
import torch
import transformers as tf

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.options import LoraOptions
from tests.stillroom.rows import labelled_rows
from tests.stillroom.tiny import seeded, tiny_bert_classifier

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "num_labels": 3,
}  # fmt: skip


def tiny_distilbert():
    config = tf.DistilBertConfig(
        vocab_size=64, dim=32, hidden_dim=64, n_layers=2, n_heads=4, num_labels=3
    )
    return seeded(tf.DistilBertForSequenceClassification, config)


def tiny_deberta():
    config = tf.DebertaV2Config(pooler_hidden_size=32, **SIZES)
    return seeded(tf.DebertaV2ForSequenceClassification, config)


def tiny_modernbert():
    words = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    config = tf.ModernBertConfig(**SIZES, **words)
    return seeded(tf.ModernBertForSequenceClassification, config)


MODELS = {
    "one module": tiny_bert_classifier,
    "distilbert": tiny_distilbert,
    "deberta": tiny_deberta,
    "modernbert": tiny_modernbert,
}
LAST_IN_FLOAT32 = {None: torch.float32, ("a", None): torch.bfloat16}


def adapted(kind, dtype):
    model = AdaptedModel(MODELS[kind]().to(dtype))
    model.add("a", LoraOptions(rank=2), task="sequence_classification")
    with torch.no_grad():
        for copied in model.worn("a").head.parameters():
            copied.mul_(1.5)
    return model.eval()


def logits(model, names=None):
    rows = labelled_rows(2)
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
    with torch.no_grad():
        return model(**inputs, adapter_names=names).logits


@pytest.mark.filterwarnings("ignore:.torch.jit.script.* is deprecated")
@pytest.mark.parametrize("names", LAST_IN_FLOAT32)
@pytest.mark.parametrize("kind", MODELS)
def test_a_half_precision_base_computes_what_a_whole_one_does(kind, names):
    rounded = logits(adapted(kind, torch.bfloat16), names)
    assert rounded.dtype == LAST_IN_FLOAT32[names]
    expected = logits(adapted(kind, torch.float32), names)
    assert (rounded.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.torch.jit.script.* is deprecated")
@pytest.mark.parametrize("kind", MODELS)
def test_every_module_of_a_half_precision_head_is_trained(kind):
    model, rows = adapted(kind, torch.bfloat16), labelled_rows(2)
    model.trainable("a")
    model(input_ids=rows.input_ids, labels=rows.labels).loss.backward()
    gradients = [parameter.grad for parameter in model.worn("a").head.parameters()]
    assert all(each is not None and each.abs().max() > 0 for each in gradients)


def test_a_head_holds_nothing_of_the_adapters_before_it():
    model = AdaptedModel(tiny_bert_classifier())
    for name in ("a", "b", "c"):
        model.add(name, LoraOptions(rank=2), task="sequence_classification")
    for name in ("a", "b", "c"):
        for module in model.worn(name).head.copies.modules():
            assert not module._forward_hooks
