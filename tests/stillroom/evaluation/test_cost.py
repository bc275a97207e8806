"""Cost on tiny models: counts exactly, times plausibly."""

import pytest
import torch
from torch import nn

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.options import PromptOptions
from stillroom.errors import NotFiniteError, RecipeError
from stillroom.evaluation import cost as module
from stillroom.evaluation.cost import (
    Cost,
    Workload,
    count_parameters,
    folder_size_bytes,
    hardware,
    measure_cost,
    memory_bytes,
)
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama
from tests.stillroom.tiny_decoders import tiny_gpt2

# peft asks transformers for a property that is about to be renamed.
peft_warns = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SHORT = Workload(prefill_tokens=8, decode_tokens=4, repeats=3)


def test_a_decoder_is_counted_weighed_and_timed():
    seen = []
    model = tiny_llama()
    cost = measure_cost(model, 123, workload=SHORT, progress=lambda *report: seen.append(report))
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.size_on_disk_bytes == 123
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert cost.memory_bytes <= 4 * cost.parameters + buffers
    assert cost.memory_bytes >= 4 * cost.parameters
    assert cost.prefill_unit == "tokens/s"
    assert cost.prefill_per_second.value > 0
    assert cost.decode_tokens_per_second.samples == 3
    speed = cost.decode_tokens_per_second.value
    assert cost.latency_ms.value == pytest.approx(1000 / speed)
    assert [done for done, *_ in seen] == [1, 2, 3, 4]
    assert Cost.from_json(cost.to_json()) == cost


def test_an_encoder_counts_sequences():
    cost = measure_cost(tiny_bert_classifier(), 0, task="sequence_classification", workload=SHORT)
    assert cost.decode_tokens_per_second is None
    assert cost.prefill_unit == "sequences/s"
    assert cost.latency_ms.value == pytest.approx(1000 / cost.prefill_per_second.value)


def test_decoding_continues_the_cache_greedily():
    model = tiny_llama()
    ids = torch.randint(4, 64, (1, 8), generator=torch.Generator().manual_seed(1))
    fed = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: fed.append(inputs["input_ids"].clone()), with_kwargs=True
    )
    with torch.no_grad():
        module._generate(model, ids, 5)
        sequence = torch.cat(fed, dim=1)
        assert [step.shape[1] for step in fed] == [8, 1, 1, 1, 1, 1]
        best = model(input_ids=sequence).logits.argmax(-1)
    assert torch.equal(best[0, 7:-1], sequence[0, 8:])


def test_the_warm_up_stays_within_the_context_too():
    model = tiny_gpt2()  # which has learned its positions
    context = model.config.n_positions
    cost = measure_cost(model, 0, workload=Workload(context - 1, 1, repeats=2))
    assert cost.latency_ms.value > 0


def test_a_median_and_its_error():
    estimate = module._median([1.0, 2.0, 9.0])
    assert estimate.value == 2
    assert estimate.standard_error == pytest.approx(4.3589 * (3.14159 / 6) ** 0.5, rel=1e-4)
    assert module._median([4.0]).standard_error is None


def test_rates_are_pieces_over_seconds():
    assert module._rate([0.5, 0.25, 1.0], 10).value == 20


def test_packed_linears_count_as_what_they_stand_for():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 16, 8
            self.register_buffer("qweight", torch.zeros(2, 8, dtype=torch.int32))
            self.register_buffer("scales", torch.zeros(1, 8, dtype=torch.float16))
            self.register_buffer("bias", torch.zeros(8, dtype=torch.float16))

    model = nn.Sequential(Packed(), nn.Linear(8, 4))
    assert count_parameters(model) == 16 * 8 + 8 + 8 * 4 + 4
    assert memory_bytes(model) == 2 * 8 * 4 + 8 * 2 + 8 * 2 + 4 * (8 * 4 + 4)


def test_tied_weights_count_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    both = nn.Sequential(first, second)
    assert count_parameters(both) == 16
    assert memory_bytes(both) == 64


def test_the_size_of_folders_is_that_of_their_weights(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b/inner").mkdir(parents=True)
    (tmp_path / "a/model.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "a/config.json").write_bytes(b"x" * 99)
    (tmp_path / "b/inner/adapter.safetensors").write_bytes(b"x" * 5)
    assert folder_size_bytes(tmp_path / "a", tmp_path / "b") == 15


@peft_warns
@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_an_adapter_is_timed_over_its_base(kind):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = tiny_llama()
    before = count_parameters(model)
    config = (
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        if kind == "lora"
        else PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    cost = measure_cost(get_peft_model(model, config), 0, workload=SHORT)
    assert cost.parameters > before
    assert cost.decode_tokens_per_second.value > 0


def test_a_workload_beyond_the_context_is_refused():
    with pytest.raises(RecipeError, match="wants 140 tokens and the model reads 128 of a text"):
        measure_cost(tiny_llama(), 0, workload=Workload(120, 20, 2))


def test_virtual_tokens_take_their_places_of_the_context():
    adapted = AdaptedModel(tiny_llama())
    adapted.add("a", PromptOptions(8), task="causal_lm", seed=0)
    with pytest.raises(RecipeError, match="wants 128 tokens and the model reads 120 of a text"):
        measure_cost(adapted, 0, workload=Workload(120, 8, 2))


def test_nan_is_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="NaN"):
        measure_cost(model, 0, workload=SHORT)


def test_the_hardware_is_text():
    found = hardware()
    assert set(found) == {"cpu", "cores", "threads", "torch", "gpu"}
    assert all(isinstance(value, str) and value for value in found.values())
