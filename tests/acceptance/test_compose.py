"""docker-compose.yml and .env.example: what the compose specification and a lab ask of them."""

from __future__ import annotations

import graphlib
import os
import re
import tomllib

import pytest
from pydantic import ByteSize, TypeAdapter
from tests.acceptance.compose import COMPOSE, ENV_EXAMPLE, ONE_SHOT, OURS, ROOT, SERVICES, interpolate, variables_of

from tpv_service.settings import Settings as ServiceSettings

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Of the specification, what is used here; a key with a typo in it would be an error of Compose.
SERVICE_KEYS = {
    *("build", "command", "depends_on", "deploy", "environment", "healthcheck", "image", "init", "ports", "profiles"),
    *("pull_policy", "restart", "stop_grace_period", "shm_size", "volumes"),
}
HEALTHCHECK_KEYS = {"test", "interval", "timeout", "retries", "start_period"}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
DURATION = re.compile(r"(\d+(us|ms|s|m|h))+")
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN")


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
