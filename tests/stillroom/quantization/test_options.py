import pytest

from stillroom.errors import RecipeError
from stillroom.quantization.options import QuantizationOptions, check_fits


def test_a_group_that_divides_nothing_names_layer_and_what_would_do():
    with pytest.raises(RecipeError) as caught:
        check_fits(QuantizationOptions(4, 128), 576, 576, "model.layers.0.self_attn.q_proj")
    assert str(caught.value) == (
        "group_size must divide in_features: 128 does not divide 576 "
        "(model.layers.0.self_attn.q_proj); use 64, 96, 192 or -1 for one group per row"
    )


def test_where_no_group_divides_only_a_row_is_left():
    with pytest.raises(RecipeError, match="; use -1 for one group per row"):
        check_fits(QuantizationOptions(4, 64), 64, 24, "layer")


@pytest.mark.parametrize("group_size", [0, 1, -2])
def test_a_group_that_is_none_is_refused(group_size):
    with pytest.raises(RecipeError, match="group_size"):
        check_fits(QuantizationOptions(4, group_size), 64, 64, "layer")


@pytest.mark.parametrize(
    ("bits", "out", "columns", "side"),
    [(3, 32, 48, "in_features"), (3, 48, 32, "out_features"), (4, 12, 32, "out_features")],
)
def test_rows_that_do_not_fill_words_are_refused(bits, out, columns, side):
    with pytest.raises(RecipeError, match=f"{side} must be a multiple of"):
        check_fits(QuantizationOptions(bits, -1), out, columns, "layer")


def test_what_fits_passes():
    check_fits(QuantizationOptions(3, -1), 96, 64, "layer")
    check_fits(QuantizationOptions(8, 12), 4, 12, "layer")
