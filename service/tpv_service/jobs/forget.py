"""What is over is forgotten: nothing that was registered, only what jobs leave behind."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.concurrency import run_in_threadpool

from tpv.errors import Unavailable
from tpv_service.jobs import queries
from tpv_service.queue import Queue
from tpv_service.storage import BlobStore

log = structlog.get_logger()

FORGET_EVERY = timedelta(minutes=10)
#: A file is older than this before it is looked at, because its row comes after it. No store's clock is further from
#: ours: S3 refuses requests from a clock that is.
FILES_KEPT = timedelta(minutes=15)


async def forget_regularly(sessions: async_sessionmaker[AsyncSession], queue: Queue, scratch: BlobStore) -> None:
    while True:
        await asyncio.sleep(FORGET_EVERY.total_seconds())
        try:
            await forget_what_is_over(sessions, queue, scratch)
        except Exception as error:  # it can wait for the next time
            log.warning("cannot forget what is over", error=repr(error))


async def forget_what_is_over(
    sessions: async_sessionmaker[AsyncSession], queue: Queue, scratch: BlobStore, kept: timedelta = FILES_KEPT
) -> None:
    """Deletes ended entries of the queue, workers that are gone for a week, and files that no attempt may ask for."""
    await queue.forget_ended()
    async with sessions.begin() as session:
        await queries.forget_gone_workers(session)
        await queries.forget_staged_files(session)
    before = datetime.now(UTC) - kept
    old = await run_in_threadpool(lambda: {*scratch.digests(before)})
    async with sessions() as session:  # after the files were listed: what has its row by now is kept
        unused = old - await queries.scratch_files(session)
    for digest in sorted(unused):
        try:
            await run_in_threadpool(scratch.delete, digest, before)  # which looks at its age again
        except Unavailable as error:  # the others can go all the same
            log.warning("cannot delete a file of an attempt that has ended", digest=digest, error=repr(error))
