import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillroom.builtin import BUILTIN_MODELS, builtin_model, import_builtin
from stillroom.errors import SourceError
from stillroom.models import (
    load_model,
    load_pretrained,
    load_tokenizer,
    read_config,
    save_model,
    tokenizer_hash,
)
from tests.stillroom.tiny import (
    tiny_bert_classifier,
    tiny_bert_masked,
    tiny_llama,
    tiny_tokenizer,
)


def test_what_is_saved_loads_as_the_same_model(tmp_path: Path) -> None:
    model = tiny_llama()
    save_model(model, tiny_tokenizer(), tmp_path)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tiny_tokenizer())


def test_the_same_model_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(tiny_llama(), tiny_tokenizer(), tmp_path / name)
    reloaded = load_model(tmp_path / "a")
    save_model(reloaded, load_tokenizer(tmp_path / "a"), tmp_path / "c")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (tmp_path / "c" / file.name).read_bytes()


def test_the_saved_number_format_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    save_model(tiny_llama().to(torch.bfloat16), tiny_tokenizer(), tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_new_head_has_the_labels_asked_for(tmp_path: Path) -> None:
    save_model(tiny_bert_classifier(labels=3), tiny_tokenizer(), tmp_path)
    model = load_pretrained(tmp_path, task="sequence_classification", label_names=("x", "y", "z"))
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}


def test_a_tokenizer_is_known_by_its_ids_not_by_how_it_was_last_called() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(["abc", "abcdef"], truncation=True, max_length=2, padding=True)
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(tiny_tokenizer(vocab=40)) != before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_hash(tokenizer) != before


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"expected a folder with config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match="cannot be read"):
        read_config(tmp_path)


def test_a_quantization_of_null_is_none(tmp_path: Path) -> None:
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path)
    config = read_config(tmp_path) | {"quantization_config": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "quantization_config" not in read_config(tmp_path)
    assert load_model(tmp_path).config.model_type == "llama"


def test_weights_that_can_run_code_are_refused(tmp_path: Path) -> None:
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_model(tmp_path)


def without(name: str, folder: Path) -> None:
    """Take a tensor out of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_model_that_would_be_completed_at_random_is_refused(tmp_path: Path) -> None:
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "llama")
    without("model.layers.1.mlp.up_proj.weight", tmp_path / "llama")
    for load in (load_model, partial(load_pretrained, task="causal_lm")):
        with pytest.raises(SourceError, match=r"lack 1 of .* model.layers.1.mlp.up_proj.weight"):
            load(tmp_path / "llama")
    save_model(tiny_bert_masked(), tiny_tokenizer(), tmp_path / "bert")
    without("cls.predictions.transform.dense.weight", tmp_path / "bert")
    with pytest.raises(SourceError, match=r"cls.predictions.* save the whole model"):
        load_model(tmp_path / "bert", task="masked_lm")


def test_only_a_head_may_be_new(tmp_path: Path) -> None:
    save_model(tiny_bert_masked(), tiny_tokenizer(), tmp_path / "bert")
    save_model(tiny_bert_masked().bert, tiny_tokenizer(), tmp_path / "bare")
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "llama")
    for name in ("bert", "bare", "llama"):
        labels = ("x", "y", "z")
        load_pretrained(tmp_path / name, task="sequence_classification", label_names=labels)
    load_pretrained(tmp_path / "bare", task="masked_lm")
    without("bert.encoder.layer.0.output.dense.weight", tmp_path / "bert")
    with pytest.raises(SourceError, match=r"lack 1 of .* bert.encoder.layer.0.output.dense"):
        load_model(tmp_path / "bert", task="sequence_classification")


def test_packed_weights_need_their_section_of_the_config(tmp_path: Path) -> None:
    """Older auto-gptq says how in a file of its own; all of the model was random."""
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    packed = {name.replace("proj.weight", "proj.qweight"): each for name, each in tensors.items()}
    save_file(packed, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"packed: config.json has to say how"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_a_builtin_model_is_what_is_said_of_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import_builtin(name, tmp_path)
    config = read_config(tmp_path)
    for fact, value in builtin_model(name).config.items():
        assert config.get(fact, value) == value, fact
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert load_tokenizer(tmp_path)("The import statement")["input_ids"]
