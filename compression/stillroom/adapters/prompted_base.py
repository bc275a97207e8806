"""What prompts have to know of a base, and what they cannot be combined with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.adapters.virtual_tokens import Template
from stillroom.errors import RecipeError

EXTENDED = {"input_ids", "attention_mask", "token_type_ids"}
REFUSED = ("position_ids", "inputs_embeds", "encoder_outputs")


@dataclass(frozen=True)
class PromptedBase:
    """Facts of a base.

    `placeholder` is the id that stands for virtual tokens, `limit` the most tokens of a row, None
    where there is no limit. `has_decoder`: it is an encoder with a decoder, and the encoder reads
    the prompt. `continues`: it is a decoder that continues text.
    """

    placeholder: int
    limit: int | None
    has_decoder: bool
    continues: bool

    def require_readable(self, template: Template) -> None:
        """Refuse virtual tokens that nothing would read.

        Raises:
            RecipeError: they stand at the end of rows that a decoder continues.
        """
        if self.continues and any(place == -1 for place, _ in template):
            raise RecipeError(
                "p_tuning.template: expected places from 0 on for a model that continues text, as "
                "no token of a row reads what stands after it; -1 came; it is for classifiers, "
                "encoders and encoder-decoders"
            )

    def require_text_behind(self, template: Template, shortest: int) -> None:
        """Refuse texts to continue, `shortest` tokens and more, that end in virtual tokens.

        None of these has learned what comes after it: in training that is asked of text alone.

        Raises:
            RecipeError: a place of the template is not inside all of them.
        """
        last = max(place for place, _ in template)
        if self.continues and 0 < last >= shortest:
            raise RecipeError(
                f"p_tuning: expected texts of at least {last + 1} tokens to continue, as virtual "
                f"tokens stand before token {last} of each, counted from 0; one of {shortest} "
                "came; lengthen it, or train with places nearer to the start"
            )

    def require_room(self, length: int, count: int) -> None:
        """Refuse rows that the base cannot hold with their virtual tokens.

        Raises:
            RecipeError: they are too long.
        """
        if self.limit is not None and length + count > self.limit:
            raise RecipeError(
                f"expected rows of at most {self.limit - count} tokens, as the base reads "
                f"{self.limit} and {count} are virtual; rows of {length} came; shorten them, or "
                "take fewer virtual tokens"
            )


def look_at(base: Any) -> PromptedBase:
    """Return the facts of `base`."""
    config = base.config
    has_decoder = bool(getattr(config, "is_encoder_decoder", False))
    ends = getattr(config, "eos_token_id", None)
    read = {getattr(config, "pad_token_id", None), *(ends if isinstance(ends, list) else [ends])}
    first = getattr(config, "bos_token_id", None)
    # Classifiers look for padding and ends among the ids, and positions are counted by padding.
    read |= {getattr(module, "padding_idx", None) for module in base.modules()}
    words = ([] if first is None else [first]) + list(range(len(read) + 1))
    return PromptedBase(
        placeholder=next(word for word in words if word not in read),
        limit=row_limit(base),
        has_decoder=has_decoder,
        # A masked language model has a word head, too.
        continues=base.get_output_embeddings() is not None
        and base.can_generate()
        and not has_decoder,
    )


def embedding_of_text(base: Any) -> nn.Module:
    """Return the layer that looks up the text's embeddings, an encoder's where there is one."""
    if getattr(base.config, "is_encoder_decoder", False):
        # Its weight is tied to the model's own, which is not called.
        return base.get_encoder().get_input_embeddings()  # type: ignore[no-any-return]
    return base.get_input_embeddings()  # type: ignore[no-any-return]


def continues_a_cache(inputs: dict[str, Any], has_decoder: bool) -> bool:
    """Return whether a call goes on where an earlier one, which read the prompt, ended.

    Raises:
        RecipeError: it has a mask of the text, which does not fit what the cache holds.
    """
    cache = inputs.get("past_key_values")
    if cache is None or not cache.get_seq_length():
        return False
    if has_decoder and inputs.get("encoder_outputs") is None:
        return False
    if inputs.get("attention_mask") is not None:
        raise RecipeError(
            "prompts: expected no attention_mask beside a cache that holds text, whose virtual "
            "tokens it would have to count; leave it out for rows without padding, or use generate"
        )
    return True


def require_plain(inputs: dict[str, Any], has_decoder: bool) -> None:
    """Refuse what virtual tokens cannot be put into.

    Raises:
        RecipeError: there are no input_ids, or inputs that are not known beside them.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor):
        raise RecipeError("prompts: expected input_ids, and none came; pass token ids")
    if mask is not None and mask.shape != ids.shape:
        raise RecipeError(
            f"prompts: expected an attention_mask like input_ids, {tuple(ids.shape)}; "
            f"{tuple(mask.shape)} came; pass 1 for each token and 0 for padding"
        )
    odd = {name for name in REFUSED if inputs.get(name) is not None}
    for name, value in inputs.items():
        of_decoder = has_decoder and (name.startswith("decoder_") or name == "labels")
        per_token = isinstance(value, Tensor) and value.shape[:2] == ids.shape
        if per_token and name not in EXTENDED and not of_decoder:
            odd.add(name)
    if odd:
        raise RecipeError(
            "prompts: expected input_ids, attention_mask and token_type_ids alone to have a value "
            f"for each token; {', '.join(sorted(odd))} came; leave it out, and compute a loss from "
            "the logits, which align with the text"
        )


def require_own_decoder_ids(base: Any, inputs: dict[str, Any]) -> None:
    """Refuse a call in which the decoder would read the encoder's ids, virtual tokens and all.

    Raises:
        RecipeError: there is nothing for the decoder.
    """
    has_labels = base.get_output_embeddings() is not None and inputs.get("labels") is not None
    own = (inputs.get(f"decoder_{name}") is not None for name in ("input_ids", "inputs_embeds"))
    if not has_labels and not any(own):
        raise RecipeError(
            "prompts: expected decoder_input_ids, and none came: the decoder would read the "
            "encoder's ids with their virtual tokens; pass them"
        )


def real_tokens(base: Any, ids: Tensor) -> Tensor:
    """Return the mask (batch, length) that `generate` takes where none is given."""
    pad, ends = base.generation_config.pad_token_id, base.generation_config.eos_token_id
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]):
        return torch.ones_like(ids)
    return torch.where(ids == pad, 0, 1)


def chosen(base: Any, options: dict[str, Any], name: str) -> Any:
    """Return what `generate` takes for `name`: an option, or what a passed or own config says."""
    # What a config that is passed leaves open, transformers takes from the base's own.
    configs = (options.get("generation_config"), base.generation_config)
    said = [options.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in said if value), None)


def lengthened(base: Any, options: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the options of `generate`, where lengths that count the prompt count more."""
    longer = dict(options)
    for kind in ("max", "min"):
        length = chosen(base, options, f"{kind}_length")
        if length and not chosen(base, options, f"{kind}_new_tokens"):
            longer[f"{kind}_length"] = length + count
    return longer


def row_limit(base: Any) -> int | None:
    """Return the most tokens of a row of `base`, None where there is no limit."""
    limit = getattr(base.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    words = base.get_input_embeddings().weight
    for module in base.modules():
        if isinstance(module, nn.Embedding) and module.weight is not words:
            pad = module.padding_idx
            if pad is not None and module.num_embeddings == limit:
                return limit - pad - 1  # positions that begin behind the padding's id
    return limit
