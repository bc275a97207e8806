"""Tied embeddings: the gradient is autograd's, whichever way it is put together."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from stillroom.training.team import Team
from stillroom.training.tied_embedding import apart_from_the_head
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama
from tests.stillroom.tiny_decoders import tiny_gpt2


def gradients(model, *, apart, passes=2):
    rows = token_rows(4, padding=3)
    with apart_from_the_head(Team(0, 1, model, model)) if apart else nullcontext() as lookups:
        for _ in range(passes):
            model(**arguments(rows), labels=rows.labels).loss.backward()
            if apart:
                lookups.add_gradient()
    return {name: value.grad for name, value in model.named_parameters()}


def arguments(rows):
    return {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}


def tied_llama():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("make", [tied_llama, tiny_gpt2])
@pytest.mark.parametrize("padding", [None, 5])
def test_the_gradient_is_autograds(make, padding):
    model = make()
    model.get_input_embeddings().padding_idx = padding
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    other = copy.deepcopy(model)
    expected, found = gradients(model, apart=False), gradients(other, apart=True)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_no_second_matrix_is_made():
    model = tied_llama()
    made = []

    def note(gradient):
        made.append(gradient.clone())

    model.get_input_embeddings().weight.register_hook(note)
    gradients(model, apart=True, passes=1)
    # Autograd's part is the head's alone, in which words are missing that no position predicts.
    head_only = tied_llama()
    rows = token_rows(4, padding=3)
    hidden = head_only.model(**arguments(rows)).last_hidden_state.detach()
    head_only.loss_function(head_only.lm_head(hidden), rows.labels, vocab_size=64).backward()
    torch.testing.assert_close(made[0], head_only.lm_head.weight.grad)


@pytest.mark.parametrize("case", ["untied", "frozen", "scaled", "hooked", "classifier", "team"])
def test_what_is_not_plain_is_left_to_autograd(case):
    model, size = tied_llama(), 1
    embedding = model.get_input_embeddings()
    match case:
        case "untied":
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        case "frozen":
            embedding.weight.requires_grad_(False)
        case "scaled":
            embedding.scale_grad_by_freq = True
        case "hooked":
            embedding.register_forward_hook(lambda module, arguments, output: 2 * output)
        case "classifier":
            model = tiny_bert_classifier()
        case "team":
            size = 2
    with apart_from_the_head(Team(0, size, model, model)) as lookups:
        assert lookups.embedding is None
        lookups.add_gradient()


def test_the_hook_goes_and_measuring_leaves_no_trace():
    model = tied_llama()
    rows = token_rows(2)
    with apart_from_the_head(Team(0, 1, model, model)) as lookups:
        with torch.no_grad():
            model(**arguments(rows))
        assert lookups.seen == []
        model(**arguments(rows)).logits.sum().backward()
        assert len(lookups.seen) == 1
    assert not model.get_input_embeddings()._forward_hooks
