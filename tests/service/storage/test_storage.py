"""One suite for both stores: a directory, and a real S3 server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from tests.service.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore

from tpv import errors, files
from tpv_service.settings import Settings
from tpv_service.storage import BlobStore, create_scratch, create_store

CONTENT = b"some bytes" * 1000


@pytest.fixture(scope="module")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with ObjectStore(tmp_path_factory.mktemp("objects")) as server:
        yield server


def s3_settings(server: ObjectStore, **values: object) -> Settings:
    return Settings(
        database_url=SecretStr("postgresql://nobody@nowhere/none"),
        s3_endpoint=server.endpoint,
        s3_access_key=ACCESS_KEY,
        s3_secret_key=SecretStr(SECRET_KEY),
        s3_secure=False,
        **values,
    )


@pytest.fixture(params=["directory", "s3"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Settings, Path]:
    """The store's settings, and the directory in which its blobs lie as files."""
    if request.param == "directory":
        url = SecretStr("postgresql://nobody@nowhere/none")
        return Settings(database_url=url, blob_directory=tmp_path), tmp_path
    server: ObjectStore = request.getfixturevalue("object_store")
    bucket = f"bucket-{tmp_path.name.replace('_', '-')}"[:60].rstrip("-")
    return s3_settings(server, s3_bucket=bucket), server.directory / bucket


@pytest.fixture
def store(made: tuple[Settings, Path]) -> BlobStore:
    return create_store(made[0])


@pytest.fixture
def directory(made: tuple[Settings, Path]) -> Path:
    return made[1]


def test_what_is_put_is_got_by_its_digest(store):
    digest = store.put(CONTENT)

    assert digest == files.digest(CONTENT)
    assert store.get(digest) == CONTENT
    assert list(store.digests()) == [digest]


def test_putting_twice_keeps_one_blob(store):
    assert store.put(CONTENT) == store.put(CONTENT)
    assert len(list(store.digests())) == 1


def test_many_at_once_are_what_they_are_one_by_one(store, directory):
    contents = [b"%d" % (i % 40) for i in range(50)]
    known, damaged = store.put(contents[0]), store.put(contents[1]).removeprefix("sha256:")
    (directory / damaged[:2] / damaged[2:]).write_bytes(b"damaged")

    assert store.put_many(contents) == [files.digest(content) for content in contents]
    assert [store.get(files.digest(content)) for content in contents] == contents
    assert known in store.digests()
    assert sorted(store.digests()) == sorted({files.digest(content) for content in contents})
    assert store.put_many([]) == []


def test_many_writers_of_one_blob_agree(store):
    threads = [threading.Thread(target=store.put, args=(CONTENT,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert store.get(files.digest(CONTENT)) == CONTENT
    assert set(store.digests()) == {files.digest(CONTENT)}


def test_a_missing_blob_is_not_found(store):
    with pytest.raises(errors.NotFound):
        store.get(files.digest(b"never stored"))


def test_a_damaged_blob_is_reported_and_not_given(store, directory):
    digest = store.put(CONTENT)
    name = digest.removeprefix("sha256:")
    (directory / name[:2] / name[2:]).write_bytes(CONTENT[:-1] + b"!")

    with pytest.raises(errors.DamagedContent):
        store.get(digest)


def test_deleting_is_for_good_and_may_be_repeated(store):
    digest = store.put(CONTENT)
    later = datetime.now(UTC) + timedelta(minutes=1)
    store.delete(digest, later)
    store.delete(digest, later)

    assert list(store.digests()) == []


def test_the_old_ones_are_those_that_nobody_has_put_since(store):
    digest = store.put(CONTENT)
    time.sleep(1.1)  # S3 tells times by the second
    between = datetime.now(UTC)
    assert list(store.digests(before=between)) == [digest]
    time.sleep(1.1)
    store.put(CONTENT)

    assert list(store.digests(before=between)) == []
    store.delete(digest, between)
    assert list(store.digests()) == [digest]


def test_scratch_is_a_store_of_its_own(made, store):
    scratch = create_scratch(made[0])
    digest = store.put(CONTENT)
    assert scratch.put(CONTENT) == digest
    other = scratch.put(b"other")
    assert (list(store.digests()), sorted(scratch.digests())) == ([digest], sorted([digest, other]))
    scratch.delete(digest, datetime.now(UTC) + timedelta(minutes=1))

    assert store.get(digest) == CONTENT
    assert list(scratch.digests()) == [other]


def test_it_can_be_checked(store):
    store.check()


def test_a_directory_store_leaves_no_temporary_file(tmp_path):
    store = create_store(Settings(database_url=SecretStr("postgresql://a@b/c"), blob_directory=tmp_path))
    store.put(CONTENT)

    assert list(tmp_path.rglob(".*")) == []


def test_an_interrupted_write_is_no_blob(tmp_path):
    store = create_store(Settings(database_url=SecretStr("postgresql://a@b/c"), blob_directory=tmp_path))
    digest = store.put(CONTENT)
    name = digest.removeprefix("sha256:")
    (tmp_path / name[:2] / ".abc.part").write_bytes(b"half")

    assert list(store.digests()) == [digest]


def test_a_presigned_url_gives_the_content_without_credentials(object_store):
    settings = s3_settings(
        object_store, s3_presign=True, s3_presign_lifetime=timedelta(minutes=1), s3_bucket="presigned"
    )
    store = create_store(settings)
    url = store.presigned_url(store.put(CONTENT))

    assert url is not None
    assert httpx.get(url).content == CONTENT


def test_a_server_that_is_away_is_unavailable_and_comes_back(tmp_path):
    server = ObjectStore(tmp_path)
    store = create_store(s3_settings(server))  # made before the server is there
    with pytest.raises(errors.Unavailable):
        store.put(CONTENT)
    with server:
        digest = store.put(CONTENT)
        assert store.get(digest) == CONTENT
    with pytest.raises(errors.Unavailable):
        store.get(digest)
    with server:
        assert store.get(digest) == CONTENT
