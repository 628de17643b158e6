"""What was acknowledged survives kill -9 of everything; writers of one name never lose or repeat a number.

More rounds than the suite has, from the root of the repository: python -m tests.acceptance.test_durability 20
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.acceptance.conftest import Up, reachable_directory

from tpv import Client, VectorVersion, files
from tpv.errors import ConnectionFailed, NotFound, Unavailable
from tpv.vectors import Float32

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROUNDS = 3
SEED = 2
THREADS = 20
NAMES = ("one", "two", "three", "four")
SHAPE = (20, 256)
FIGURE = {"dataset": "some/data", "metric": "accuracy", "value": 0.5}


@dataclass
class Ledger:
    """What the writers know: everything that they sent, and what was acknowledged."""

    sent: dict[str, Float32] = field(default_factory=dict)  #: by fingerprint
    acknowledged: dict[tuple[str, int], str] = field(default_factory=dict)  #: fingerprint by name and number
    adding: threading.Lock = field(default_factory=threading.Lock)

    def register(self, client: Client, name: str, tensor: Float32) -> None:
        self.sent[files.fingerprint(tensor)] = tensor
        version = client.vectors.register(name, vector=tensor, initialization="family", metrics=[FIGURE])
        with self.adding:
            assert version.created
            assert (name, version.version) not in self.acknowledged
            self.acknowledged[name, version.version] = version.fingerprint


@dataclass(frozen=True, kw_only=True)
class Round:
    """One kill, and what was there after it."""

    delay: float  #: seconds that the writers wrote
    processes: int  #: that were killed
    restart: float  #: seconds until `tpv up` was ready again
    acknowledged: int  #: registrations, of this and all earlier rounds
    versions: int  #: found then


def make_initialization(client: Client) -> None:
    tensor = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    client.initializations.create("family", base_model="some/model", unpinned=True, tensor=tensor)


def kill_tree(running: Up, draws: np.random.Generator) -> int:
    """SIGKILL to `tpv up` and every process below it, in any order; gives how many there were."""
    pids = [str(process.pid) for process in (psutil.Process(running.process.pid), *running.family())]
    draws.shuffle(pids)
    # One program sends all signals within a millisecond; our own threads would get in between.
    subprocess.run(["sh", "-c", 'kill -9 "$@"', "sh", *pids], stderr=subprocess.DEVNULL)
    running.end()
    return len(pids)


def versions_of(client: Client, name: str) -> dict[int, VectorVersion]:
    """By number; none when there is no such vector."""
    found: dict[int, VectorVersion] = {}
    with suppress(NotFound):
        for version in client.vectors.versions(name):
            assert version.version not in found
            found[version.version] = version
    return found


def verify(client: Client, ledger: Ledger, read: set[tuple[str, int]]) -> int:
    """Checks every version, and the content of those that are not `read` yet; gives how many versions there are."""
    total = 0
    for name in NAMES:
        versions = versions_of(client, name)
        total += len(versions)
        assert sorted(versions) == list(range(1, len(versions) + 1))
        acknowledged = {number: print_ for (of, number), print_ in ledger.acknowledged.items() if of == name}
        assert acknowledged.items() <= {number: version.fingerprint for number, version in versions.items()}.items()
        assert len({version.fingerprint for version in versions.values()}) == len(versions)
        if versions:
            assert client.vectors.describe(name).newest_version == len(versions)
        for number, version in versions.items():
            assert [figure.value for figure in version.evaluations] == [FIGURE["value"]]
            if (name, number) not in read:
                assert np.array_equal(version.load().tensor, ledger.sent[version.fingerprint])
                read.add((name, number))
    return total


def rounds_of_kills(data_dir: Path, rounds: int) -> Iterator[Round]:
    """Each round 20 threads register until everything is killed; then all that is there is checked."""
    ledger, read = Ledger(), set[tuple[str, int]]()
    running = Up(data_dir)
    try:
        with Client(running.url) as client:
            make_initialization(client)
        for number in range(rounds):
            draws = np.random.default_rng([SEED, number])
            delay = draws.uniform(0.05, 2.0)
            processes = _register_until_killed(running, ledger, delay, draws)
            running = Up(data_dir)
            with Client(running.url) as client:
                if number == rounds - 1:
                    read.clear()
                versions = verify(client, ledger, read)
            yield Round(
                delay=delay,
                processes=processes,
                restart=running.seconds,
                acknowledged=len(ledger.acknowledged),
                versions=versions,
            )
    finally:
        running.stop()


def _register_until_killed(running: Up, ledger: Ledger, delay: float, draws: np.random.Generator) -> int:
    started, killing = threading.Barrier(THREADS + 1), threading.Event()

    def write(own: np.random.Generator) -> None:
        started.wait()
        while True:
            name, tensor = NAMES[own.integers(len(NAMES))], own.standard_normal(SHAPE, dtype=np.float32)
            try:
                ledger.register(client, name, tensor)
            except (ConnectionFailed, Unavailable):
                assert killing.is_set()
                return

    with Client(running.url, retries=0) as client, ThreadPoolExecutor(THREADS) as pool:
        writers = [pool.submit(write, own) for own in draws.spawn(THREADS)]
        started.wait()
        time.sleep(delay)
        killing.set()
        killed = kill_tree(running, draws)
        for writer in writers:
            writer.result()
    return killed


def test_kill_9_of_everything_during_registrations_loses_nothing_and_leaves_nothing_half_there(place: Path) -> None:
    done = list(rounds_of_kills(place / "data", ROUNDS))
    assert done[-1].acknowledged > 0


def test_a_registration_that_is_retried_over_a_crash_is_made_once(up: Callable[..., Up]) -> None:
    """The key that the client sends with it makes it so, also when the answer to a commit was lost."""
    threads, each = 8, 6
    draws = np.random.default_rng(SEED)
    ledger, first = Ledger(), up()
    patient = Client(first.url, retries=60)
    make_initialization(patient)

    def write(own: np.random.Generator) -> None:
        for _ in range(each):
            ledger.register(patient, NAMES[0], own.standard_normal(SHAPE, dtype=np.float32))

    with patient, ThreadPoolExecutor(threads) as pool:
        writers = [pool.submit(write, own) for own in draws.spawn(threads)]
        while len(ledger.acknowledged) < threads:
            time.sleep(0.01)
        kill_tree(first, draws)
        assert len(ledger.acknowledged) < threads * each
        up(port=first.port)
        for writer in writers:
            writer.result()
        assert verify(patient, ledger, set()) == len(ledger.acknowledged) == threads * each


def test_32_writers_of_one_name_get_versions_1_to_32(up: Callable[..., Up]) -> None:
    count = 32
    ledger, started = Ledger(), threading.Barrier(count)
    with Client(up().url) as client:
        make_initialization(client)

        def write(own: np.random.Generator) -> None:
            tensor = own.standard_normal(SHAPE, dtype=np.float32)
            started.wait()
            ledger.register(client, NAMES[0], tensor)

        with ThreadPoolExecutor(count) as pool:
            list(pool.map(write, np.random.default_rng(SEED).spawn(count)))

        assert sorted(number for _, number in ledger.acknowledged) == list(range(1, count + 1))
        assert verify(client, ledger, set()) == count


def main(rounds: int) -> None:
    done = []
    with reachable_directory() as place:
        for each in rounds_of_kills(place / "data", rounds):
            done.append(each)
            sys.stdout.write(f"{len(done):3}: {each}\n")
            sys.stdout.flush()
    restarts = sorted(each.restart for each in done)
    last = done[-1]
    sys.stdout.write(
        f"{rounds} rounds: {last.acknowledged} registrations acknowledged, all of them there, "
        f"{last.versions - last.acknowledged} more committed but not acknowledged; ready again after "
        f"{restarts[0]:.1f} to {restarts[-1]:.1f} s (median {restarts[len(restarts) // 2]:.1f} s)\n"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
