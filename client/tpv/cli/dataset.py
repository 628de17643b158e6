"""`tpv dataset`: uploaded text-to-text data."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from tpv.cli.options import Description, Json, Limit, Namespace, connect
from tpv.cli.output import Output, plain, short

app = typer.Typer(help="Data sets: JSON Lines with `source` and `target`, one file a split.", no_args_is_help=True)

SplitOption = Annotated[Path | None, typer.Option(help="JSON Lines file.")]


@app.command("upload")
def upload(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="[namespace/]name.")],
    train: Annotated[Path, typer.Option(help="JSON Lines file.")],
    validation: SplitOption = None,
    test: SplitOption = None,
    label_words: Annotated[
        list[str] | None, typer.Option("--label-word", help="An answer to choose among; repeatable, at least two.")
    ] = None,
    metric: Annotated[str, typer.Option(help="How answers are judged.")] = "accuracy",
    description: Description = None,
    as_json: Json = False,
) -> None:
    """Uploads the splits as the next version of a name."""
    with connect(context) as client:
        found = client.datasets.upload(
            name,
            train=train,
            validation=validation,
            test=test,
            label_words=label_words or None,
            metric=metric,
            description=description,
            progress=sys.stderr.isatty() and not as_json,
        )
    what = "uploaded" if found.created else "is there already:"
    rows = ", ".join(f"{split.name} {split.rows} rows" for split in found.splits)
    Output(as_json).line(found, f"{what} {plain(found.reference)} ({rows})")


@app.command("list")
def list_(context: typer.Context, namespace: Namespace = None, limit: Limit = 100, as_json: Json = False) -> None:
    """Lists data sets, the newest version of each."""
    with connect(context) as client:
        found = list(islice(client.datasets.list(namespace=namespace), limit))
    Output(as_json).table(
        found,
        ["name", "rows", "label words", "metric", "fingerprint", "created"],
        ([plain(d.reference), {s.name: s.rows for s in d.splits}, d.label_words, d.metric,
          short(d.fingerprint), d.created_at] for d in found),
        empty="no data sets; upload one with: tpv dataset upload NAME --train FILE",
    )  # fmt: skip
