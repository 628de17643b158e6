"""`tpv worker`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from tpv.cli import worker as others
from tpv_worker.lab import cli as lab

app = typer.Typer()
app.add_typer(lab.app, name="lab")
group = typer.Typer(invoke_without_command=True, subcommand_metavar="[list]")
group.command("list")(others.list_)
app.add_typer(group, name="worker")


@group.callback()
def worker(
    context: typer.Context,
    queues: Annotated[
        str | None, typer.Option(help="Queues to take jobs from, separated by commas; none: all.")
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Attempts at a time; by default one for each device or group of --processes."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="What to train on: cpu (the default), cuda:1, or cuda for every visible GPU.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="GPUs, with --device cuda, that train one attempt together; by default 1.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="How this worker is shown; by default host:pid.")] = None,
    grace: Annotated[
        float | None, typer.Option(min=0, help="Seconds that running attempts have to end when the worker is stopped.")
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="What one attempt may take of its device's memory, such as 24GB; by default all.")
    ] = None,
    model_directory: Annotated[
        list[Path] | None,
        typer.Option(exists=True, file_okay=False, help="Jobs may load models from below it; repeatable."),
    ] = None,
) -> None:
    """Runs jobs until Ctrl-C or SIGTERM. Where from and as whom: TPV_URL, TPV_TOKEN, TPV_QUEUE_URL."""
    if context.invoked_subcommand is not None:
        return
    from pydantic import ValidationError  # imported here: `tpv --help` stays quick

    from tpv.errors import TpvError
    from tpv_worker.settings import Settings
    from tpv_worker.worker import run_worker

    given: dict[str, Any] = {
        "queues": queues,
        "concurrency": concurrency,
        "device": device,
        "processes": processes,
        "name": name,
        "grace": grace,
        "memory_limit": memory_limit,
        "model_directories": model_directory,
    }
    try:
        settings = Settings(**{option: value for option, value in given.items() if value not in (None, [], "")})
    except ValidationError as error:
        problems = (f"{'_'.join(('TPV', *map(str, e['loc']))).upper()}: {e['msg']}" for e in error.errors())
        raise TpvError("; ".join(problems)) from error
    asyncio.run(run_worker(settings))
