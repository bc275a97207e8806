"""Call single blocks of a model as the model calls them, and see what their weights multiply."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stillroom.blocks import LinearWeight
from stillroom.errors import StageError

# Where each product has its inputs and its weight among its arguments.
PRODUCTS: dict[Any, tuple[int, int]] = {
    functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.matmul: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
}


class Stop(Exception):
    """It ends a forward pass that has come far enough."""


class CalibrationRows(Protocol):
    """Tokenised rows, (rows, length) int64 each; the mask is 1 at real tokens."""

    @property
    def input_ids(self) -> Tensor:
        """Return the token ids."""

    @property
    def attention_mask(self) -> Tensor:
        """Return the mask."""


@dataclass(frozen=True)
class Rows:
    """Calibration rows that go through the model together, (rows, length) each."""

    ids: Tensor
    mask: Tensor  # 1 at real tokens


@dataclass(frozen=True)
class Place:
    """A block: which list of blocks it is in, and its number there."""

    stack: str
    index: int


class BlockCaller:
    """Run single blocks with the arguments that the model gives them.

    While it is entered, the model's own forward pass runs everything but the blocks: those are
    passed by, and the one that is asked for gets the hidden states that are handed in, as what the
    block before it gave. So nothing needs to be known of how a model prepares masks, positions and
    the like, or of what it does between two blocks, and the other blocks need not be in memory.
    """

    def __init__(self, model: nn.Module, stacks: Mapping[str, nn.ModuleList]) -> None:
        self.model = model
        self.stacks = dict(stacks)
        self._wanted: set[Place] = set()
        self._hidden: Tensor | None = None
        self._left: Mapping[str, Tensor] = {}
        self._sides: Mapping[str, tuple[Any, ...] | None] = {}
        self._result: Any = None
        self._reached: tuple[str, Tensor] | None = None
        self._called: set[Place] = set()

    @contextmanager
    def entered(self) -> Iterator["BlockCaller"]:
        """Take the place of the blocks' forward methods."""
        blocks = [
            (Place(name, index), block)
            for name, stack in self.stacks.items()
            for index, block in enumerate(stack)
        ]
        try:
            for place, block in blocks:
                original = block.forward
                setattr(block, "forward", self._stand_in(place, original))  # noqa: B010 - mypy
            with _plain_forward(self.model):
                yield self
        finally:
            for _, block in blocks:
                block.__dict__.pop("forward", None)

    def entry(
        self,
        rows: Rows,
        left: Mapping[str, Tensor],
        sides: Mapping[str, tuple[Any, ...] | None],
    ) -> tuple[str, Tensor]:
        """Return the stack that comes next and what reaches its first block.

        The hidden states are (rows, length, hidden). `left` holds what came out of the last block
        of the stacks before it, and `sides` what their first blocks return besides hidden states.
        """
        wanted = {Place(name, 0) for name in self.stacks if name not in left}
        self._run(wanted, None, rows, left, sides)
        assert self._reached is not None
        return self._reached

    def call(
        self,
        place: Place,
        hidden: Tensor,
        rows: Rows,
        left: Mapping[str, Tensor],
        sides: Mapping[str, tuple[Any, ...] | None],
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        """Return the block's hidden states, (rows, length, hidden), and what else it returns.

        Nothing else, None, means that it returns no tuple.

        Args:
            hidden: what comes out of the block before; what reaches the block, if it is the first.
        """
        self._run({place}, hidden, rows, left, sides)
        result = self._result
        return (result[0], result[1:]) if isinstance(result, tuple) else (result, None)

    def finish(
        self,
        rows: Rows,
        left: Mapping[str, Tensor],
        sides: Mapping[str, tuple[Any, ...] | None],
    ) -> Tensor:
        """Return the model's logits, given what came out of the last block of each stack."""
        return self._run(set(), None, rows, left, sides).logits  # type: ignore[no-any-return]

    def _run(
        self,
        wanted: set[Place],
        hidden: Tensor | None,
        rows: Rows,
        left: Mapping[str, Tensor],
        sides: Mapping[str, tuple[Any, ...] | None],
    ) -> Any:
        self._wanted, self._hidden, self._left, self._sides = wanted, hidden, left, sides
        self._called = set()
        inputs = {"input_ids": rows.ids, "attention_mask": rows.mask}
        if getattr(self.model.config, "is_encoder_decoder", False):
            inputs |= {"decoder_input_ids": rows.ids, "decoder_attention_mask": rows.mask}
        try:
            output = self.model(**inputs)
        except Stop:
            return None
        finally:
            self._hidden = None
        if wanted:
            missed = " or ".join(f"{place.stack}.{place.index}" for place in wanted)
            raise StageError(f"the model returned without calling its block {missed}")
        return output

    def _stand_in(self, place: Place, original: Callable[..., Any]) -> Callable[..., Any]:
        last = len(self.stacks[place.stack]) - 1
        after = Place(place.stack, place.index + 1)

        def forward(*args: Any, **kwargs: Any) -> Any:
            came = args[0] if args else kwargs["hidden_states"]
            self._note_call(place)
            if place in self._wanted:
                if self._hidden is None:
                    self._reached = (place.stack, came)
                    raise Stop
                rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                given = came if place.index else self._hidden
                self._result = original(given, *args[1:], **rest)
                raise Stop
            leaves = place.index == last and place.stack in self._left
            passed = self._left[place.stack] if leaves else came
            if after in self._wanted and self._hidden is not None:
                passed = self._hidden
            side = self._sides.get(place.stack)
            return passed if side is None else (passed, *side)

        return forward

    def _note_call(self, place: Place) -> None:
        if place in self._called:
            raise StageError(
                f"{place.stack}.{place.index} is called more than once in a forward pass, as in "
                "models whose layers share their weights (ALBERT), and blocks are quantized one "
                "after another; use a model whose layers have weights of their own"
            )
        self._called.add(place)


@dataclass(frozen=True)
class Picked:
    """Which rows of a matrix were taken last: a mixture takes an expert's tokens so."""

    of: int  # rows of the matrix
    index: Tensor  # (taken,)


class Watch(TorchFunctionMode):
    """While it is entered, call see(name, inputs, picked) when one of the weights is multiplied.

    It sees the product itself, so that it makes no difference whether a module or a slice of a
    mixture's fused parameter holds the weight. `picked` are the rows that were taken last of any
    matrix and are not put back yet; None where there are none.
    """

    def __init__(
        self,
        weights: Mapping[str, LinearWeight],
        see: Callable[[str, Tensor, Picked | None], None],
    ) -> None:
        super().__init__()
        self.picked: Picked | None = None
        self.names: dict[int, list[str]] = {}
        for name, weight in weights.items():
            self.names.setdefault(weight.multiplied.data_ptr(), []).append(name)
        self.see = see

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Look at the product or at what is taken, then compute it."""
        if func is Tensor.__getitem__:
            self.picked = _picked(*args) or self.picked
        elif func is Tensor.index_add_:
            self.picked = None  # an expert's outputs go back to their tokens
        places = PRODUCTS.get(func)
        if places is not None and len(args) > max(places):
            weight = args[places[1]]
            if isinstance(weight, Tensor) and weight.dim() == 2:
                for name in self.names.get(weight.data_ptr(), ()):
                    self.see(name, args[places[0]], self.picked)
        return func(*args, **(kwargs or {}))


def _picked(matrix: Tensor, index: Any) -> Picked | None:
    """Return which rows of `matrix` an index takes; None where it is no list of rows."""
    if isinstance(index, tuple) and len(index) == 2 and index[0] is None:
        index = index[1]
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype != torch.int64:
        return None
    return Picked(len(matrix), index) if matrix.dim() == 2 else None


@contextmanager
def _plain_forward(model: nn.Module) -> Iterator[None]:
    """Fill no key-value cache, which nobody reads, and call experts one by one, to be seen."""
    config: Any = model.config
    wanted = {"use_cache": False, "_experts_implementation": "eager"}
    before = {name: getattr(config, name) for name in wanted if hasattr(config, name)}
    for name in before:
        setattr(config, name, wanted[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
