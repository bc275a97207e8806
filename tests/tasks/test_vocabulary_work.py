"""The stage that cuts a teacher's vocabulary: which texts count, and what comes of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from stillroom.config import Training
from stillroom.data.documents import Document
from stillroom.data.prepare import PrepareOptions, prepare, save_prepared
from stillroom.errors import DataError, SourceError
from stillroom.models import (
    load_model,
    load_tokenizer,
    read_config,
    save_model,
    tokenizer_hash,
)
from tasks.sources import resolve_text
from tasks.stages import TRIM_VOCABULARY, TUNE_TEACHER, as_json
from tasks.work import trim_vocabulary, tune_teacher
from tests.stillroom.tiny import seeded, tiny_bert_classifier, tiny_bert_masked, tiny_llama
from tests.stillroom.trained_tokenizers import trained
from tests.tasks.benches import new_bench

TEXT = {
    "format": "auto",
    "config": None,
    "split": "train",
    "text_column": "text",
    "label_column": None,
    "messages_column": None,
}
TRAIN = ["the quick brown fox and the lazy dog", "the dog jumps over the fox"]
EVALUATION = ["a vocabulary holds words, a tokenizer cuts a text"]


@pytest.fixture
def trim(tmp_path: Path) -> Any:
    tokenizer = trained("bpe")
    save_model(tiny_llama(vocab=len(tokenizer)), tokenizer, tmp_path / "teacher")
    for name, texts in (("train", TRAIN), ("evaluation", EVALUATION)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)

    def work(*roles: str, minimum_uses: int = 1) -> Any:
        section = {"minimum_uses": minimum_uses} | {f"base-{role}": TEXT for role in roles}
        place = tmp_path / f"{len(roles)}-{minimum_uses}"
        place.mkdir()
        bench = new_bench(TRIM_VOCABULARY, section, place, {"teacher": tmp_path / "teacher"})
        sources = {
            f"base-{role}": resolve_text(str(tmp_path / f"{role}.jsonl"), None) for role in roles
        }
        bench = replace(bench, order=bench.order.model_copy(update={"sources": sources}))
        return trim_vocabulary.work(bench).metrics, bench.output

    work.teacher = tmp_path / "teacher"  # type: ignore[attr-defined]
    return work


def test_the_words_of_all_texts_stay_and_the_model_says_the_same(trim: Any) -> None:
    metrics, folder = trim("train", "evaluation")
    before, after = load_tokenizer(trim.teacher), load_tokenizer(folder)
    old, new = load_model(trim.teacher), load_model(folder)
    assert len(after) == metrics["words"] == new.config.vocab_size < len(before)
    assert metrics["parameters"] == sum(each.numel() for each in new.parameters())
    assert metrics["share_of_text_in_dropped_words"] == 0
    assert metrics["reload_max_difference"] == 0 < metrics["reload_max_logit"]
    assert tokenizer_hash(after) != tokenizer_hash(before)
    for text in [*TRAIN, *EVALUATION]:
        assert after.tokenize(text) == before.tokenize(text)
        there = torch.tensor([before(text)["input_ids"]])
        here = torch.tensor([after(text)["input_ids"]])
        kept = before.convert_tokens_to_ids(after.convert_ids_to_tokens(range(len(after))))
        with torch.no_grad():
            expected = old(there).logits[..., kept]
            torch.testing.assert_close(new(here).logits, expected)


def test_texts_that_are_not_the_recipes_do_not_count(trim: Any) -> None:
    both, _ = trim("train", "evaluation")
    one, folder = trim("train")
    assert one["words"] < both["words"]
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(EVALUATION[0], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == EVALUATION[0]


def test_rare_words_go_and_their_share_is_told(trim: Any) -> None:
    metrics, _ = trim("train", "evaluation", minimum_uses=2)
    assert 0 < metrics["share_of_text_in_dropped_words"] < 1
    assert metrics["words_used"] > 2


def test_a_template_that_refuses_a_conversation_names_it(tmp_path: Path) -> None:
    tokenizer = trained("bpe")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    save_model(tiny_llama(vocab=len(tokenizer)), tokenizer, tmp_path / "teacher")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"m": messages}))
    section = {"minimum_uses": 1, "base-train": TEXT | {"messages_column": "m"}}
    bench = new_bench(TRIM_VOCABULARY, section, tmp_path, {"teacher": tmp_path / "teacher"})
    sources = {"base-train": resolve_text(str(tmp_path / "train.jsonl"), None)}
    bench = replace(bench, order=bench.order.model_copy(update={"sources": sources}))
    with pytest.raises(DataError, match=r"train\.jsonl#0: roles must alternate"):
        trim_vocabulary.work(bench)


def test_a_bare_encoder_gets_a_head_from_the_seed_where_one_is_trained_later(
    tmp_path: Path,
) -> None:
    tokenizer = trained("bpe")
    bare = tiny_bert_masked(vocab=len(tokenizer)).bert
    save_model(bare, tokenizer, tmp_path / "teacher")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": TRAIN[0]}) + "\n")
    source = resolve_text(str(tmp_path / "train.jsonl"), None)

    def work(place: Path, **further: Any) -> Path:
        place.mkdir()
        section = {"minimum_uses": 1, "base-train": TEXT, **further}
        bench = new_bench(TRIM_VOCABULARY, section, place, {"teacher": tmp_path / "teacher"})
        asked = {"section": {**section, "task": "masked_lm", "device": "cpu"}}
        order = bench.order.model_copy(update={"sources": {"base-train": source}, **asked})
        trim_vocabulary.work(replace(bench, order=order))
        return bench.output

    torch.manual_seed(1)
    first = work(tmp_path / "first", new_head=True)
    torch.manual_seed(2)
    again = work(tmp_path / "again", new_head=True)
    file = "model.safetensors"
    assert (first / file).read_bytes() == (again / file).read_bytes()
    model = load_model(first, task="masked_lm")
    assert model.config.vocab_size < len(tokenizer)
    with pytest.raises(SourceError, match=r"set teacher\.fine_tune"):
        work(tmp_path / "untrained", new_head=False)


CLASSIFY = {"task": "sequence_classification", "device": "cpu"}


def tiny_t5(words: int) -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    return seeded(T5ForConditionalGeneration, T5Config(vocab_size=words, **sizes, **ids))


def trim_classifier(teacher: Path, place: Path) -> Path:
    """Trim a teacher for classes to the words of a text."""
    place.mkdir()
    (place / "train.jsonl").write_text(json.dumps({"text": TRAIN[0]}) + "\n")
    section = {"minimum_uses": 1, "base-train": TEXT}
    bench = new_bench(TRIM_VOCABULARY, section, place, {"teacher": teacher})
    sources = {"base-train": resolve_text(str(place / "train.jsonl"), None)}
    order = bench.order.model_copy(update={"section": section | CLASSIFY, "sources": sources})
    metrics = trim_vocabulary.work(replace(bench, order=order)).metrics
    assert metrics["reload_max_difference"] < 1e-6 < metrics["reload_max_logit"]
    return bench.output


def tune_classifier(teacher: Path, place: Path) -> Path:
    """Tune a teacher on texts of three classes."""
    place.mkdir()
    tokenizer = load_tokenizer(teacher)
    documents = [
        Document(text=f"the {word} fox number {i} of the dog", label=word)
        for word in ("quick", "brown", "lazy")
        for i in range(4)
    ]
    options = PrepareOptions(
        task="sequence_classification", sequence_length=16, calibration_rows=0, leak_ngram=50
    )
    data = prepare(options, documents, None, tokenizer, tokenizer_hash(tokenizer))
    save_prepared(data, place / "data")
    section = {"training": as_json(Training(steps=2))}
    inputs = {"teacher": teacher, "data": place / "data"}
    bench = new_bench(TUNE_TEACHER, section, place, inputs)
    order = bench.order.model_copy(update={"section": section | CLASSIFY})
    tune_teacher.work(replace(bench, order=order))
    return bench.output


@pytest.mark.parametrize(
    "kind", ["BertModel", "BertForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
def test_a_teacher_without_a_head_for_classes_gets_none_until_it_is_tuned(
    tmp_path: Path, kind: str
) -> None:
    tokenizer = trained("bpe")
    words = len(tokenizer)
    masked = tiny_bert_masked(vocab=words)
    model = {
        "BertModel": masked.bert,
        "BertForMaskedLM": masked,
        "LlamaForCausalLM": tiny_llama(vocab=words),
        "T5ForConditionalGeneration": tiny_t5(words),
    }[kind]
    save_model(model, tokenizer, tmp_path / "teacher")
    assert read_config(tmp_path / "teacher")["architectures"] == [kind]
    folders = []
    for name in ("first", "again"):
        torch.manual_seed(len(folders))
        folders.append(trim_classifier(tmp_path / "teacher", tmp_path / name))
    first, again = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == again
    config = read_config(folders[0])
    assert config["architectures"] == [f"{kind.partition('For')[0].removesuffix('Model')}Model"]
    assert config["vocab_size"] < words
    tuned = load_model(tune_classifier(folders[0], tmp_path / "tuned"), task=CLASSIFY["task"])
    assert tuned.config.id2label == {0: "brown", 1: "lazy", 2: "quick"}


def test_a_ready_made_classifier_keeps_its_head_until_it_learns_other_classes(
    tmp_path: Path,
) -> None:
    tokenizer = trained("bpe")
    model = tiny_bert_classifier(vocab=len(tokenizer), labels=2)
    save_model(model, tokenizer, tmp_path / "teacher")
    trimmed = trim_classifier(tmp_path / "teacher", tmp_path / "trim")
    head = load_model(trimmed, task=CLASSIFY["task"]).classifier.weight
    assert torch.equal(head, model.classifier.weight)
    torch.manual_seed(1)
    first = tune_classifier(trimmed, tmp_path / "first")
    torch.manual_seed(2)
    again = tune_classifier(trimmed, tmp_path / "again")
    assert load_model(first, task=CLASSIFY["task"]).config.num_labels == 3
    file = "model.safetensors"
    assert (first / file).read_bytes() == (again / file).read_bytes()
