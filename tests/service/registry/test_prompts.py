"""P = P_init + scale * T, computed by the service."""

from __future__ import annotations

from io import BytesIO
from zipfile import ZipFile

import numpy as np
import pytest
from tests.service.registry.conftest import ROWS, WIDTH, prompt_near

import tpv
from tpv import errors, files, peft

pytestmark = pytest.mark.anyio

URL = "/api/v1/vectors/default/mnli/versions/1/prompt"
PEFT_URL = "/api/v1/vectors/default/mnli/versions/1/peft"


@pytest.fixture
async def version(client: tpv.AsyncClient, family, start):
    return await client.vectors.register("mnli", prompt=prompt_near(start, 1), initialization="family")


@pytest.fixture
async def other(client: tpv.AsyncClient) -> np.ndarray:
    tensor = np.random.default_rng(7).normal(size=(ROWS, WIDTH)).astype(np.float32)
    await client.initializations.create("other", base_model="tiny-t5", revision="a" * 40, tensor=tensor)
    return tensor


async def test_the_prompt_is_the_one_whose_fingerprint_was_kept(client, version, start):
    vector = await (await client.vectors.get("mnli")).load()
    made = await client.vectors.register("from-t", vector=vector)  # of a P*, rounding may have taken a last bit
    prompt = await client.vectors.prompt("from-t")

    assert prompt.dtype == np.float32
    assert files.fingerprint(prompt) == made.prompt_fingerprint
    np.testing.assert_allclose(prompt, prompt_near(start, 1), atol=version.reconstruction_error)


@pytest.mark.parametrize("scale", [0.5, -1.0, 0.0])
async def test_the_scale_multiplies_the_vector(client, version, start, scale):
    vector = await (await client.vectors.get("mnli")).load()

    np.testing.assert_array_equal(await client.vectors.prompt("mnli", scale=scale), vector.apply(start, scale))


async def test_another_initialization_needs_the_flag(client, version, other):
    vector = await (await client.vectors.get("mnli")).load()
    with pytest.raises(errors.IncompatibleVectors, match=r"default/family.*default/other.*allow_mixed") as caught:
        await client.vectors.prompt("mnli", "other")
    prompt = await client.vectors.prompt("mnli", "other", 0.5, allow_mixed_initializations=True)

    assert set(caught.value.extra["differences"]) == {"fingerprint"}
    np.testing.assert_array_equal(prompt, vector.apply(other, 0.5, allow_mixed_initializations=True))


@pytest.mark.parametrize(
    ("members", "shape", "different"),
    [
        ({"base_model": "tiny-t5", "revision": "b" * 40}, (ROWS, WIDTH), {"base_model_revision"}),
        ({"base_model": "tiny-llama", "revision": "a" * 40}, (ROWS, WIDTH), {"base_model"}),
        ({"base_model": "tiny-t5", "revision": "a" * 40}, (ROWS + 1, WIDTH), {"num_virtual_tokens"}),
    ],
)
async def test_another_base_model_or_shape_is_refused_with_the_flag_too(client, version, members, shape, different):
    await client.initializations.create("foreign", tensor=np.ones(shape, np.float32), **members)
    with pytest.raises(errors.IncompatibleVectors, match="never go together") as caught:
        await client.vectors.prompt("mnli", "foreign", allow_mixed_initializations=True)

    assert set(caught.value.extra["differences"]) == {"fingerprint"} | different


async def test_its_own_initialization_may_be_named_by_any_reference(client, version, family):
    own = await client.vectors.prompt("mnli")

    for reference in ("family", family.fingerprint, str(family.id), family):
        np.testing.assert_array_equal(await client.vectors.prompt("mnli", reference), own)


async def test_the_file_says_what_it_was_made_of(client, version, other, tmp_path):
    fingerprint = (await client.initializations.get("other")).fingerprint
    path = tmp_path / "prompt.safetensors"
    prompt = await client.vectors.prompt("mnli", "other", 0.5, allow_mixed_initializations=True, file=path)

    np.testing.assert_array_equal(files.read(path)["prompt"], prompt)
    assert files.metadata(path.read_bytes()) == {
        "vector": "default/mnli:1",
        "vector_fingerprint": version.fingerprint,
        "initialization": fingerprint,
        "scale": "0.5",
    }


async def test_the_etag_is_the_contents_digest(http, version):
    whole = await http.get(URL)
    digest = files.digest(whole.content)

    assert whole.headers["etag"] == f'"{digest}"'
    assert (await http.get(URL, headers={"If-None-Match": f'"{digest}"'})).status_code == 304
    assert (await http.get(URL, params={"scale": 2}, headers={"If-None-Match": f'"{digest}"'})).status_code == 200
    part = await http.get(URL, headers={"Range": "bytes=0-7"})
    assert (part.status_code, part.content) == (206, whole.content[:8])


@pytest.mark.parametrize(("scale", "said"), [("nan", "scale"), ("much", "scale"), ("1e39", "NaN or infinite")])
async def test_a_scale_that_gives_no_prompt_is_refused(http, version, scale, said):
    answer = await http.get(URL, params={"scale": scale})

    assert answer.status_code == 422
    assert said in answer.json()["detail"]


async def test_what_is_missing_is_not_found(client, version):
    with pytest.raises(errors.NotFound, match="nothing"):
        await client.vectors.prompt("mnli", "nothing")
    with pytest.raises(errors.NotFound):
        await client.vectors.prompt("mnli:2")


async def test_the_directory_that_peft_loads_comes_as_a_zip_archive(client, http, version, start, tmp_path):
    vector = await (await client.vectors.get("mnli")).load()
    answer = await http.get(PEFT_URL, params={"task_type": "SEQ_2_SEQ_LM", "scale": 0.5})
    again = await http.get(PEFT_URL, params={"task_type": "SEQ_2_SEQ_LM", "scale": 0.5})
    with ZipFile(BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path)
    read = peft.read(tmp_path)

    assert answer.headers["content-type"] == "application/zip"
    assert again.headers["etag"] == answer.headers["etag"]
    np.testing.assert_array_equal(read.tensor, vector.apply(start, 0.5))
    assert (read.vector, read.reference) == (vector, "default/mnli:1")
    assert (read.config.base_model_name_or_path, read.config.task_type) == ("tiny-t5", "SEQ_2_SEQ_LM")


async def test_peft_needs_to_know_the_kind_of_model(http, version):
    answer = await http.get(PEFT_URL)

    assert answer.status_code == 422
    assert "task_type" in answer.json()["detail"]
