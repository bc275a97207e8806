"""Which weights of a block share an input, and what their inputs are like."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.blocks import LinearWeight
from stillroom.quantization.capture import Picked, Place, Watch
from stillroom.quantization.hessian import HessianAccumulator, Statistics
from stillroom.quantization.streaming import Activations, Stream

# Of each call of a weight, the number of the batch and of the input in it.
Calls = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Round:
    """Groups of weights, those with the same input together, that are ready at the same time."""

    groups: tuple[tuple[str, ...], ...]
    once: bool  # each is called once in a forward pass, before all later rounds

    @property
    def watched(self) -> list[str]:
        """The first weight of each group: the others see the same."""
        return [group[0] for group in self.groups]


def plan_rounds(
    stream: Stream, place: Place, weights: Mapping[str, LinearWeight]
) -> tuple[Round, ...]:
    """Return the rounds in which the weights of a block are solved, in the order of their inputs.

    Weights share an input if they are given the very same tensors, call by call. The experts of a
    mixture stand in one round, since no forward pass reaches all of them one after another.
    Weights that the first batch does not reach, such as experts that are modules, are looked for
    in those after it; those that nobody multiplies are left out.
    """
    calls: dict[str, Calls] = {}
    for b in range(len(stream.batches)):
        for name, seen in _calls(stream, place, weights, b).items():
            calls.setdefault(name, seen)
        reached = {_family(weights[name]) for name in calls}
        for name, weight in weights.items():
            if weight.expert is not None and _family(weight) in reached:
                calls.setdefault(name, ((-1, weight.expert),))  # no batch so far uses it
        if len(calls) == len(weights):
            break
    shared: dict[tuple[object, Calls], list[str]] = {}
    for name, seen in calls.items():
        shared.setdefault((_family(weights[name]), seen), []).append(name)
    rounds: dict[object, list[tuple[str, ...]]] = {}
    for (family, seen), names in shared.items():
        rounds.setdefault(seen if family is None else family, []).append(tuple(names))
    once = all(len(seen) == 1 for seen in calls.values())
    return tuple(Round(tuple(groups), once) for groups in rounds.values())


def _calls(
    stream: Stream, place: Place, weights: Mapping[str, LinearWeight], b: int
) -> dict[str, Calls]:
    """Return the calls of each weight that a batch reaches."""
    inputs: list[Tensor] = []  # kept, so that no two have the same identity
    calls: dict[str, Calls] = {}

    def see(name: str, value: Tensor, _: Picked | None) -> None:
        known = next((i for i, other in enumerate(inputs) if other is value), len(inputs))
        if known == len(inputs):
            inputs.append(value)
        calls[name] = (*calls.get(name, ()), (b, known))

    with Watch(weights, see):
        stream.run(place, b)
    return calls


class _SeenAll(Exception):
    """It ends a block's forward pass early, once all inputs were seen; the pass has no outputs."""


@dataclass(frozen=True)
class Sums:
    """What the weights that share an input saw, on the rows to solve on and on the others."""

    train: Statistics
    held_out: Statistics | None


def collect(
    stream: Stream,
    place: Place,
    weights: Mapping[str, LinearWeight],
    watched: Sequence[str],
    once: bool,
    held_out: set[int],
    full_precision: Activations | None,
) -> dict[str, Sums]:
    """Return the statistics of the watched weights' inputs; those that got no token are left out.

    `held_out` are the numbers of the batches that count apart. Padding does not count. The forward
    pass ends as soon as all inputs were seen, where each comes `once`. `full_precision` holds what
    the inputs are in the full-precision model, as `watch_inputs` kept them.
    """
    chosen = {name: weights[name] for name in watched}
    found: dict[tuple[str, bool], HessianAccumulator] = {}
    for b, rows in enumerate(stream.batches):
        waiting = set(watched)

        def add(
            name: str,
            value: Tensor,
            picked: Picked | None,
            b: int = b,
            mask: Tensor = rows.mask,
            waiting: set[str] = waiting,
        ) -> None:
            kept = f"{name}-{b}"
            other = None
            if full_precision and full_precision.has(kept) and _is_of_all(value, mask, picked):
                other = full_precision.read(kept, value.device)
            columns = value.shape[-1]
            accumulator = found.setdefault((name, b in held_out), HessianAccumulator(columns))
            accumulator.add(_real_tokens(value, mask, picked), other)
            waiting.discard(name)
            if once and not waiting:
                raise _SeenAll

        with Watch(chosen, add), suppress(_SeenAll):
            stream.run(place, b)
    sums: dict[str, Sums] = {}
    for name in watched:
        train, other = found.get((name, False)), found.get((name, True))
        statistics = None if train is None else train.statistics()
        held = None if other is None else other.statistics()
        if statistics is not None:
            sums[name] = Sums(statistics, held)
        elif held is not None:
            sums[name] = Sums(held, None)
    return sums


def watch_inputs(
    stream: Stream,
    place: Place,
    weights: Mapping[str, LinearWeight],
    watched: Sequence[str],
    kept: Activations,
) -> None:
    """Let every batch go through a block, and keep on disk what the watched weights get.

    Weights that a batch calls more than once are left out of it, as it would not be known which
    call is whose; so are those called with some of the tokens (experts), since the quantized model
    may send them others.
    """
    chosen = {name: weights[name] for name in watched if weights[name].expert is None}
    for b, rows in enumerate(stream.batches):
        called: set[str] = set()

        def keep(
            name: str,
            value: Tensor,
            picked: Picked | None,
            b: int = b,
            mask: Tensor = rows.mask,
            called: set[str] = called,
        ) -> None:
            if name in called:
                kept.drop(f"{name}-{b}")
            elif _is_of_all(value, mask, picked):
                kept.write(f"{name}-{b}", _real_tokens(value, mask, picked))
            called.add(name)

        with Watch(chosen, keep):
            output = stream.run(place, b)
        stream.hidden[place.stack].write(b, output)


def _real_tokens(value: Tensor, mask: Tensor, picked: Picked | None) -> Tensor:
    """Return the inputs of real tokens, (tokens, in); all where it is not known whose they are."""
    rows = value.flatten(0, -2)  # (tokens, in)
    real = mask.flatten().bool()
    if picked is not None and _is_choice(value, mask, picked):
        real = real[picked.index]
    elif not _is_of_all(value, mask, picked):
        return rows
    return rows if bool(real.all()) else rows[real]


def _is_of_all(value: Tensor, mask: Tensor, picked: Picked | None) -> bool:
    """Return whether inputs, (rows, length, in) or (tokens, in), are all tokens', in order."""
    if picked is not None and _is_choice(value, mask, picked):
        return False
    return value.shape[:-1] in (mask.shape, (mask.numel(),))


def _is_choice(value: Tensor, mask: Tensor, picked: Picked) -> bool:
    """Return whether inputs, (taken, in), are of the tokens that were picked last."""
    return value.dim() == 2 and picked.of == mask.numel() and len(picked.index) == len(value)


def _family(weight: LinearWeight) -> object:
    """Return what an expert's weight shares with those of the other experts; None for a layer's."""
    return None if weight.expert is None else (id(weight.module), weight.parameter)


def dead_inputs(sums: Sums) -> int:
    """Return how many inputs were zero on all rows."""
    seen = [each for each in (sums.train, sums.held_out) if each is not None]
    return int(torch.stack([each.hessian.diagonal() == 0 for each in seen]).all(0).sum())
