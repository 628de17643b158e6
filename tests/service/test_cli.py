import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psycopg
import pytest

from tpv.cli.main import main


@pytest.fixture
def environment(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator sets; the database has the schema."""
    monkeypatch.setenv("TPV_DATABASE_URL", database_url)
    monkeypatch.setenv("TPV_BLOB_DIRECTORY", str(tmp_path / "blobs"))
    monkeypatch.setenv("TPV_PORT", "0")


def test_settings_that_are_missing_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TPV_DATABASE_URL", raising=False)

    assert main(["serve"]) == 1
    assert capsys.readouterr().err == "tpv: TPV_DATABASE_URL: Field required\n"


@pytest.mark.usefixtures("environment")
def test_the_schema_is_checked_taken_back_and_brought_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["db", "check"]) == 0
    assert main(["db", "downgrade", "base"]) == 0
    assert main(["db", "check"]) == 1
    assert main(["serve"]) == 1
    assert capsys.readouterr().err.count("bring it there with: tpv db upgrade") == 2

    assert main(["db", "upgrade"]) == 0
    assert main(["db", "check"]) == 0


@pytest.mark.usefixtures("environment")
def test_a_database_that_does_not_answer_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPV_DATABASE_URL", "postgresql://127.0.0.1:1/tpv")

    assert main(["db", "check"]) == 1
    error = capsys.readouterr().err
    assert "Connection refused" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("environment")
def test_nobody_else_gets_in_without_a_token(
    database_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPV_HOST", "0.0.0.0")  # noqa: S104 # the refusal is what is tested
    assert main(["serve"]) == 1
    assert "there is no token yet" in capsys.readouterr().err

    assert main(["admin", "token", "create", "old", "--scope", "read", "--days", "1"]) == 0
    with psycopg.connect(database_url) as connection:
        connection.execute("update tokens set expires_at = now() - interval '1 second'")
    assert main(["serve"]) == 1
    assert "there is no token yet" in capsys.readouterr().err

    monkeypatch.setenv("TPV_AUTHENTICATION", "false")
    assert main(["serve"]) == 1
    assert "is for loopback only" in capsys.readouterr().err


@pytest.mark.usefixtures("environment")
def test_tokens_are_made_listed_and_revoked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["admin", "token", "create", "ci", "--scope", "read", "--scope", "write", "--days", "30"]) == 0
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("tpv_")

    assert main(["admin", "token", "list", "--json"]) == 0
    shown = capsys.readouterr().out
    assert secret not in shown
    (listed,) = json.loads(shown)
    assert (listed["name"], listed["scopes"], listed["revoked_at"]) == ("ci", ["read", "write"], None)

    assert main(["admin", "token", "revoke", "ci"]) == 0
    assert main(["admin", "token", "revoke", "ci"]) == 1
    assert main(["admin", "token", "create", "other", "--scope", "all"]) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_serves_until_sigterm() -> None:
    command = [sys.executable, "-m", "tpv.cli.main", "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        url = process.stdout.readline().split()[-1]
        assert httpx.get(f"{url}/readyz", timeout=30).json() == {"status": "ready"}
        assert httpx.get(f"{url}/api/v1/vectors").status_code == 401
        process.send_signal(signal.SIGTERM)
        process.wait(10)
