"""`tpv combine`: a signed, weighted sum of vectors, as a version of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from tpv.cli.options import Description, Json, TagPairs, connect, pairs
from tpv.cli.output import Output, plain
from tpv.merging import MergeMethod


def combine(
    context: typer.Context,
    output: Annotated[str, typer.Argument(help="[namespace/]name of the result.")],
    terms: Annotated[
        list[str], typer.Argument(metavar="VECTOR=WEIGHT...", help="Such as mnli=1 rte@best=-0.5; a minus unlearns.")
    ],
    method: Annotated[MergeMethod, typer.Option(help="How they are merged.")] = "sum",
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="For ties: the share of each vector's values that stay.")
    ] = None,
    drop: Annotated[
        float | None, typer.Option(min=0, max=1, help="For dare: the probability that a value is dropped.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="For dare: which values are dropped.")] = None,
    initialization: Annotated[
        str | None, typer.Option("--initialization", "-i", help="The result's; needed when the terms have several.")
    ] = None,
    allow_mixed_initializations: Annotated[
        bool,
        typer.Option("--allow-mixed-initializations", help="Also vectors of other initializations of the base model."),
    ] = False,
    task: Annotated[list[str] | None, typer.Option(help="What the result is for; repeatable.")] = None,
    task_type: Annotated[str | None, typer.Option(help="Such as nli or sentiment.")] = None,
    description: Description = None,
    tags: TagPairs = None,
    as_json: Json = False,
) -> None:
    """Registers a weighted sum of vectors as the next version of a name."""
    with connect(context) as client:
        made = client.combinations.create(
            output,
            [_term(text) for text in terms],
            method=method,
            density=density,
            drop=drop,
            seed=seed,
            initialization=initialization,
            allow_mixed_initializations=allow_mixed_initializations or None,
            task=task or None,
            task_type=task_type,
            description=description,
            tags=pairs(tags, option="--tag") or None,
        )
    out = Output(as_json)
    if as_json:
        out.json(made)
        return
    out.note(f"{'registered' if made.created else 'is there already:'} {plain(made.reference)}  {made.fingerprint}")
    out.table([], ["weight", "vector", "cosine"], ([t.weight, plain(t.reference), t.cosine] for t in made.terms))
    if made.mixed_initializations:
        others = ", ".join(other.name or other.fingerprint for other in made.mixed_initializations)
        own = made.initialization.name or made.initialization.fingerprint
        out.note(f"mixed initializations: the result belongs to {own}; there are terms of {others}")


def _term(text: str) -> tuple[str, float]:
    vector, _, weight = text.rpartition("=")
    try:
        return vector, float(weight)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not written as VECTOR=WEIGHT, such as mnli=1 or rte=-0.5") from error
