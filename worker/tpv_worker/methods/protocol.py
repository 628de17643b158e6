"""What the training loop asks of a method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A method's answer with its present parameters; copies, so that further steps do not change it."""

    prompt: Tensor  #: the soft prompt (r, d), float32, without gradient
    members: tuple[int, ...] | None = None  #: indices of the sources in the group, for methods that group
    tensors: dict[str, Tensor] = field(default_factory=dict)  #: what else is worth keeping beside the result


class TuningMethod(Protocol):
    """Holds the trained parameters, on the backbone's device, and makes a soft prompt of them."""

    @property
    def members(self) -> tuple[int, ...] | None:
        """The group of the last training step, for methods that group."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW, each with `params`, its own `lr` and `weight_decay`."""

    def prompt(self) -> Tensor:
        """The soft prompt (r, d) of the next training step, differentiable; called once a step."""

    def snapshot(self) -> Snapshot:
        """What validation sees, and what the job gives if this step turns out the best."""
