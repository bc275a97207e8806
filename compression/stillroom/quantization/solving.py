"""Quantize layers that share an input, each by its method, and keep account of it."""

import logging
from collections.abc import Mapping, Sequence

import torch

from stillroom.blocks import LinearWeight
from stillroom.errors import NotFiniteError, NotPositiveDefiniteError
from stillroom.quantization.choices import Choices
from stillroom.quantization.inputs import Sums, dead_inputs
from stillroom.quantization.layer import quantize_together
from stillroom.quantization.obq import obq
from stillroom.quantization.options import Method, QuantizationOptions
from stillroom.quantization.pieces import QuantizedLayer
from stillroom.quantization.rounding import round_to_nearest
from stillroom.quantization.weight import LayerAccount, Solution

logger = logging.getLogger(__name__)


def solve_group(
    group: Sequence[str],
    weights: Mapping[str, LinearWeight],
    sums: Sums | None,
    choices: Choices,
) -> dict[str, QuantizedLayer]:
    """Return the layers of a group, which share an input; those with the same options as one.

    Where the calibration rows say nothing of the input, `sums` is None and they are rounded.

    Raises:
        NotFiniteError: a weight or an input is NaN or infinite; the message names the layer.
    """
    together: dict[tuple[QuantizationOptions, bool], list[str]] = {}
    for name in group:
        key = (choices.of(name), weights[name].bias is None)
        together.setdefault(key, []).append(name)
    solved: dict[str, QuantizedLayer] = {}
    for (options, _), names in together.items():
        _require_finite(names, weights, sums)
        chosen = {name: weights[name] for name in names}
        method, solutions = _solve(chosen, sums, options)
        dead = 0 if sums is None else dead_inputs(sums)
        for name, solution in zip(names, solutions, strict=True):
            account = _account(name, solution, method, options, dead)
            solved[name] = QuantizedLayer(solution.weight, account, solution.bias)
    return {name: solved[name] for name in group}


def write_layer(weight: LinearWeight, layer: QuantizedLayer) -> None:
    """Put a quantized layer where the model has the original, in place."""
    weight.write(layer.weight.dequantize())
    if layer.bias is not None and weight.bias is not None:
        weight.bias.copy_(layer.bias)


def _require_finite(
    names: Sequence[str], weights: Mapping[str, LinearWeight], sums: Sums | None
) -> None:
    for name in names:
        if not bool(torch.isfinite(weights[name].read()).all()):
            raise NotFiniteError(f"{name}: the weight holds a NaN or an infinity; check the model")
    seen = () if sums is None else (sums.train, sums.held_out)
    if not all(each.is_finite for each in seen if each is not None):
        raise NotFiniteError(
            f"{names[0]}: its inputs on the calibration rows hold a NaN or an infinity; "
            f"compute the model in float32 or bfloat16"
        )


def _solve(
    weights: Mapping[str, LinearWeight], sums: Sums | None, options: QuantizationOptions
) -> tuple[Method, list[Solution]]:
    """Return what was done, and its solutions; rounding where the method is not possible."""
    if options.method != "rtn" and sums is not None and _is_alive(sums):
        try:
            solutions = _compensate(weights, sums, options)
        except NotPositiveDefiniteError as error:
            logger.warning("%s is rounded to nearest: %s", ", ".join(weights), error)
        else:
            return options.method, solutions
    H = None if sums is None else sums.train.hessian
    parts = (weight.read().float() for weight in weights.values())
    return "rtn", [round_to_nearest(W, options, H) for W in parts]


def _compensate(
    weights: Mapping[str, LinearWeight], sums: Sums, options: QuantizationOptions
) -> list[Solution]:
    """Return the solutions of a method that makes good what rounding loses."""
    parts = [weight.read().float() for weight in weights.values()]
    if options.method == "obq":
        return [obq(W, sums.train.hessian, options) for W in parts]
    biases = [weight.bias.float() for weight in weights.values() if weight.bias is not None]
    bias = torch.cat(biases) if biases else None
    sizes = [len(part) for part in parts]
    return quantize_together(torch.cat(parts), sizes, bias, sums.train, sums.held_out, options)


def _is_alive(sums: Sums) -> bool:
    return bool((sums.train.hessian.diagonal() > 0).any())


def _account(
    name: str, solution: Solution, method: Method, options: QuantizationOptions, dead: int
) -> LayerAccount:
    return LayerAccount(
        name=name,
        method=method,
        fell_back=method != options.method,
        relative_error=solution.relative_error,
        damping=solution.damping,
        clipped=solution.clipped,
        weights=solution.weight.integers.numel(),
        dead_inputs=dead,
        bits=options.bits,
        group_size=solution.weight.group_size,
        held_out_error=solution.held_out_error,
        babai_bound=solution.babai_bound,
        alpha=solution.alpha,
        refined=solution.refined,
    )
