from functools import partial

import pytest
import torch

from stillroom.errors import RecipeError
from tests.stillroom.adapters.prompted import (
    BOTH_HALVES,
    CAUSAL,
    EVERYWHERE,
    INSIDE,
    ROWS,
    call,
    frozen,
    p_tuned,
    padded,
    with_words,
)


def greedy(base, ids, mask, steps):
    """Return rows continued one token at a time, each from the whole row."""
    for _ in range(steps):
        logits = call(base, ids, mask).logits
        best = logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
        mask = torch.cat([mask, torch.ones_like(best)], 1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_generation_equals_greedy_decoding_by_hand(kind, cache):
    base = frozen(kind)
    base.generation_config.eos_token_id = None
    ids, mask = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]]), torch.ones(2, 4).long()
    part = p_tuned(base, INSIDE)
    expected = greedy(base, ids, mask, 6)
    how = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "none": {"use_cache": False},
    }[cache]
    written = part.generate(base, ids, max_new_tokens=6, do_sample=False, **how)
    assert torch.equal(written, expected)
    assert torch.equal(call(base, ids, mask).logits[:, -1].argmax(-1), expected[:, 4])
    by_length = part.generate(base, ids, max_length=10, do_sample=False)
    assert torch.equal(by_length, expected)


def test_padded_rows_are_continued_as_each_alone():
    base = frozen("llama")
    base.generation_config.eos_token_id = None
    part = p_tuned(base, INSIDE)
    ids, mask = padded(ROWS, "left")
    for options in ({"attention_mask": mask}, {}):
        written = part.generate(base, ids, max_new_tokens=5, do_sample=False, **options)
        for row, words in enumerate(ROWS):
            alone = part.generate(base, torch.tensor([words]), max_new_tokens=5, do_sample=False)
            assert torch.equal(written[row, -len(words) - 5 :], alone[0])


@pytest.mark.parametrize("length", [1, 2])
def test_texts_that_end_before_the_last_virtual_token_are_not_continued(length):
    base = frozen("llama")
    part = p_tuned(base, INSIDE)
    ids, mask = padded([ROWS[0], ROWS[0][:length]], "left")
    for options in ({"attention_mask": mask}, {}):
        with pytest.raises(RecipeError, match=f"at least 3 tokens .*; one of {length} came"):
            part.generate(base, ids, max_new_tokens=2, **options)
    ids, mask = padded([ROWS[0], ROWS[0][:3]], "left")
    part.generate(base, ids, attention_mask=mask, max_new_tokens=2)


def test_beams_and_named_outputs_are_without_virtual_tokens():
    base = frozen("llama")
    part = p_tuned(base, INSIDE)
    ids, mask = padded(ROWS, "left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    written = part.generate(base, ids, num_return_sequences=2, **options)
    named = part.generate(
        base, ids, num_return_sequences=2, return_dict_in_generate=True, **options
    )
    assert torch.equal(named.sequences, written)
    assert torch.equal(written[:, :6], ids.repeat_interleave(2, 0))
    part.wear(False)
    words = padded([with_words(row, INSIDE) for row in ROWS], "left")
    options["attention_mask"] = words[1]
    as_text = base.generate(input_ids=words[0], num_return_sequences=2, **options)
    assert torch.equal(written[:, 6:], as_text[:, 11:])


@pytest.mark.parametrize("kind", BOTH_HALVES)
def test_encoder_decoder_writes_what_it_writes_of_the_words(kind):
    base = frozen(kind)
    base.generation_config.eos_token_id = None

    def written(write, rows):
        ids, mask = padded(rows, "right")
        options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
        output = write(input_ids=ids, attention_mask=mask, do_sample=False, **options)
        return output.sequences, torch.stack(output.logits)

    expected = written(base.generate, [with_words(row, EVERYWHERE) for row in ROWS])
    plain = written(base.generate, ROWS)
    part = p_tuned(base, EVERYWHERE)
    found = written(partial(part.generate, base), ROWS)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    assert not torch.allclose(found[1], plain[1], atol=1e-3)


def test_steps_from_a_cache_go_on_behind_the_prompt():
    base = frozen("llama")
    p_tuned(base, INSIDE)
    ids = torch.tensor([ROWS[0]])
    whole = base(input_ids=ids).logits
    first = base(input_ids=ids[:, :4], use_cache=True)
    rest = base(input_ids=ids[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 4:], rtol=0, atol=1e-5)
    with pytest.raises(RecipeError, match="no attention_mask beside a cache"):
        call(base, ids, torch.ones_like(ids), past_key_values=first.past_key_values)
