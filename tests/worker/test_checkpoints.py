"""A run that goes on from a checkpoint is the run that was never interrupted, to the bit."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
import torch
from safetensors.torch import save
from tests.worker.methods.conftest import same
from tests.worker.test_methods import Run, tensors_of
from torch import Tensor

from tpv.errors import DamagedContent, TooLarge, Unavailable
from tpv.schemas.jobs import AttemptStarted, Checkpoint
from tpv_worker.attempt import failure_of
from tpv_worker.checkpoints import Checkpoints, Drained, State, StoredCheckpoints, UnusableState
from tpv_worker.data import Row, Task
from tpv_worker.methods import METHODS
from tpv_worker.training import TrainingResult, train

pytestmark = pytest.mark.slow  # every method is trained, several times

#: What has a state of its own: warm-up, clipping, the best step so far and patience, groups that last.
OPTIONS: dict[str, Any] = {"steps": 24, "evaluate_every": 3, "patience": 6, "schedule": "linear", "warmup_steps": 5}
OPTIONS |= {"clip_norm": 1.0, "accumulation": 2, "adam_epsilon": 1e-6}
OWN: dict[str, dict[str, Any]] = {"dtvg": {"regroup_every": 3}, "spot-multitask": {"mixing_limit": 15}}


class Interrupted(Exception):
    pass


class Kept(Checkpoints):
    """Keeps the state of one step, counted over all stages, as bytes; the run ends there if it is interrupted."""

    def __init__(self, at: int = 0, *, interrupted: bool = False, found: bytes | None = None) -> None:
        self.asked, self.at, self.interrupted = 0, at, interrupted
        self.content = b""
        self.found = State.load(found) if found else None

    def due(self) -> bool:
        self.asked += 1
        return self.asked == self.at

    def save(self, state: State) -> None:
        self.content = state.dump()
        if self.interrupted:
            raise Interrupted


class Runs:
    """Runs of one method, each on a model of its own."""

    def __init__(self, name: str, model: Path, prompt: Tensor, rows: list[Row]) -> None:
        self.name, self.model, self.prompt, self.rows = name, model, prompt, rows
        self.events: list[dict[str, Any]] = []

    def train(self, checkpoints: Checkpoints) -> tuple[TrainingResult, Any]:
        run = Run(self.name, self.model, self.prompt, self.rows, **OPTIONS, **OWN.get(self.name, {}))
        tasks = [Task(train=task.train, validation=self.rows[:9], label_words=("yes", "no")) for task in run.tasks]
        self.events = []
        result = train(
            run.given.backbone,
            run.method,
            tasks,
            run.source_tasks,
            options=run.method.options,
            seed=3,
            report=self.events.append,
            checkpoints=checkpoints,
        )
        return result, run.method.facts


def figures(result: TrainingResult) -> dict[str, Any]:
    ignored = ("snapshot", "wall_seconds", "cpu_seconds")
    return {name: value for name, value in vars(result).items() if name not in ignored}


@pytest.mark.parametrize(("name", "at"), [*((name, 13) for name in METHODS), ("mpt", 2)])
def test_a_resumed_run_is_the_one_that_was_never_interrupted(
    name: str, at: int, model_paths: dict[str, Path], prompt: Tensor, rows: list[Row]
) -> None:
    """For MPT, step 2 is one of its source stage; at step 13 there are a best answer and groups that have changed."""
    runs = Runs(name, model_paths["encoder-decoder"], prompt, rows)
    uninterrupted = Kept()
    whole, facts = runs.train(uninterrupted)
    told = [event for event in runs.events if event["type"] in ("evaluation", "warning")]

    first = Kept(at, interrupted=True)
    with pytest.raises(Interrupted):
        runs.train(first)
    before = [event for event in runs.events if event["type"] in ("evaluation", "warning")]

    second = Kept(found=first.content)
    rest, facts_of_rest = runs.train(second)
    assert second.asked == uninterrupted.asked - at  # no step is done twice
    assert same(tensors_of(rest.snapshot), tensors_of(whole.snapshot))
    assert rest.snapshot.members == whole.snapshot.members
    assert figures(rest) == figures(whole)
    assert facts_of_rest == facts
    assert before + [event for event in runs.events if event["type"] in ("evaluation", "warning")] == told


@pytest.mark.parametrize("name", ["prompt-tuning", "dtvg", "mpt"])
def test_keeping_a_state_changes_nothing(
    name: str, model_paths: dict[str, Path], prompt: Tensor, rows: list[Row]
) -> None:
    runs = Runs(name, model_paths["decoder-only"], prompt, rows)
    whole, facts = runs.train(Checkpoints())
    events = runs.events
    kept, facts_of_kept = runs.train(Kept(7))
    assert same(tensors_of(kept.snapshot), tensors_of(whole.snapshot))
    assert figures(kept) == figures(whole)
    assert facts_of_kept == facts
    assert runs.events == events


def test_a_run_may_be_interrupted_again_and_again(
    model_paths: dict[str, Path], prompt: Tensor, rows: list[Row]
) -> None:
    runs = Runs("dtvg", model_paths["decoder-only"], prompt, rows)
    whole, facts = runs.train(Checkpoints())
    content = None
    for _ in range(4):
        kept = Kept(4, interrupted=True, found=content)
        with pytest.raises(Interrupted):
            runs.train(kept)
        content = kept.content
    assert State.load(content).step == 16
    rest, facts_of_rest = runs.train(Kept(found=content))
    assert same(tensors_of(rest.snapshot), tensors_of(whole.snapshot))
    assert figures(rest) == figures(whole)
    assert facts_of_rest == facts


def test_the_group_is_said_again_to_those_who_follow(
    model_paths: dict[str, Path], prompt: Tensor, rows: list[Row]
) -> None:
    runs = Runs("dtvg", model_paths["encoder-decoder"], prompt, rows)
    first = Kept(10, interrupted=True)
    with pytest.raises(Interrupted):
        runs.train(first)
    [*_, known] = [event for event in runs.events if event["type"] == "group"]
    runs.train(Kept(found=first.content))
    assert runs.events[0] == known | {"step": 10}


def test_the_state_of_another_run_is_refused(model_paths: dict[str, Path], prompt: Tensor, rows: list[Row]) -> None:
    first = Kept(3, interrupted=True)
    with pytest.raises(Interrupted):
        Runs("prompt-tuning", model_paths["encoder-decoder"], prompt, rows).train(first)
    with pytest.raises(UnusableState, match="other parameters"):
        Runs("prompt-tuning", model_paths["encoder-decoder"], prompt[1:], rows).train(Kept(found=first.content))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"something else",
        save({"0/parameter": torch.ones(1)}),
        save({"0/parameter": torch.ones(1)}, {"state": "no JSON"}),
        save({"0/parameter": torch.ones(1)}, {"state": '{"format": 0, "step": 1, "values": {}}'}),
    ],
)
def test_what_is_no_state_is_refused(content: bytes) -> None:
    with pytest.raises(UnusableState):
        State.load(content)


def test_a_state_is_read_as_it_was_written() -> None:
    numbers = torch.tensor([0.1, torch.inf, -0.0], dtype=torch.float32)
    tensors = {"a": numbers, "b": numbers.double(), "c": torch.ones(2, 3, dtype=torch.bfloat16).T, "d": torch.tensor(3)}
    state = State(step=4, tensors=tensors, values={"loss": 0.1 + 0.2, "members": [1], "none": None})
    read = State.load(state.dump())
    assert (read.step, read.values) == (state.step, state.values)
    assert same(read.tensors, tensors)
    assert {name: tensor.dtype for name, tensor in read.tensors.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }


# --- Those that the registry keeps


class Store:
    """What the client's `jobs` does with checkpoints, in memory; it may be down, or give damaged ones."""

    def __init__(self, *contents: bytes) -> None:
        self.kept = [*contents]
        self.refusal: Exception | None = None

    @property
    def jobs(self) -> Store:
        return self

    def checkpoint(self, job: UUID, attempt: int, digest: str) -> bytes:
        content = self.kept[int(digest)]
        if not content:
            raise DamagedContent("the file is damaged")
        return content

    def save_checkpoint(self, job: UUID, attempt: int, step: int, content: bytes) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.kept.append(content)


class Told:
    def __init__(self) -> None:
        self.phases: list[str] = []
        self.warnings: list[str] = []

    def phase(self, message: str) -> None:
        self.phases.append(message)

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def stored(store: Store, told: Told, *, every: float = 0, stopping: bool = False) -> StoredCheckpoints:
    kept = [Checkpoint(attempt=1, step=i, digest=str(i), size=1) for i in reversed(range(len(store.kept)))]
    started = AttemptStarted.model_construct(job=uuid4(), number=2, checkpoints=kept)
    stop = threading.Event()
    if stopping:
        stop.set()
    return StoredCheckpoints(store, started, told, timedelta(seconds=every), stop)  # type: ignore[arg-type]


def state(step: int) -> State:
    return State(step=step, tensors={"a": torch.ones(1)}, values={})


def test_the_newest_intact_checkpoint_is_gone_on_from() -> None:
    told = Told()
    found = stored(Store(state(0).dump(), state(1).dump(), b"cut off", b""), told).found
    assert found is not None
    assert found.step == 1
    assert told.phases == ["going on after step 1 of attempt 1"]
    assert [warning[:29] for warning in told.warnings] == [
        "the checkpoint after step 3 i",
        "the checkpoint after step 2 i",
    ]
    assert stored(Store(), told).found is stored(Store(b""), told).found is None


def test_states_are_kept_at_their_time() -> None:
    store = Store()
    hourly, always = stored(store, Told(), every=3600), stored(store, Told())
    assert not hourly.due()
    assert always.due()
    always.save(state(1))
    always.save(state(2))  # waits for the one before
    assert State.load(store.kept[0]).step == 1


@pytest.mark.parametrize(("sending", "pause"), [(0, 60), (10, 50), (15, 45), (40, 70)])
def test_what_is_lost_is_one_interval_at_most(monkeypatch: pytest.MonkeyPatch, sending: float, pause: float) -> None:
    """What takes ten seconds to send is taken every 50: the one before it is 60 seconds old when it is stored.

    What takes more than a quarter of the interval is older then: half the interval nothing is sent.
    """
    now = 0.0

    class Slow(Store):
        def save_checkpoint(self, job: UUID, attempt: int, step: int, content: bytes) -> None:
            nonlocal now
            now += sending
            super().save_checkpoint(job, attempt, step, content)

    monkeypatch.setattr("tpv_worker.checkpoints.time", SimpleNamespace(monotonic=lambda: now))
    checkpoints = stored(Slow(), Told(), every=60)
    for taken in (30, 30 + pause, 30 + 2 * pause):
        now = taken - 0.1
        assert not checkpoints.due()
        now = taken
        assert checkpoints.due()
        checkpoints.save(state(1))
        assert checkpoints.sending is not None
        checkpoints.sending.join()


@pytest.mark.parametrize(("refusal", "again"), [(Unavailable("no answer"), True), (TooLarge("over 64 MB"), False)])
def test_a_state_that_cannot_be_stored_is_a_warning(refusal: Exception, again: bool) -> None:
    store, told = Store(), Told()
    checkpoints = stored(store, told)
    store.refusal = refusal
    checkpoints.save(state(1))
    assert checkpoints.sending is not None
    checkpoints.sending.join()
    assert told.warnings == [f"the checkpoint after step 1 could not be stored: {refusal}"]
    assert checkpoints.due() == again


def test_a_worker_that_stops_keeps_the_last_step() -> None:
    store = Store()
    checkpoints = stored(store, Told(), every=3600, stopping=True)
    assert checkpoints.due()
    with pytest.raises(Drained, match="after step 5") as drained:
        checkpoints.save(state(5))
    assert State.load(store.kept[0]).step == 5
    assert failure_of(drained.value).reason == "drained"


def test_a_state_is_sent_also_where_no_memory_is_left_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    store = Store()
    checkpoints = stored(store, Told())
    monkeypatch.setattr(threading.Thread, "start", start)
    checkpoints.save(state(3))
    assert State.load(store.kept[0]).step == 3
    assert checkpoints.due()
