"""`tpv import`: soft prompts that other software has tuned, as versions of the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tpv import errors, files, peft, torch_files
from tpv._sync.client import Client
from tpv.cli.options import Json, connect
from tpv.cli.output import Output, plain
from tpv.schemas.initializations import Initialization
from tpv.schemas.vectors import Version
from tpv.vectors import Float32

app = typer.Typer(help="Soft prompts that other software has tuned.", no_args_is_help=True)

NameArgument = Annotated[
    str | None,
    typer.Argument(help="[namespace/]name to register it under; default: that of the directory or file."),
]
InitializationOption = Annotated[
    str | None,
    typer.Option("--initialization", "-i", help="Name, id or fingerprint; with --init-file, the name that it gets."),
]
InitFile = Annotated[
    Path | None,
    typer.Option(
        help="The initialization itself, registered first: a PEFT directory, a safetensors file, or a .pt or .bin file."
    ),
]
BaseModelOption = Annotated[str | None, typer.Option(help="Of --init-file: hub id, or a directory.")]
Revision = Annotated[str | None, typer.Option(help="Of --init-file: commit of the hub id.")]
Unpinned = Annotated[bool, typer.Option("--unpinned", help="Of --init-file: accept a model without a commit.")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="What it was tuned for; repeatable.")]


@app.command("peft")
def peft_(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="What `save_pretrained` of a PEFT model has written.")],
    name: NameArgument = None,
    initialization: InitializationOption = None,
    init_file: InitFile = None,
    base_model: BaseModelOption = None,
    revision: Revision = None,
    unpinned: Unpinned = False,
    task: Tasks = None,
    as_json: Json = False,
) -> None:
    """Registers the soft prompt of a PEFT directory; rows that the model never reads are left out."""
    prompt = peft.read(directory)
    config, vector = prompt.config, prompt.vector
    if init_file is None:
        initialization = initialization or prompt.initialization
    model = {"base_model": base_model or config.base_model_name_or_path, "unpinned": unpinned}
    model["revision"] = revision or (None if base_model else config.revision)
    provenance = {
        "imported_from": "peft",
        "adapter_config": config.model_dump(exclude_unset=True),
        "dead_rows": prompt.dead_rows,
        **({"exported_from": prompt.reference} if prompt.reference else {}),
    }
    with connect(context) as client:
        start = _initialization(
            client,
            initialization,
            init_file,
            shape=prompt.tensor.shape,
            dead_rows=prompt.dead_rows,
            expected=prompt.initialization,
            model=model,
        )
        version = client.vectors.register(
            name or directory.resolve().name,
            prompt=prompt.tensor if vector is None else None,
            vector=vector,
            initialization=start,
            task=task or None,
            provenance=provenance,
        )
    out = Output(as_json)
    if vector is not None:
        out.note(f"this is the vector of {plain(prompt.reference) or 'an export'}, bit for bit")
    elif prompt.reference:
        out.note(f"the prompt was changed after {plain(prompt.reference)} was exported: it is a new one")
    if config.base_model_name_or_path not in (None, start.base_model.name):
        out.note(
            f"mind: the adapter was made for {config.base_model_name_or_path!r}, "
            f"the initialization is of {start.base_model.name!r}"
        )
    _report(out, version, prompt.tensor.shape[0], prompt.dead_rows, exported_from=prompt.reference)


@app.command("pt")
def pt(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A .pt or .bin file: a tensor, or a dict with prompt_embeddings.")],
    kind: Annotated[Literal["prompt", "vector"], typer.Option("--as", help="prompt: it is P*; vector: it is T.")],
    name: NameArgument = None,
    live_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The first N rows are those that the model reads. Required, unless the file has as many rows as the "
            "registry's initialization.",
        ),
    ] = None,
    initialization: InitializationOption = None,
    init_file: InitFile = None,
    base_model: BaseModelOption = None,
    revision: Revision = None,
    unpinned: Unpinned = False,
    task: Tasks = None,
    as_json: Json = False,
) -> None:
    """Registers the soft prompt P* or the vector T of a file of torch; nothing in the file is run."""
    tensor = torch_files.read(file)
    rows, width = tensor.shape
    if live_rows is None and init_file is not None:
        raise typer.BadParameter(
            f"{file} does not say how many of its {rows} rows the model reads: for a T5 prompt of PEFT it is the first "
            "half",
            param_hint="--live-rows",
        )
    live = live_rows or rows
    if live > rows:
        raise typer.BadParameter(f"{file} has {rows} rows", param_hint="--live-rows")
    with connect(context) as client:
        start = _initialization(
            client,
            initialization,
            init_file,
            shape=(live, width),
            dead_rows=rows - live,
            hint="" if live_rows else "; if the model reads only the first of them: tpv import pt --live-rows N",
            model={"base_model": base_model, "revision": revision, "unpinned": unpinned},
        )
        version = client.vectors.register(
            name or file.resolve().name.partition(".")[0],
            prompt=tensor[:live] if kind == "prompt" else None,
            vector=tensor[:live] if kind == "vector" else None,
            initialization=start,
            task=task or None,
            provenance={"imported_from": "pt", "file": file.name, "as": kind, "dead_rows": rows - live},
        )
    _report(Output(as_json), version, live, rows - live)


def _initialization(
    client: Client,
    reference: str | None,
    file: Path | None,
    *,
    shape: tuple[int, ...],
    dead_rows: int,
    hint: str = "",
    expected: str | None = None,
    model: dict[str, Any],
) -> Initialization:
    """The initialization of a prompt of this shape: from the registry, or registered from a file, dead rows left out.

    Raises IncompatibleVectors when it has another shape (the text ends with the hint), or another fingerprint than the
    expected one.
    """
    if file is None:
        if reference is None:
            raise typer.BadParameter(
                "name the initialization that the prompt was tuned from, or give its tensor with --init-file",
                param_hint="--initialization",
            )
        found = client.initializations.get(reference)
        there = (found.num_virtual_tokens, found.token_dim)
        if there == (shape[0] + dead_rows, shape[1]):
            hint = f"; its last {dead_rows} are dead rows too, register the others: tpv import peft --init-file FILE"
        _check_shape(f"initialization {reference}", there, shape, hint)
        _check_own(found.fingerprint, expected)
        return found
    if not model["base_model"]:
        raise typer.BadParameter("name the model that --init-file belongs to", param_hint="--base-model")
    start = _read_start(file)
    if len(start) == shape[0] + dead_rows:
        start = start[: shape[0]]
    _check_shape(str(file), start.shape, shape, hint)
    _check_own(files.fingerprint(start), expected)
    return client.initializations.create(reference, tensor=start, **model)


def _check_shape(what: str, found: tuple[int, ...], shape: tuple[int, ...], hint: str) -> None:
    if found != shape:
        raise errors.IncompatibleVectors(
            f"the prompt has {shape[0]} rows of width {shape[1]}, {what} has {found[0]} of width {found[1]}{hint}",
            differences={"shape": [list(shape), list(found)]},
        )


def _check_own(found: str, expected: str | None) -> None:
    if expected not in (None, found):
        raise errors.IncompatibleVectors(
            f"the exported vector belongs to the initialization {expected}, this one is {found}; to import the prompt "
            "with another one, remove tpv.json from the directory",
            differences={"initialization": [expected, found]},
        )


def _read_start(path: Path) -> Float32:
    """The tensor of an initialization, dead rows included when its file has them."""
    if path.is_dir():
        return peft.read(path).tensor
    if path.suffix in (".pt", ".pth", ".bin"):
        return torch_files.read(path)
    tensors = files.read(path)
    for name in ("prompt", "prompt_embeddings"):
        if name in tensors:
            return tensors[name]
    raise errors.InvalidTensor(f"{path} has no tensor `prompt`; it has: {', '.join(tensors) or 'none'}")


def _report(out: Output, version: Version, live: int, dead: int, **facts: Any) -> None:
    if dead:
        out.note(f"kept the first {live} of {live + dead} rows: the model reads no others")
    what = "registered" if version.created else "is there already:"
    out.line(
        {**version.model_dump(mode="json"), "live_rows": live, "dead_rows": dead, **facts},
        f"{what} {plain(version.reference)}  {version.fingerprint}",
    )
