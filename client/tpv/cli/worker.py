"""`tpv worker list`: who takes jobs from the queue."""

from __future__ import annotations

import typer
from pydantic import ByteSize

from tpv.cli.errors import NEEDS_EXTRA
from tpv.cli.options import Json, connect
from tpv.cli.output import Output
from tpv.schemas.workers import Worker

app = typer.Typer(help="Workers: a process that runs jobs, and who the others are.", invoke_without_command=True)


@app.callback()
def worker(context: typer.Context) -> None:
    """Who takes jobs from the queue; running one needs the extra `worker`."""
    if context.invoked_subcommand is None:
        typer.echo(f"tpv: {NEEDS_EXTRA}", err=True)
        raise typer.Exit(1)


@app.command("list")
def list_(context: typer.Context, as_json: Json = False) -> None:
    """Lists workers: where they run, what they can do, and which jobs they work on."""
    with connect(context) as client:
        found = list(client.workers.list())
    Output(as_json).table(
        found,
        ["worker", "state", "device", "memory", "queues", "jobs", "last seen"],
        ([w.name, w.state, w.device, _memory(w), w.queues or "all", _busy(w), w.last_seen] for w in found),
        empty="no workers; start one with: tpv worker",
    )


def _memory(worker: Worker) -> str:
    return ByteSize(worker.memory).human_readable(decimal=True) if worker.memory else ""


def _busy(worker: Worker) -> str:
    return f"{len(worker.jobs)}/{worker.concurrency}"
