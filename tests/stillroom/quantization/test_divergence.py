import pytest
import torch

from stillroom.blocks import find_blocks, find_linears
from stillroom.errors import DataError
from stillroom.quantization.divergence import kl_measure
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama
from tests.stillroom.tiny_decoders import tiny_gpt2, tiny_qwen2


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert_classifier])
def test_the_measure_is_the_kl_divergence(make):
    model = make()
    data = token_rows()
    measure = kl_measure(model, data, tokens=10**6, batch_size=4)
    assert measure([]) == 0
    before = model(input_ids=data.input_ids).logits.float().log_softmax(-1).detach()
    names = list(find_linears(model))[1:4]
    for name in names:
        model.get_submodule(name).weight.data *= 0.5
    after = model(input_ids=data.input_ids).logits.float().log_softmax(-1).detach()
    expected = (before.exp() * (before - after)).sum(-1).mean()
    assert expected > 1e-5
    assert measure(names) == pytest.approx(float(expected), rel=1e-2)


@torch.no_grad()
def test_few_tokens_are_spread_over_the_rows_and_padding_is_left_out():
    model = tiny_llama()
    data = token_rows(6, 16, padding=4)
    name = "model.layers.0.mlp.up_proj"
    measure = kl_measure(model, data, tokens=10)
    before = model(data.input_ids, attention_mask=data.attention_mask).logits.log_softmax(-1)
    model.get_submodule(name).weight *= 0.5
    after = model(data.input_ids, attention_mask=data.attention_mask).logits.log_softmax(-1)
    mask = data.attention_mask.bool()
    each = (before.exp() * (before - after)).sum(-1)[mask]  # 84 real tokens
    assert measure([name]) == pytest.approx(float(each[8::9].mean()), rel=1e-4)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="calibration rows"):
        kl_measure(tiny_llama(), token_rows(0))


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_qwen2, tiny_bert_classifier])
def test_blocks_before_the_first_change_are_not_computed_and_it_makes_no_difference(make):
    model = make()
    measure = kl_measure(model, token_rows(padding=3), batch_size=4)
    prefix, blocks = find_blocks(model)
    name = next(name for name in find_linears(model) if name.startswith(f"{prefix}.1."))
    model.get_submodule(name).weight *= 0.5
    calls = []
    hooks = [
        linear.register_forward_hook(lambda *_, place=i: calls.append(place))
        for i, block in enumerate(blocks)
        for linear in find_linears(block).values()
    ]
    found = measure([name])
    assert set(calls) == set(range(1, len(blocks)))
    assert found > 0
    calls.clear()
    assert measure([name, "lm_head"]) == pytest.approx(found, rel=1e-6)
    assert set(calls) == set(range(len(blocks)))
    for hook in hooks:
        hook.remove()
    assert all("forward" not in block.__dict__ for block in blocks)
