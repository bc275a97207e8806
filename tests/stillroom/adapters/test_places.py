"""Where adapters find their places, be a base dense or packed."""

import pytest

from stillroom.adapters.places import adaptable_blocks
from tests.stillroom.adapters.zoo import KINDS, build


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_base_and_its_dense_form_have_the_same_blocks(kind):
    assert adaptable_blocks(build(kind, 4))[0] == adaptable_blocks(build(kind))[0]


def test_blocks_that_are_packed_beside_larger_dense_ones_are_not_chosen():
    dense, half = build("t5"), build("t5")
    half.encoder = build("t5", 4).encoder
    assert adaptable_blocks(half)[0] == adaptable_blocks(dense)[0] == "decoder.block"
