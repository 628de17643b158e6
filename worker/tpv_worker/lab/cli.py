"""`tpv lab run`: starts a registry when none is given, runs the lab on it, and prints what came out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from platformdirs import user_data_path, user_log_path

from tpv.errors import TpvError

if TYPE_CHECKING:
    from tpv_worker.lab.run import TargetResult

app = typer.Typer(help="A small world with known answers, to see the registry at work.", no_args_is_help=True)

_START = 120.0  # seconds that a new registry gets to become ready


@app.command()
def run(
    context: typer.Context,
    data_dir: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Of the registry that the lab starts; by default a folder of its own."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of that registry; 0 picks a free one.")] = 8000,
    seed: Annotated[int, typer.Option(min=0, help="Of the initialization, the data and the order of batches.")] = 0,
    shots: Annotated[int, typer.Option(min=2, help="Training rows of a target.")] = 16,
    target: Annotated[list[str] | None, typer.Option(help="A target task; repeatable. By default all five.")] = None,
) -> None:
    """Runs source tuning and DTVG transfers from an empty registry to a table.

    With --url or TPV_URL it uses that registry; else it starts one, which stays there afterwards.
    """
    from rich.console import Console

    import tpv  # imported here: `tpv --help` stays quick
    from tpv_worker.lab.run import run as run_lab
    from tpv_worker.lab.world import TARGETS, task_named

    try:
        targets = [task_named(name) for name in target] if target else TARGETS
    except ValueError as error:
        raise TpvError(f"{error}; the targets are {', '.join(t.name for t in TARGETS)}") from error
    given = context.obj.url if context.obj else None
    url, pid = (given, None) if given else _start(data_dir, port)
    started = time.monotonic()
    with tpv.Client(url, token=context.obj.token if context.obj else None) as client:
        results = run_lab(client, targets=targets, seed=seed, shots=shots)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_table(results, seed, shots))
    console.print(f"{time.monotonic() - started:.0f} s. The registry is listening at {url}")
    console.print(f"Look around: TPV_URL={url} tpv vector list --namespace lab")
    if pid:
        console.print(f"Stop it: kill {pid}")


def _start(data_dir: Path | None, port: int) -> tuple[str, int | None]:
    """Starts `tpv up` in the background, or finds the one that is running there; gives its URL and process."""
    # As root outside home, where PostgreSQL's own user may go.
    data_dir = data_dir or (Path("/var/lib/tpv-lab") if os.geteuid() == 0 else user_data_path("tpv-lab", False))
    command = [sys.executable, "-m", "tpv.cli.main", "up", "--data-dir", str(data_dir), "--port", str(port)]
    log = user_log_path("tpv", appauthor=False, ensure_exists=True) / "lab.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
        said = log.read_text()
        if "ready at " in said:
            return said.split("ready at ")[1].split()[0], process.pid
        if process.poll() is not None:
            if "already runs on" in said:
                return said.split()[-1], None
            raise TpvError(said.strip().splitlines()[-1] if said.strip() else f"the registry did not start; see {log}")
        time.sleep(0.1)
    process.terminate()
    raise TpvError(f"the registry is not ready after {_START:.0f} s; see {log}")


def _table(results: list[TargetResult], seed: int, shots: int) -> object:
    from rich.table import Table

    table = Table(title=f"Accuracy on 400 test rows, {shots} training rows, seed {seed} (CPU seconds, target steps)")
    for column in ("target", "majority", "prompt tuning", "prompt tuning, steps of both stages", "DTVG", "its group"):
        table.add_column(column, justify="left" if column in ("target", "its group") else "right")
    for result in results:
        figures = {
            "prompt-tuning": result.prompt_tuning,
            "prompt-tuning-long": result.prompt_tuning_long,
            "dtvg": result.dtvg,
        }
        table.add_row(
            result.target.name,
            f"{result.majority:.1%}",
            *(
                f"{value:.1%} ({result.cpu_seconds[name]:.1f} s, {result.steps[name]:.0f})"
                for name, value in figures.items()
            ),
            "\n".join(f"{name} ({kind})" for name, kind in result.group.items()) or "nobody",
        )
    table.add_section()
    columns = zip(*((r.majority, r.prompt_tuning, r.prompt_tuning_long, r.dtvg) for r in results), strict=True)
    table.add_row("mean", *(f"{sum(column) / len(results):.1%}" for column in columns))
    return table
