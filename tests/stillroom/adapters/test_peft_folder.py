"""What peft writes and ours computes as well, and what is refused by name."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from stillroom.adapters.folder import load_adapter
from stillroom.adapters.peft_folder import USUAL, options_of_peft
from stillroom.errors import MismatchError
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_llama

pytestmark = [
    # peft reads what transformers deprecates, and advises those who call it themselves.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
# As they stand in adapter_config.json.
COMPUTED_OTHERWISE = {
    "alora_invocation_tokens": [5, 6],
    "layer_replication": [[0, 2], [1, 2]],
    "target_parameters": ["mlp.experts.down_proj"],
    "exclude_modules": ["model.layers.0.self_attn.q_proj"],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 4},
    "layers_to_transform": 0,
}


def written(folder, **fields):
    """Return an adapter that peft wrote, with A and B moved as training would."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **fields
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=token_rows().input_ids).logits


@pytest.mark.parametrize("begun", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_beside_the_base_computes_what_it_does_in_peft(begun, tmp_path):
    folder = written(tmp_path, init_lora_weights=begun)
    theirs = logits(PeftModel.from_pretrained(tiny_llama(), folder))
    torch.testing.assert_close(logits(load_adapter(tiny_llama(), folder)), theirs)


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changed_its_base_is_refused(begun, tmp_path):
    with pytest.raises(MismatchError, match=f"init_lora_weights {begun} of peft changes the base"):
        load_adapter(tiny_llama(), written(tmp_path, init_lora_weights=begun))


@pytest.mark.parametrize("begun", ["corda", "loftq", "lora_ga", "OLoRA", "of tomorrow"])
def test_a_beginning_that_is_not_known_to_leave_the_base_is_refused(begun, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "init_lora_weights": begun})
    )
    with pytest.raises(MismatchError, match=f"init_lora_weights {begun}"):
        options_of_peft(tmp_path)


@pytest.mark.parametrize("name", COMPUTED_OTHERWISE)
def test_what_is_computed_otherwise_is_refused(name, tmp_path):
    path = written(tmp_path) / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {name: COMPUTED_OTHERWISE[name]}))
    with pytest.raises(MismatchError, match=f"{name} .* of peft is not computed here"):
        load_adapter(tiny_llama(), tmp_path)


def test_every_variant_that_peft_knows_is_refused():
    variants = {
        field.name
        for field in dataclasses.fields(LoraConfig)
        if field.metadata.get("is_lora_variant")
    }
    assert variants
    assert variants <= set(USUAL)
