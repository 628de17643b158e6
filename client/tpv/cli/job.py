"""`tpv job`: work for the workers, asked for, followed and compared."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from tpv._sync.client import Client
from tpv._sync.jobs import Job
from tpv.cli import compare
from tpv.cli.options import Description, Json, Limit, OptionPairs, TagPairs, connect, pairs, values
from tpv.cli.output import Output, cell, plain
from tpv.methods import METHODS, Method
from tpv.presets import PRESETS
from tpv.schemas.jobs import JobCreate, State

app = typer.Typer(help="Jobs: tuning and transfer on the workers.", no_args_is_help=True)
app.command("compare")(compare.compare)

JobArgument = Annotated[str, typer.Argument(help="The job's id.", metavar="JOB")]
DatasetsOption = Annotated[
    list[str],
    typer.Option(
        "--dataset",
        "-d",
        help="[namespace/]name[:version]; repeatable for methods that read further ones, after the one that is tuned "
        "for.",
    ),
]
OutputOption = Annotated[
    str | None, typer.Option("--output", help="[namespace/]name that the result is registered under, if a vector.")
]
PresetOption = Annotated[
    str | None, typer.Option(help="Options of a paper, for those that are not given: " + ", ".join(PRESETS) + ".")
]
StepsOption = Annotated[int | None, typer.Option(min=0, help="Optimizer steps at most.")]
ShotsOption = Annotated[int | None, typer.Option(min=1, help="Training rows of a data set; none: all.")]
ShotSeedOption = Annotated[int | None, typer.Option(help="Seed of the few-shot sample.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the training.")]
TaskTypeOption = Annotated[str | None, typer.Option(help="Task type of the result, such as nli.")]
QueueOption = Annotated[str | None, typer.Option(help="Queue that a worker takes it from; default: default.")]
PriorityOption = Annotated[int | None, typer.Option(min=-1000, max=1000, help="The highest goes first; default 0.")]
MemoryOption = Annotated[
    str | None, typer.Option(help="Start only on a device with as much memory: bytes, 24GB or 24GiB.")
]
NeedsOption = Annotated[
    list[str] | None, typer.Option("--needs", metavar="JOB", help="Start when this job has succeeded; repeatable.")
]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end; Ctrl-C leaves the job running.")]


@app.command("tune")
def tune(
    context: typer.Context,
    datasets: DatasetsOption,
    initialization: Annotated[str, typer.Option("--initialization", "-i", help="Name, id or fingerprint.")],
    output: OutputOption = None,
    method: Annotated[str, typer.Option(help="A method without sources; see: tpv job methods.")] = "prompt-tuning",
    preset: PresetOption = None,
    steps: StepsOption = None,
    shots: ShotsOption = None,
    shot_seed: ShotSeedOption = None,
    seed: SeedOption = 0,
    options: OptionPairs = None,
    task_type: TaskTypeOption = None,
    description: Description = None,
    tags: TagPairs = None,
    queue: QueueOption = None,
    priority: PriorityOption = None,
    min_memory: MemoryOption = None,
    needs: NeedsOption = None,
    wait: WaitOption = True,
    as_json: Json = False,
) -> None:
    """Tunes on a data set, or on several together; a vector becomes the next version of the output."""
    given = values(options) | ({"steps": steps} if steps is not None else {})
    with connect(context) as client:
        job = client.jobs.tune(
            dataset=datasets[0],
            datasets=datasets[1:],
            initialization=initialization,
            output=output,
            method=method,
            preset=preset,
            shots=shots,
            shot_seed=shot_seed,
            seed=seed,
            task_type=task_type,
            description=description,
            tags=pairs(tags, option="--tag") or None,
            queue=queue,
            priority=priority,
            min_memory=min_memory,
            needs=needs,
            **_free(given),
        )
        _end(client, job, wait, Output(as_json))


@app.command("transfer")
def transfer(
    context: typer.Context,
    sources: Annotated[list[str], typer.Option("--source", "-s", help="A source vector; repeatable.")],
    datasets: DatasetsOption,
    output: OutputOption = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", help="The target's own vector, for methods that start from it; tuned first when missing."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="A method with sources; see: tpv job methods.")] = "dtvg",
    preset: PresetOption = None,
    initialization: Annotated[
        str | None, typer.Option("--initialization", "-i", help="Default: that of the sources.")
    ] = None,
    steps: StepsOption = None,
    shots: ShotsOption = None,
    shot_seed: ShotSeedOption = None,
    seed: SeedOption = 0,
    options: OptionPairs = None,
    target_options: Annotated[
        list[str] | None,
        typer.Option("--target-option", metavar="KEY=VALUE", help="An option of the target's own tuning; repeatable."),
    ] = None,
    prepare: Annotated[
        list[str] | None,
        typer.Option(
            "--prepare", metavar="SOURCE=DATASET", help="Tune this source first if it has no version; repeatable."
        ),
    ] = None,
    reference_pool: Annotated[
        list[str] | None,
        typer.Option(
            "--reference",
            metavar="VECTOR",
            help="For --option center=true: a vector of those whose mean is subtracted; repeatable. Default: the "
            "newest of each vector of the initialization.",
        ),
    ] = None,
    task_type: TaskTypeOption = None,
    description: Description = None,
    tags: TagPairs = None,
    queue: QueueOption = None,
    priority: PriorityOption = None,
    min_memory: MemoryOption = None,
    needs: NeedsOption = None,
    wait: WaitOption = True,
    as_json: Json = False,
) -> None:
    """Tunes on a data set with the help of source vectors; a vector becomes the next version of the output."""
    given = values(options) | ({"steps": steps} if steps is not None else {})
    with connect(context) as client:
        job = client.jobs.transfer(
            method=method,
            target=target,
            sources=sources,
            dataset=datasets[0],
            datasets=datasets[1:],
            output=output,
            preset=preset,
            reference_pool=reference_pool,
            target_options=values(target_options, option="--target-option") or None,
            prepare=pairs(prepare, option="--prepare") or None,
            initialization=initialization,
            shots=shots,
            shot_seed=shot_seed,
            seed=seed,
            task_type=task_type,
            description=description,
            tags=pairs(tags, option="--tag") or None,
            queue=queue,
            priority=priority,
            min_memory=min_memory,
            needs=needs,
            **_free(given),
        )
        _end(client, job, wait, Output(as_json))


@app.command("methods")
def methods(
    method: Annotated[str | None, typer.Argument(help="Show the options of this one.")] = None, as_json: Json = False
) -> None:
    """Lists the methods of jobs, or the options of one."""
    out = Output(as_json)
    if method is None:
        out.table(
            [_entry(found) for found in METHODS.values()],
            ["method", "gives", "takes", "what it is"],
            ([found.name, found.result, _takes(found), _sentence(found)] for found in METHODS.values()),
        )
        return
    if method not in METHODS:
        raise typer.BadParameter(f"there is no method {method!r}; use one of {', '.join(METHODS)}")
    options = METHODS[method].options.model_fields
    out.table(
        [{"option": name, "default": _default(field), "what": field.description} for name, field in options.items()],
        ["option", "default", "what it is"],
        ([name, json.dumps(_default(field)), field.description] for name, field in options.items()),
    )


@app.command("list")
def list_(
    context: typer.Context,
    state: Annotated[State | None, typer.Option(help="Only in this state.")] = None,
    method: Annotated[str | None, typer.Option(help="Only of this method.")] = None,
    output: Annotated[str | None, typer.Option("--output", help="Only with this output.")] = None,
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """Lists jobs, newest first."""
    with connect(context) as client:
        found = list(islice(client.jobs.list(state=state, method=method, output=output), limit))
    Output(as_json).table(
        found,
        ["job", "method", "output", "state", "step", "result", "submitted"],
        ([j.id, j.method, plain(j.output), _state(j), _step(j), plain(j.result), j.created_at] for j in found),
        empty="no jobs; submit one with: tpv job tune",
    )  # fmt: skip


@app.command("show")
def show(context: typer.Context, job: JobArgument, as_json: Json = False) -> None:
    """Shows one job: state, specification, attempts and metrics."""
    with connect(context) as client:
        found = client.jobs.get(job)
    Output(as_json).record(found, _members(found))


@app.command("watch")
def watch(
    context: typer.Context,
    jobs: Annotated[list[str], typer.Argument(help="The jobs' ids.", metavar="JOB")],
    as_json: Json = False,
) -> None:
    """Follows jobs until they have ended; with --json, prints their events, a line each."""
    with connect(context) as client:
        found = [client.jobs.get(job) for job in jobs]
        if as_json:
            for job in found:
                for event in job.events(follow=True):
                    typer.echo(f'{{"job":"{job.id}",{event.model_dump_json()[1:]}')
            client.jobs.wait_all(found)
            return
        if not sys.stderr.isatty() and len(found) == 1:
            for event in found[0].events(follow=True):
                typer.echo(f"{cell(event.at)} {event.type}: {cell(event.data)}")
        follow(client, found)
    for job in found:
        Output(False).note(f"{job.method} {job.id} succeeded: {_result(job)}  {cell(job.metrics)}")


@app.command("logs")
def logs(
    context: typer.Context,
    job: JobArgument,
    attempt: Annotated[int | None, typer.Option(min=1, help="Only this attempt.")] = None,
) -> None:
    """Prints what was said of a job so far: states, phases, warnings and log lines."""
    with connect(context) as client:
        typer.echo(client.jobs.logs(job, attempt=attempt), nl=False)


@app.command("download")
def download(
    context: typer.Context,
    job: JobArgument,
    path: Annotated[Path | None, typer.Argument(help="Where to save it; default METHOD-JOB.safetensors.")] = None,
    as_json: Json = False,
) -> None:
    """Saves the artifact of a job whose method gives one (a safetensors file with its tensors), verified."""
    with connect(context) as client:
        found = client.jobs.get(job)
        target = path or Path(f"{found.method}-{found.id}.safetensors")
        client.jobs.download(found, target, progress=sys.stderr.isatty() and not as_json)
    Output(as_json).line({"job": found.id, "path": str(target), "artifact": found.artifact}, f"saved to {target}")


@app.command("cancel")
def cancel(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="The job's id.")],
    as_json: Json = False,
) -> None:
    """Calls a queued or running job off; jobs that need it fail."""
    with connect(context) as client:
        cancelled = client.jobs.cancel(job)
    Output(as_json).line(cancelled, f"job {cancelled.id} is {cancelled.state}")


@app.command("retry")
def retry(
    context: typer.Context,
    job: JobArgument,
    fresh: Annotated[bool, typer.Option("--fresh", help="From the start, not from the last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Takes a failed or cancelled job up again; jobs that failed because of it wait for it again."""
    with connect(context) as client:
        retried = client.jobs.retry(job, fresh=fresh)
    Output(as_json).line(
        retried, f"job {retried.id} is {retried.state}: {retried.message}; watch it with: tpv job watch {retried.id}"
    )


def follow(client: Client, jobs: Sequence[Job]) -> None:
    """Waits for jobs, with progress bars on a terminal; Ctrl-C leaves them running and says how to go on."""
    try:
        client.jobs.wait_all(jobs, progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        ids = " ".join(str(job.id) for job in jobs if not job.finished)
        typer.echo(f"it goes on without us; watch it with: tpv job watch {ids}", err=True)
        raise typer.Exit(130) from None


def _end(client: Client, job: Job, wait: bool, out: Output) -> None:
    """Shows a job that was submitted: at once, or when it has ended."""
    if not wait:
        first = "".join(f"; it waits for job {needed}" for needed in job.needs)
        out.line(job, f"job {job.id} is {job.state}{first}; watch it with: tpv job watch {job.id}")
        return
    follow(client, [*(client.jobs.get(needed) for needed in job.needs), job])
    out.record(job, _members(job))


def _free(options: dict[str, Any]) -> dict[str, Any]:
    """The options, none of which is a member of the job itself."""
    taken = sorted(JobCreate.model_fields.keys() & options.keys())
    if taken:
        raise typer.BadParameter(f"use --{taken[0].replace('_', '-')} for {taken[0]}", param_hint="--option")
    return options


def _state(job: Job) -> str:
    return job.state + (f" ({job.reason})" if job.reason else "")


def _step(job: Job) -> str:
    progress = job.progress
    return f"{progress.step}/{progress.steps or '?'}" if progress.step is not None else ""


def _result(job: Job) -> str:
    """What there is to have, and how."""
    if job.artifact is not None:
        return f"tpv job download {job.id} ({job.artifact.size} bytes)"
    return plain(job.result) + (" (was there already)" if job.result and job.result_created is False else "")


def _entry(method: Method) -> dict[str, Any]:
    return {"method": method.name, "gives": method.result, "takes": _takes(method), "what": _sentence(method)}


def _takes(method: Method) -> str:
    """What a job takes beside the initialization, the data set, and the name of a vector."""
    if method.result == "initialization":
        return "base model"
    datasets = {"together": "further data sets", "sources": "a data set of each source", None: None}
    takes = ["target" if method.target else None, "sources" if method.sources else None, datasets[method.datasets]]
    return ", ".join(part for part in takes if part)


def _sentence(method: Method) -> str:
    return inspect.cleandoc(method.options.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _default(field: FieldInfo) -> Any:
    return to_jsonable_python(field.get_default(call_default_factory=True))


def _members(job: Job) -> dict[str, Any]:
    spec = job.spec
    return {
        "job": job.id,
        "method": job.method,
        "state": _state(job),
        "message": job.message,
        "result": _result(job),
        "metrics": job.metrics,
        "step": _step(job),
        "loss": job.progress.loss,
        "samples/s": job.progress.samples_per_second,
        "left": f"{job.progress.eta:.0f} s" if job.progress.eta is not None and not job.finished else None,
        "group": [plain(member) for member in job.progress.group or ()],
        "group changes": job.progress.group_changes,
        "data set": plain(spec.dataset.reference) if spec.dataset else None,
        "further data sets": [plain(dataset.reference) for dataset in spec.datasets],
        "initialization": plain(spec.initialization.reference) if spec.initialization else None,
        "target": plain(spec.target.reference) if spec.target else spec.target_name,
        "sources": [plain(source.reference) for source in spec.sources],
        "shots": f"{spec.shots} (seed {spec.shot_seed})" if spec.shots else None,
        "seed": spec.seed,
        "preset": spec.preset,
        "options": spec.options,
        "centre": f"mean of {spec.center.size} vectors: {spec.center.rule}" if spec.center else None,
        "needs": [f"{n.id} {n.method} {plain(n.output)} {n.state}" for n in job.needed],
        "attempts": [f"{a.number} {a.state} on {a.worker}: {a.message or '-'}" for a in job.attempts],
        "by": job.actor,
        "submitted": job.created_at,
        "started": job.started_at,
        "ended": job.finished_at,
    }
