"""What the training loop asks of a method, and what a method is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from tpv_worker.backbone import Backbone, Prompt
from tpv_worker.checkpoints import Checkpoints
from tpv_worker.data import Example, Task

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a job hands to its method; tensors are float32 and on the backbone's device."""

    backbone: Backbone
    initialization: Tensor  #: P_init (r, d)
    target: Tensor | None = None  #: the target's own vector T_t (r, d)
    sources: Tensor | None = None  #: source vectors T_s (n, r, d)
    source_names: Sequence[str] = ()  #: references of the sources, for messages
    center: Tensor | None = None  #: mean pooled vector (d,) of the reference pool, for centred similarities
    tasks: int = 1  #: how many tasks are trained together
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A method's answer with its present parameters; copies, so that further steps do not change it."""

    prompt: Prompt  #: what the model reads in front of a source, without gradient; (r, d) where the result is a vector
    members: tuple[int, ...] | None = None  #: indices of the sources in the group, for methods that group
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  #: kept beside a vector; of an artifact: all of it


class TuningMethod(ABC):
    """Holds the trained parameters, on the backbone's device, and makes a soft prompt of them."""

    members: tuple[int, ...] | None = None  #: the group of the last training step, for methods that group
    facts: Mapping[str, Any]  #: what is worth telling of the result beside tensors; JSON

    steps_before: int = 0  #: of a training in `prepare`; the run's checkpoints count them too

    artifact: ClassVar[bool] = False  #: the result is `Snapshot.tensors`, which `load` reads, instead of a vector

    def __init__(self) -> None:
        self.facts = {}

    def prepare(  # noqa: B027, most methods have nothing to do here
        self, tasks: Sequence[Task], source_tasks: Sequence[Task], report: Report, checkpoints: Checkpoints
    ) -> None:
        """What comes before the first step: a search, or a training on the sources' data, which keeps its states in
        `checkpoints` and goes on from the one found there. Called once, by `train`.
        """

    def state(self) -> dict[str, Any]:
        """What further steps depend on beside parameters and arguments; JSON."""
        return {"facts": dict(self.facts)}

    def resume(self, state: Mapping[str, Any], report: Report) -> None:
        """Takes what `state` gave, when a run goes on after a checkpoint; called in the place of `prepare`."""
        self.facts = state["facts"]

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW, each with `params`, its own `lr` and `weight_decay`."""

    @abstractmethod
    def prompt(self) -> Prompt:
        """What the model reads in front of the sources of the next step, differentiable; called once a step."""

    def sample(self, batch: Sequence[Example]) -> Sequence[Example]:
        """The rows of a batch that a step is made of; called once a step, by all processes that train together."""
        return batch

    def loss(self, backbone: Backbone, prompt: Prompt, batch: Sequence[Example]) -> Tensor:
        """The scalar that a step makes smaller, in nats; `prompt` is that of the step.

        Called for each part of the step's rows, and depends on nothing else: it is a mean in which a row weighs as many
        as its target has tokens, so that the parts' losses, weighted by their tokens, are that of all rows.
        """
        return backbone.loss(prompt, batch)

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """What validation sees, and what the job gives if this step turns out the best.

        Works before `prepare` as well: the length of the prompt decides whether the rows fit the model.
        """

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the parameters from a snapshot's tensors; methods whose result is an artifact have it."""
        raise NotImplementedError
