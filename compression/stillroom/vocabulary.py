"""Cut a model's vocabulary down to the words that a corpus uses.

A small model spends much of its size on an embedding of words it never meets. The rows that stay
are copied, not trained, and a text made of kept words is cut into the same words as before:

- BPE applies, again and again, the first merge in rank order that fits. Inside the span of a final
  word it does what it does on that word alone. Keep the words those merges pass through, and at
  each step the merge that was applied is still there, and still the first that fits.
- WordPiece takes the longest word that fits. Among fewer words, the one it took is still the
  longest.
- Unigram takes the cut with the highest sum of scores. Among fewer cuts, that one is still the
  best. An unknown character costs what the lowest score says, so a word with that score stays.

A word here is a token of the vocabulary, not a word of the language.
"""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

from transformers import PreTrainedModel

from stillroom.errors import RecipeError
from stillroom.vocabulary_rows import trim_model

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BATCH = 256


def used_words(tokenizer: Any, texts: Iterable[str]) -> dict[int, int]:
    """Return how often each id comes up in `texts`, without the special tokens around a text."""
    counts: Counter[int] = Counter()
    rest = iter(texts)
    while batch := list(islice(rest, _BATCH)):
        # Quiet: a text longer than the model's window is no fault here.
        for row in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            counts.update(row)
    return dict(sorted(counts.items()))


def words_to_keep(tokenizer: Any, counts: Mapping[int, int], *, minimum: int = 1) -> list[int]:
    """Return the ids, ascending, of a vocabulary for texts like those that were counted.

    They are the ids used at least `minimum` times, the added and the special tokens, the words of
    one character or one byte, so that any other text can still be written, and what these need to
    be found again: for BPE the words that their merges pass through; for Unigram a word of the
    lowest score. A WordPiece or Unigram word stays, too, when one of its characters has no word of
    its own; other texts with such a character may then meet an unknown word that was not there.

    Raises:
        RecipeError: `counts` names an id that is no word, or the tokenizer is of another kind.
    """
    rules = _rules(tokenizer)
    ids: dict[str, int] = tokenizer.get_vocab()
    words = {index: word for word, index in ids.items()}
    used = {index for index, count in counts.items() if count >= minimum}
    if strange := sorted(used - words.keys()):
        raise RecipeError(
            f"expected ids of the tokenizer's {len(words)} words, {strange[:5]} came; "
            "count the words with this tokenizer"
        )
    keep = used | _special_ids(tokenizer, rules)
    model = rules["model"]
    own = [word for word, _ in _vocabulary(model)]
    keep |= {ids[word] for word in own if _single(word, model)}
    match model["type"]:
        case "BPE":
            needed = _passed_through((words[index] for index in keep), model)
            keep |= {ids[word] for word in needed if word in ids}
        case "WordPiece":
            keep |= {ids[word] for word in own if not ids.keys() >= set(_spelled(word, model))}
        case "Unigram":
            keep |= {ids[word] for word in own if not ids.keys() >= set(word)}
            keep.add(min(enumerate(model["vocab"]), key=lambda item: item[1][1])[0])
    return sorted(keep)


def trim_vocabulary(
    model: PreTrainedModel, tokenizer: Any, keep: Sequence[int]
) -> tuple[PreTrainedModel, Any]:
    """Return a new model and a new tokenizer that know the words `keep` only, numbered from 0.

    The model shares no memory with the old one. Its logits are the old ones at the kept words, bit
    for bit where the head's product sums in the same order for both sizes. The rows a model has
    beyond the tokenizer's words go. Neither argument is changed.

    Args:
        model: with embeddings of (rows, hidden), found through `get_input_embeddings`, and
            perhaps an output head of (rows, hidden), tied or not.
        tokenizer: a fast one, BPE, WordPiece or Unigram.
        keep: ascending ids, as `words_to_keep` returns them.

    Raises:
        RecipeError: `keep` leaves out what other words or texts need, or the model or the tokenizer
            cannot be cut.
    """
    new_tokenizer = _trim_tokenizer(tokenizer, keep)
    return trim_model(model, keep), new_tokenizer


def _trim_tokenizer(tokenizer: Any, keep: Sequence[int]) -> Any:
    from tokenizers import Tokenizer

    needed = words_to_keep(tokenizer, dict.fromkeys(keep, 1))
    if list(keep) != needed:
        lost = tokenizer.convert_ids_to_tokens(sorted(set(needed) - set(keep))[:5])
        raise RecipeError(
            "expected ascending ids that include all special and single-character words and the "
            f"words that BPE's merges pass through; {len(keep)} ids came, without or out of order: "
            f"{lost}; pass what words_to_keep returns"
        )
    new_ids = {old: new for new, old in enumerate(keep)}
    rules = _rules(tokenizer)
    model = rules["model"]
    if model["type"] == "Unigram":
        vocabulary = model["vocab"]
        model["vocab"] = [word for old, word in enumerate(vocabulary) if old in new_ids]
        if model["unk_id"] is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = {
            word: new_ids[old]
            for word, old in sorted(model["vocab"].items(), key=lambda item: item[1])
            if old in new_ids
        }
    if model["type"] == "BPE":
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if {left, right, _merged(left, right, model)} <= model["vocab"].keys()
        ]
    for token in rules["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    for holder, key in _numbered(rules):
        holder[key] = new_ids[holder[key]]
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(rules))
    # What still names the old files and numbers.
    trimmed.init_kwargs.pop("vocab_file", None)
    trimmed.vocab_file = None
    if decoder := trimmed.init_kwargs.get("added_tokens_decoder"):
        trimmed.init_kwargs["added_tokens_decoder"] = {
            new_ids[int(old)]: token for old, token in decoder.items() if int(old) in new_ids
        }
    expected = {word: new_ids[old] for word, old in tokenizer.get_vocab().items() if old in new_ids}
    if trimmed.get_vocab() != expected:
        raise RecipeError(
            "expected a tokenizer whose added tokens follow its other words; this one's are "
            "numbered otherwise when it is read again; keep its whole vocabulary"
        )
    return trimmed


def _rules(tokenizer: Any) -> dict[str, Any]:
    """Return the parsed tokenizer.json of a tokenizer that can be cut."""
    if not getattr(tokenizer, "is_fast", False):
        raise RecipeError(
            f"expected a fast tokenizer, {type(tokenizer).__name__} came; "
            "convert it to one with a tokenizer.json, or keep its whole vocabulary"
        )
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = rules["model"]["type"]
    if kind not in ("BPE", "WordPiece", "Unigram"):
        raise RecipeError(
            f"expected a tokenizer of BPE, WordPiece or Unigram, {kind} came; "
            "keep its whole vocabulary"
        )
    return rules


def _vocabulary(model: dict[str, Any]) -> list[tuple[str, int]]:
    if model["type"] == "Unigram":
        return [(word, index) for index, (word, _) in enumerate(model["vocab"])]
    return list(model["vocab"].items())


def _special_ids(tokenizer: Any, rules: dict[str, Any]) -> set[int]:
    """Return the ids of added and special tokens, and those that the rules themselves name."""
    ids = {*tokenizer.all_special_ids, *(token["id"] for token in rules["added_tokens"])}
    ids |= {holder[key] for holder, key in _numbered(rules)}
    model = rules["model"]
    unknown = model.get("unk_id")
    if model.get("unk_token") is not None:
        unknown = model["vocab"].get(model["unk_token"])
    return ids if unknown is None else ids | {unknown}


def _numbered(rules: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield where the padding and the post-processor name an id, as a container and its key."""
    if rules.get("padding"):
        yield rules["padding"], "pad_id"
    waiting = [rules["post_processor"]] if rules.get("post_processor") else []
    while waiting:
        processor = waiting.pop()
        waiting += processor.get("processors", ())
        match processor["type"]:
            case "TemplateProcessing":
                for token in processor["special_tokens"].values():
                    yield from ((token["ids"], i) for i in range(len(token["ids"])))
            case "BertProcessing" | "RobertaProcessing":
                # Each is [word, id].
                yield processor["sep"], 1
                yield processor["cls"], 1


def _continued(word: str, model: dict[str, Any]) -> bool:
    """Return whether the word goes on from another one, as WordPiece's "##ing" does."""
    prefix = model.get("continuing_subword_prefix") or ""
    return bool(prefix) and word.startswith(prefix) and word != prefix


def _single(word: str, model: dict[str, Any]) -> bool:
    """Return whether the word is one character or one byte."""
    if _continued(word, model):
        word = word[len(model["continuing_subword_prefix"]) :]
    suffix = model.get("end_of_word_suffix") or ""
    return len(word) == 1 or len(word.removesuffix(suffix)) == 1 or bool(_BYTE.fullmatch(word))


def _spelled(word: str, model: dict[str, Any]) -> list[str]:
    """Return the words of one character that WordPiece would write this word with."""
    prefix = model["continuing_subword_prefix"]
    if _continued(word, model):
        return [prefix + character for character in word[len(prefix) :]]
    return [word[:1], *(prefix + character for character in word[1:])]


def _merged(left: str, right: str, model: dict[str, Any]) -> str:
    return left + right[len(model.get("continuing_subword_prefix") or "") :]


def _passed_through(words: Iterable[str], model: dict[str, Any]) -> set[str]:
    """Return the words, and all that BPE's merges pass through on the way to them."""
    merges = [(left, right) for left, right in model["merges"]]
    marked = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    # Where characters bear marks by their place, the spelling of a lone word is not certain.
    ranks = {} if marked else {pair: rank for rank, pair in enumerate(merges)}
    parts_of: dict[str, set[str]] = {}
    for left, right in merges:
        parts_of.setdefault(_merged(left, right, model), set()).update((left, right))
    found: set[str] = set()
    waiting = list(words)
    while waiting:
        word = waiting.pop()
        if word in found:
            continue
        found.add(word)
        way = _merge_alone(word, ranks)
        # The way is not known: then every merge that makes the word might be on it.
        waiting += parts_of.get(word, ()) if way is None else way
    return found


def _merge_alone(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str] | None:
    """Return each word that BPE makes when it reads `word` alone; None where it ends elsewhere."""
    parts = list(word)
    made: list[str] = []
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(parts)))
        if rank == math.inf:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        made.append(parts[at])
    return made
