"""Child processes that never outlive this one, however it ends, and their bounded logs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from types import TracebackType
from typing import Self

from tpv_service.embedded import EmbeddedError

_LOG_LIMIT = 10 * 1024**2  # bytes of one log; the part before it is kept as NAME.log.1

# The guard reads a pipe whose only writing end is in this process: end of file means that this process is gone, also
# by kill -9. It leads the process group of all children, so it needs no list of them. TERM asks everybody to stop
# (PostgreSQL then waits for its clients, which stop at the same time), INT makes PostgreSQL stop in any case, KILL
# ends what is left after 2 s (PostgreSQL recovers from that, too). Why not PR_SET_PDEATHSIG: it exists on Linux only,
# fires when the starting *thread* ends, and needs Python code between fork and exec. This is the same on macOS.
_GUARD = 'trap "" INT TERM HUP; read -r _; kill -TERM 0; sleep 1; kill -INT 0; sleep 1; kill -KILL 0'


@dataclass(frozen=True)
class Account:
    """The system user that a child runs as."""

    uid: int
    gid: int


class ProcessGroup:
    """Starts children in a process group of their own, which a Ctrl-C in the terminal does not reach."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        self.log_dir.mkdir(mode=0o700, exist_ok=True)
        reading, self._pipe = os.pipe()
        self._guard = subprocess.Popen(["sh", "-c", _GUARD], stdin=reading, process_group=0, cwd="/")
        os.close(reading)

    def close(self) -> None:
        """Kills whatever is left of the group; callers stop their children in order before this."""
        if self._guard:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()
            self._guard = None
            os.close(self._pipe)

    def start(
        self,
        name: str,
        args: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        account: Account | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Starts a program whose output goes to NAME.log."""
        if self._guard is None:
            raise RuntimeError("the group is not open")
        log = self.log(name)
        bound_log(log)
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as output:
            return subprocess.Popen(
                args,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd="/" if account else None,  # which another user might not be allowed to enter
                process_group=self._guard.pid,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
                pass_fds=pass_fds,
            )

    def run(self, name: str, args: Sequence[str | Path], *, env: Mapping[str, str], account: Account | None) -> None:
        """Runs a program to its end. Raises EmbeddedError when it fails."""
        process = self.start(name, args, env=env, account=account)
        try:
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status:
            raise EmbeddedError(f"{Path(args[0]).name} failed: {last_line(self.log(name))} (more in {self.log(name)})")

    def log(self, name: str) -> Path:
        return self.log_dir / f"{name}.log"


def stop(process: subprocess.Popen[bytes], *, first: signal.Signals, patience: float) -> None:
    """Asks a child to end and kills it after `patience` seconds."""
    process.send_signal(first)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cores() -> int:
    """Those that this process and its children may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bound_log(log: Path) -> None:
    """Moves the content of a long log aside. Its writers go on: they append to the same, now empty, file."""
    if log.exists() and log.stat().st_size > _LOG_LIMIT:
        copyfile(log, log.with_name(log.name + ".1"))
        os.truncate(log, 0)


def last_line(log: Path) -> str:
    """The last thing a program said: what an error message shows of its log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"
