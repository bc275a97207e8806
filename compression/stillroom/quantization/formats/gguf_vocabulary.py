"""A tokenizer as GGUF's metadata, so that llama.cpp turns the same text into the same ids.

Two kinds have a counterpart there: BPE on bytes (GPT-2's, in GGUF `gpt2`), whose way of cutting a
text into words llama.cpp knows by name only, and sentencepiece's BPE with byte fallback (Llama 2's,
in GGUF `llama`), which merges by scores.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import MismatchError
from stillroom.models import load_tokenizer

# The names that llama.cpp has for what cuts a text into words: the steps before BPE.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    ("gpt2 words",): "gpt-2",
    ("digits", "gpt2 words"): "smollm",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST, "bytes"): "qwen2",
    (r" ?[^(\s|[.,!?…。，、।۔،])]+", "bytes"): "bloom",
}
WHOLE_WORDS = ("llama-bpe",)  # of these llama.cpp merges no word that is a token as it is
SPACE = "▁"
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id"}


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, and how a text becomes them."""

    kind: str  # GGUF's name of the algorithm: gpt2 or llama
    pre: str  # llama.cpp's name of the steps before it
    tokens: list[str]
    types: list[int]  # gguf.TokenType of each
    merges: list[str]  # gpt2: pairs, best first
    scores: list[float]  # llama: the highest is merged first
    space_prefix: bool  # llama: a text gets a space in front


def write_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Add the tokenizer in `folder` to a GGUFWriter, filled up to `size` tokens.

    Raises:
        MismatchError: llama.cpp has no counterpart of it.
    """
    tokenizer, vocabulary = find_vocabulary(folder, size)
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == "gpt2":
        # A model without merges has an empty list there, which the writer leaves out.
        writer.add_token_merges(vocabulary.merges or [""])
    else:
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    for name, attribute in (*SPECIAL.items(), ("pad", "pad_token_id")):
        if (token := getattr(tokenizer, attribute)) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(whole) > len(plain) and whole[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(whole) > len(plain) and whole[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def find_vocabulary(folder: Path, size: int) -> tuple[Any, Vocabulary]:
    """Return the tokenizer in `folder` and its vocabulary, filled up to `size` tokens.

    Raises:
        MismatchError: llama.cpp has no counterpart of it.
    """
    tokenizer = load_tokenizer(folder)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise MismatchError(
            f"expected a tokenizer with a tokenizer.json in {folder}; {type(tokenizer).__name__} "
            f'came; export with vocabulary="none" and tokenize with transformers'
        )
    return tokenizer, read_vocabulary(json.loads(tokenizer.backend_tokenizer.to_str()), size)


def read_vocabulary(rules: Mapping[str, Any], size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json, filled up to `size` tokens.

    Raises:
        MismatchError: llama.cpp has no counterpart of it.
    """
    model = rules["model"]
    if model["type"] != "BPE":
        raise MismatchError(
            f"expected a BPE tokenizer, which llama.cpp runs; {model['type']} came; export with "
            f'vocabulary="none" and tokenize with transformers, or serve the GPTQ checkpoint'
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens, types = _tokens(model, rules["added_tokens"], size)
    if model.get("byte_fallback"):
        prefix = _space_prefix(rules)
        return Vocabulary("llama", "default", tokens, types, [], _scores(tokens, merges), prefix)
    pre = _pre_tokenizer(rules)
    _require_same_words(rules, pre)
    return Vocabulary("gpt2", pre, tokens, types, merges, [], False)


def _tokens(
    model: Mapping[str, Any], added: list[dict[str, Any]], size: int
) -> tuple[list[str], list[int]]:
    """Return each id's token and its type; ids that the tokenizer lacks are marked unused."""
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    known = dict(model["vocab"])
    known |= {token["content"]: token["id"] for token in added}
    special = {token["id"]: bool(token["special"]) for token in added}
    for token, i in known.items():
        if i >= size:
            raise MismatchError(
                f"expected token ids below the model's {size}; {token!r} has {i}; save the model "
                f"with the tokenizer it was trained with"
            )
        tokens[i] = token
        kind = TokenType.NORMAL
        if i in special:
            kind = TokenType.CONTROL if special[i] else TokenType.USER_DEFINED
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            kind = TokenType.BYTE
        types[i] = int(kind)
    unknown = known.get(model.get("unk_token") or "")
    if unknown is not None and model.get("byte_fallback"):
        types[unknown] = int(TokenType.UNKNOWN)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return scores in the order of the merges, as sentencepiece trains them."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), i + 1)
    return [-float(rank.get(token, 0)) for token in tokens]


def _pre_tokenizer(rules: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for what a byte-level tokenizer does before BPE."""
    steps = rules["pre_tokenizer"] or {"type": "none"}
    steps = steps.get("pretokenizers", [steps])
    found = tuple(_step(step) for step in steps)
    normal = (rules["normalizer"] or {"type": "NFC"})["type"]
    # llama.cpp composes no characters, and nor do texts that are composed already.
    if found not in PRE_TOKENIZERS or normal != "NFC":
        raise MismatchError(
            f"expected the words of {', '.join(PRE_TOKENIZERS.values())}, which llama.cpp knows; "
            f"the tokenizer's steps are {normal}, {', '.join(found)}; export with "
            f'vocabulary="none" and tokenize with transformers'
        )
    return PRE_TOKENIZERS[found]


def _require_same_words(rules: Mapping[str, Any], pre: str) -> None:
    """Refuse a tokenizer that merges words which llama.cpp takes whole, or the other way round.

    It makes a difference only if the merges lead to another cut than the token itself.
    """
    model = rules["model"]
    whole = bool(model.get("ignore_merges"))
    if whole == (pre in WHOLE_WORDS):
        return
    from tokenizers import Tokenizer

    merging = Tokenizer.from_str(json.dumps({**rules, "model": {**model, "ignore_merges": False}}))
    added = {token["content"] for token in rules["added_tokens"]}
    for token in model["vocab"]:
        if token not in added and len(merging.model.tokenize(token)) > 1:
            raise MismatchError(
                f"expected ignore_merges: {str(not whole).lower()} in tokenizer.json, as "
                f"llama.cpp cuts the words of {pre}; with {str(whole).lower()} {token!r} is cut "
                f'otherwise; correct it, or export with vocabulary="none" and tokenize with '
                f"transformers"
            )


def _step(step: Mapping[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "gpt2 words"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
            return str(pattern)
        case _:
            return str(step["type"])


def _space_prefix(rules: Mapping[str, Any]) -> bool:
    """Return whether a sentencepiece tokenizer puts a space before a text.

    llama.cpp then always does; a Metaspace step leaves it out before a space.
    """
    normal = rules["normalizer"] or {}
    steps = [*normal.get("normalizers", [normal]), rules["pre_tokenizer"] or {}]
    kinds = {step.get("type"): step for step in steps}
    if "Metaspace" in kinds:
        return bool(kinds["Metaspace"].get("prepend_scheme") != "never")
    if "Replace" not in kinds or kinds["Replace"].get("content") != SPACE:
        raise MismatchError(
            f"expected a sentencepiece tokenizer that turns spaces into {SPACE}; its steps are "
            f'{", ".join(str(kind) for kind in kinds)}; export with vocabulary="none" and '
            f"tokenize with transformers"
        )
    return "Prepend" in kinds
