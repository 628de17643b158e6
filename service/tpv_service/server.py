"""The API as a process: the body of `tpv serve`, and the child that `tpv up` supervises."""

from __future__ import annotations

import gc
import socket
import sys
from contextlib import suppress
from ipaddress import ip_address

from tpv_service.settings import Settings


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError when that is not possible."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family, backlog=512)


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def serve(settings: Settings, listener: socket.socket) -> None:
    """Answers requests until SIGTERM or SIGINT, then finishes the ones at hand."""
    import uvicorn  # here, because the supervisor of `tpv up` uses the functions above and needs no application

    from tpv_service.app import create_app

    config = uvicorn.Config(create_app(settings), access_log=False, timeout_graceful_shutdown=3)
    # What is here now stays. To look through it again and again for garbage takes a tenth of a second, in which every
    # request waits.
    gc.collect()
    gc.freeze()
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    # For `tpv up`, which keeps the listening socket open: the port stays ours when this process is started again.
    # It starts the database at the same time: imports come first, for they need none.
    from tpv_service import app, migrate  # noqa: F401 # what `serve` imports takes longest

    settings = Settings()  # from the environment
    database_url = settings.database_url.get_secret_value()
    migrate.wait_for(database_url)
    migrate.upgrade(database_url)
    serve(settings, socket.socket(fileno=int(sys.argv[1])))
