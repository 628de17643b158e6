"""`tpv`: puts the nouns together, adds the commands of the other packages, and turns errors into one line."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

import tpv
from tpv.cli import combine, dataset, export, group, import_, init, job, similarity, vector, worker
from tpv.cli.errors import NEEDS_EXTRA, explain
from tpv.cli.options import Root

#: Commands of each package that adds some, to name what is missing when it cannot be loaded.
_ADDED = {"service": ("up", "serve", "db", "admin"), "worker": ("lab",)}


def build() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        help="The registry of task prompt vectors: store, search, group and produce them.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",  # brackets stand for themselves
    )
    app.callback()(root)
    app.add_typer(init.app, name="init")
    app.add_typer(vector.app, name="vector")
    app.add_typer(similarity.app, name="similarity")
    app.command("group")(group.group)
    app.command("combine")(combine.combine)
    app.add_typer(dataset.app, name="dataset")
    app.add_typer(job.app, name="job")
    app.add_typer(worker.app, name="worker")
    app.add_typer(import_.app, name="import")
    app.add_typer(export.app, name="export")
    for entry in entry_points(group="tpv.commands"):
        try:
            added = entry.load()
        except ImportError:
            added = typer.Typer()
            for name in _ADDED.get(entry.name, ()):
                added.command(name, hidden=True, context_settings=_ANYTHING)(_missing)
        app.add_typer(added)
    return app


_ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _missing() -> None:
    typer.echo(f"tpv: {NEEDS_EXTRA}", err=True)
    raise typer.Exit(1)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(tpv.__version__)
        raise typer.Exit


def root(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="Where the service is.", envvar="TPV_URL")] = None,
    token: Annotated[str | None, typer.Option(help="Access token; better in TPV_TOKEN.", show_envvar=False)] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The registry of task prompt vectors: store, search, group and produce them."""
    context.obj = Root(url, token)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit status is 0, 1 for an error, 2 for a command line that makes no sense."""
    try:
        build()(args=arguments, prog_name="tpv")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = explain(error)
        if line is None or os.environ.get("TPV_DEBUG"):
            raise
        typer.echo(f"tpv: {line}", err=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
