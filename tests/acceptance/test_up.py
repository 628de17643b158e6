"""`tpv up` as a real process: starts, stops, is killed, comes back."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from tests.acceptance.conftest import Up

import tpv
from tpv.schemas.initializations import Initialization

pytestmark = pytest.mark.slow

CHILDREN = 3  # guard, PostgreSQL, API


def alive_after(seconds: float, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie does not, it waits for an init process that may take its time."""
    _, left = psutil.wait_procs(processes, timeout=seconds)
    return [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def register(url: str) -> Initialization:
    with tpv.Client(url) as client:
        tensor = np.arange(6, dtype=np.float32).reshape(2, 3)
        return client.initializations.create("family", base_model="some/model", unpinned=True, tensor=tensor)


def registered(url: str) -> Initialization:
    with tpv.Client(url) as client:
        return client.initializations.get("family")


def test_stops_cleanly_on_sigterm_and_keeps_its_data(up: Callable[..., Up], place: Path) -> None:
    first = up()
    made = register(first.url)
    family = first.family()
    assert len(family) >= CHILDREN

    first.process.terminate()
    assert first.end() == 0
    assert alive_after(1, family) == []
    assert not (place / "data" / "postgres" / "postmaster.pid").exists()

    again = up()
    assert again.seconds < 20  # 5 s are promised and 2 to 3 usual; this machine may be busy
    assert registered(again.url).fingerprint == made.fingerprint


def test_ctrl_c_ends_it_well_too(up: Callable[..., Up]) -> None:
    running = up()
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 0


def test_a_second_one_says_who_runs_and_touches_nothing(up: Callable[..., Up], place: Path) -> None:
    first = up()
    lock = (place / "data" / "up.lock").read_text()

    second = subprocess.run(
        [sys.executable, "-m", "tpv.cli.main", "up", "--data-dir", str(place / "data")], capture_output=True, text=True
    )

    assert second.returncode == 1
    assert second.stdout == ""
    assert second.stderr.count("\n") == 1
    assert f"pid {first.process.pid}, {first.url}" in second.stderr
    assert (place / "data" / "up.lock").read_text() == lock
    assert httpx.get(f"{first.url}/readyz").status_code == 200


def test_kill_9_of_the_parent_takes_the_children_along(up: Callable[..., Up]) -> None:
    first = up(workers=1)
    made = register(first.url)
    while not any("tpv_worker" in " ".join(process.cmdline()) for process in first.family()):
        time.sleep(0.05)
    family = first.family()
    port = int(first.url.rsplit(":", 1)[1])

    first.process.kill()
    killed = time.monotonic()
    first.process.wait()
    again = up(port=port)  # at once, on the same port

    assert alive_after(max(0.0, 5 - (time.monotonic() - killed)), family) == []
    assert registered(again.url).fingerprint == made.fingerprint
    first.end()


def test_kill_9_of_everything_loses_nothing(up: Callable[..., Up], place: Path) -> None:
    first = up()
    made = register(first.url)
    for process in (psutil.Process(first.process.pid), *first.family()):
        process.kill()
    first.end()
    assert json.loads((place / "data" / "up.lock").read_text())["pid"] == first.process.pid

    assert registered(up().url).fingerprint == made.fingerprint


def test_children_that_die_are_started_again(up: Callable[..., Up]) -> None:
    running = up()
    made = register(running.url)

    running.child("tpv_service.server").kill()
    running.wait_for("api ended")
    assert registered(running.url).fingerprint == made.fingerprint

    running.child("bin/postgres").kill()
    running.wait_for("PostgreSQL ended")
    assert _eventually_ready(running.url)
    assert registered(running.url).fingerprint == made.fingerprint


def test_workers_share_the_cores(up: Callable[..., Up]) -> None:
    started = psutil.Process(up(workers=2).process.pid).children
    while len(workers := [one for one in started() if one.cmdline()[-1:] == ["tpv_worker"]]) < 2:
        time.sleep(0.05)
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {worker.environ()["OMP_NUM_THREADS"] for worker in workers} == {share}


def test_one_line_says_that_the_port_is_taken(up: Callable[..., Up], place: Path) -> None:
    port = up().url.rsplit(":", 1)[1]

    other = subprocess.run(
        [sys.executable, "-m", "tpv.cli.main", "up", "--data-dir", str(place / "other"), "--port", port],
        capture_output=True,
        text=True,
    )

    assert other.returncode == 1
    assert other.stderr == f"tpv: port {port} is taken; choose another with --port, or 0 for any free one\n"


def test_listens_on_loopback_only(place: Path) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "tpv.cli.main", "up", "--data-dir", str(place / "data"), "--host", "0.0.0.0"],  # noqa: S104 # the refusal is what is tested
        capture_output=True,
        text=True,
    )

    assert refused.returncode == 1
    assert "loopback only" in refused.stderr
    assert not (place / "data").exists()


def _eventually_ready(url: str) -> bool:
    for _ in range(100):
        if httpx.get(f"{url}/readyz", timeout=10).status_code == 200:
            return True
        time.sleep(0.1)
    return False
