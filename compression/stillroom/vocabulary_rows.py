"""Cut a model's embeddings and head down to some of their rows; see `stillroom.vocabulary`."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stillroom.errors import RecipeError

_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
_MIXED_LISTS = ("forced_decoder_ids", "sequence_bias")
# Sizes of other tables: segments, and the entities of LUKE.
_OTHER_SIZES = ("type_vocab_size", "entity_vocab_size")


def trim_model(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """Return a copy of the model with the rows `keep` of its embeddings and head, in that order.

    Tied matrices stay tied. The ids in its configurations are renumbered.

    Args:
        model: embeddings of (rows, hidden), a head of (rows, hidden) and a bias of (rows,).
        keep: ascending ids below `rows`.

    Raises:
        RecipeError: another tensor has a row per word, an id in a configuration is not kept, or
            the embeddings are not a plain matrix.
    """
    rows = _row_tensors(model, keep)
    table: Any = model.get_input_embeddings()
    size = table.weight.shape[0]
    new_ids = {old: new for new, old in enumerate(keep)}
    _check_positions(model, new_ids)
    # deepcopy takes these in place of the old ones wherever they appear: what was tied stays tied,
    # and the large matrices are not copied whole.
    trimmed: PreTrainedModel = copy.deepcopy(model, {**rows})
    for config in _configs(trimmed.config):
        _renumber(config, new_ids, size)
    if getattr(trimmed, "generation_config", None) is not None:
        _renumber(trimmed.generation_config, new_ids, size)
    new = {id(tensor) for tensor in rows.values()}
    for module in trimmed.modules():
        _tell_sizes(module, new, new_ids, size)
    return trimmed


def _row_tensors(model: Any, keep: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return, by the `id` of each tensor with a row per word, its kept rows as a new tensor."""
    if not isinstance(model, PreTrainedModel):
        raise RecipeError(
            f"expected a transformers model, {type(model).__name__} came; "
            "merge its adapter into it first"
        )
    table = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(table, nn.Parameter) or table.dim() != 2 or not table.is_floating_point():
        raise RecipeError(
            "expected embeddings with a weight of (words, hidden) floats, "
            f"{type(model.get_input_embeddings()).__name__} came; cut the model before it is packed"
        )
    size = table.shape[0]
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    owned = [table, getattr(head, "weight", None), getattr(head, "bias", None)]
    rows: dict[int, torch.Tensor] = {}
    for old in owned:
        if old is None:
            continue
        if not isinstance(old, nn.Parameter) or old.shape[0] <= keep[-1]:
            raise RecipeError(
                f"expected a row for each of the tokenizer's words up to {keep[-1]}, "
                f"{tuple(old.shape)} came; use the tokenizer the model was trained with"
            )
        kept = old.detach()[torch.tensor(keep, device=old.device)]
        rows[id(old)] = nn.Parameter(kept, requires_grad=old.requires_grad)
    for name, buffer in model.named_buffers():
        # BART's family adds it to the logits.
        if name.endswith("final_logits_bias") and buffer.shape[-1] == size:
            rows[id(buffer)] = buffer[..., torch.tensor(keep, device=buffer.device)]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in rows and tensor.is_floating_point() and size in tensor.shape:
            raise RecipeError(
                "expected a row per word in the input embeddings and the output head only, "
                f"{name} of {tuple(tensor.shape)} has {size}, too; "
                "keep this model's whole vocabulary"
            )
    return rows


def _check_positions(model: PreTrainedModel, new_ids: Mapping[int, int]) -> None:
    """Refuse to move the padding of a model that counts its positions from the padding's id."""
    table = model.get_input_embeddings()
    for name, module in model.named_modules():
        pad = getattr(module, "padding_idx", None)
        counts = isinstance(module, nn.Embedding) or "Position" in type(module).__name__
        shared = getattr(module, "weight", None) is table.weight
        if counts and not shared and pad is not None and new_ids.get(pad) != pad:
            raise RecipeError(
                f"expected positions that do not hang on the padding's id, {name} counts from "
                f"{pad}; keep all words below {pad + 1}, so that it stays {pad}"
            )


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type"):
            yield from _configs(value)


def _renumber(config: Any, new_ids: Mapping[int, int], size: int) -> None:
    """Give a configuration the new size and the new ids, in place."""
    for name, value in list(vars(config).items()):
        if name in _MIXED_LISTS and value:
            raise RecipeError(
                f"expected no {name} in the generation config, {value} came; "
                "remove it, and set it again with the new ids"
            )
        if name.endswith(("_token_id", "_token_ids")) or name in _ID_LISTS:
            setattr(config, name, _new_id(name, value, new_ids))
        elif name.endswith("vocab_size") and name not in _OTHER_SIZES and value is not None:
            if value != size:
                raise RecipeError(
                    f"expected {name} to be the {size} rows of the embeddings, {value} came; "
                    "keep this model's whole vocabulary"
                )
            setattr(config, name, len(new_ids))


def _new_id(name: str, value: Any, new_ids: Mapping[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return [_new_id(name, each, new_ids) for each in value]
    # A negative one says that there is none.
    if value is None or value < 0:
        return value
    if value not in new_ids:
        raise RecipeError(
            f"expected {name} among the kept words, {value} came; "
            "count it before words_to_keep, or set it to None in the model's configuration"
        )
    return new_ids[value]


def _tell_sizes(module: nn.Module, new: set[int], new_ids: Mapping[int, int], size: int) -> None:
    """Set the sizes and the padding that a module remembers of its matrices."""
    owns = any(id(parameter) in new for parameter in module._parameters.values())
    remembered = vars(module)
    for name in ("num_embeddings", "out_features", "vocab_size"):
        if remembered.get(name) == size and (owns or name == "vocab_size"):
            setattr(module, name, len(new_ids))
    pad = remembered.get("padding_idx")
    if pad is not None and (owns or not isinstance(module, nn.Embedding)):
        vars(module)["padding_idx"] = new_ids.get(pad)
