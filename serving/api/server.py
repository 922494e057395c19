"""HTTP server: Granian in one process, on one event loop, with an orderly end.

Granian (hyper) speaks HTTP: framing, trailers, bounds of a head, slow heads and half-closed clients
are its work. docs/SERVICE.md has what was measured of it and of other servers.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import logging.handlers
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any

import orjson

from recsys.errors import ConfigError

if TYPE_CHECKING:
    from granian.server.embed import Server


log = logging.getLogger("recsys.serve")

Started = Callable[[Callable[[], None]], None]

LOCAL = ("127.0.0.1", "localhost", "::1")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048
"""Connections that may wait to be let in."""
MAX_HEAD_BYTES = 64 << 10
"""Of a request's head, and of its trailers."""


@dataclass(frozen=True)
class ServerRules:
    """How the process behaves.

    Args:
        head: seconds that a connection has for the head of its next request.
        drain: seconds that running requests have to finish after SIGTERM.
        connections: requests that are worked on at once; others wait to be let in.
        switch: seconds after which a thread that computes lets the event loop go on; Python's own
            5 ms are what a row of the table takes fifty times over.
    """

    head: float = 30.0
    drain: int = 10
    connections: int = 4096
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
    started: Started = lambda stop: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs.

    Args:
        app: the ASGI application.
        bound: as `bind` gave it; it is closed, and its address is the server's.
        rules: times.
        started: called with what stops the server, when connections are taken.

    Raises:
        ConfigError: somebody else listens there by now.
    """
    import uvloop

    rules = rules or ServerRules()
    host, port = bound.getsockname()[:2]
    # Two may be bound to one address while neither listens. The second to listen is refused.
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"{url(bound)} was taken meanwhile, while models were being loaded: {error}. "
            "Name another --host or --port."
        ) from None
    finally:
        bound.close()
    sys.setswitchinterval(rules.switch)
    # What was loaded stays: the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    uvloop.run(serve(app, host, port, rules, started))
    log.info("stopped")


def make_server(app: Any, host: str, port: int, rules: ServerRules) -> Server:
    """Granian as the service runs it."""
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings
    from granian.server.embed import Server

    return Server(
        app,
        address=host,
        port=port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(
            header_read_timeout=round(rules.head * 1000), max_buffer_size=MAX_HEAD_BYTES
        ),
        websockets=False,
        backlog=BACKLOG,
        backpressure=rules.connections,
        log_enabled=False,
    )


async def serve(
    app: Any, host: str, port: int, rules: ServerRules, started: Started = lambda stop: None
) -> None:
    """Serve on the running event loop until it is stopped; see `run`."""
    server = make_server(app, host, port, rules)
    loop = asyncio.get_running_loop()
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if stopping:
            os._exit(1)  # asked twice: do not wait
        stopping = True
        server.stop()
        loop.call_later(rules.drain, give_up)

    def give_up() -> None:
        log.error("requests still run %d s after the stop; the process ends", rules.drain)
        logging.shutdown()
        os._exit(1)

    if threading.current_thread() is threading.main_thread():
        for one in SIGNALS:
            loop.add_signal_handler(one, stop)
    serving = loop.create_task(server.serve())
    while not serving.done():
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(0.01)
            continue
        writer.close()

        def stop_from_anywhere() -> None:
            loop.call_soon_threadsafe(stop)

        started(stop_from_anywhere)
        break
    await serving


WAITING = 10_000
"""Lines that may wait for their reader; more are dropped."""


class JsonLine(logging.Formatter):
    """Time, level, logger, message; and what the record carries as `data`."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        said |= getattr(record, "data", {})
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(said, default=str).decode()


class _Put(logging.handlers.QueueHandler):
    """Drops what does not fit: a stuck reader of logs must not stop the service."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # formatted in the thread; nothing leaves the process in between

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):  # there is nowhere to say it
            self.queue.put_nowait(record)


@contextmanager
def json_logs(level: str = "info", to: IO[str] | None = None) -> Iterator[None]:
    """All logs as JSON lines on stderr (or `to`) while the block runs; all are out at its end."""
    handler = logging.StreamHandler(to or sys.stderr)
    handler.setFormatter(JsonLine())
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(WAITING)
    listener = logging.handlers.QueueListener(waiting, handler)
    root = logging.getLogger()
    before, before_level = root.handlers[:], root.level
    put = _Put(waiting)
    root.handlers[:] = [put]
    root.setLevel(level.upper())
    listener.start()
    try:
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(before_level)
        listener.stop()
