"""The client of the TPV registry, and the mathematics of task prompt vectors.

`Client`, `AsyncClient` and their handles are loaded when first used: the mathematics alone needs no HTTP.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tpv import errors, grouping, similarity
from tpv.vectors import TaskPromptVector

if TYPE_CHECKING:
    from tpv._async.client import AsyncClient
    from tpv._async.jobs import AsyncJob
    from tpv._async.vectors import AsyncVectorVersion
    from tpv._base import Retries
    from tpv._sync.client import Client
    from tpv._sync.jobs import Job
    from tpv._sync.vectors import VectorVersion

    __version__: str

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "AsyncVectorVersion",
    "Client",
    "Job",
    "Retries",
    "TaskPromptVector",
    "VectorVersion",
    "__version__",
    "errors",
    "grouping",
    "similarity",
]

_LAZY = {
    "AsyncClient": "tpv._async.client",
    "AsyncJob": "tpv._async.jobs",
    "AsyncVectorVersion": "tpv._async.vectors",
    "Client": "tpv._sync.client",
    "Job": "tpv._sync.jobs",
    "Retries": "tpv._base",
    "VectorVersion": "tpv._sync.vectors",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from tpv._base import version

        return version()
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tpv' has no attribute {name!r}")
