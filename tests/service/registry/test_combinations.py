"""Combinations through the published client, against `tpv.merging` and plain NumPy on the same vectors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.service.registry.conftest import ROWS, WIDTH

import tpv
from tpv import errors, files, merging
from tpv_service.registry import combinations

pytestmark = pytest.mark.anyio


@pytest.fixture
async def vectors(client: tpv.AsyncClient, family) -> dict[str, np.ndarray]:
    """Four vectors of `family`."""
    random = np.random.default_rng(5)
    made = {name: random.normal(size=(ROWS, WIDTH)).astype(np.float32) for name in ("mnli", "qnli", "rte", "sst2")}
    for name, tensor in made.items():
        await client.vectors.register(name, vector=tensor, initialization="family", task=f"task-{name}")
    return made


@pytest.fixture
async def strange(client: tpv.AsyncClient) -> np.ndarray:
    """A vector `strange` of another initialization of the same base model and shape."""
    tensor = np.ones((ROWS, WIDTH), np.float32)
    await client.initializations.create("other", base_model="tiny-t5", revision="a" * 40, tensor=tensor)
    await client.vectors.register("strange", vector=2 * tensor, initialization="other")
    return 2 * tensor


async def loaded(version: tpv.AsyncVectorVersion) -> np.ndarray:
    return (await version.load()).tensor


async def test_two_vectors_are_added_to_the_bit(client, vectors):
    made = await client.combinations.create("sum", [("mnli", 1.0), ("rte", 1.0)])

    np.testing.assert_array_equal(await loaded(made), vectors["mnli"] + vectors["rte"])
    assert (made.reference, made.created, made.method) == ("default/sum:1", True, "combination:sum")


@pytest.mark.parametrize(
    ("method", "options"),
    [("sum", {}), ("mean", {}), ("ties", {"density": 0.4}), ("dare", {"drop": 0.5, "seed": 3})],
)
async def test_every_method_is_that_of_the_client_to_the_bit(client, vectors, method, options):
    weights = {"mnli": 1.0, "qnli": -0.3, "rte": 0.7, "sst2": 0.1}
    made = await client.combinations.create("out", weights, method=method, **options)
    expected = merging.merge(np.stack(list(vectors.values())), list(weights.values()), method, **options)

    np.testing.assert_array_equal(await loaded(made), expected)
    assert made.hyperparameters == {
        "terms": [{"vector": f"default/{name}:1", "weight": weight} for name, weight in weights.items()],
        **options,
    }


async def test_a_sum_is_the_same_however_little_is_held_in_memory(client, vectors, monkeypatch):
    whole = await client.combinations.create("whole", dict.fromkeys(vectors, 0.3))
    monkeypatch.setattr(combinations, "_BLOCK", 1)

    assert (await client.combinations.create("rows", dict.fromkeys(vectors, 0.3))).fingerprint == whole.fingerprint


async def test_a_weight_of_minus_one_unlearns(client, vectors):
    negated = await client.combinations.create("forget-rte", {"rte": -1})
    without = await client.combinations.create("without", [("mnli", 1), (negated, 1)])

    np.testing.assert_array_equal(await loaded(negated), -vectors["rte"])
    np.testing.assert_array_equal(await loaded(without), vectors["mnli"] - vectors["rte"])


async def test_the_answer_echoes_weights_and_tells_how_near_each_term_is(client, vectors):
    made = await client.combinations.create("out", [("mnli", 3.0), ("rte", -0.5)])
    result = (3 * vectors["mnli"].astype(np.float64) - 0.5 * vectors["rte"]).ravel()

    assert [(term.reference, term.weight) for term in made.terms] == [("default/mnli:1", 3.0), ("default/rte:1", -0.5)]
    for term, name in zip(made.terms, ("mnli", "rte"), strict=True):
        vector = vectors[name].ravel().astype(np.float64)
        cosine = vector @ result / np.linalg.norm(vector) / np.linalg.norm(result)
        assert term.cosine == pytest.approx(cosine, rel=1e-6)
    assert made.mixed_initializations == []


async def test_nothing_is_near_to_zero(client, vectors):
    made = await client.combinations.create("nothing", [("mnli", 1), ("mnli", -1)])

    assert made.norm == 0
    assert [term.cosine for term in made.terms] == [None, None]


async def test_the_terms_are_the_parents_pinned_to_the_version_they_meant(client, vectors):
    await client.vectors.set_alias("mnli", "best", 1)
    await client.vectors.register("mnli", vector=2 * vectors["mnli"], initialization="family")
    made = await client.combinations.create("ns/out", [("mnli@best", 1.0), ("mnli", -0.5)], tags={"k": "v"}, task="t")

    parents = [(parent.reference, parent.role, parent.weight) for parent in made.parents]
    assert parents == [("default/mnli:1", "term", 1.0), ("default/mnli:2", "term", -0.5)]
    assert made.norm == 0
    described = await client.vectors.describe("ns/out")
    assert (described.tags, described.tasks) == ({"k": "v"}, ["t"])
    with pytest.raises(errors.InUse, match="descendant ns/out:1"):
        await client.vectors.delete("mnli:1")


async def test_the_same_again_is_the_version_that_is_there(client, vectors):
    first = await client.combinations.create("out", {"mnli": 1, "rte": 0.1})
    again = await client.combinations.create("out", {"mnli": 1, "rte": 0.1})
    another = await client.combinations.create("out", {"mnli": 1, "rte": 0.2})

    assert (again.reference, again.created) == (first.reference, False)
    assert another.version == 2


async def test_a_result_may_be_a_version_of_one_of_its_terms(client, vectors):
    made = await client.combinations.create("mnli", {"mnli": 0.5})

    assert made.reference == "default/mnli:2"
    assert [parent.reference for parent in made.parents] == ["default/mnli:1"]


async def test_one_idempotency_key_has_one_effect(client, http, vectors):
    def ask(weight: float):
        body = {"name": "out", "terms": [{"vector": "mnli", "weight": weight}]}
        return http.post("/api/v1/combinations", json=body, headers={"Idempotency-Key": "k"})

    first = await ask(2)
    await client.vectors.register("mnli", vector=vectors["rte"], initialization="family")  # `mnli` means another now
    again, other = await ask(2), await ask(3)
    await client.vectors.delete("mnli", force=True)  # and nothing now
    last = await ask(2)

    assert first.status_code == again.status_code == last.status_code == 201
    assert first.json() == again.json() == last.json()
    assert other.json()["type"] == "urn:tpv:problem:idempotency-conflict"
    assert [v.version async for v in client.vectors.versions("out")] == [1]


async def test_mixed_initializations_are_refused_by_name_and_taken_with_the_flag(client, vectors, strange):
    terms = {"mnli": 1.0, "strange": 0.5}
    with pytest.raises(errors.IncompatibleVectors, match=r"default/family.*default/other.*allow_mixed") as caught:
        await client.combinations.create("out", terms)
    with pytest.raises(errors.Invalid, match=r"default/family, default/other.*name the result's"):
        await client.combinations.create("out", terms, allow_mixed_initializations=True)
    made = await client.combinations.create("out", terms, allow_mixed_initializations=True, initialization="other")

    assert set(caught.value.extra["differences"]) == {"fingerprint"}
    assert made.initialization.name == "other"
    assert [summary.name for summary in made.mixed_initializations] == ["family"]
    np.testing.assert_array_equal(await loaded(made), vectors["mnli"] + np.float32(0.5) * strange)


async def test_another_initialization_for_the_result_alone_is_mixed_too(client, vectors, strange):
    with pytest.raises(errors.IncompatibleVectors, match="allow_mixed"):
        await client.combinations.create("out", {"mnli": 1.0}, initialization="other")

    assert (await client.combinations.create("out", {"mnli": 1.0}, initialization="family")).created


async def test_another_shape_or_model_is_refused_with_the_flag_too(client, vectors):
    wide = np.ones((ROWS, WIDTH + 1), np.float32)
    await client.initializations.create("wide", base_model="tiny-llama", revision="a" * 40, tensor=wide)
    await client.vectors.register("wide", vector=wide, initialization="wide")
    with pytest.raises(errors.IncompatibleVectors, match="never go together") as caught:
        await client.combinations.create(
            "out", {"mnli": 1, "wide": 1}, allow_mixed_initializations=True, initialization="family"
        )

    assert set(caught.value.extra["differences"]) == {"fingerprint", "base_model", "token_dim"}


async def test_a_thousand_terms_are_taken(client, vectors):
    made = await client.combinations.create("many", [(name, 0.001) for name in list(vectors) * 250])

    assert len(made.parents) == 1000
    np.testing.assert_allclose(await loaded(made), sum(vectors.values()) * 0.25, rtol=1e-6, atol=1e-7)


async def test_what_would_fill_the_memory_is_refused(client, vectors, monkeypatch):
    monkeypatch.setattr(combinations, "STACK_LIMIT", 2 * ROWS * WIDTH)
    terms = dict.fromkeys(list(vectors)[:3], 1.0)

    with pytest.raises(errors.Invalid, match=rf"ties holds all.*3 of {ROWS} x {WIDTH}.*use sum or mean"):
        await client.combinations.create("out", terms, method="ties", density=0.5)
    assert (await client.combinations.create("out", terms)).created


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"terms": []}, "terms"),
        ({"terms": [{"vector": "mnli", "weight": 1}] * 1001}, "1000"),
        ({"terms": [{"vector": "mnli"}]}, "terms.0.weight"),
        ({"terms": [{"vector": "mnli", "weight": "NaN"}]}, "terms.0.weight"),
        ({"terms": [{"vector": "mnli", "weight": 1e39}]}, "infinite as float32"),
        ({"terms": [{"vector": "mnli", "weight": 1e308}] * 2}, "infinite as float32"),
        ({"terms": [{"vector": "mnli", "weight": 1}, {"vector": "rte", "weight": -1}], "method": "mean"}, "sum to 0"),
        ({"terms": [{"vector": "sha256:" + "0" * 64, "weight": 1}]}, "by name or id"),
        ({"terms": [{"vector": "a b", "weight": 1}]}, "'a b'"),
        ({"name": "out:3"}, "without version or alias"),
        ({"method": "ties"}, "ties takes density"),
        ({"method": "dare", "drop": 0.5}, "dare takes drop and seed"),
        ({"density": 0.5}, "sum takes no options"),
        ({"method": "ties", "density": 0}, "density"),
        ({"normalize": True}, "normalize"),
    ],
)
async def test_a_bad_combination_is_a_422_that_says_what_is_wrong(http, vectors, members, said):
    body = {"name": "out", "terms": [{"vector": "mnli", "weight": 1}], **members}
    answer = await http.post(
        "/api/v1/combinations", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )

    assert answer.status_code == 422
    assert said in answer.json()["detail"]
    assert (await http.get("/api/v1/vectors/default/out")).status_code == 404


async def test_every_missing_term_is_named(client, vectors):
    with pytest.raises(errors.NotFound, match="nothing, mnli:7"):
        await client.combinations.create("out", {"mnli": 1, "nothing": 1, "mnli:7": 1})


async def test_a_damaged_term_makes_no_combination(client, vectors, settings):
    digest = (await client.vectors.get("mnli")).digest.removeprefix("sha256:")
    path = settings.blob_directory / digest[:2] / digest[2:]
    path.write_bytes(files.dump({"vector": vectors["rte"]}))

    with pytest.raises(errors.DamagedContent):
        await client.combinations.create("out", {"mnli": 1})
