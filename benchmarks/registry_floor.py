"""The floor that benchmarks/registry.py measures against; run by it, with the settings of our own server."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Annotated

import psycopg_pool
import uvicorn
from fastapi import FastAPI, Form, UploadFile
from fastapi.responses import FileResponse, Response
from minio import Minio
from starlette.concurrency import run_in_threadpool

DIRECTORY = Path(os.environ["TPV_BLOB_DIRECTORY"]).with_name("floor") if "TPV_BLOB_DIRECTORY" in os.environ else None
BUCKET = "floor"
newest = ""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    if DIRECTORY:
        DIRECTORY.mkdir(exist_ok=True)
    elif not object_store().bucket_exists(BUCKET):
        object_store().make_bucket(BUCKET)
    async with pool, pool.connection() as connection:
        await connection.execute("create table if not exists floor (id bigserial primary key, digest text)")
        await connection.commit()
        yield


def object_store() -> Minio:
    return Minio(
        os.environ["TPV_S3_ENDPOINT"],
        access_key=os.environ["TPV_S3_ACCESS_KEY"],
        secret_key=os.environ["TPV_S3_SECRET_KEY"],
        region="us-east-1",
        secure=False,
    )


pool = psycopg_pool.AsyncConnectionPool(os.environ["TPV_DATABASE_URL"], max_size=20, open=False)
app = FastAPI(lifespan=lifespan)
client = None if DIRECTORY else object_store()


@app.get("/readyz")
async def ready() -> str:
    return "ready"


@app.post("/files", status_code=201)
async def put(metadata: Annotated[str, Form()], file: UploadFile) -> str:
    global newest
    digest = await run_in_threadpool(store, await file.read())
    async with pool.connection() as connection:  # commits at its end
        await connection.execute("insert into floor (digest) values (%s)", [digest])
    newest = digest
    return digest


def store(content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    if DIRECTORY is None:
        assert client is not None
        client.put_object(BUCKET, digest, BytesIO(content), len(content))
        return digest
    with (DIRECTORY / digest).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return digest


@app.get("/files/newest")
async def get() -> Response:
    if DIRECTORY:
        path = DIRECTORY / newest
        await run_in_threadpool(lambda: hashlib.sha256(path.read_bytes()).hexdigest())
        return FileResponse(path)
    return Response(await run_in_threadpool(fetch))


def fetch() -> bytes:
    assert client is not None
    content = client.get_object(BUCKET, newest).read()
    hashlib.sha256(content).hexdigest()
    return content


if __name__ == "__main__":
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    server.run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
