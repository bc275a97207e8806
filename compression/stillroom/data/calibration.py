"""The rows that a quantizer looks at."""

import torch

from stillroom.data.examples import Examples
from stillroom.errors import DataError


def draw_calibration(examples: Examples, rows: int, seed: int) -> Examples:
    """Return `rows` rows drawn without replacement, in their order.

    Raises:
        DataError: there are fewer rows.
    """
    if rows > len(examples):
        raise DataError(
            f"{rows} rows to calibrate with expected: there are {len(examples)} training rows; "
            f"set calibration_rows to {len(examples)} or less, or give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(examples), generator=generator)[:rows]
    return examples.take(drawn.sort().values)
