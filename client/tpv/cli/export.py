"""`tpv export`: vectors for other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpv import errors, peft
from tpv.cli.options import Json, connect
from tpv.cli.output import Output, plain
from tpv.cli.vector import ReferenceArgument

app = typer.Typer(help="Vectors for other libraries.", no_args_is_help=True)


@app.command("peft")
def peft_(
    context: typer.Context,
    reference: ReferenceArgument,
    directory: Annotated[Path, typer.Argument(help="A directory that is new or empty.")],
    initialization: Annotated[
        str | None, typer.Option("--initialization", "-i", help="The P_init to add T to; default: its own.")
    ] = None,
    scale: Annotated[float, typer.Option(help="The factor on T.")] = 1.0,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed-initializations", help="Let --initialization be another one than T's own.")
    ] = False,
    task_type: Annotated[
        peft.TaskType | None, typer.Option(help="PEFT's word for the kind of model; default: as the base model is.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes the soft prompt P_init + scale * T as a directory that Hugging Face's `peft` loads."""
    with connect(context) as client:
        version = client.vectors.get(reference)
        own = client.initializations.get(version.initialization)
        start = client.initializations.get(initialization) if initialization else own
        if start.base_model.id != own.base_model.id:
            names = [own.base_model.name, start.base_model.name]
            raise errors.IncompatibleVectors(
                f"{plain(version.reference)} belongs to the base model {names[0]}, the initialization to {names[1]}",
                differences={"base_model": names},
            )
        if start.fingerprint != own.fingerprint and not allow_mixed:
            raise errors.IncompatibleVectors(
                f"{plain(version.reference)} belongs to initialization {own.name or own.fingerprint}, not to "
                f"{start.name or start.fingerprint}; to add it to that one all the same: --allow-mixed-initializations",
                differences={"initialization": [own.fingerprint, start.fingerprint]},
            )
        model = start.base_model
        kind = task_type or peft.task_type_of(model.architecture)
        path = version.load().to_peft(
            directory,
            client.initializations.load(start),
            base_model=model.name,
            revision=model.revision,
            task_type=kind,
            scale=scale,
            reference=version.reference,
            allow_mixed_initializations=allow_mixed,
        )
    facts = {
        "reference": version.reference,
        "path": str(path),
        "base_model": model.name,
        "revision": model.revision,
        "task_type": kind,
        "initialization": start.fingerprint,
        "scale": scale,
    }
    Output(as_json).line(facts, f"exported {plain(version.reference)} to {directory}, a {kind} prompt for {model.name}")
