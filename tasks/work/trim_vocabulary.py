"""Cut the teacher's vocabulary down to the words that the recipe's texts use."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from stillroom.data.conversations import render
from stillroom.data.documents import Document
from stillroom.data.examples import Examples
from stillroom.evaluation.reload import measure_reload
from stillroom.labels import lacks_label_head
from stillroom.models import (
    load_body,
    load_pretrained,
    load_tokenizer,
    read_config,
    save_model,
    saved_dtype,
)
from stillroom.vocabulary import trim_vocabulary, used_words, words_to_keep
from tasks.work.bench import Bench, Result
from tasks.work.texts import read_texts
from tasks.work.training import reload_metrics

WORDS_COMPARED = 32


def work(bench: Bench) -> Result:
    """Write the same teacher with fewer words, and a tokenizer that cuts these texts as before."""
    folder = bench.inputs["teacher"]
    tokenizer = load_tokenizer(folder)
    documents = [each for role in bench.order.sources for each in read_texts(bench, role)]
    counts = used_words(tokenizer, _texts(documents, tokenizer))
    keep = words_to_keep(tokenizer, counts, minimum=bench.section["minimum_uses"])
    model, tokenizer = trim_vocabulary(_teacher(bench), tokenizer, keep)
    save_model(model, tokenizer, bench.output)
    reload = measure_reload(model, _load(bench, bench.output), _first_words(len(keep)))
    used, lost = sum(counts.values()), sum(counts[word] for word in counts.keys() - set(keep))
    metrics = {
        "words": float(len(keep)),
        "words_used": float(len(counts)),
        "share_of_text_in_dropped_words": lost / max(used, 1),
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
    }
    return Result(licence=bench.licence("teacher"), metrics=metrics | reload_metrics(reload))


def _teacher(bench: Bench) -> PreTrainedModel:
    """Return the teacher, with weights from the seed where they are to be trained later."""
    folder = bench.inputs["teacher"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.order.seed)
        if not bench.section.get("new_head"):
            return _load(bench, folder)
        dtype = saved_dtype(read_config(folder))
        return load_pretrained(folder, task=bench.task, dtype=dtype)


def _load(bench: Bench, folder: Path) -> PreTrainedModel:
    """Return the model in `folder`; without a head where it would get one for unknown classes."""
    config = read_config(folder)
    if bench.task != "sequence_classification" or not lacks_label_head(config):
        return bench.load(folder)
    return load_body(folder, saved_dtype(config)).to(bench.device)  # type: ignore[no-any-return, arg-type]


def _first_words(count: int) -> Examples:
    """Return one row of the words that stay, or of some of them."""
    ids = torch.arange(min(count, WORDS_COMPARED)).unsqueeze(0)  # (1, words)
    return Examples(ids, torch.ones_like(ids), ids, torch.zeros(1, dtype=torch.int64), "")


def _texts(documents: list[Document], tokenizer: Any) -> Iterator[str]:
    for document in documents:
        if document.messages and tokenizer.chat_template:
            # As they will be tokenised: with the template's own words, and the system's.
            yield render(document, document.messages, tokenizer)
        else:
            yield document.content
