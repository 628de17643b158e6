"""The state of a run after a step, as bytes, and where it is kept: what the next attempt goes on from.

Everything random in a run is drawn from its seed, in the order of its steps, so the step says where in the data it is.
A state holds the rest: parameters, optimizer, the best answer so far, and what the method and the loop remember.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tpv import Client, files
from tpv.errors import DamagedContent, FingerprintMismatch, JobFinished, NotFound, StaleAttempt, TooLarge, TpvError
from tpv.schemas.jobs import AttemptStarted
from tpv_worker.events import Events

FORMAT = 1  #: of a state; another one's is not read


class UnusableState(TpvError):
    """These bytes are no state of this run."""


@dataclass(frozen=True, kw_only=True)
class State:
    """A run after a step: with its arguments all that its further steps depend on."""

    step: int  #: of the whole run, steps of a preparation included
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]  #: JSON

    def dump(self) -> bytes:
        """As one safetensors file, with step and values in its metadata."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        text = json.dumps({"format": FORMAT, "step": self.step, "values": self.values})
        return safetensors.torch.save(tensors, {"state": text})

    @staticmethod
    def load(content: bytes) -> State:
        """What `dump` has written, to the bit; raises UnusableState for anything else."""
        try:
            tensors = safetensors.torch.load(content)
            state = json.loads(files.metadata(content)["state"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise UnusableState(f"this is no state of a run: {error}") from error
        if state["format"] != FORMAT:
            raise UnusableState(f"the state has the format {state['format']}, this worker reads {FORMAT}")
        return State(step=state["step"], tensors=tensors, values=state["values"])


class Checkpoints:
    """Where a run keeps its states. This one keeps none, and a run with it begins at its first step."""

    found: State | None = None  #: what the run goes on from

    def due(self) -> bool:
        """Whether a state is to be kept after this step; asked after every one.

        Of processes that train together the first one's answer counts: they look at their losses together first.
        """
        return False

    def save(self, state: State) -> None:
        """Keeps the state; what this raises ends the run."""


class Drained(TpvError):
    """The worker is stopping: the attempt has ended after a step, for another one to go on."""


class StoredCheckpoints(Checkpoints):
    """Keeps the states of an attempt in the registry, and the last one when it is asked to stop.

    A state is copied between two steps, and sent by a thread while training goes on. The next one is due so early that,
    if it takes as long to send, it is stored before the newest one there is older than `every`, and the step or the
    evaluation that goes on then: that is what a lost attempt costs. Half of `every` passes in any case after one was
    sent, so that a slow store is not written to all the time. One that cannot be stored is a warning: the one before it
    is still there.
    """

    def __init__(
        self, client: Client, started: AttemptStarted, events: Events, every: timedelta, stopping: threading.Event
    ) -> None:
        """Finds what the attempt goes on from: the newest checkpoint that is intact."""
        self.client, self.started, self.events = client, started, events
        self.every, self.stopping = every.total_seconds(), stopping
        self.sending: threading.Thread | None = None
        self.next = time.monotonic() + self.every / 2  # how long sending takes is not known yet
        self.found = self._find()

    def due(self) -> bool:
        if self.stopping.is_set():
            return True
        return time.monotonic() >= self.next and (self.sending is None or not self.sending.is_alive())

    def save(self, state: State) -> None:
        """Raises Drained when the worker is stopping, once the state has been sent."""
        if self.sending is not None:
            self.sending.join()
        taken = time.monotonic()
        content = state.dump()
        self.sending = threading.Thread(target=self._send, args=(state.step, content, taken), daemon=True)
        try:
            self.sending.start()
        except RuntimeError:  # no memory is left for its stack
            self.sending = None
            self._send(state.step, content, taken)
        if self.stopping.is_set():
            if self.sending is not None:
                self.sending.join()
            raise Drained(f"the worker is stopping; training has ended after step {state.step}")

    def _find(self) -> State | None:
        for checkpoint in self.started.checkpoints:
            try:
                state = State.load(
                    self.client.jobs.checkpoint(self.started.job, self.started.number, checkpoint.digest)
                )
            except (DamagedContent, FingerprintMismatch, NotFound, UnusableState) as error:
                self.events.warning(f"the checkpoint after step {checkpoint.step} is of no use: {error}")
            else:
                self.events.phase(f"going on after step {checkpoint.step} of attempt {checkpoint.attempt}")
                return state
        return None

    def _send(self, step: int, content: bytes, taken: float) -> None:
        try:
            self.client.jobs.save_checkpoint(self.started.job, self.started.number, step, content)
        except (StaleAttempt, JobFinished):
            os._exit(0)  # the work is for nobody any more
        except TooLarge as error:
            self._warn(step, error)
            self.next = math.inf  # the next one would be as large
            return
        except Exception as error:
            self._warn(step, error)
        now = time.monotonic()
        self.next = max(taken + self.every - (now - taken), now + self.every / 2)

    def _warn(self, step: int, error: Exception) -> None:
        self.events.warning(f"the checkpoint after step {step} could not be stored: {error}")


# --- Tensors of an optimizer -----------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The parameters and what the optimizer remembers of each, by the parameters' places."""
    tensors = {}
    for place, parameter in enumerate(_parameters(optimizer)):
        tensors[f"{place}/parameter"] = parameter
        tensors |= {f"{place}/{name}": value for name, value in optimizer.state.get(parameter, {}).items()}
    return tensors


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Takes what `optimizer_tensors` has given of one for the same parameters; raises UnusableState for others."""
    parameters = _parameters(optimizer)
    remembered: dict[int, dict[str, Tensor]] = {}
    values = {}
    for key, tensor in tensors.items():
        place, name = key.split("/")
        if name == "parameter":
            values[int(place)] = tensor
        else:
            remembered.setdefault(int(place), {})[name] = tensor
    if {place: tensor.shape for place, tensor in values.items()} != {i: p.shape for i, p in enumerate(parameters)}:
        raise UnusableState("the state is that of other parameters")
    for i, parameter in enumerate(parameters):
        parameter.copy_(values[i])
    optimizer.load_state_dict({"state": remembered, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
