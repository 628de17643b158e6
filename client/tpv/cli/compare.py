"""`tpv job compare`: what jobs, or vectors, reached, at which cost."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tpv import comparison
from tpv._sync.client import Client
from tpv._sync.jobs import Job
from tpv.cli.options import Json, connect
from tpv.cli.output import Output, plain
from tpv.comparison import Interval
from tpv.errors import NotFound, TpvError
from tpv.schemas.vectors import Evaluation, Version

_COSTS = ("target_steps", "cpu_seconds")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the comparison."""

    asked: str  #: job id or reference, as it was given
    reference: str | None  #: of the vector; none where the result is an artifact or figures alone
    job: uuid.UUID | None
    method: str | None
    evaluation: Evaluation
    costs: dict[str, float]  #: of the job, and of the target's own tuning that it built on
    predictions: list[dict[str, Any]] | None
    majority: float | None  #: as the job measured it, with the rows that it trained on

    @property
    def name(self) -> str:
        return plain(self.reference) if self.reference else f"job {self.job}"


def compare(
    context: typer.Context,
    jobs: Annotated[list[str], typer.Argument(metavar="JOB", help="Jobs by id, or vectors by reference.")],
    paired: Annotated[
        str | None, typer.Option(metavar="BASE", help="Also the difference from this one, with its 95 % interval.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compares results: the metric (test split if there, else validation), target steps, CPU seconds.

    Steps and seconds of a transfer include those of the target's own tuning. The majority class is the most frequent
    answer of the training rows. The interval is a paired bootstrap over the rows of the split.
    """
    with connect(context) as client:
        entries = [_entry(client, text) for text in jobs]
        base = None
        if paired is not None:
            base = next((entry for entry in entries if entry.asked == paired), None) or _entry(client, paired)
        majority = entries[0].majority
        if majority is None:
            majority = _majority(client, entries[0])
    rows = [_row(entry, base) for entry in entries]
    out = Output(as_json)
    if as_json:
        out.json({"results": rows, "majority": majority, "base": base.name if base else None})
        return
    first = entries[0].evaluation
    shown = [[entry.name, row["method"], plain(row["dataset"]), row["split"], row["value"], row["n"],
              row["target_steps"], row["cpu_seconds"], _interval(row["difference"])]
             for entry, row in zip(entries, rows, strict=True)]  # fmt: skip
    if majority is not None:
        shown.insert(0, ["majority class", None, plain(first.dataset), first.split, majority, first.n, 0, None, ""])
    columns = ["result", "method", "data set", "split", first.metric, "rows", "target steps", "CPU s"]
    if base is not None:
        columns.append(f"minus {base.name} (95 %)")
    out.table([], columns, (row[: len(columns)] for row in shown))


def _entry(client: Client, text: str) -> Entry:
    job: Job | None = None
    version: Version | None = None
    try:
        job = client.jobs.get(uuid.UUID(text))
    except ValueError:
        version = client.vectors.get(text)
        if version.job is not None:
            job = client.jobs.get(version.job)
    else:
        if job.state != "succeeded":
            raise NotFound(f"job {job.id} is {job.state} and has no result; see: tpv job show {job.id}")
        if job.result is not None:
            version = client.vectors.get(job.result)
    evaluation = _evaluation(version, job)
    return Entry(
        asked=text,
        reference=version.reference if version else None,
        job=version.job if version else job.id if job else None,
        method=(version.method if version else None) or (job.method if job else None),
        evaluation=evaluation,
        costs=_costs(client, job),
        predictions=client.vectors.predictions(evaluation) if evaluation.predictions else None,
        majority=job.metrics.get(f"{evaluation.split}/majority") if job else None,
    )


def _evaluation(version: Version | None, job: Job | None) -> Evaluation:
    """The figure to compare by: the job's own, of its first data set, on test, the newest; so far as there are such."""
    own = version.evaluations if version else job.evaluations if job else []
    if job is not None:
        own = [e for e in own if e.job == job.id] or own
        own = [e for e in own if job.spec.dataset and e.dataset == job.spec.dataset.reference] or own
    for split in ("test", "validation"):
        found = [evaluation for evaluation in own if evaluation.split == split]
        if found:
            return max(found, key=lambda evaluation: evaluation.created_at)
    what = f"vector {plain(version.reference)}" if version else f"job {job and job.id}"
    raise NotFound(f"{what} has no evaluation on test or validation; see: tpv {what.replace(' ', ' show ', 1)}")


def _costs(client: Client, job: Job | None) -> dict[str, float]:
    """Target steps and CPU seconds, those of the target's own tuning included."""
    if job is None:
        return {}
    stages = [job]
    if job.spec.target is not None:
        target = client.vectors.get(job.spec.target.reference)
        if target.job is not None:
            stages.append(client.jobs.get(target.job))
    return {
        cost: sum(stage.metrics[cost] for stage in stages)
        for cost in _COSTS
        if all(cost in stage.metrics for stage in stages)
    }


def _majority(client: Client, entry: Entry) -> float | None:
    """The accuracy of the training rows' most frequent answer; None when the rows are not at hand."""
    if not entry.predictions or entry.evaluation.metric != "accuracy":
        return None
    targets = [str(row["target"]) for row in entry.predictions]
    try:
        answers = [str(row["target"]) for row in client.datasets.rows(entry.evaluation.dataset, "train")]
    except TpvError:  # not a data set of this registry
        return None
    return comparison.majority(answers, targets)


def _row(entry: Entry, base: Entry | None) -> dict[str, Any]:
    evaluation = entry.evaluation
    return {
        "reference": entry.reference,
        "job": str(entry.job) if entry.job else None,
        "method": entry.method,
        "dataset": evaluation.dataset,
        "split": evaluation.split,
        "metric": evaluation.metric,
        "value": evaluation.value,
        "n": evaluation.n,
        **{cost: entry.costs.get(cost) for cost in _COSTS},
        "difference": _difference(entry, base),
    }


def _difference(entry: Entry, base: Entry | None) -> Interval | None:
    if base is None or entry is base:
        return None
    if entry.predictions is None or base.predictions is None:
        missing = entry if entry.predictions is None else base
        raise NotFound(f"no predictions are kept for {missing.name}; compare without --paired")
    try:
        return comparison.paired_bootstrap(entry.predictions, base.predictions)
    except ValueError as error:
        raise typer.BadParameter(f"{entry.name} and {base.name}: {error}", param_hint="--paired") from error


def _interval(found: Interval | None) -> str:
    return f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]" if found else ""
