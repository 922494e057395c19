"""Logs as one JSON object a line, written by a thread: a slow terminal holds up no request."""

from __future__ import annotations

import logging
import logging.handlers
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import IO, Any

import orjson

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
