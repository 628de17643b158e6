"""Bulk registration and download: what the client refuses by itself, what it sends, and what it does not believe."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest
from tests.client.conftest import parts

from tpv import Client, TaskPromptVector, errors, files
from tpv._base import Retries

ONE, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64
TENSORS = np.arange(12, dtype=np.float32).reshape(2, 2, 3)


@pytest.fixture
def client(registry: Any) -> Client:
    return Client(transport=registry.transport, retries=Retries(times=1, first=0.0))


def registered(name: str, tensor: np.ndarray) -> dict[str, Any]:
    fingerprint = files.fingerprint(tensor)
    return {"namespace": "default", "name": name, "version": 1, "fingerprint": fingerprint, "created": True}


def test_one_request_has_the_stacked_tensor_and_what_is_told_of_it(registry: Any, client: Client) -> None:
    registry.on("POST /vectors/bulk", {"items": [registered("a", TENSORS[0]), registered("b", TENSORS[1])]})
    items = ["a", {"name": "team/b", "tags": {"x": "1"}}]
    made = client.vectors.register_many(items, vectors=TENSORS.astype(np.float64), initialization="family", task="rte")

    (request,) = registry.asked("POST /vectors/bulk")
    fields, sent = parts(request)
    fingerprints = [files.fingerprint(tensor) for tensor in TENSORS]
    assert [item.reference for item in made] == ["default/a:1", "default/b:1"]
    assert request.headers["Idempotency-Key"]
    np.testing.assert_array_equal(files.load(sent["file"])["vectors"], TENSORS)
    assert json.loads(fields["metadata"]) == {
        "initialization": "family",
        "defaults": {"task": ["rte"]},
        "items": [
            {"name": "default/a", "fingerprint": fingerprints[0]},
            {"name": "team/b", "tags": {"x": "1"}, "fingerprint": fingerprints[1]},
        ],
    }


WRONG: dict[str, tuple[list[Any], dict[str, Any], type[Exception], str]] = {
    "neither": (["a"], {}, TypeError, "exactly one"),
    "both": (["a"], {"prompts": TENSORS, "vectors": TENSORS}, TypeError, "exactly one"),
    "another number": (["a"], {"prompts": TENSORS}, errors.Invalid, "1 items and 2 prompts"),
    "a version": (["a", "b:1"], {"prompts": TENSORS}, errors.Invalid, "item 1: name"),
    "a misspelt member": (["a", {"name": "b", "colour": 1}], {"prompts": TENSORS}, errors.Invalid, "item 1: colour"),
    "not a number": (
        ["a", "b"],
        {"vectors": TENSORS * [[[1]], [[np.nan]]]},
        errors.InvalidTensor,
        "vector 1 has 6 of 6",
    ),
    "flat": (["a", "b"], {"prompts": TENSORS[0]}, errors.InvalidTensor, r"prompt 0 has shape \[3\]"),
    "two shapes": (["a", "b"], {"prompts": [TENSORS[0], TENSORS[1][:1]]}, errors.InvalidTensor, "prompt 1 has shape"),
    "two initializations": (
        ["a", "b"],
        {"vectors": [TaskPromptVector(TENSORS[0], ONE), TaskPromptVector(TENSORS[1], OTHER)], "initialization": None},
        errors.IncompatibleVectors,
        "vectors 0 and 1",
    ),
    "no initialization": (["a", "b"], {"prompts": TENSORS, "initialization": None}, TypeError, "initialization="),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_before_anything_is_sent(registry: Any, client: Client, case: str) -> None:
    items, given, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        client.vectors.register_many(items, **{"initialization": "family", **given})
    assert registry.requests == []


def download(tensors: np.ndarray, rows: list[dict[str, str]]) -> httpx.Response:
    return httpx.Response(200, content=files.dump({"vectors": tensors}, {"versions": json.dumps(rows)}))


ROWS = [
    {"reference": f"default/{name}:1", "fingerprint": files.fingerprint(tensor), "initialization": ONE}
    for name, tensor in zip("ab", TENSORS, strict=True)
]
FALSE = {
    "other values": download(TENSORS + 1, ROWS),
    "another order": download(TENSORS[::-1], ROWS),
    "too few": download(TENSORS[:1], ROWS[:1]),
    "rows untold": download(TENSORS, ROWS[:1]),
    "another tensor": httpx.Response(200, content=files.dump({"vector": TENSORS})),
    "cut off": httpx.Response(200, content=download(TENSORS, ROWS).content[:-4]),
    "no file": httpx.Response(200, content=b"a proxy's page"),
}


@pytest.mark.parametrize("case", FALSE)
def test_what_is_not_what_was_asked_for_is_never_given(registry: Any, client: Client, case: str) -> None:
    registry.on("POST /vectors/bulk/content", FALSE[case])
    with pytest.raises(errors.DamagedContent):
        client.vectors.load_many(["a", "b"])


def test_a_version_is_held_to_its_own_fingerprint(registry: Any, wire: Any, client: Client) -> None:
    registry.on("GET /vectors/default/a/versions/newest", wire.version(fingerprint=files.fingerprint(TENSORS[1])))
    registry.on("POST /vectors/bulk/content", download(TENSORS, ROWS))
    with pytest.raises(errors.DamagedContent, match="default/a:1"):
        client.vectors.load_many([client.vectors.get("a"), "b"])


def test_a_download_that_breaks_off_is_asked_for_again(registry: Any, client: Client) -> None:
    broken = httpx.RemoteProtocolError("peer closed connection")
    registry.on("POST /vectors/bulk/content", broken, download(TENSORS, ROWS))
    np.testing.assert_array_equal([vector.tensor for vector in client.vectors.load_many(["a", "b"])], TENSORS)

    registry.on("POST /vectors/bulk/content", broken)
    with pytest.raises(errors.ConnectionFailed, match="broke off"):
        client.vectors.load_many(["a", "b"])
