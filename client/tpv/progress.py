"""Progress bars on the terminal (standard error): bytes that move, and jobs that run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from tpv.schemas.jobs import Event, Job

_MARKS = {"succeeded": "[green]✓[/]", "failed": "[red]✗[/]", "cancelled": "[yellow]-[/]"}


@contextlib.contextmanager
def transfer(description: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar over `total` bytes; gives the function that is told of further bytes."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=_console()
    ) as bars:
        task = bars.add_task(description, total=total)
        yield lambda count: bars.advance(task, count)


@contextlib.contextmanager
def following(jobs: Sequence[Job]) -> Iterator[JobBars]:
    """One bar a job: step of steps, loss, metric, and the current group."""
    with Progress(
        TextColumn("{task.fields[mark]} {task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[steps]}", justify="right"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[says]}"),
        console=_console(),
    ) as bars:
        yield JobBars(bars, jobs)


class JobBars:
    """The bars of some jobs, moved by their events."""

    def __init__(self, bars: Progress, jobs: Sequence[Job]) -> None:
        self._bars = bars
        self._tasks: dict[UUID, TaskID] = {}
        self._said: dict[UUID, dict[str, str]] = {}
        for job in jobs:
            name = f"{job.method} {job.output or ''}".strip()
            self._tasks[job.id] = bars.add_task(name, total=None, start=False, mark=" ", steps="", says=job.state)
            self._said[job.id] = {"state": job.state}
            if job.finished:
                self.ended(job)

    def event(self, job: Job, event: Event) -> None:
        """Shows what an event says; of a type that is not known, nothing."""
        task, said, data = self._tasks[job.id], self._said[job.id], event.data
        match event.type:
            case "progress":
                self._step(task, data)
                if data.get("loss") is not None:
                    said["loss"] = f"loss {_number(data['loss'])}"
                said.pop("phase", None)
            case "evaluation":
                split = f"{data['split']} " if data.get("split") else ""
                said["metric"] = f"{split}{data.get('metric', '')} {_number(data.get('value'))}"
            case "warning":
                self._bars.print(Text(f"{job.method} {job.output or job.id}: {data.get('message', '')}", "yellow"))
                return
            case "group":
                members = [str(member).removeprefix("default/") for member in data.get("members") or ()]
                said["group"] = "group " + (" + ".join(members) if members else "empty")
            case "phase":
                self._bars.start_task(task)
                said["phase"] = str(data.get("message", ""))
            case "state":
                said["state"] = str(data.get("state", ""))
                if said["state"] == "running":
                    self._bars.start_task(task)
            case _:
                return
        if said.get("state") == "running":
            said.pop("state")
        self._say(task, said)

    def ended(self, job: Job) -> None:
        """Shows how a job ended."""
        task, said = self._tasks[job.id], self._said[job.id]
        said.pop("phase", None)
        why = job.message or job.reason or ""
        said["state"] = job.result or "" if job.state == "succeeded" else f"{job.state}: {why}"
        if job.state == "succeeded":
            found = self._bars.tasks[self._bars.task_ids.index(task)]
            total = found.total or 1
            self._bars.update(task, total=total, completed=total)
        self._bars.update(task, mark=_MARKS.get(job.state, " "))
        self._bars.stop_task(task)
        self._say(task, said)

    def _step(self, task: TaskID, data: dict[str, Any]) -> None:
        step, steps = data.get("step"), data.get("steps")
        if step is None:
            return
        self._bars.start_task(task)
        self._bars.update(task, completed=step, total=steps, steps=f"{step}/{steps}" if steps else str(step))

    def _say(self, task: TaskID, said: dict[str, str]) -> None:
        order = ("state", "phase", "loss", "metric", "group")
        text = "  ".join(said[key] for key in order if said.get(key))
        self._bars.update(task, says=Text(text, overflow="ellipsis").markup)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _console() -> Console:
    return Console(stderr=True)
