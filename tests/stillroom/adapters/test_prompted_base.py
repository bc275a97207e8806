import pytest
import torch

from stillroom.adapters.options import PromptOptions, PTuningOptions
from stillroom.adapters.prompts import PromptAdapter
from stillroom.errors import RecipeError
from tests.stillroom.adapters.prompted import (
    CAUSAL,
    EVERYWHERE,
    INSIDE,
    ROWS,
    call,
    frozen,
    p_tuned,
    padded,
)


@pytest.mark.parametrize("kind", [*CAUSAL])
def test_end_is_refused_where_nothing_reads_it(kind):
    with pytest.raises(RecipeError, match=r"p_tuning\.template.*continues text"):
        PromptAdapter(frozen(kind), PTuningOptions(EVERYWHERE), 0)


@pytest.mark.parametrize(
    ("kind", "limit"), [("llama", 128), ("roberta", 63), ("gpt2", 64), ("bart", 64)]
)
def test_rows_that_leave_no_room_are_refused(kind, limit):
    base = frozen(kind)
    part = PromptAdapter(base, PromptOptions(10), 0)
    part.wear(True)
    ids = torch.full((1, limit - 10), 9)
    assert call(base, ids, torch.ones_like(ids)).logits.isfinite().all()
    ids = torch.full((1, limit - 9), 9)
    with pytest.raises(RecipeError, match=f"at most {limit - 10} tokens.*rows of {limit - 9}"):
        call(base, ids, torch.ones_like(ids))


@pytest.mark.parametrize(
    "name", ["labels", "position_ids", "inputs_embeds", "mask", "words", "tuple"]
)
def test_what_cannot_be_extended_is_refused(name):
    base = frozen("llama")
    p_tuned(base, INSIDE)
    ids, mask = padded(ROWS, "right")
    embeddings = base.get_input_embeddings()(ids)
    inputs = {"input_ids": ids, "attention_mask": mask}
    changes, message = {
        "labels": ({"labels": ids}, "labels came"),
        "position_ids": ({"position_ids": torch.arange(6)[None]}, "position_ids came"),
        "inputs_embeds": ({"inputs_embeds": embeddings}, "inputs_embeds came"),
        "mask": ({"attention_mask": mask[:, None, None].float()}, "attention_mask like"),
        "words": ({"input_ids": None, "inputs_embeds": embeddings}, "none came"),
        "tuple": ({"return_dict": False}, "leave return_dict out"),
    }[name]
    with pytest.raises(RecipeError, match=message):
        base(**inputs | changes)
    base(**inputs)


def test_decoder_without_words_of_its_own_and_unknown_words_are_refused():
    base = frozen("bart")
    p_tuned(base, EVERYWHERE)
    with pytest.raises(RecipeError, match="decoder_input_ids, and none came"):
        base(input_ids=torch.tensor(ROWS[:1]))
    for words in ((5, 64), ()):
        with pytest.raises(RecipeError, match="ids from 0 to 63"):
            PromptAdapter(frozen("llama"), PromptOptions(4, words), 0)
