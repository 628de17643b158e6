import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tpv_service.embedded import EmbeddedError, processes
from tpv_service.embedded.processes import ProcessGroup

pytestmark = pytest.mark.slow  # real processes, started and killed

AliveAfter = Callable[[float, list[psutil.Process]], list[psutil.Process]]

ENV = dict(os.environ)


def test_a_closed_group_leaves_nothing_running(tmp_path: Path, alive_after: AliveAfter) -> None:
    with ProcessGroup(tmp_path / "log") as group:
        shell = group.start("shell", ["sh", "-c", "sleep 60 & sleep 60"], env=ENV)
        for _ in range(100):
            family = [psutil.Process(shell.pid), *psutil.Process(shell.pid).children()]
            if len(family) == 3:
                break
            time.sleep(0.1)
        assert len(family) == 3

    shell.wait()
    assert alive_after(2, family) == []


def test_ctrl_c_in_the_terminal_does_not_reach_the_children(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path / "log") as group:
        child = group.start("sleep", ["sleep", "60"], env=ENV)
        assert os.getpgid(child.pid) != os.getpgid(0)
        child.kill()
        child.wait()


def test_a_program_that_fails_is_reported_by_its_last_line(tmp_path: Path) -> None:
    with (
        ProcessGroup(tmp_path / "log") as group,
        pytest.raises(EmbeddedError, match=r"^sh failed: no luck \(more in .*/log/try.log\)$"),
    ):
        group.run("try", ["sh", "-c", "echo first; echo no luck; exit 3"], env=ENV, account=None)


def test_a_log_is_bounded_while_its_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_LOG_LIMIT", 1000)
    with ProcessGroup(tmp_path / "log") as group:
        os.mkfifo(go := tmp_path / "go")
        talker = group.start("talker", ["sh", "-c", f"seq 1000; read -r _ < {go}; echo more"], env=ENV)
        log = group.log("talker")
        while not log.read_text().endswith("1000\n"):
            time.sleep(0.02)

        processes.bound_log(log)
        go.write_text("on\n")
        talker.wait()

        assert log.read_text() == "more\n"
        assert log.with_name("talker.log.1").read_text().startswith("1\n2\n")


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path / "log") as group:
        deaf = group.start("deaf", ["sh", "-c", 'trap "" TERM; echo on; while :; do sleep 0.1; done'], env=ENV)
        while not group.log("deaf").read_text():
            time.sleep(0.02)

        processes.stop(deaf, first=signal.SIGTERM, patience=0.2)

        assert deaf.returncode == -signal.SIGKILL
