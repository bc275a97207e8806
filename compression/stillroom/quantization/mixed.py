"""Choose each layer's bits under a budget of bytes, by what the model's outputs lose."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from stillroom.blocks import find_stacks
from stillroom.checkpoint import Checkpoints, NoCheckpoints
from stillroom.errors import MismatchError
from stillroom.progress import Progress, silent
from stillroom.quantization.allocation import (
    Allocation,
    LayerChoice,
    MeasuredChoice,
    ModuleChoices,
    Repair,
    allocate,
    layer_options,
    repair,
)
from stillroom.quantization.capture import CalibrationRows
from stillroom.quantization.choices import Choices
from stillroom.quantization.divergence import kl_measure
from stillroom.quantization.obq import refuse_large
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.pieces import work_fingerprint
from stillroom.quantization.sensitivity import measure_costs, replaced, rounding, tied_layers

# Tokens of the one row from which it is read which layers share an input.
PROBE_TOKENS = 8
COSTS = "costs.json"


@torch.no_grad()
def choose_bits(  # noqa: PLR0913
    model: Any,
    rows: CalibrationRows,
    options: QuantizationOptions,
    offers: Sequence[LayerChoice],
    max_bytes: int,
    *,
    skip: tuple[str, ...] = (),
    tokens: int = 256,
    checkpoints: Checkpoints | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, QuantizationOptions], Repair]:
    """Return the options of every layer in the blocks, and how they were found.

    Each choice is measured as the KL divergence of the outputs with only these layers rounded;
    the knapsack takes the best sum within `max_bytes`, and swaps judged on all layers together
    mend what the sum did not foresee. Layers with the same input get the same choice. Those whose
    dotted name fits a pattern in `skip` get none, and take nothing of the budget. The whole model
    is in memory, and is as before afterwards. What was measured of each layer is kept in
    `checkpoints`; a later call with the same arguments continues behind it.

    Raises:
        MismatchError: the checkpoints were made with other options or other rows.
        RecipeError: the budget is below the smallest possible, no offer fits a layer, `skip` fits
            none or all of them, or a layer is too large for the method.
        DataError: there are no rows.
    """
    layers, stacks = Choices(options, {}, skip), find_stacks(model)
    layers.skipped(stacks)
    weights = layers.chosen(stacks)
    if options.method == "obq":
        for weight in weights.values():
            refuse_large(*weight.shape)
    probe = slice(0, PROBE_TOKENS)
    groups = tied_layers(
        model, list(weights), rows.input_ids[:1, probe], rows.attention_mask[:1, probe]
    )
    measure, quantize = kl_measure(model, rows, tokens=tokens), rounding(options)
    asked = [asdict(options), [asdict(offer) for offer in offers], tokens, list(skip)]
    kept = _KeptCosts(
        checkpoints or NoCheckpoints(),
        work_fingerprint(asked, rows.input_ids, rows.attention_mask),
    )
    known = {group: held for group in groups if (held := kept.load(group)) is not None}
    left = [group for group in groups if group not in known]
    for measured in measure_costs(weights, left, offers, measure, quantize, progress=progress):
        kept.save(measured)
        known[measured.layers] = measured
    choices = [known[group] for group in groups]
    with replaced(weights, quantize) as replace_by:

        def joint(allocation: Allocation) -> float:
            replace_by(allocation.layers)
            return measure(allocation.layers)

        found = repair(choices, allocate(choices, max_bytes), max_bytes, joint)
    return layer_options(found.allocation.layers, options), found


class _KeptCosts:
    """What the choices of tied layers cost, as one checkpoint a group."""

    def __init__(self, checkpoints: Checkpoints, fingerprint: str) -> None:
        self.checkpoints = checkpoints
        self.fingerprint = fingerprint
        self.finished = set(checkpoints.names())

    def save(self, measured: ModuleChoices) -> None:
        listing = {
            "fingerprint": self.fingerprint,
            "layers": measured.layers,
            "options": [asdict(option) for option in measured.options],
        }
        with TemporaryDirectory() as folder:
            (Path(folder) / COSTS).write_text(json.dumps(listing, sort_keys=True))
            self.checkpoints.save(_piece(measured.layers), Path(folder))

    def load(self, group: tuple[str, ...]) -> ModuleChoices | None:
        """Return what was measured of a group, or nothing.

        Raises:
            MismatchError: it was measured with other options or on other rows.
        """
        if _piece(group) not in self.finished:
            return None
        with TemporaryDirectory() as folder:
            self.checkpoints.load(_piece(group), Path(folder))
            listing = json.loads((Path(folder) / COSTS).read_text())
        if listing["fingerprint"] != self.fingerprint or listing["layers"] != list(group):
            raise MismatchError(
                f"checkpoint {_piece(group)} was made with other options or calibration rows than "
                "these; delete it, or keep checkpoints of different work apart"
            )
        options = [
            MeasuredChoice(LayerChoice(**each["choice"]), each["size_bytes"], each["cost"])
            for each in listing["options"]
        ]
        return ModuleChoices(group, tuple(options))


def _piece(group: tuple[str, ...]) -> str:
    """Return the name under which a group's costs are kept."""
    return f"costs-{group[0]}"
