"""Every bad upload gets a problem that says what is wrong, and leaves no row and no blob behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import AsyncIterator

import numpy as np
import pytest
from safetensors.numpy import save
from tests.service.registry.conftest import ROWS, WIDTH, prompt_near

from tpv import files

pytestmark = pytest.mark.anyio

GOOD = save({"vector": np.ones((ROWS, WIDTH), dtype=np.float32)})


def with_value(value: float) -> bytes:
    tensor = np.ones((ROWS, WIDTH), dtype=np.float32)
    tensor[1, 2] = value
    return save({"vector": tensor})


def claiming(header_size: int) -> bytes:
    return header_size.to_bytes(8, "little") + GOOD[8:]


CASES = {
    "pickle": (pickle.dumps({"vector": [1.0]}), {}, 422, "safetensors"),
    "truncated": (GOOD[:-10], {}, 422, "truncated"),
    "header of 10 GB": (claiming(10 * 2**30), {}, 422, "header"),
    "tensor of 10 GB": (
        (lambda h: len(h).to_bytes(8, "little") + h)(
            json.dumps(
                {"vector": {"dtype": "F32", "shape": [1, 2684354560], "data_offsets": [0, 10737418240]}}
            ).encode()
        ),
        {},
        422,
        "truncated",
    ),
    "not a number": (with_value(np.nan), {}, 422, "NaN"),
    "infinite": (with_value(np.inf), {}, 422, "infinite"),
    "beyond float32": (save({"vector": np.full((ROWS, WIDTH), 1e300)}), {}, 422, "infinite"),
    "integers": (save({"vector": np.ones((ROWS, WIDTH), dtype=np.int64)}), {}, 422, "I64"),
    "wrong rows": (save({"vector": np.ones((ROWS + 1, WIDTH), dtype=np.float32)}), {}, 422, "num_virtual_tokens"),
    "wrong width": (save({"vector": np.ones((ROWS, WIDTH + 1), dtype=np.float32)}), {}, 422, "token_dim"),
    "no matrix": (save({"vector": np.ones(WIDTH, dtype=np.float32)}), {}, 422, "shape"),
    "other tensor": (save({"weights": np.ones((ROWS, WIDTH), dtype=np.float32)}), {}, 422, "weights"),
    "unknown initialization": (GOOD, {"initialization": "nothing"}, 404, "tpv init list"),
    "wrong fingerprint": (GOOD, {"fingerprint": "sha256:" + "0" * 64}, 422, "declares"),
    "unknown member": (GOOD, {"colour": "red"}, 422, "colour"),
    "empty": (b"", {}, 422, "shorter"),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_bad_upload_is_refused_and_leaves_nothing(http, family, settings, case):
    content, metadata, status, word = CASES[case]
    before = sorted(settings.blob_directory.rglob("*"))
    answer = await http.post(
        "/api/v1/vectors/default/mnli/versions",
        data={"metadata": json.dumps({"initialization": "family", **metadata})},
        files={"file": content},
    )

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["type"].startswith("urn:tpv:problem:")
    assert word in problem["detail"]
    assert (await http.get("/api/v1/vectors/default/mnli")).status_code == 404
    assert sorted(settings.blob_directory.rglob("*")) == before


@pytest.mark.parametrize("name", ["a%2Fb", "UPPER", "-dash", "a" * 200, "sp%20ace"])
async def test_a_bad_name_is_refused(http, family, name):
    answer = await http.post(
        f"/api/v1/vectors/default/{name}/versions",
        data={"metadata": '{"initialization": "family"}'},
        files={"file": GOOD},
    )

    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_refused_after_reading_little(http, family, settings, declared):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        while sent < 2**30:
            sent += 2**16
            yield bytes(2**16)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    if declared:
        headers["Content-Length"] = str(2**30)
    answer = await http.post("/api/v1/vectors/default/mnli/versions", content=endless(), headers=headers)

    assert answer.status_code == 413
    assert answer.json()["type"] == "urn:tpv:problem:too-large"
    assert str(settings.upload_limit) in answer.json()["detail"]
    assert sent <= (0 if declared else settings.upload_limit) + 2**20


async def test_a_zero_byte_in_a_text_is_refused(http, family, start):
    answer = await http.post(
        "/api/v1/vectors/default/mnli/versions",
        data={"metadata": json.dumps({"initialization": "family", "description": "a\0b"})},
        files={"file": files.dump({"prompt": prompt_near(start, 1)})},
    )

    assert answer.status_code == 422


async def test_metadata_that_is_no_json_is_refused(http, family):
    answer = await http.post("/api/v1/vectors/default/mnli/versions", data={"metadata": "{"}, files={"file": GOOD})

    assert answer.status_code == 422
    assert "metadata" in answer.json()["detail"]
