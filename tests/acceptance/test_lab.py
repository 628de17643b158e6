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
    options += ["--methods", "prompt-tuning,tpv-sum,spot-multitask,dtvg", "--shots", "16", "--json", str(stored)]

    ended = lab(running.url, *options)

    assert ended.returncode == 0, ended.stderr
    assert "phone-tense-plus" in ended.stdout
    [seed] = json.loads(stored.read_text())["seeds"]
    figures = seed["targets"]["phone-tense-plus"]["methods"]
    assert [*figures] == ["prompt-tuning", "tpv-sum", "spot-multitask", "dtvg"]
    assert set(figures["dtvg"]["group"]) <= set(seed["sources"])
    assert figures["dtvg"]["target_steps"] > figures["prompt-tuning"]["target_steps"]  # both stages count
    with tpv.Client(running.url) as client:
        assert client.vectors.get(figures["dtvg"]["result"]).method == "dtvg"
        made_from = client.vectors.get(figures["spot-multitask"]["result"]).parents
        assert [parent.reference for parent in made_from] == ["lab/mixed-0:1"]
        assert client.vectors.get("lab/mixed-0").method == "spot-multitask"


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
