from __future__ import annotations

import numpy as np
import pytest
from tests.service.jobs.conftest import QueueTables

from tpv import files
from tpv.schemas.jobs import ResultReport
from tpv_service.db import create_engine, create_sessionmaker
from tpv_service.storage import create_store
from tpv_service.verify import damaged_files

pytestmark = pytest.mark.anyio


async def test_verify_names_every_missing_and_damaged_file(client, settings):
    start = np.zeros((2, 3), dtype=np.float32)
    initialization = await client.initializations.create("family", base_model="m", revision="a" * 40, tensor=start)
    made = await client.vectors.register("mnli", vector=start + 1, initialization="family")
    await client.datasets.upload("mr", train=[{"source": "a", "target": "b"}])
    job = await client.jobs.tune(method="lora", dataset="mr", initialization="family")
    queue = QueueTables(settings.database_url.get_secret_value().replace("+psycopg", ""))
    await client.jobs.start_attempt(job, "worker", queue.given(job.id))
    artifact = await client.jobs.stage(job, 1, files.dump({"A": start}))
    predictions = await client.jobs.stage(job, 1, b"{}")
    figure = {"dataset": "mr", "metric": "accuracy", "value": 1, "predictions": predictions.digest}
    await client.jobs.complete(job, 1, ResultReport(artifact=artifact.digest, evaluations=[figure]))

    async def check() -> tuple[int, list[str]]:
        engine = create_engine(settings)
        async with create_sessionmaker(engine)() as session:
            found = await damaged_files(session, create_store(settings))
        await engine.dispose()
        return found

    assert await check() == (5, [])
    for damaged in (made.digest, artifact.digest, predictions.digest):
        name = damaged.removeprefix("sha256:")
        (settings.blob_directory / name[:2] / name[2:]).write_bytes(b"other")
    name = initialization.digest.removeprefix("sha256:")
    (settings.blob_directory / name[:2] / name[2:]).unlink()

    count, problems = await check()
    assert count == 5
    assert any("default/mnli:1" in problem for problem in problems)
    assert any(problem.startswith(f"job {job.id}: ") for problem in problems)
    assert any(problem.startswith(f"job {job.id} (predictions): ") for problem in problems)
    assert any(str(initialization.id) in problem and "missing" in problem for problem in problems)
    assert len(problems) == 4
