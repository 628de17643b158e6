"""`tpv lab run` goes through the real product: a registry, a worker, and what it prints and stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.acceptance.conftest import Up

import tpv

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def lab(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tpv.cli.main", "--url", url, "lab", "run", *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


def test_the_lab_fills_a_registry_and_says_what_came_out(up: Callable[..., Up], tmp_path: Path) -> None:
    running = up(workers=1, environment={"TPV_THREADS": "1"})
    stored = tmp_path / "figures.json"
    options = ["--sources", "movie-tense-plus,hotel-tense-plus,music-tense-minus", "--targets", "phone-tense-plus"]
    options += ["--methods", "prompt-tuning,tpv-sum,dtvg", "--shots", "16", "--json", str(stored)]

    first = lab(running.url, *options)
    assert first.returncode == 0, first.stderr
    assert "phone-tense-plus" in first.stdout
    figures = json.loads(stored.read_text())
    [seed] = figures["seeds"]
    assert [*seed["targets"]["phone-tense-plus"]["methods"]] == ["prompt-tuning", "tpv-sum", "dtvg"]
    assert set(seed["targets"]["phone-tense-plus"]["methods"]["dtvg"]["group"]) <= set(seed["sources"])
    with tpv.Client(running.url) as client:
        dataset = client.datasets.get("lab/phone-tense-plus-0")
        assert client.vectors.get("lab/phone-tense-plus-0-dtvg").method == "dtvg"

    # The same again finds all vectors there, and trains nothing.
    again = lab(running.url, *options)
    assert again.returncode == 0, again.stderr
    assert json.loads(stored.read_text())["seeds"][0]["targets"] == seed["targets"]
    with tpv.Client(running.url) as client:
        assert client.datasets.get("lab/phone-tense-plus-0") == dataset


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--targets", "moon-tense-plus"], "the lab has no 'moon-tense-plus'"),
        (["--methods", "few,magic"], "the lab has no 'magic'"),
        (["--seeds", "one"], "seeds are numbers"),
    ],
)
def test_what_the_lab_does_not_know_is_said_before_anything_starts(options: list[str], says: str) -> None:
    refused = lab("http://127.0.0.1:9", *options)

    assert refused.returncode == 1
    assert says in refused.stderr
