import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.adapters.virtual_tokens import in_reading_order, lay_out
from tests.stillroom.adapters.prompted import (
    padded,
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(-1, 8), st.integers(1, 3)), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
)
def test_layout_equals_rows_written_by_hand(lengths, template, side):
    template = in_reading_order(tuple(dict(template).items()))
    count = sum(each for _, each in template)
    rows = [list(range(10, 10 + length)) for length in lengths]
    if not max(lengths):
        return
    ids, mask = padded(rows, side)
    layout = lay_out(mask, template)
    written = layout.extend(ids, torch.arange(100, 100 + count).expand(len(ids), -1))
    expected = []
    for row in rows:
        words, inside = iter(range(100, 100 + count)), []
        for column in range(len(row) + 1):
            for place, each in template:
                if (min(place, len(row)) if place >= 0 else len(row)) == column:
                    inside += [next(words) for _ in range(each)]
            inside += row[column : column + 1]
        expected.append(inside)
    # Padding of a row without words may stand on either side.
    full = [row for row, length in enumerate(lengths) if length]
    assert torch.equal(written[full], padded(expected, side)[0][full])
    assert torch.equal(layout.drop(written), ids)
