"""Learned embeddings among the text's: prompt tuning (2104.08691) and P-tuning (2103.10385)."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.adapters.options import PromptOptions, PTuningOptions
from stillroom.adapters.part import Part
from stillroom.adapters.prompt_encoder import PromptEncoder
from stillroom.adapters.prompted_base import (
    continues_a_cache,
    embedding_of_text,
    lengthened,
    look_at,
    real_tokens,
    require_own_decoder_ids,
    require_plain,
)
from stillroom.adapters.routing import Rows
from stillroom.adapters.virtual_tokens import Layout, Template, in_reading_order, lay_out
from stillroom.errors import RecipeError, SourceError
from stillroom.training.options import derived_seed

PER_TOKEN = {"last_hidden_state": 3, "start_logits": 2, "end_logits": 2}
"""Outputs with a value for each token, beside logits, and how many dimensions they have."""


@dataclass
class Pass:
    """A forward pass under way: its extended ids (batch, extended) and their layout."""

    ids: Tensor
    layout: Layout
    logits_to_keep: int | Tensor = 0
    is_replaced: bool = False


class PromptAdapter(Part):
    """Virtual tokens that the base reads as text, and that its outputs do not show.

    The base is given a real word's id at their places, so that whatever it reads off the ids keeps
    working, and the learned embeddings (count, hidden) in place of that word's. Labels align with
    the outputs as they do without a prompt. In a decoder a token is predicted from the text before
    it, not from virtual tokens right before it.
    """

    alone = True

    def __init__(self, base: Any, options: PromptOptions | PTuningOptions, seed: int) -> None:
        super().__init__()
        self.facts = look_at(base)
        table = embedding_of_text(base)
        self.encoder: PromptEncoder | None = None
        self.embeddings: nn.Parameter | None
        if isinstance(options, PromptOptions):
            self.template: Template = ((0, options.num_virtual_tokens),)
            self.embeddings = nn.Parameter(_embeddings_of_words(base, table, options, seed))
        else:
            self.template = in_reading_order(options.template)
            self.facts.require_readable(self.template)
            some = _look_up(table, [0])
            encoder = PromptEncoder(some.shape[1], self.count, options, seed)
            self.encoder = encoder.to(some.device)
            self.register_parameter("embeddings", None)
        self._pass: Pass | None = None
        self._is_generating = False
        self._made: tuple[list[tuple[int, int]], Tensor] | None = None
        self.hook_before(base, self._extend, with_kwargs=True)
        self.hook(table, self._replace, with_kwargs=True)
        self.hook(base, self._drop)

    @property
    def count(self) -> int:
        """How many virtual tokens there are."""
        return sum(count for _, count in self.template)

    def prompt(self) -> Tensor:
        """Return the embeddings (count, hidden), made once where they are not trained."""
        if self.encoder is None:
            assert self.embeddings is not None
            return self.embeddings
        if self.training or torch.is_grad_enabled():
            made: Tensor = self.encoder()
            return made
        versions = [(each._version, each.data_ptr()) for each in self.encoder.parameters()]
        if self._made is None or self._made[0] != versions:
            self._made = versions, self.encoder()
        return self._made[1]

    def train(self, mode: bool = True) -> "PromptAdapter":
        """Set the mode; what the encoder made before is forgotten."""
        # A fused optimizer changes parameters without counting their versions up.
        self._made = None
        super().train(mode)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the embeddings alone: what made them is needed no more."""
        with torch.no_grad():
            made = self.prompt() if self.encoder is None else self.encoder()
            return {"embeddings": made.detach()}

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Take embeddings that were saved; they are trained directly from then on.

        Raises:
            SourceError: they are of other names or shapes.
        """
        if self.encoder is None:
            super().take(tensors)
            return
        own = self.prompt().detach().clone()
        encoder, self.encoder, self.embeddings = self.encoder, None, nn.Parameter(own)
        try:
            super().take(tensors)
        except SourceError:
            self.encoder, self.embeddings = encoder, None
            raise

    def generate(self, base: Any, input_ids: Tensor, **options: Any) -> Any:
        """Return what the base's `generate` returns for `input_ids` (batch, length), prompted.

        Raises:
            RecipeError: the rows are too long, or too short for the template, or an option cannot
                be combined with prompts.
        """
        if options.get("attention_mask") is None:
            options["attention_mask"] = real_tokens(base, input_ids)
        shortest = int(options["attention_mask"].sum(-1).min())
        self.facts.require_text_behind(self.template, shortest)
        inputs = self._extended({"input_ids": input_ids, **options})
        if not self.facts.has_decoder:
            inputs = lengthened(base, inputs, self.count)
        self._is_generating = True
        try:
            output = base.generate(**inputs)
            assert self._pass is not None
            _require_replaced(self._pass)
            current = self._pass
        finally:
            self._is_generating, self._pass = False, None
        if self.facts.has_decoder:
            return output
        if isinstance(output, Tensor):
            return _without(output, current)
        output["sequences"] = _without(output["sequences"], current)
        return output

    def wear(self, rows: Rows) -> None:
        """Have all rows go through it, or none."""
        super().wear(rows)
        self._pass = None

    def _extend(self, base: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self.rows is False or self._is_generating:
            return None
        self._pass = None
        inputs = dict(zip(inspect.signature(base.forward).parameters, args, strict=False)) | options
        if continues_a_cache(inputs, self.facts.has_decoder):
            return None
        if self.facts.has_decoder:
            require_own_decoder_ids(base, inputs)
            return (), self._extended(inputs)
        keep = inputs.pop("logits_to_keep", None)
        extended = self._extended(inputs)
        if keep is not None and self._pass is not None:
            if isinstance(keep, int) and keep:
                keep = min(keep, self._pass.layout.kept.shape[1])
                extended["logits_to_keep"] = keep + self.count
            self._pass.logits_to_keep = keep
        return (), extended

    def _extended(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs with the virtual tokens in them, and begin a pass."""
        require_plain(inputs, self.facts.has_decoder)
        ids: Tensor = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        self.facts.require_room(ids.shape[1], self.count)
        layout = lay_out(torch.ones_like(ids) if mask is None else mask, self.template)
        extended = dict(inputs, input_ids=layout.extend(ids, self.facts.placeholder))
        if mask is not None:
            extended["attention_mask"] = layout.extend(mask, 1)
        types = inputs.get("token_type_ids")
        if types is not None:
            extended["token_type_ids"] = layout.extend(types, layout.beside(types))
        self._pass = Pass(extended["input_ids"], layout)
        return extended

    def _replace(
        self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        current = self._pass
        # A decoder that looks its tokens up in the same table comes second.
        if current is None or (current.is_replaced and self.facts.has_decoder):
            return None
        ids = next(iter((*args, *options.values())))
        rows, width = current.ids.shape
        # A step from the cache is shorter; beams are more rows.
        if ids.dim() != 2 or ids.shape[1] < width or len(ids) % rows:
            return None
        if not torch.equal(ids[:, :width], current.ids.repeat_interleave(len(ids) // rows, 0)):
            return None
        current.is_replaced = True
        return current.layout.repeated(len(ids)).replace(output, self.prompt())

    def _drop(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if self._pass is None or self._is_generating:
            return None
        current, self._pass = self._pass, None
        _require_replaced(current)
        if self.facts.has_decoder:
            return None
        if not isinstance(output, dict):
            raise RecipeError("prompts: expected a named output; leave return_dict out")
        if output.get("logits") is not None:
            output["logits"] = _text_logits(output["logits"], current)
        for name, dimensions in PER_TOKEN.items():
            if output.get(name) is not None and output[name].dim() == dimensions:
                output[name] = current.layout.drop(output[name])
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(
                current.layout.drop(each) if each.shape[1] == current.ids.shape[1] else each
                for each in output["hidden_states"]
            )
        return output


def _text_logits(logits: Tensor, current: Pass) -> Tensor:
    """Return the logits of the text's tokens, or those (batch, labels) of a row as they are."""
    if logits.dim() != 3:
        return logits
    keep = current.logits_to_keep
    if isinstance(keep, Tensor):
        return current.layout.drop(logits)[:, keep]
    return (current.layout.last(keep) if keep else current.layout).drop(logits)


def _without(sequences: Tensor, current: Pass) -> Tensor:
    """Return sequences (rows, extended + new) without their virtual tokens."""
    text = current.layout.repeated(len(sequences)).drop(sequences)
    return torch.cat([text, sequences[:, current.ids.shape[1] :]], 1)


def _require_replaced(current: Pass) -> None:
    if not current.is_replaced:
        raise RecipeError(
            "prompts: expected a base that looks up the embeddings of a whole row at once; it did "
            f"not for rows of {tuple(current.ids.shape)}; choose another method"
        )


def _embeddings_of_words(base: Any, table: nn.Module, options: PromptOptions, seed: int) -> Tensor:
    """Return the embeddings (count, hidden) that a prompt starts from, in float32."""
    words = base.get_input_embeddings().weight.shape[0]
    if options.init_token_ids is None:
        generator = torch.Generator().manual_seed(derived_seed(seed, "prompt_tuning"))
        drawn = torch.randint(words, (options.num_virtual_tokens,), generator=generator)
        return _look_up(table, drawn.tolist())
    odd = [token for token in options.init_token_ids if not 0 <= token < words]
    if odd or not options.init_token_ids:
        raise RecipeError(
            f"prompt_tuning.init_token_ids: expected ids from 0 to {words - 1}, at least one; "
            f"{odd or 'none'} came"
        )
    times = -(-options.num_virtual_tokens // len(options.init_token_ids))
    return _look_up(table, (options.init_token_ids * times)[: options.num_virtual_tokens])


@torch.no_grad()
def _look_up(table: nn.Module, ids: Sequence[int]) -> Tensor:
    weight: Any = table.weight
    embeddings: Tensor = table(torch.tensor(list(ids), device=weight.device)[None])[0]
    return embeddings.float().clone()
