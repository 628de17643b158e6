"""`tpv lab run`: starts a registry when none is given, runs the lab on it, prints what came out and keeps it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from platformdirs import user_data_path, user_log_path

from tpv.errors import TpvError

if TYPE_CHECKING:
    from tpv_worker.lab.run import SeedFigures

app = typer.Typer(help="A small world with known answers, to see the registry at work.", no_args_is_help=True)

_START = 120.0  # seconds that a new registry gets to become ready
# One worker with a job for each core, which share its memory; a model this small gains nothing from a second thread.
_WORKER = {"TPV_THREADS": "1", "TPV_CONCURRENCY": str(min(os.cpu_count() or 1, 8))}


@app.command()
def run(
    context: typer.Context,
    seeds: Annotated[
        str, typer.Option(help="Of initializations, data and the order of batches: 0, 0-4, or 1,3,8.")
    ] = "0",
    shots: Annotated[int, typer.Option(min=2, help="Training rows of a target.")] = 24,
    methods: Annotated[str, typer.Option(help="Commas between: methods and variants, `few` or `all`.")] = "few",
    targets: Annotated[str, typer.Option(help="Commas between: target tasks, `few` or `all`.")] = "few",
    sources: Annotated[str, typer.Option(help="Commas between: source tasks, `few` or `all`.")] = "few",
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Where all figures are stored.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Of the registry that the lab starts; by default a folder of its own."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of that registry; 0 picks a free one.")] = 8000,
) -> None:
    """Runs source tuning and transfers from an empty registry to a table for each target.

    With --url or TPV_URL it uses that registry; else it starts one, which stays there afterwards.
    """
    from rich.console import Console

    import tpv  # imported here: `tpv --help` stays quick
    from tpv_worker.lab import REVISION, tables, world
    from tpv_worker.lab.run import CONTENDERS, DEFAULT_CONTENDERS
    from tpv_worker.lab.run import run as run_lab

    chosen = {
        "sources": _chosen(sources, "sources", {"few": world.FEW_SOURCES, "all": [t.name for t in world.SOURCES]}),
        "targets": _chosen(targets, "targets", {"few": world.FEW_TARGETS, "all": [t.name for t in world.TARGETS]}),
        "methods": _chosen(methods, "methods", {"few": DEFAULT_CONTENDERS, "all": [*CONTENDERS]}),
    }
    numbers = _numbers(seeds)
    json_file = json_file or user_data_path("tpv", appauthor=False) / "lab" / f"seeds-{seeds}-shots-{shots}.json"
    json_file.parent.mkdir(parents=True, exist_ok=True)
    # A reference pool is larger than the sources, and separate from them.
    reference = world.REFERENCE[: 16 if len(chosen["sources"]) < 16 else 32]

    asked = context.obj.url if context.obj else None
    url, pid = (asked, None) if asked else _start(data_dir, port)
    figures: list[SeedFigures] = []
    with tpv.Client(url, token=context.obj.token if context.obj else None) as client:
        for seed in numbers:
            figures.append(
                run_lab(
                    client,
                    seed=seed,
                    shots=shots,
                    sources=[world.task_named(name) for name in chosen["sources"]],
                    targets=[world.task_named(name) for name in chosen["targets"]],
                    contenders=chosen["methods"],
                    reference=reference,
                )
            )
            kept = {"model": REVISION, "shots": shots, **chosen, "seeds": [asdict(each) for each in figures]}
            json_file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    console = Console(width=None if sys.stdout.isatty() else 140)
    for target in chosen["targets"]:
        console.print(tables.of_target(figures, target))
    console.print(tables.of_all(figures))
    for metric in figures[0].similarity:
        console.print(tables.of_similarity(figures, metric))
        console.print(tables.on_similarity(figures, metric))
    console.print(f"{sum(each.seconds for each in figures):.0f} s. All figures: {json_file}")
    console.print(f"The registry is listening at {url}. Look around: TPV_URL={url} tpv vector list --namespace lab")
    if pid:
        console.print(f"Stop it: kill {pid}")


def _chosen(text: str, what: str, sets: Mapping[str, Sequence[str]]) -> list[str]:
    """The names in a list with commas; the name of a set stands for its members."""
    names = [name for word in text.split(",") for name in sets.get(word, [word])]
    if unknown := [name for name in names if name not in sets["all"]]:
        raise TpvError(f"the lab has no {unknown[0]!r}; its {what} are {', '.join(sets['all'])}")
    return list(dict.fromkeys(names))


def _numbers(text: str) -> list[int]:
    """`0`, `0-4` or `1,3,8` as numbers."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise TpvError(f"seeds are numbers, ranges of them, and commas between: 0, 0-4 or 1,3,8; not {text!r}")
    ranges = [part.partition("-") for part in text.split(",")]
    return [seed for first, _, last in ranges for seed in range(int(first), int(last or first) + 1)]


def _start(data_dir: Path | None, port: int) -> tuple[str, int | None]:
    """Starts `tpv up` in the background, or finds the one that is running there; gives its URL and process."""
    # As root outside home, where PostgreSQL's own user may go.
    data_dir = data_dir or (Path("/var/lib/tpv-lab") if os.geteuid() == 0 else user_data_path("tpv-lab", False))
    command = [sys.executable, "-m", "tpv.cli.main", "up", "--data-dir", str(data_dir), "--port", str(port)]
    log = user_log_path("tpv", appauthor=False, ensure_exists=True) / f"lab-{port}.log"
    with log.open("ab") as output:  # the registry that is running there may write to it
        begin = output.tell()
        process = subprocess.Popen(
            command,
            env=_WORKER | os.environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
        said = log.read_bytes()[begin:].decode(errors="replace")
        if "ready at " in said:
            return said.split("ready at ")[1].split()[0], process.pid
        if process.poll() is not None:
            if "already runs on" in said:
                return said.split()[-1], None
            raise TpvError(said.strip().splitlines()[-1] if said.strip() else f"the registry did not start; see {log}")
        time.sleep(0.1)
    process.terminate()
    raise TpvError(f"the registry is not ready after {_START:.0f} s; see {log}")
