"""Commands of whoever runs the service: `tpv up`, `serve`, `db`, `admin token`."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, cast

import typer

from tpv.cli.options import Json
from tpv.cli.output import Output
from tpv.errors import TpvError
from tpv.schemas.tokens import SCOPES, Scope

if TYPE_CHECKING:
    # SQLAlchemy, FastAPI and PostgreSQL are imported by the commands that use them: `tpv --help` stays quick.
    from sqlalchemy.ext.asyncio import AsyncSession

    from tpv_service.settings import Settings

T = TypeVar("T")

app = typer.Typer()
db = typer.Typer(help="The schema of the database in TPV_DATABASE_URL.", no_args_is_help=True)
admin = typer.Typer(help="What an administrator does on the machine of the service.", no_args_is_help=True)
token = typer.Typer(help="Access tokens.", no_args_is_help=True)
app.add_typer(db, name="db")
app.add_typer(admin, name="admin")
admin.add_typer(token, name="token")


@app.command()
def up(
    data_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Where everything is kept; by default the user's data folder.")
    ] = None,
    host: Annotated[str, typer.Option(help="A loopback address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=0, help="Processes that run jobs, one job each at a time.")] = 1,
    model_directory: Annotated[
        list[Path] | None,
        typer.Option(exists=True, file_okay=False, help="Jobs may load models from below it; repeatable."),
    ] = None,
) -> None:
    """Runs the whole registry here, with a database of its own, until Ctrl-C."""
    from tpv_service.embedded import stack

    stack.up(
        data_dir or stack.default_data_dir(),
        host=host,
        port=port,
        workers=workers,
        model_directories=model_directory or [],
        say=typer.echo,
    )


@app.command()
def serve() -> None:
    """Runs the API with the settings of the environment (TPV_DATABASE_URL ...); migrate first: tpv db upgrade."""
    from tpv_service import migrate, server
    from tpv_service.auth.tokens import any_token

    settings = _settings()
    with _database_errors():
        if not migrate.is_current(settings.database_url.get_secret_value()):
            raise TpvError("the database has not the schema of this release; bring it there with: tpv db upgrade")
    if not server.is_loopback(settings.host):
        if not settings.authentication:
            raise TpvError(f"TPV_AUTHENTICATION=false is for loopback only, and TPV_HOST is {settings.host}")
        if settings.initial_token is None and not _in_session(settings, any_token):
            raise TpvError(
                f"TPV_HOST is {settings.host} and there is no token yet: set TPV_INITIAL_TOKEN, or make one with: "
                "tpv admin token create"
            )
    with server.listen(settings.host, settings.port) as listener:
        typer.echo(f"listening at {server.url_of(listener)}")
        server.serve(settings, listener)


@db.command("upgrade")
def upgrade(revision: Annotated[str, typer.Argument(help="How far.")] = "head") -> None:
    """Applies the migrations that are missing."""
    from tpv_service import migrate

    with _database_errors():
        migrate.upgrade(_settings().database_url.get_secret_value(), revision)


@db.command("downgrade")
def downgrade(revision: Annotated[str, typer.Argument(help="The revision to go back to, or `base`.")]) -> None:
    """Takes migrations back; what only the newer schema holds is lost."""
    from tpv_service import migrate

    with _database_errors():
        migrate.downgrade(_settings().database_url.get_secret_value(), revision)


@db.command("check")
def check() -> None:
    """Exit status 0 if the database has the schema of this release."""
    from tpv_service import migrate

    with _database_errors():
        current = migrate.is_current(_settings().database_url.get_secret_value())
    if not current:
        raise TpvError("the database has not the schema of this release; bring it there with: tpv db upgrade")
    typer.echo("the database has the schema of this release")


@admin.command("verify")
def verify(as_json: Json = False) -> None:
    """Reads every stored file and compares it with its digest; exit status 1 when one is missing or damaged."""
    from tpv_service.storage import create_store
    from tpv_service.verify import damaged_files

    settings = _settings()
    count, problems = _in_session(settings, lambda session: damaged_files(session, create_store(settings)))
    Output(as_json).line({"files": count, "problems": problems}, "\n".join([*problems, f"{count} files read"]))
    if problems:
        raise typer.Exit(1)


@token.command("create")
def create_token(
    name: str,
    scope: Annotated[list[str], typer.Option(help=f"What it allows: {', '.join(SCOPES)}; repeatable.")],
    days: Annotated[int | None, typer.Option(min=1, help="Valid for so long; else until it is revoked.")] = None,
    as_json: Json = False,
) -> None:
    """Makes a token and prints it, this once."""
    from tpv_service.auth import tokens

    if unknown := sorted(set(scope) - set(SCOPES)):
        raise typer.BadParameter(f"{', '.join(unknown)}: not one of {', '.join(SCOPES)}", param_hint="--scope")
    scopes = cast("list[Scope]", scope)
    lifetime = timedelta(days=days) if days else None
    made = _in_session(
        _settings(),
        lambda session: tokens.create_token(
            session, name=name, scopes=scopes, created_by=getpass.getuser(), lifetime=lifetime
        ),
    )
    Output(as_json).line({"name": name, "token": made}, made)


@token.command("list")
def list_tokens(as_json: Json = False) -> None:
    """Lists the tokens: never their secrets."""
    from tpv_service.auth import tokens

    columns = ("name", "scopes", "created_by", "created_at", "expires_at", "revoked_at")
    found = _in_session(_settings(), tokens.list_tokens)
    rows = [{column: getattr(row, column) for column in columns} for row in found]
    Output(as_json).table(rows, [column.replace("_", " ") for column in columns], [list(row.values()) for row in rows])


@token.command("revoke")
def revoke_token(name: str) -> None:
    """Makes a token worthless at once."""
    from tpv_service.auth import tokens

    _in_session(_settings(), lambda session: tokens.revoke_token(session, name))
    typer.echo(f"revoked {name}")


def _settings() -> Settings:
    from pydantic import ValidationError

    from tpv_service.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        problems = (f"{'_'.join(('TPV', *map(str, e['loc']))).upper()}: {e['msg']}" for e in error.errors())
        raise TpvError("; ".join(problem.removeprefix("TPV: ") for problem in problems)) from error


def _in_session(settings: Settings, action: Callable[[AsyncSession], Awaitable[T]]) -> T:
    """Runs the action in one transaction."""
    from tpv_service.db import create_engine, create_sessionmaker

    async def run() -> T:
        engine = create_engine(settings)
        try:
            async with create_sessionmaker(engine).begin() as session:
                return await action(session)
        finally:
            await engine.dispose()

    with _database_errors():
        return asyncio.run(run())


@contextmanager
def _database_errors() -> Iterator[None]:
    """The driver's errors as one line."""
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except DBAPIError as error:
        raise TpvError(f"the database refuses: {' '.join(str(error.orig).split())}; see TPV_DATABASE_URL") from error
