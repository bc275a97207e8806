"""The widths that a model's config names, whatever the names are."""

import copy
from dataclasses import dataclass

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from stillroom.errors import RecipeError

INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff", "ffn_hidden_size")
# Further names of hidden_size, of OPT and DeBERTa.
AS_HIDDEN = ("word_embed_proj_dim", "pooler_hidden_size")
FIELD = "distillation.student"


@dataclass(frozen=True)
class Sizes:
    """How wide a model is.

    hidden: channels of the residual stream. intermediate: neurons of a feed-forward layer. heads:
    query heads of a layer, in `groups` groups that share a key-value head. head_dim: channels of a
    head. free: the config names head_dim; otherwise it is hidden / heads.
    """

    hidden: int
    intermediate: int
    heads: int
    groups: int
    head_dim: int
    free: bool

    @property
    def ratio(self) -> int:
        """The number of query heads of a group."""
        return self.heads // self.groups


def read_sizes(config: PreTrainedConfig) -> Sizes:
    """Return the widths a config names.

    Raises:
        RecipeError: it lacks one, or does not have one number for all layers.
    """
    hidden = _number(config, "hidden_size")
    heads = _number(config, "num_attention_heads")
    name = _intermediate_name(config)
    # GPT-2's default
    intermediate = 4 * hidden if getattr(config, name) is None else _number(config, name)
    groups = heads
    if getattr(config, "num_key_value_heads", None) is not None:
        groups = _number(config, "num_key_value_heads")
    # Some configs compute it, and have no such field.
    free = config.to_dict().get("head_dim") is not None
    head_dim = _number(config, "head_dim") if free else hidden // heads
    if heads % groups or (not free and hidden % heads):
        raise RecipeError(
            f"{FIELD}: heads expected that divide the channels, in groups of one size; this "
            f"teacher has {hidden} channels, {heads} heads and {groups} key-value heads; take "
            "another teacher"
        )
    return Sizes(hidden, intermediate, heads, groups, head_dim, free)


def resized(config: PreTrainedConfig, sizes: Sizes) -> PreTrainedConfig:
    """Return a copy of a config that names these widths.

    Raises:
        RecipeError: configs of this kind do not allow them together.
    """
    new = copy.deepcopy(config)
    as_hidden = [n for n in AS_HIDDEN if getattr(config, n, None) == config.hidden_size]
    try:
        for name in as_hidden:
            setattr(new, name, sizes.hidden)
        # The setter maps the first two names to the config's own, such as GPT-2's n_embd.
        new.hidden_size = sizes.hidden
        new.num_attention_heads = sizes.heads
        setattr(new, _intermediate_name(config), sizes.intermediate)
        if getattr(config, "num_key_value_heads", None) is not None:
            new.num_key_value_heads = sizes.groups
        if sizes.free:
            new.head_dim = sizes.head_dim
        type(new).from_dict(new.to_dict())  # what loading it will check
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{FIELD}: {type(config).__name__} allows no model with {sizes.hidden} channels, "
            f"{sizes.intermediate} neurons and {sizes.heads} heads: {' '.join(str(error).split())}"
        ) from error
    return new


def _intermediate_name(config: PreTrainedConfig) -> str:
    # A config keeps whatever it is given: what its class declares is what the model reads.
    for place in (type(config), config):
        for name in INTERMEDIATE:
            if hasattr(place, name):
                return name
    raise RecipeError(
        f"{FIELD}: a config expected that names the width of its feed-forward layers as one of "
        f"{', '.join(INTERMEDIATE)}; {type(config).__name__} has none of them; take another teacher"
    )


def _number(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise RecipeError(
            f"{FIELD}: one number for all layers expected as the teacher's {name}, got {value} in "
            f"its {type(config).__name__}; take a teacher whose layers are all as wide"
        )
    return value
