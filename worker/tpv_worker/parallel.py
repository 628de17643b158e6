"""Several processes that train together, each with a copy of the frozen model on a device of its own.

Every process runs the same loop on the same batches and computes its share of each. What travels are the gradients of
the few trained parameters, the losses at the logging points, and predictions; parameters and decisions made from them
are the same everywhere, because every process adds up the same numbers. A process that is alone skips all of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from tpv.errors import TpvError
from tpv_worker import memory
from tpv_worker.data import Example

PATIENCE = timedelta(days=1)  #: to wait for another process; the service ends an attempt that is silent for too long


class Separated(TpvError):
    """What another process was to send has not come, most likely because it has ended."""


class Place(NamedTuple):
    """Where a process stands among those of one attempt."""

    rank: int = 0
    size: int = 1
    meeting: str = ""  #: path of a file, not there yet, by which they find each other


ALONE = Place()


@contextmanager
def together(place: Place, device: str) -> Iterator[None]:
    """Within it the processes of an attempt train together; raises Separated when they do not meet."""
    if place.size == 1:
        yield
        return
    for backend in ("GLOO", "NCCL"):  # all of them are on this machine: nobody else needs to reach them
        os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with _others():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
            init_method=f"file://{place.meeting}",
            rank=place.rank,
            world_size=place.size,
            timeout=PATIENCE,
        )
    summed(torch.zeros(1, device=device))  # NCCL takes its memory now, not when training has taken the rest
    yield
    gathered(None)  # nobody leaves while another one still adds up
    distributed.destroy_process_group()  # not after an error: this process ends, and the others with it


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the backends raise nothing narrower
        if memory.has_run_out(error) or isinstance(error, torch.AcceleratorError):
            raise
        raise Separated(f"the processes of this attempt have lost each other: {error}") from error


def rank_and_size() -> tuple[int, int]:
    """This process's place among those that train together now, and their number."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def shares(batch: Sequence[Example], accumulation: int) -> list[tuple[Sequence[Example], float]]:
    """The parts of a batch that this process computes, each with its share of the batch's target tokens.

    Weighted by these shares, the parts' mean losses sum up to that of the whole batch, over all processes. A process
    for which no row is left has one of weight 0, so that it makes the same kind of gradients as the others.
    """
    rank, size = rank_and_size()
    parts = [batch[i :: accumulation * size] for i in range(rank, accumulation * size, size)]
    tokens = sum(len(example.target) for example in batch)
    mine = [(part, sum(len(example.target) for example in part) / tokens) for part in parts if part]
    return mine or [(batch[:1], 0.0)]


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Adds up the parameters' gradients over all processes; one that no process has stays None."""
    if rank_and_size()[1] > 1:
        # A part of the model may be for some rows only, as the experts of a sparse one are.
        having = summed(torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32))
        for parameter, count in zip(parameters, having.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            sums = summed(torch.cat([gradient.flatten() for gradient in gradients]))
            parts = torch.split(sums, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if rank_and_size()[1] > 1:
        with _others():
            distributed.all_reduce(values)
    return values


def gathered(value: Any) -> list[Any]:
    """What each process has, in their order."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    values = [None] * size
    with _others():
        distributed.all_gather_object(values, value)
    return values


def of_first(value: Any) -> Any:
    """What the first process has."""
    if rank_and_size()[1] == 1:
        return value
    values = [value]
    with _others():
        distributed.broadcast_object_list(values)
    return values[0]
