"""Stored files as HTTP answers: ETag, If-None-Match, one byte range, or a redirect to the store itself."""

from __future__ import annotations

import re

from fastapi import Request
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from tpv import files
from tpv_service.storage import BlobStore


async def content_response(
    request: Request, digest: str, *, media_type: str, filename: str, store: BlobStore | None = None
) -> Response:
    """The blob of this digest; it is checked before the first byte leaves, so a damaged one is never served.

    Whoever asks has closed their session: a slow blob store must not keep others from the database. `store` is the one
    for what is registered, unless another is named.
    """
    store = store or request.state.store
    assert store is not None
    headers = _headers(digest, filename)
    if _matches(request.headers.get("if-none-match", ""), digest):
        return Response(status_code=304, headers=headers)
    if url := store.presigned_url(digest):
        return RedirectResponse(url, 307, {"Cache-Control": "no-store"})
    return _part(request, await run_in_threadpool(store.get, digest), digest, headers, media_type)


def computed_response(request: Request, content: bytes, *, media_type: str, filename: str) -> Response:
    """Content that was made for this request."""
    digest = files.digest(content)
    headers = _headers(digest, filename)
    if _matches(request.headers.get("if-none-match", ""), digest):
        return Response(status_code=304, headers=headers)
    return _part(request, content, digest, headers, media_type)


def _headers(digest: str, filename: str) -> dict[str, str]:
    return {
        "ETag": f'"{digest}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",  # an alias moves, a version is deleted: ask again, by ETag
        "Content-Disposition": f'attachment; filename="{filename}"',
    }


def _part(request: Request, content: bytes, digest: str, headers: dict[str, str], media_type: str) -> Response:
    """The whole content, or the range of it that is asked for."""
    span = _span(request.headers.get("range"), len(content))
    if span is None or request.headers.get("if-range", f'"{digest}"') != f'"{digest}"':
        return Response(content, 200, headers, media_type)
    start, end = span
    if start >= end:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
    return Response(content[start:end], 206, headers, media_type)


def _matches(header: str, digest: str) -> bool:
    tags = [tag.strip().removeprefix("W/").strip('"') for tag in header.split(",")]
    return digest in tags or "*" in tags


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end of a single range; None when there is none that RFC 9110 asks to honour."""
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", header or "")
    if not match or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if not first:  # the last so many bytes
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size
