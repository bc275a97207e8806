from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from stillroom.blocks import find_blocks, find_linears, weight_at
from stillroom.checkpoint import FolderCheckpoints
from stillroom.errors import DataError, MismatchError, NotFiniteError, RecipeError
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama
from tests.stillroom.tiny_mixtures import tiny_switch

OPTIONS = QuantizationOptions(bits=4, group_size=16)


def tiny_gpt2(seed=0, layers=2, hidden=32, vocab=64):
    config = GPT2Config(
        vocab_size=vocab, n_positions=64, n_embd=hidden, n_layer=layers, n_head=4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
    return model.eval()


def rows(count=6, length=16, padded=True):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 64, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[2, 10:] = 0
    return SimpleNamespace(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def logits(model, data):
    return model(input_ids=data.input_ids, attention_mask=data.attention_mask).logits


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert_classifier}


@pytest.fixture(params=MODELS)
def make_model(request):
    return MODELS[request.param]


@pytest.mark.parametrize("true_sequential", [True, False])
def test_every_architecture_loses_less_with_gptq_than_with_rounding(make_model, true_sequential):
    data = rows(count=12)
    reference = logits(make_model(), data)
    lost = {}
    for method in ("gptq", "rtn"):
        model = make_model()
        options = QuantizationOptions(4, 32, True, method=method, true_sequential=true_sequential)
        result = quantize_model(model, data, options)
        lost[method] = float((logits(model, data) - reference).square().sum())
        assert result.fallbacks == 0
        assert {account.method for account in result.accounts} == {method}
    assert 0 < lost["gptq"] < lost["rtn"]


def test_all_linears_in_the_blocks_and_nothing_else_changes(make_model):
    model, before = make_model(), make_model().state_dict()
    result = quantize_model(model, rows(), OPTIONS)
    prefix, blocks = find_blocks(model)
    expected = [f"{prefix}.{i}.{name}" for i in range(2) for name in find_linears(blocks[i])]
    assert list(result.layers) == expected
    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    weights = {f"{name}.weight" for name in expected}
    biases = {f"{name}.bias" for name, layer in result.layers.items() if layer.bias is not None}
    assert changed == weights | biases
    for name, layer in result.layers.items():
        weight = weight_at(model, name).read()
        assert torch.equal(weight, layer.weight.dequantize())


def test_a_later_layer_is_solved_for_the_outputs_of_the_quantized_ones_before_it():
    """The last layer's error, measured anew on the final model's own inputs, is the one stated."""
    model, original, data = tiny_llama(), tiny_llama(), rows(padded=False)
    # Measured anew in float32, so the calibration rows go through the model in float32 too.
    result = quantize_model(model, data, replace(OPTIONS, matmul_precision="highest"))
    name = "model.layers.1.mlp.down_proj"
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, 1))
    )
    logits(model, data)
    hook.remove()
    W, Q = (each.get_submodule(name).weight.detach() for each in (original, model))
    outputs = seen[0] @ W.T
    expected = (outputs - seen[0] @ Q.T).square().sum() / outputs.square().sum()
    assert result.layers[name].account.relative_error == pytest.approx(float(expected), rel=1e-3)


def test_batches_of_rows_do_not_matter_but_for_rounding():
    errors = []
    for batch_rows in (1, 6):
        result = quantize_model(tiny_llama(), rows(), replace(OPTIONS, batch_rows=batch_rows))
        errors.append(sum(account.relative_error for account in result.accounts))
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


class _Killed(BaseException):
    pass


def test_a_run_killed_after_a_block_continues_to_the_same_bytes(make_model, tmp_path):
    def make():
        return make_model(layers=3)

    data = rows()
    whole = make()
    expected = quantize_model(whole, data, OPTIONS)
    kept = FolderCheckpoints(tmp_path)
    tmp_path.mkdir(exist_ok=True)

    def kill(done, total, unit, note=""):
        if done == 2:
            raise _Killed

    with pytest.raises(_Killed):
        quantize_model(make(), data, OPTIONS, checkpoints=kept, progress=kill)
    assert [name[-5:] for name in kept.names()] == ["-0000", "-0001"]
    resumed = make()
    result = quantize_model(resumed, data, OPTIONS, checkpoints=kept)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    assert list(result.layers) == list(expected.layers)
    for name, layer in expected.layers.items():
        for part in ("integers", "scales", "zeros"):
            ours = getattr(result.layers[name].weight, part)
            assert torch.equal(ours, getattr(layer.weight, part)), (name, part)
    assert result.accounts == expected.accounts


def test_experts_that_are_modules_are_solved_wherever_a_row_reaches_them(tmp_path):
    data = rows(count=16)
    reached = set()
    original = tiny_switch(num_experts=8)
    for name, module in original.named_modules():
        if ".experts." in name and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda *_, name=name: reached.add(name))
    ids, mask = data.input_ids, data.attention_mask
    for row in range(16):
        real = ids[row : row + 1, mask[row].bool()]
        original(input_ids=real, decoder_input_ids=real)
    kept = FolderCheckpoints(tmp_path)
    options = replace(OPTIONS, batch_rows=1)
    whole = quantize_model(tiny_switch(num_experts=8), data, options, checkpoints=kept)
    fell_back = {account.name for account in whole.accounts if account.fell_back}
    assert reached
    assert not fell_back & reached
    for name in kept.names():
        if name.startswith("block-decoder") and not name.endswith("-0000"):
            kept.delete(name)
    resumed = quantize_model(tiny_switch(num_experts=8), data, options, checkpoints=kept)
    assert resumed.accounts == whole.accounts


def test_checkpoints_of_other_work_are_refused(tmp_path):
    kept = FolderCheckpoints(tmp_path)
    quantize_model(tiny_llama(), rows(), OPTIONS, checkpoints=kept)
    with pytest.raises(MismatchError, match=r"block-model\.layers-0000"):
        quantize_model(tiny_llama(), rows(count=5), OPTIONS, checkpoints=kept)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_calibration_rows_are_multiplied_as_asked_and_logits_to_compare_exactly(precision):
    model, data = tiny_llama(), rows(padded=False)
    seen: list[str] = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: seen.append(torch.get_float32_matmul_precision())
    )
    result = quantize_model(model, data, replace(OPTIONS, matmul_precision=precision))
    hook.remove()
    # The rows to compare go through once, the calibration rows several times.
    assert "highest" in seen
    assert seen.count(precision) >= 2
    assert torch.get_float32_matmul_precision() == "highest"
    with torch.no_grad():
        exact = model(input_ids=result.rows.ids, attention_mask=result.rows.mask).logits
    assert (result.logits - exact).abs().max() < 1e-5 * exact.abs().max()


def test_skipped_layers_keep_their_weights():
    model, before = tiny_llama(), tiny_llama().state_dict()
    result = quantize_model(model, rows(), OPTIONS, skip=("*.mlp.down_proj",))
    assert result.skipped == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))
    for name in result.skipped:
        assert name not in result.layers
        assert torch.equal(model.state_dict()[f"{name}.weight"], before[f"{name}.weight"])


@pytest.mark.parametrize("skip", [("*",), ("*.down_porj",)])
def test_a_skip_that_fits_all_or_nothing_is_refused(skip):
    with pytest.raises(RecipeError, match="skip"):
        quantize_model(tiny_llama(), rows(), OPTIONS, skip=skip)


def test_progress_counts_blocks():
    calls = []
    quantize_model(tiny_llama(), rows(), OPTIONS, progress=lambda *args: calls.append(args))
    assert calls == [(1, 2, "blocks", "model.layers.0"), (2, 2, "blocks", "model.layers.1")]


def test_a_nan_weight_is_reported_by_layer():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"model\.layers\.1\.mlp\.up_proj: the weight"):
        quantize_model(model, rows(), OPTIONS)


def test_a_nan_input_is_reported_by_layer():
    model = tiny_llama()
    model.model.layers[0].post_attention_layernorm.weight.data[0] = torch.inf
    with pytest.raises(NotFiniteError, match=r"model\.layers\.0\.mlp\.gate_proj: its inputs"):
        quantize_model(model, rows(), OPTIONS)


def test_a_nan_input_of_a_row_that_is_held_out_is_reported_by_layer():
    model, data = tiny_llama(), rows(count=8, padded=False)

    class Overflow(torch.nn.Module):
        def forward(self, inputs):
            return inputs * (torch.inf if len(inputs) == 1 else 1)

    model.model.layers[0].mlp.act_fn = Overflow()
    with pytest.raises(NotFiniteError, match=r"model\.layers\.0\.mlp\.down_proj: its inputs"):
        quantize_model(model, data, OPTIONS)


def test_layers_that_no_row_reaches_are_rounded_and_counted(caplog):
    model = tiny_llama()
    # Nobody calls this one.
    model.model.layers[0].mlp.spare = torch.nn.Linear(32, 32)
    result = quantize_model(model, rows(), OPTIONS)
    account = result.layers["model.layers.0.mlp.spare"].account
    assert account.fell_back
    assert account.method == "rtn"
    assert result.fallbacks == 1
    assert "1 of 15 layers" in caplog.text


def test_rows_of_padding_alone_are_left_out():
    data = rows(count=10)
    data.attention_mask[[1, 7]] = 0
    real = data.attention_mask.any(1)
    fewer = SimpleNamespace(
        input_ids=data.input_ids[real], attention_mask=data.attention_mask[real]
    )
    expected = quantize_model(tiny_llama(), fewer, OPTIONS)
    assert quantize_model(tiny_llama(), data, OPTIONS).accounts == expected.accounts


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="calibration"):
        quantize_model(tiny_llama(), rows(count=0, padded=False), OPTIONS)


def test_a_group_that_fits_no_layer_is_refused_before_any_work():
    model, before = tiny_llama(), tiny_llama().state_dict()
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        quantize_model(model, rows(), QuantizationOptions(4, 48))
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_go_through(dtype):
    model = tiny_llama().to(dtype)
    result = quantize_model(model, rows(), OPTIONS)
    assert result.fallbacks == 0
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_bits_go_through(bits):
    model = tiny_llama(hidden=64)
    result = quantize_model(model, rows(), QuantizationOptions(bits, 32))
    assert all(int(layer.weight.integers.max()) < 2**bits for layer in result.layers.values())


def test_one_calibration_token_is_enough_to_finish():
    data = SimpleNamespace(
        input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 1, dtype=torch.long)
    )
    result = quantize_model(tiny_llama(), data, OPTIONS)
    assert result.fallbacks == 0
