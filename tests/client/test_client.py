from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.client.conftest import parts

import tpv
from tpv import AsyncClient, Client, TaskPromptVector, errors, files
from tpv._base import Retries
from tpv.schemas.jobs import EvaluationReport, EventReport, FailureReport, ResultReport

VECTOR = "/vectors/default/mnli/versions/newest"
QUICK = Retries(times=3, first=0.0)
PROMPT = np.ones((2, 3), np.float32)


@pytest.fixture
def client(registry: Any) -> Client:
    return Client(transport=registry.transport, retries=QUICK)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have slept."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


# --- Settings --------------------------------------------------------------------------------------------------------


def test_address_and_token_come_from_arguments_then_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Client().url == "http://127.0.0.1:8000"
    monkeypatch.setenv("TPV_URL", "https://tpv.example/")
    assert Client().url == "https://tpv.example"
    assert Client("http://here:1").url == "http://here:1"
    with pytest.raises(errors.ConnectionFailed, match="http://"):
        Client("localhost:8000")


def test_the_token_is_sent_and_never_shown(registry: Any, wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.on(f"GET {VECTOR}", wire.version())
    monkeypatch.setenv("TPV_TOKEN", "from-the-environment")
    with Client(transport=registry.transport) as one, Client(token="mine", transport=registry.transport) as other:
        one.vectors.get("mnli")
        other.vectors.get("mnli")
        assert "mine" not in repr(other) + repr(other._http.settings)
    sent = [request.headers["authorization"] for request in registry.requests]
    assert sent == ["Bearer from-the-environment", "Bearer mine"]


def test_an_address_may_have_a_path(registry: Any, wire: Any) -> None:
    registry.routes["GET /tpv/api/v1" + VECTOR] = [wire.version()]
    assert Client("http://here/tpv/", transport=registry.transport).vectors.get("mnli").version == 1


# --- Trying again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        httpx.Response(502),
        httpx.Response(503),
        httpx.Response(504),
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("slow"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("server disconnected"),
    ],
    ids=str,
)
def test_a_call_that_may_be_repeated_is_tried_again(client: Client, registry: Any, wire: Any, failure: Any) -> None:
    registry.on(f"GET {VECTOR}", failure, failure, wire.version())
    assert client.vectors.get("mnli").reference == "default/mnli:1"
    assert len(registry.requests) == 3


def test_it_gives_up_after_the_retries(client: Client, registry: Any, wire: Any) -> None:
    registry.on(f"GET {VECTOR}", wire.problem("unavailable", 503, "the database does not answer"))
    with pytest.raises(errors.Unavailable, match="database"):
        client.vectors.get("mnli")
    assert len(registry.requests) == 4


def test_a_service_that_is_not_there_is_named_with_what_to_do(client: Client, registry: Any) -> None:
    registry.on(f"GET {VECTOR}", httpx.ConnectError("[Errno 111] Connection refused"))
    with pytest.raises(errors.ConnectionFailed, match=r"http://127\.0\.0\.1:8000 .*refused.*tpv up"):
        client.vectors.get("mnli")


@pytest.mark.parametrize("status", [400, 404, 409, 422, 500])
def test_an_answer_that_stands_is_not_asked_for_again(client: Client, registry: Any, status: int) -> None:
    registry.on(f"GET {VECTOR}", httpx.Response(status))
    with pytest.raises(errors.ProblemError):
        client.vectors.get("mnli")
    assert len(registry.requests) == 1


@pytest.mark.parametrize("timeout", [None, 5])
def test_a_slow_answer_is_not_asked_for_again(registry: Any, timeout: float | None) -> None:
    client = Client(transport=registry.transport, retries=QUICK, timeout=timeout)
    registry.on(f"GET {VECTOR}", httpx.ReadTimeout("slow"))
    with pytest.raises(errors.ConnectionFailed, match="in time"):
        client.vectors.get("mnli")
    assert len(registry.requests) == 1


def test_pauses_double_with_jitter_up_to_the_longest() -> None:
    retries = Retries(times=6, first=0.25, longest=2.0)
    for tried, longest in enumerate([0.25, 0.5, 1.0, 2.0, 2.0, 2.0]):
        drawn = {retries.pause(tried) for _ in range(20)}
        assert all(pause is not None and longest / 2 <= pause <= longest for pause in drawn)
        assert len(drawn) > 1
    assert retries.pause(6) is None


def test_retry_after_is_kept_to(registry: Any, wire: Any, pauses: list[float]) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    registry.on(
        f"GET {VECTOR}",
        httpx.Response(503, headers={"Retry-After": "7"}),
        httpx.Response(503, headers={"Retry-After": later}),
        httpx.Response(503, headers={"Retry-After": "nonsense"}),
        wire.version(),
    )
    Client(transport=registry.transport).vectors.get("mnli")
    assert pauses[0] == 7
    assert 18 < pauses[1] <= 20
    assert pauses[2] <= 1


def test_a_service_that_asks_for_an_hour_is_not_waited_for(registry: Any, pauses: list[float]) -> None:
    registry.on(f"GET {VECTOR}", httpx.Response(503, headers={"Retry-After": "3600"}))
    with pytest.raises(errors.Unavailable):
        Client(transport=registry.transport).vectors.get("mnli")
    assert pauses == []


def test_a_registration_keeps_its_idempotency_key_and_its_body_over_retries(
    client: Client, registry: Any, wire: Any
) -> None:
    created = httpx.Response(201, json=wire.version())
    registry.on("POST /vectors/default/mnli/versions", httpx.Response(503), httpx.ReadError("reset"), created)
    client.vectors.register("mnli", prompt=PROMPT, initialization="family")
    client.vectors.register("mnli", prompt=PROMPT, initialization="family")
    first, second, third, other = registry.requests
    keys = [request.headers["idempotency-key"] for request in registry.requests]
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]
    assert all(files.dump({"prompt": PROMPT}) in request.content for request in (first, second, third, other))


CREATING: dict[str, tuple[str, Callable[[Client], Any]]] = {
    "initialization": ("/initializations", lambda c: c.initializations.create("f", base_model="m", tensor=PROMPT)),
    "version": ("/vectors/default/v/versions", lambda c: c.vectors.register("v", vector=PROMPT, initialization="f")),
    "dataset": ("/datasets/default/d/versions", lambda c: c.datasets.upload("d", [{"source": "a", "target": "b"}])),
    "job": ("/jobs", lambda c: c.jobs.tune(dataset="d", initialization="f", output="o")),
}


@pytest.mark.parametrize(("path", "create"), CREATING.values(), ids=CREATING)
def test_every_creating_call_carries_a_key(
    client: Client, registry: Any, path: str, create: Callable[[Client], Any]
) -> None:
    registry.on(f"POST {path}", httpx.Response(418))
    with pytest.raises(errors.ProblemError):
        create(client)
    [request] = registry.requests
    assert len(request.headers["idempotency-key"]) == 36


def test_a_post_without_a_key_that_changes_something_is_not_repeated(registry: Any) -> None:
    from tpv._base import Call
    from tpv._sync.http import Http

    client = Client(transport=registry.transport, retries=QUICK)
    http: Http = client._http
    registry.on("POST /anything", httpx.ConnectError("refused"))
    with pytest.raises(errors.ConnectionFailed):
        http.send(Call(method="POST", path="/anything"))
    assert len(registry.requests) == 1


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", errors.PROBLEMS.values(), ids=errors.PROBLEMS)
def test_each_problem_is_raised_as_its_class(registry: Any, kind: type[errors.ProblemError]) -> None:
    document = kind("what is wrong", reference="default/mnli").problem()
    answer = httpx.Response(kind.status, json=document, headers={"Content-Type": "application/problem+json"})
    registry.on(f"GET {VECTOR}", answer)
    with pytest.raises(kind, match="what is wrong") as error:
        Client(transport=registry.transport, retries=0).vectors.get("mnli")
    assert type(error.value) is kind
    assert error.value.extra == {"reference": "default/mnli"}


def test_a_proxys_error_page_is_shown_in_short(registry: Any) -> None:
    registry.on(f"GET {VECTOR}", httpx.Response(403, text="<html>\n<h1>Blocked</h1>" + "x" * 500))
    with pytest.raises(errors.Forbidden, match=r"403 from .*Blocked") as error:
        Client(transport=registry.transport).vectors.get("mnli")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b"null", b'{"items": 1}'])
def test_another_service_is_recognized(client: Client, registry: Any, body: bytes) -> None:
    for path in (VECTOR, "/vectors", "/vectors/default/mnli/aliases/best/history"):
        registry.on(f"GET {path}", httpx.Response(200, content=body))
    with pytest.raises(errors.ConnectionFailed, match="not as this client understands"):
        client.vectors.get("mnli")
    with pytest.raises(errors.ConnectionFailed):
        list(client.vectors.list())
    if body != b"[]":
        with pytest.raises(errors.ConnectionFailed):
            client.vectors.alias_history("mnli", "best")


def test_wrong_arguments_are_refused_before_anything_is_sent(client: Client, registry: Any) -> None:
    with pytest.raises(errors.Invalid, match="shots"):
        client.jobs.tune(dataset="d", initialization="f", output="o", shots=0)
    with pytest.raises(errors.InvalidReference):
        client.vectors.get("No Name")
    with pytest.raises(errors.InvalidReference):
        client.vectors.register("mnli:3", prompt=PROMPT, initialization="f")
    with pytest.raises(errors.InvalidReference):
        client.vectors.get("sha256:" + "0" * 64)
    with pytest.raises(errors.InvalidReference):
        client.datasets.get("cr@best")
    with pytest.raises(errors.InvalidReference):
        client.initializations.get("family:1")
    with pytest.raises(errors.InvalidReference):
        client.jobs.get("not-an-id")
    with pytest.raises(errors.InvalidReference):
        client.vectors.set_alias("mnli", "latest", 1)
    with pytest.raises(errors.InvalidTensor, match="NaN"):
        client.vectors.register("mnli", prompt=np.array([[np.nan]]), initialization="f")
    with pytest.raises(TypeError, match="exactly one"):
        client.vectors.register("mnli", prompt=PROMPT, vector=PROMPT, initialization="f")
    with pytest.raises(TypeError, match="initialization"):
        client.vectors.register("mnli", prompt=PROMPT)
    with pytest.raises(TypeError, match="seed"):
        client.initializations.create("f", base_model="m", tensor=PROMPT, seed=3)
    assert registry.requests == []


# --- Initializations -------------------------------------------------------------------------------------------------


def test_a_tensor_is_uploaded_with_its_fingerprint(client: Client, registry: Any, wire: Any) -> None:
    registry.on("POST /initializations", httpx.Response(201, json=wire.initialization(created=True)))
    found = client.initializations.create(
        "lab/mine", base_model="t5-base", revision="a" * 40, tensor=PROMPT.astype("f8")
    )
    assert found.created
    metadata, content = parts(registry.requests[0])
    assert json.loads(metadata["metadata"]) == {
        "name": "mine",
        "namespace": "lab",
        "base_model": {"id": "t5-base", "revision": "a" * 40},
        "fingerprint": files.fingerprint(PROMPT),
    }
    assert files.load(content["file"])["prompt"].tolist() == PROMPT.tolist()


def test_without_a_tensor_a_worker_draws_one_and_is_waited_for(client: Client, registry: Any, wire: Any) -> None:
    start = wire.initialization()
    job = wire.job("queued", method="initialize")
    done = wire.job("succeeded", method="initialize", result=start["id"], result_created=True)
    registry.on("POST /jobs", httpx.Response(201, json=job))
    registry.on(
        f"GET /jobs/{job['id']}/events", wire.events(("state", {"state": "running"})), wire.events(finished=True)
    )
    registry.on(f"GET /jobs/{job['id']}", done)
    registry.on(f"GET /initializations/default/{start['id']}", start)
    found = client.initializations.create(
        "family", base_model="t5-base", unpinned=True, seed=42, num_virtual_tokens=20, strategy="random-vocab", top_k=9
    )
    assert (str(found.id), found.created) == (start["id"], True)
    assert json.loads(registry.asked("POST /jobs")[0].content) == {
        "method": "initialize",
        "options": {"num_virtual_tokens": 20, "strategy": "random-vocab", "top_k": 9},
        "output": "family",
        "base_model": {"id": "t5-base", "unpinned": True},
        "seed": 42,
    }


def test_an_initialization_is_loaded_and_verified(client: Client, registry: Any, wire: Any) -> None:
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3)
    start = wire.initialization(tensor=tensor)
    registry.on("GET /initializations/default/family", start)
    registry.on(f"GET /initializations/default/{start['id']}/content", wire.content(files.dump({"prompt": tensor})))
    assert client.initializations.load("family").tolist() == tensor.tolist()


def test_an_initialization_is_named_by_fingerprint_too(client: Client, registry: Any, wire: Any) -> None:
    start = wire.initialization()
    registry.on(f"GET /initializations/default/{start['fingerprint']}", start)
    assert client.initializations.get(start["fingerprint"]).name == "family"


# --- Vectors ---------------------------------------------------------------------------------------------------------


def test_a_vector_knows_its_initialization(client: Client, registry: Any, wire: Any) -> None:
    registry.on("POST /vectors/lab/mnli/versions", wire.version(namespace="lab", created=False))
    T = TaskPromptVector(PROMPT, "sha256:" + "1" * 64)
    version = client.vectors.register("lab/mnli", vector=T, task="nli", tags={"team": "a"}, metrics=[
        {"dataset": "catalog:glue/mnli", "metric": "accuracy", "value": 0.5}
    ])  # fmt: skip
    assert not version.created
    metadata, content = parts(registry.requests[0])
    assert json.loads(metadata["metadata"]) == {
        "initialization": T.initialization,
        "task": ["nli"],
        "tags": {"team": "a"},
        "metrics": [{"dataset": "catalog:glue/mnli", "metric": "accuracy", "value": 0.5}],
        "fingerprint": T.fingerprint,
    }
    assert list(files.load(content["file"])) == ["vector"]


def test_torch_tensors_are_taken_as_they_are(client: Client, registry: Any, wire: Any) -> None:
    torch = pytest.importorskip("torch")
    registry.on("POST /vectors/default/mnli/versions", wire.version())
    for tensor in (torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.bfloat16)):
        client.vectors.register("mnli", prompt=tensor, initialization="family")
        _, content = parts(registry.requests[-1])
        assert files.load(content["file"])["prompt"].tolist() == PROMPT.tolist()


def test_a_file_is_uploaded_as_it_is(client: Client, registry: Any, wire: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(files.dump({"prompt": PROMPT}))
    registry.on("POST /vectors/default/mnli/versions", httpx.Response(503), wire.version())
    client.vectors.register("mnli", file=path, initialization="family")
    assert [parts(request)[1]["file"] for request in registry.requests] == [path.read_bytes()] * 2


def test_a_version_is_loaded_and_verified(client: Client, registry: Any, wire: Any) -> None:
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3)
    registry.on("GET /vectors/default/mnli/versions/@best", wire.version(version=3, tensor=tensor))
    registry.on("GET /vectors/default/mnli/versions/3/content", wire.content(files.dump({"vector": tensor})))
    T = client.vectors.get("mnli@best").load()
    expected = TaskPromptVector(tensor, wire.initialization()["fingerprint"])
    assert expected == T


def test_a_download_appears_when_it_is_complete(client: Client, registry: Any, wire: Any, tmp_path: Path) -> None:
    content = files.dump({"vector": PROMPT})
    registry.on(f"GET {VECTOR}", wire.version())
    registry.on("GET /vectors/default/mnli/versions/1/content", wire.content(content))
    path = client.vectors.get("mnli").download(tmp_path / "T.safetensors")
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["T.safetensors"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_download_that_is_not_what_was_stored_is_refused(
    client: Client, registry: Any, wire: Any, tmp_path: Path
) -> None:
    registry.on(f"GET {VECTOR}", wire.version())
    registry.on("GET /vectors/default/mnli/versions/1/content", wire.content(files.dump({"vector": 2 * PROMPT})))
    version = client.vectors.get("mnli")
    (tmp_path / "T.safetensors").write_text("what was here before")
    with pytest.raises(errors.DamagedContent, match="digest"):
        version.download(tmp_path / "T.safetensors")
    with pytest.raises(errors.DamagedContent):
        version.load()
    assert [p.read_text() for p in tmp_path.iterdir()] == ["what was here before"]


def test_content_whose_digest_is_not_known_is_checked_against_its_etag(client: Client, registry: Any) -> None:
    answer = httpx.Response(200, content=b'{"prediction": "a", "target": "b"}\n', headers={"ETag": '"sha256:00"'})
    registry.on("GET /evaluations/e/predictions", answer)
    with pytest.raises(errors.DamagedContent):
        client.vectors.predictions("e")
    answer.headers["ETag"] = '"d41d8cd98f00b204e9800998ecf8427e"'  # as other stores write theirs: says nothing to us
    assert client.vectors.predictions("e") == [{"prediction": "a", "target": "b"}]


def test_a_transfer_that_breaks_off_starts_again(registry: Any, wire: Any, tmp_path: Path) -> None:
    content = files.dump({"vector": PROMPT})

    class Torn(httpx.SyncByteStream):
        def __iter__(self) -> Any:
            yield content[:50]
            raise httpx.ReadError("reset")

    answers = iter([httpx.Response(200, stream=Torn()), httpx.Response(200, content=content)])
    transport = httpx.MockTransport(
        lambda request: next(answers) if "content" in request.url.path else registry.handle(request)
    )
    registry.on(f"GET {VECTOR}", wire.version())
    client = Client(transport=transport, retries=QUICK)
    assert client.vectors.get("mnli").download(tmp_path / "T").read_bytes() == content


def test_a_redirect_to_the_blob_store_takes_no_token_along(registry: Any, wire: Any) -> None:
    content = files.dump({"vector": PROMPT})
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if request.url.host == "store":
            return httpx.Response(200, content=content, headers={"ETag": '"an md5"'})
        if request.url.path.endswith("/content"):
            return httpx.Response(307, headers={"Location": "http://store/blob?signature=x"})
        return httpx.Response(200, json=wire.version())

    client = Client(token="secret", transport=httpx.MockTransport(answer))
    assert client.vectors.get("mnli").load().tensor.tolist() == PROMPT.tolist()
    assert ["authorization" in request.headers for request in seen] == [True, True, False]


def test_lists_are_fetched_a_page_at_a_time(client: Client, registry: Any, wire: Any) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        number = int(request.url.params.get("cursor", "0"))
        page = wire.page(wire.vector(f"v{number}"), next_cursor=str(number + 1) if number < 9 else None)
        return httpx.Response(200, json=page)

    registry.on("GET /vectors", answer)
    found = client.vectors.list(task="nli", tags={"team": "a", "x": "y"}, deleted=True, page_size=1)
    assert registry.requests == []
    assert [next(found).name, next(found).name] == ["v0", "v1"]
    assert len(registry.requests) == 2
    assert [vector.name for vector in found] == [f"v{n}" for n in range(2, 10)]
    assert registry.requests[1].url.params.multi_items() == [
        ("task", "nli"), ("tag", "team:a"), ("tag", "x:y"), ("deleted", "true"), ("limit", "1"), ("cursor", "1"),
    ]  # fmt: skip


def test_only_what_is_given_is_changed(client: Client, registry: Any, wire: Any) -> None:
    registry.on("PATCH /vectors/default/mnli", wire.vector())
    client.vectors.update("mnli", description=None)
    client.vectors.update("mnli", tags={"a": "b"})
    assert [json.loads(request.content) for request in registry.requests] == [
        {"description": None},
        {"tags": {"a": "b"}},
    ]


def test_versions_and_vectors_are_deleted_and_restored(client: Client, registry: Any) -> None:
    for path in ("/vectors/default/mnli", "/vectors/default/mnli/versions/2"):
        registry.on(f"DELETE {path}", httpx.Response(204))
        registry.on(f"POST {path}/restore", httpx.Response(204))
    client.vectors.delete("mnli")
    client.vectors.delete("mnli:2", force=True)
    client.vectors.restore("mnli")
    client.vectors.restore("mnli:2")
    assert [str(request.url.query, "ascii") for request in registry.requests] == ["", "force=true", "", ""]


def test_aliases_move_when_they_are_where_they_should_be(client: Client, registry: Any, wire: Any) -> None:
    path = "/vectors/default/mnli/aliases/best"
    registry.on(f"PUT {path}", {"alias": "best", "version": 2}, wire.problem("alias-moved", 409))
    registry.on(f"DELETE {path}", httpx.Response(204))
    move = {
        "alias": "best",
        "from_version": 1,
        "to_version": None,
        "actor": "a",
        "reason": "r",
        "at": "2026-01-01T00:00:00Z",
    }
    registry.on(f"GET {path}/history", [move])
    assert client.vectors.set_alias("mnli", "best", 2, expected_version=1, reason="better").version == 2
    assert json.loads(registry.requests[0].content) == {"version": 2, "expected_version": 1, "reason": "better"}
    with pytest.raises(errors.AliasMoved):
        client.vectors.set_alias("mnli", "best", 3)
    client.vectors.delete_alias("mnli", "best")
    assert [move.to_version for move in client.vectors.alias_history("mnli", "best")] == [None]


# --- Data sets -------------------------------------------------------------------------------------------------------


def test_splits_are_uploaded_from_files_and_rows(client: Client, registry: Any, wire: Any, tmp_path: Path) -> None:
    train = b'{"source": "a", "target": "b"}\n'
    (tmp_path / "train.jsonl").write_bytes(train)
    registry.on("POST /datasets/default/cr/versions", httpx.Response(503), wire.dataset(train=train))
    client.datasets.upload(
        "cr", train=tmp_path / "train.jsonl", test=[{"source": "é", "target": "ü"}], label_words=["b", "c"]
    )
    metadata, content = parts(registry.requests[-1])
    assert json.loads(metadata["metadata"]) == {"label_words": ["b", "c"], "metric": "accuracy"}
    assert content == {"train": train, "test": '{"source": "é", "target": "ü"}\n'.encode()}


def test_rows_come_back_verified(client: Client, registry: Any, wire: Any, tmp_path: Path) -> None:
    train = '{"source": "é\u2028", "target": "b"}\n{"source": "c", "target": "d"}\n'.encode()
    registry.on("GET /datasets/default/cr/versions/newest", wire.dataset(train=train))
    registry.on("GET /datasets/default/cr/versions/1/splits/train", wire.content(train), wire.content(b"other"))
    assert client.datasets.rows("cr", "train")[0] == {"source": "é\u2028", "target": "b"}
    with pytest.raises(errors.DamagedContent):
        client.datasets.download("cr", "train", tmp_path / "train.jsonl")
    with pytest.raises(errors.NotFound, match="it has: train"):
        client.datasets.rows("cr", "dev")
    assert list(tmp_path.iterdir()) == []


# --- Similarity and grouping -----------------------------------------------------------------------------------------


def test_candidates_are_references_or_a_filter(client: Client, registry: Any, wire: Any) -> None:
    registry.on("POST /similarity/search", httpx.Response(503), wire.problem("not-found", 404))
    registry.on("POST /groupings", wire.problem("not-found", 404))
    with pytest.raises(errors.NotFound):  # after a second try: a question may be repeated
        client.similarity.search("rte", 5, task_type="nli", allow_same_task=True)
    with pytest.raises(errors.NotFound):
        client.groupings.create(target="rte", candidates=["mnli", "qnli"], max_size=3)
    with pytest.raises(errors.NotFound):
        client.groupings.create("rte")
    assert [json.loads(request.content) for request in registry.requests[1:]] == [
        {"query": "rte", "k": 5, "candidates": {"filter": {"task_type": "nli"}}, "allow_same_task": True},
        {"target": "rte", "candidates": {"references": ["mnli", "qnli"]}, "max_size": 3},
        {"target": "rte"},
    ]


# --- Jobs ------------------------------------------------------------------------------------------------------------


def test_tuning_and_transfer_are_submitted_with_their_options(client: Client, registry: Any, wire: Any) -> None:
    registry.on("POST /jobs", httpx.Response(201, json=wire.job()))
    client.jobs.tune(dataset="cr", initialization="family", output="cr", shots=64, seed=1, steps=10, learning_rate=0.3)
    client.jobs.transfer(target="cr", sources=["sst2", "mr:2"], dataset="cr", output="cr-dtvg", steps=5,
                         target_options={"steps": 10}, tags={"a": "b"})  # fmt: skip
    tune, transfer = (json.loads(request.content) for request in registry.requests)
    assert tune == {
        "method": "prompt-tuning", "dataset": "cr", "initialization": "family", "output": "cr", "shots": 64, "seed": 1,
        "options": {"steps": 10, "learning_rate": 0.3},
    }  # fmt: skip
    assert transfer == {
        "method": "dtvg", "target": "cr", "sources": ["sst2", "mr:2"], "dataset": "cr", "output": "cr-dtvg", "seed": 0,
        "options": {"steps": 5}, "target_options": {"steps": 10}, "tags": {"a": "b"},
    }  # fmt: skip


def submitted(client: Client, registry: Any, wire: Any, *pages: Any, **end: Any) -> tpv.Job:
    job = wire.job("queued")
    registry.on(f"GET /jobs/{job['id']}", job, {**wire.job("succeeded"), **end})
    registry.on(f"GET /jobs/{job['id']}/events", *pages)
    return client.jobs.get(job["id"])


def test_waiting_follows_the_events_to_the_end(client: Client, registry: Any, wire: Any) -> None:
    step = ("progress", {"step": 1, "steps": 2, "loss": 0.5})
    pages = [wire.events(step), wire.events(after=1), httpx.Response(503), wire.events(step, after=1, finished=True)]
    job = submitted(client, registry, wire, *pages)
    assert job.wait() is job
    assert (job.state, job.result, job.finished) == ("succeeded", "default/mnli:1", True)
    asked = [dict(request.url.params) for request in registry.asked(f"GET /jobs/{job.id}/events")]
    assert [question["after"] for question in asked] == ["0", "1", "1", "1"]
    assert all(0 < float(question["wait"]) <= 25 for question in asked)
    assert all(request.extensions["timeout"]["read"] > 25 for request in registry.asked(f"GET /jobs/{job.id}/events"))


def test_a_job_that_fails_is_an_error_with_its_reason(client: Client, registry: Any, wire: Any) -> None:
    end = {"state": "failed", "reason": "nan-loss", "message": "the loss was NaN at step 3"}
    job = submitted(client, registry, wire, wire.events(finished=True), **end)
    with pytest.raises(errors.JobFailed, match=r"failed \(nan-loss\): the loss was NaN at step 3") as error:
        job.wait()
    assert error.value.job is job


def test_waiting_ends_after_the_timeout(client: Client, registry: Any, wire: Any) -> None:
    job = submitted(client, registry, wire, wire.events())
    with pytest.raises(errors.WaitTimeout, match=str(job.id)):
        job.wait(timeout=0.05)
    assert job.state == "queued"


def test_several_jobs_are_waited_for_and_the_first_failure_told_at_the_end(
    client: Client, registry: Any, wire: Any, pauses: list[float]
) -> None:
    jobs = []
    for name, state in (("a", "failed"), ("b", "succeeded")):
        job = wire.job("queued", name)
        registry.on(f"GET /jobs/{job['id']}", job, wire.job(state, name))
        registry.on(f"GET /jobs/{job['id']}/events", wire.events(), wire.events(finished=True))
        jobs.append(client.jobs.get(job["id"]))
    with pytest.raises(errors.JobFailed) as error:
        client.jobs.wait_all(jobs, progress=True)
    assert error.value.job is jobs[0]
    assert [job.state for job in jobs] == ["failed", "succeeded"]


def test_the_bars_show_step_loss_metric_and_group(
    client: Client, registry: Any, wire: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    events = [
        ("state", {"state": "running"}),
        ("phase", {"message": "loading the model"}),
        ("progress", {"step": 3, "steps": 8, "loss": 0.25}),
        ("evaluation", {"step": 3, "metric": "accuracy", "value": 0.75, "split": "validation"}),
        ("group", {"step": 3, "members": ["default/mnli:1", "lab/qnli:2"]}),
        ("warning", {"message": "the group flaps"}),
        ("something new", {"x": 1}),
    ]
    job = submitted(client, registry, wire, wire.events(*events, finished=True))
    job.wait(progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    for text in (
        "prompt-tuning mnli",
        "3/8",
        "loss 0.25",
        "validation accuracy 0.75",
        "group mnli:1 + lab/qnli:2",
        "prompt-tuning mnli: the group flaps\n",
        "✓",
    ):
        assert text in shown.err


def test_every_kind_of_job_is_asked_for_by_its_members(client: Client, registry: Any, wire: Any) -> None:
    registry.on("POST /jobs", wire.job())
    center = {"center": True, "reference_pool": ["a", "b"]}
    client.jobs.tune(method="spot-multitask", dataset="cr", datasets=["mr"], initialization="f", preset="tpv-paper")
    client.jobs.transfer(target="cr", sources=["s"], dataset="cr", output="new", steps=3, **center)
    client.jobs.transfer(method="attempt", sources=["s"], dataset="cr", datasets=[])
    tuning, transfer, attempt = [json.loads(request.content) for request in registry.asked("POST /jobs")]

    assert (tuning["datasets"], tuning["preset"], tuning["options"]) == (["mr"], "tpv-paper", {})
    assert transfer["options"] == {"center": True, "steps": 3}
    assert transfer["reference_pool"]["references"] == ["a", "b"]
    assert attempt.keys() & {"target", "output", "datasets", "preset", "reference_pool"} == set()


def test_an_artifact_is_saved_and_verified(client: Client, registry: Any, wire: Any, tmp_path: Path) -> None:
    content = files.dump({"A": np.ones((2, 2), np.float32)})
    artifact = {"digest": files.digest(content), "size": len(content)}
    job = wire.job("succeeded", method="lora", output=None, result=None, artifact=artifact)
    registry.on(f"GET /jobs/{job['id']}", job)
    registry.on(f"GET /jobs/{job['id']}/artifact", wire.content(content), wire.content(b"something else"))
    assert client.jobs.download(job["id"], tmp_path / "lora").read_bytes() == content
    with pytest.raises(errors.DamagedContent):
        client.jobs.download(job["id"], tmp_path / "damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_events_are_listed_and_followed(client: Client, registry: Any, wire: Any) -> None:
    page = wire.events(("log", {"message": "a"}), ("log", {"message": "b"}))
    job = submitted(client, registry, wire, page, wire.events(after=2))
    assert [event.data["message"] for event in job.events()] == ["a", "b"]
    end = wire.events(("log", {"message": "c"}), after=2, finished=True)
    registry.on(f"GET /jobs/{job.id}/events", wire.events(after=2), end)
    assert [event.id for event in job.events(after=2, follow=True)] == [3]
    assert client.jobs.events(job, after=2, wait=0).finished


def test_a_worker_reports_its_attempt(client: Client, registry: Any, wire: Any) -> None:
    job = wire.job("running")
    base = f"/jobs/{job['id']}/attempts"
    content = b"\0\1\2"
    digest = files.digest(content)
    registry.on(f"POST {base}", httpx.Response(503), {"job": job["id"], "number": 2, "spec": job["spec"]})
    registry.on(f"POST {base}/2/events", httpx.Response(204))
    registry.on(f"POST {base}/2/staged", httpx.ReadError("reset"), {"digest": digest, "size": 3})
    registry.on(f"GET {base}/2/staged/{digest}", wire.content(content))
    registry.on(f"POST {base}/2/result", httpx.Response(502), wire.job("succeeded"))
    registry.on(f"POST {base}/2/failure", wire.problem("stale-attempt", 409))

    attempt = client.jobs.start_attempt(job["id"], "worker-1", entry=7)
    assert attempt.number == 2
    event = EventReport(type="progress", at=datetime.now(UTC), data={"step": 1})
    client.jobs.report_events(attempt.job, attempt.number, [event])
    assert client.jobs.stage(attempt.job, attempt.number, content).digest == digest
    assert registry.requests[-1].content == content
    assert client.jobs.staged(attempt.job, attempt.number, digest) == content
    figure = EvaluationReport(dataset="cr", metric="accuracy", value=0.5, predictions=digest)
    done = client.jobs.complete(attempt.job, attempt.number, ResultReport(prompt=digest, evaluations=[figure]))
    assert done.state == "succeeded"
    assert json.loads(registry.requests[-1].content)["evaluations"][0]["predictions"] == digest
    with pytest.raises(errors.StaleAttempt):
        client.jobs.fail(attempt.job, attempt.number, FailureReport(reason="crashed", message="it did"))


# --- The asynchronous client -----------------------------------------------------------------------------------------


def test_the_asynchronous_client_does_the_same(registry: Any, wire: Any, tmp_path: Path) -> None:
    registry.on(f"GET {VECTOR}", httpx.Response(503), wire.version())
    registry.on("GET /vectors/default/mnli/versions/1/content", wire.content(files.dump({"vector": PROMPT})))
    registry.on("GET /vectors", wire.page(wire.vector("a"), wire.vector("b")))
    registry.on("POST /vectors/default/mnli/versions", httpx.Response(503), wire.version())
    job = wire.job("queued")
    registry.on(f"GET /jobs/{job['id']}", job, wire.job("succeeded"))
    registry.on(f"GET /jobs/{job['id']}/events", wire.events(("log", {"message": "a"}), finished=True))
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(files.dump({"prompt": PROMPT}))

    async def use() -> None:
        async with AsyncClient(transport=registry.transport, retries=QUICK) as client:
            version = await client.vectors.get("mnli")
            assert (await version.load()).tensor.tolist() == PROMPT.tolist()
            await version.download(tmp_path / "T")
            assert [vector.name async for vector in client.vectors.list()] == ["a", "b"]
            await client.vectors.register("mnli", file=path, initialization="family")
            running = await client.jobs.get(job["id"])
            assert (await running.wait()).state == "succeeded"
            assert [event.type async for event in running.events(follow=True)] == ["log"]

    asyncio.run(use())
    uploads = registry.asked("POST /vectors/default/mnli/versions")
    assert len({request.headers["idempotency-key"] for request in uploads}) == 1
    assert [parts(request)[1]["file"] for request in uploads] == [path.read_bytes()] * 2


def test_ready_says_whether_the_service_is(registry: Any) -> None:
    client = Client(transport=registry.transport, retries=QUICK)
    registry.routes["GET /readyz"] = [httpx.ConnectError("refused"), httpx.Response(503), httpx.Response(200, json={})]
    assert [client.ready(), client.ready(), client.ready()] == [False, False, True]


def test_the_default_timeouts_are_finite(registry: Any, wire: Any) -> None:
    registry.on(f"GET {VECTOR}", wire.version())
    Client(transport=registry.transport).vectors.get("mnli")
    Client(transport=registry.transport, timeout=3).vectors.get("mnli")
    default, given = (request.extensions["timeout"] for request in registry.requests)
    assert all(seconds and seconds <= 60 for seconds in default.values())
    assert set(given.values()) == {3}
