"""`tpv init`: the soft prompts that tuning starts from."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from tpv import files
from tpv.cli.job import follow
from tpv.cli.options import Json, Limit, Namespace, connect
from tpv.cli.output import Output, short
from tpv.errors import InvalidTensor
from tpv.schemas.initializations import Initialization

app = typer.Typer(help="Initializations: the soft prompts that tuning starts from.", no_args_is_help=True)


@app.command("create")
def create(
    context: typer.Context,
    base_model: Annotated[str, typer.Option(help="Hub id, or a directory that workers may read.")],
    name: Annotated[str | None, typer.Argument(help="[namespace/]name; none: known by its fingerprint only.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the hub id.")] = None,
    unpinned: Annotated[bool, typer.Option("--unpinned", help="Accept a model without a commit.")] = False,
    file: Annotated[
        Path | None, typer.Option(help="Safetensors file with the tensor `prompt`; none: a worker draws one.")
    ] = None,
    num_virtual_tokens: Annotated[int | None, typer.Option(min=1, help="Rows r of the soft prompt.")] = None,
    strategy: Annotated[str | None, typer.Option(help="random-vocab, random-uniform or text.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    top_k: Annotated[int | None, typer.Option(min=1, help="random-vocab: token ids below this.")] = None,
    value_range: Annotated[
        float | None, typer.Option("--range", help="random-uniform: values in [-range, range).")
    ] = None,
    text: Annotated[str | None, typer.Option(help="text: whose tokens to take.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the worker.")] = True,
    as_json: Json = False,
) -> None:
    """Uploads an initialization, or has a worker draw one from the base model."""
    drawn: dict[str, Any] = {
        "num_virtual_tokens": num_virtual_tokens,
        "strategy": strategy,
        "top_k": top_k,
        "range": value_range,
    }
    options = {key: value for key, value in {**drawn, "text": text}.items() if value is not None}
    out = Output(as_json)
    with connect(context) as client:
        if file is not None:
            if options or seed:
                raise typer.BadParameter("the tensor is drawn already; leave out how to draw it", param_hint="--file")
            tensors = files.read(file)
            if "prompt" not in tensors:
                raise InvalidTensor(f"{file} has no tensor `prompt`; it has: {', '.join(tensors) or 'none'}")
            found = client.initializations.create(
                name,
                base_model=base_model,
                revision=revision,
                unpinned=unpinned,
                tensor=tensors["prompt"],
                progress=sys.stderr.isatty(),
            )
        else:
            job = client.jobs.initialize(
                name, base_model=base_model, revision=revision, unpinned=unpinned, seed=seed, **options
            )
            if not wait:
                out.line(job, f"job {job.id} is {job.state}; watch it with: tpv job watch {job.id}")
                return
            follow(client, [job])
            found = client.initializations.get(str(job.result))
            found.created = bool(job.result_created)
        out.record(found, _members(found))


@app.command("list")
def list_(
    context: typer.Context,
    namespace: Namespace = None,
    base_model: Annotated[str | None, typer.Option(help="Only of this base model.")] = None,
    limit: Limit = 100,
    as_json: Json = False,
) -> None:
    """Lists initializations."""
    with connect(context) as client:
        found = list(islice(client.initializations.list(namespace=namespace, base_model=base_model), limit))
    Output(as_json).table(
        found,
        ["name", "base model", "r", "d", "strategy", "fingerprint", "created"],
        ([_name(i), i.base_model.name, i.num_virtual_tokens, i.token_dim, i.strategy,
          short(i.fingerprint), i.created_at] for i in found),
        empty="no initializations yet; make one with: tpv init create NAME --base-model MODEL",
    )  # fmt: skip


@app.command("show")
def show(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(help="Name, id or fingerprint.")],
    as_json: Json = False,
) -> None:
    """Shows one initialization."""
    with connect(context) as client:
        found = client.initializations.get(reference)
    Output(as_json).record(found, _members(found))


def _name(found: Initialization) -> str:
    return (f"{found.namespace}/{found.name}" if found.name else str(found.id)).removeprefix("default/")


def _members(found: Initialization) -> dict[str, object]:
    model = found.base_model
    marks = [*(["unpinned"] if model.unpinned else []), *([] if model.verified else ["unverified"])]
    return {
        "name": _name(found),
        "id": found.id,
        "fingerprint": found.fingerprint,
        "base model": " ".join(
            [model.name, *([f"at {model.revision}"] if model.revision else []), *map("({})".format, marks)]
        ),
        "shape": f"{found.num_virtual_tokens} x {found.token_dim}",
        "strategy": found.strategy,
        "drawn with": found.parameters,
        "by": found.actor,
        "created": found.created_at,
    }
