"""The ASGI application: what the process owns, and which routes it answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypedDict

from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.middleware import Middleware

from tpv_service import health, logs, problems
from tpv_service.auth.tokens import ensure_initial_token
from tpv_service.datasets import endpoints as datasets
from tpv_service.db import create_engine, create_reading_engine, create_sessionmaker
from tpv_service.jobs import endpoints as jobs
from tpv_service.jobs import workers
from tpv_service.jobs.stalled import watch_stalled_jobs
from tpv_service.queue import Queue
from tpv_service.registry import (
    aliases,
    bulk,
    combinations,
    evaluations,
    filters,
    initializations,
    lineage,
    prompts,
    vectors,
    versions,
)
from tpv_service.registry.queries import KnownInitializations
from tpv_service.search import endpoints as search
from tpv_service.search.families import Families, cache_directory
from tpv_service.search.indexes import Indexes
from tpv_service.settings import Settings
from tpv_service.storage import BlobStore, create_scratch, create_store


class State(TypedDict):
    """What the process owns; endpoints find it in `request.state`."""

    settings: Settings
    sessions: async_sessionmaker[AsyncSession]
    readers: async_sessionmaker[AsyncSession]
    initializations: KnownInitializations
    families: Families
    indexes: Indexes
    store: BlobStore
    scratch: BlobStore
    queue: Queue


def create_app(settings: Settings) -> FastAPI:
    logs.configure()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[State]:
        async with AsyncExitStack() as at_end:
            engine, reading = create_engine(settings), create_reading_engine(settings)
            at_end.push_async_callback(engine.dispose)
            at_end.push_async_callback(reading.dispose)
            sessions, readers = create_sessionmaker(engine), create_sessionmaker(reading)
            if settings.initial_token:
                async with sessions.begin() as session:
                    await ensure_initial_token(session, settings.initial_token.get_secret_value())
            queue = Queue(settings)
            cache = at_end.enter_context(cache_directory(settings.cache_directory))
            store, scratch = create_store(settings), create_scratch(settings)
            await at_end.enter_async_context(watch_stalled_jobs(settings, sessions, queue, scratch))
            yield State(
                settings=settings,
                sessions=sessions,
                readers=readers,
                initializations=KnownInitializations(readers),
                families=Families(readers, cache),
                indexes=await at_end.enter_async_context(Indexes(settings, sessions, readers).opened()),
                store=store,
                scratch=scratch,
                queue=queue,
            )

    middleware = [Middleware(problems.BodyLimit, limit=settings.upload_limit)]
    if not settings.authentication:
        middleware.append(Middleware(problems.LoopbackOnly))
    app = FastAPI(
        title="TPV registry",
        description="Task prompt vectors: stored, found, grouped, combined and produced.",
        lifespan=lifespan,
        middleware=middleware,
    )
    problems.install(app)
    app.include_router(health.router)
    for module in (  # those asked most come first: routes are tried one after another
        *(versions, search),
        *(initializations, vectors, bulk, filters, prompts, lineage, aliases, evaluations, combinations),
        *(datasets, jobs, workers),
    ):
        app.include_router(module.router, prefix="/api/v1")
    return app
