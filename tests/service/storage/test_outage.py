"""The API on a real S3 server that goes away and comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import SecretStr
from tests.service.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore

from tpv import files

pytestmark = pytest.mark.anyio


@pytest.fixture
def server(tmp_path: Path):
    with ObjectStore(tmp_path / "objects") as server:
        yield server


@pytest.fixture
def settings(settings, server):
    return settings.model_copy(
        update={
            "blob_directory": None,
            "s3_endpoint": server.endpoint,
            "s3_access_key": ACCESS_KEY,
            "s3_secret_key": SecretStr(SECRET_KEY),
            "s3_secure": False,
        }
    )


async def register(http, seed: int):
    prompt = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
    return await http.post(
        "/api/v1/vectors/default/mnli/versions",
        data={"metadata": '{"initialization": "family"}'},
        files={"file": files.dump({"prompt": prompt})},
    )


async def test_an_outage_is_a_503_that_leaves_nothing_and_passes(http, client, server):
    start = np.zeros((2, 3), dtype=np.float32)
    await client.initializations.create("family", base_model="m", revision="a" * 40, tensor=start)
    assert (await register(http, 1)).status_code == 201

    server.stop()
    refused = await register(http, 2)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert (await http.get("/api/v1/vectors/default/mnli/versions/newest")).json()["version"] == 1
    assert (await http.get("/readyz")).status_code == 503

    server.start()
    again = await register(http, 2)
    assert (again.status_code, again.json()["version"]) == (201, 2)
    assert (await http.get("/readyz")).status_code == 200
