from dataclasses import replace

import pytest
import torch

from stillroom.distillation.width_axes import Axis
from stillroom.distillation.width_probe import find_axes
from stillroom.distillation.width_proof import empty, filled, holds, random_state, run
from stillroom.distillation.width_sizes import read_sizes
from tests.stillroom.tiny_widths import tiny_of


def mistakes(axis):
    """Other things that a dimension of the same size could be."""
    size = sum(axis.parts)
    if axis.kind == "groups":
        yield replace(axis, parts=(1,) * size)
        if size == 8:  # the heads of these models have 8 channels, and there are 4 for 32
            yield Axis("channels", (1,), summed=axis.summed)
    yield replace(axis, summed=not axis.summed)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "phi3", "gpt_neox"])
@torch.no_grad()
def test_one_wrong_dimension_is_found(kind):
    model = tiny_of(kind)
    axes, sizes = find_axes(model), read_sizes(model.config)
    small = filled(type(model), model.config, random_state(empty(type(model), model.config)))
    ids = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = run(small, ids)
    assert holds(small, axes, sizes, ids, expected)
    tried = 0
    for name, each in axes.items():
        # A number added to all of a query's products is nothing to the softmax.
        if ".0." not in name or name.endswith("key.bias"):
            continue
        for dim, axis in enumerate(each):
            for mistake in mistakes(axis) if axis is not None else ():
                if sizes.groups != 4 and mistake.kind != axis.kind:
                    continue
                wrong = axes | {name: (*each[:dim], mistake, *each[dim + 1 :])}
                assert not holds(small, wrong, sizes, ids, expected), (name, dim, mistake)
                tried += 1
    assert tried > 10
