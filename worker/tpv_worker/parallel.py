"""Several processes that train together, each with a copy of the frozen model on a device of its own.

Every process runs the same loop on the same batches and computes its share of each. What travels are the gradients of
the few trained parameters, the losses at the logging points, and predictions; parameters and decisions made from them
are the same everywhere, because every process adds up the same numbers. A process that is alone skips all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from tpv_worker.data import Example


def place() -> tuple[int, int]:
    """This process's place among those that train together, and their number."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def shares(batch: Sequence[Example], accumulation: int) -> list[tuple[Sequence[Example], float]]:
    """The parts of a batch that this process computes, each with its share of the batch's target tokens.

    Weighted by these shares, the parts' mean losses sum up to that of the whole batch, over all processes. A process
    for which no row is left has one of weight 0, so that it makes the same kind of gradients as the others.
    """
    rank, size = place()
    parts = [batch[i :: accumulation * size] for i in range(rank, accumulation * size, size)]
    tokens = sum(len(example.target) for example in batch)
    mine = [(part, sum(len(example.target) for example in part) / tokens) for part in parts if part]
    return mine or [(batch[:1], 0.0)]


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Adds up the parameters' gradients over all processes; who has none has none anywhere."""
    if place()[1] > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            sums = summed(torch.cat([gradient.flatten() for gradient in gradients]))
            parts = torch.split(sums, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if place()[1] > 1:
        distributed.all_reduce(values)
    return values


def gathered(value: Any) -> list[Any]:
    """What each process has, in their order."""
    size = place()[1]
    if size == 1:
        return [value]
    values = [None] * size
    distributed.all_gather_object(values, value)
    return values
