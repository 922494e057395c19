"""The service as a process: one worker, uvloop and httptools, an orderly end."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from recsys.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger("recsys.serve")

LOCAL = ("127.0.0.1", "localhost", "::1")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LISTENERS = 32
BACKLOG = 2048
"""Connections that may wait to be let in, as uvicorn has it."""


@dataclass(frozen=True)
class ServerRules:
    """How the process behaves.

    Args:
        keep_alive: seconds that a connection may wait for its next request.
        drain: seconds that running requests have to finish after SIGTERM.
        switch: seconds after which a thread that computes lets the event loop go on; Python's own
            5 ms are what a hot answer takes fifty times over.
    """

    keep_alive: int = 30
    drain: int = 10
    switch: float = 0.0005


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host in LOCAL or host.startswith("127.")


def own_names(host: str) -> frozenset[bytes]:
    """Names that a local service may be called by in a Host header."""
    bracketed = f"[{host}]" if ":" in host else host
    return frozenset({b"localhost", b"127.0.0.1", b"[::1]", bracketed.encode()})


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not yet listen, before any model is loaded.

    Raises:
        ConfigError: the address is taken, or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened on: {error}. Name another --host or --port."
        ) from None
    return bound


def url(bound: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: Any,
    bound: socket.socket,
    rules: ServerRules | None = None,
    *,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs.

    Args:
        app: the ASGI application.
        bound: as `bind` gave it.
        rules: times.
        started: called when connections are taken.

    Raises:
        ConfigError: somebody else listens there by now.
    """
    rules = rules or ServerRules()
    # Two may be bound to one address while neither listens. The second to listen is refused, and
    # uvloop says nothing of it.
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"{url(bound)} was taken meanwhile, while models were being loaded: {error}. "
            "Name another --host or --port."
        ) from None
    sys.setswitchinterval(rules.switch)
    # What was loaded stays: the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    server = make_server(app, rules, started)
    server.run(sockets=listeners(bound))
    log.info("stopped")


def listeners(bound: socket.socket) -> list[socket.socket]:
    """One listening socket, as often as connections are to be taken in a turn of the event loop.

    libuv takes one connection a turn from each socket that it listens to (its #3696), and a turn
    answers all that was asked: with 256 callers at once the last ones waited two seconds to be let
    in. Duplicates share one queue, so that whichever looks first takes the next of it.
    """
    return [bound, *(bound.dup() for _ in range(LISTENERS - 1))]


def make_server(
    app: Any, rules: ServerRules, started: Callable[[], None] = lambda: None
) -> uvicorn.Server:
    """Uvicorn as the service runs it."""
    import uvicorn

    from recsys.serving.api.protocol import GuardedProtocol

    class Server(uvicorn.Server):
        """Ends with the exit code of whoever runs it: a drained service has done its work."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started()

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            # uvicorn raises the signal again at the end: that would kill what is yet to be flushed.
            before = {one: signal.signal(one, self.handle_exit) for one in SIGNALS}
            try:
                yield
            finally:
                for one, handler in before.items():
                    signal.signal(one, handler)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit  # asked twice: do not wait
            self.should_exit = True

    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=GuardedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=rules.keep_alive,
        timeout_graceful_shutdown=rules.drain,
    )
    return Server(config)
