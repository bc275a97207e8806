"""Processes that train one model together, each on its share of a step's batches.

They are those of `torch.distributed`, started by torchrun, `accelerate launch` or the pipeline. How
many there are changes nothing of what a step does: its `gradient_accumulation` batches are dealt
out, and the gradients add up to those of one process.
"""

import atexit
import copy
import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, distributed, nn

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Team:
    """This process among those that train: `rank` of `size`.

    `forward` is called on a batch; `module` holds the parameters that are trained, under the
    model's own names.
    """

    rank: int
    size: int
    forward: nn.Module
    module: nn.Module

    def collecting(self, *, last: bool) -> AbstractContextManager[None]:
        """Add gradients up over the processes in the `last` backward pass of a step alone."""
        if self.size == 1:
            return nullcontext()
        if isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return nullcontext() if last else self.forward.no_sync()
        cast(Any, self.module).set_requires_gradient_sync(last)
        return nullcontext()

    def sum(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the sums of the named figures over the processes; all give the same names."""
        return self._exchanged(figures, distributed.all_reduce)

    def first(self, figures: dict[str, float]) -> dict[str, float]:
        """Return what the first process gave, so that all decide alike."""
        return self._exchanged(figures, lambda values: distributed.broadcast(values, 0))

    def _exchanged(self, figures: dict[str, float], exchange: Any) -> dict[str, float]:
        if self.size == 1 or not figures:
            return figures
        device = next(self.module.parameters()).device
        ordered = [figures[name] for name in sorted(figures)]
        values = torch.tensor(ordered, device=device, dtype=torch.float64)
        exchange(values)
        return dict(zip(sorted(figures), values.tolist(), strict=True))


@contextmanager
def joined(model: nn.Module, parallel: Parallel) -> Iterator[Team]:
    """Join the other processes, where there are any, for the length of a training.

    With "ddp" each process holds the whole model; with "fsdp" a share of its parameters, their
    gradients and the optimizer's moments, and the model itself is empty until the training ends,
    when every process gets all of it back. Each process gives the same model.
    """
    device = next(model.parameters()).device
    size = _size(device)
    if size == 1:
        yield Team(0, 1, model, model)
    elif parallel == "ddp":
        # Some models have parameters that no task of ours uses, such as BERT's pooler. Buffers are
        # constants, and the integers of a quantized base.
        forward = nn.parallel.DistributedDataParallel(
            model, find_unused_parameters=True, broadcast_buffers=False
        )
        yield Team(distributed.get_rank(), size, forward, model)
    else:
        with _shared_out(model, device, size) as shares:
            yield Team(distributed.get_rank(), size, shares, shares)


def gathered(value: Tensor) -> Tensor:
    """Return a tensor of this process's own: the whole of one that processes share."""
    from torch.distributed.tensor import DTensor

    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().clone()


def of_first(value: Tensor) -> Tensor:
    """Return what the first process gives; the others give a tensor of its shape to write to."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(value, 0)
    return value


def like_shares(value: Tensor, shares: Tensor) -> Tensor:
    """Return a whole tensor on the device, and shared out in the way, of `shares`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    moved = value.to(shares.device)
    if isinstance(shares, DTensor):
        return distribute_tensor(moved, shares.device_mesh, shares.placements)
    return moved


def _size(device: torch.device) -> int:
    """Return how many processes there are, once this one, which computes on `device`, met them."""
    if not distributed.is_available():
        return 1
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 1
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return distributed.get_world_size()


def _leave() -> None:
    # What still refers to the group would keep its threads, which must not outlive Python.
    gc.collect()
    distributed.destroy_process_group()


@contextmanager
def _shared_out(model: nn.Module, device: torch.device, size: int) -> Iterator[nn.Module]:
    """Yield a twin whose parameters are shared out; the model's own are empty meanwhile."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    from stillroom.blocks import find_stacks

    # The twin takes the tensors themselves: the model is in memory once.
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(value): value for value in tensors})
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (size,))
    for stack in find_stacks(twin).values():
        for block in stack:
            fully_shard(block, mesh=mesh)
    fully_shard(twin, mesh=mesh)
    for value in model.parameters():
        value.data = value.data.new_empty(0)
    try:
        yield twin
    finally:
        # A forward pass without a backward one leaves the root gathered: a copy, older than the
        # shares where these were set since.
        for module in twin.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        shares = dict(twin.named_parameters())
        for name, value in model.named_parameters():
            value.data = gathered(shares[name])
