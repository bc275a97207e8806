"""Whether a model's classes are those that rows are labelled with."""

import json
from pathlib import Path

import pytest

from stillroom.errors import MismatchError, SourceError
from stillroom.labels import label_order, require_known_labels
from tests.stillroom.tiny import tiny_bert_classifier, tiny_bert_masked


def classifier(folder: Path, *names: str) -> Path:
    model = tiny_bert_classifier(labels=len(names))
    model.config.id2label = dict(enumerate(names))
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_order_is_that_of_the_outputs(tmp_path: Path) -> None:
    names = [f"class {i}" for i in reversed(range(12))]
    assert label_order(classifier(tmp_path, *names)) == tuple(names)


@pytest.mark.parametrize(
    "known", [("World", "Business"), ("LABEL_0", "LABEL_1"), ("LABEL_0", "Business")]
)
def test_a_class_without_a_name_may_bear_any(tmp_path: Path, known: tuple[str, ...]) -> None:
    require_known_labels(classifier(tmp_path, *known), ("World", "Business"))


def test_a_number_is_the_class_of_its_place(tmp_path: Path) -> None:
    require_known_labels(classifier(tmp_path, "World", "Business"), ("0", "1"))


def test_capitals_do_not_count(tmp_path: Path) -> None:
    require_known_labels(classifier(tmp_path, "NEGATIVE", "Positive"), ("negative", "positive"))


@pytest.mark.parametrize(
    "labels",
    [("Business", "World"), ("World", "Sport"), ("World", "Business", "Sport"), ("0", "2")],
)
def test_other_classes_are_refused(tmp_path: Path, labels: tuple[str, ...]) -> None:
    with pytest.raises(MismatchError, match=r"order, World, Business; .* set teacher\.fine_tune"):
        require_known_labels(classifier(tmp_path, "World", "Business"), labels)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_a_model_without_a_head_for_classes_is_refused(tmp_path: Path, kind: str) -> None:
    tiny_bert_masked().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [kind]}))
    with pytest.raises(SourceError, match=rf"holds a {kind}, .* set teacher\.fine_tune"):
        require_known_labels(tmp_path, ("LABEL_0", "LABEL_1"))
