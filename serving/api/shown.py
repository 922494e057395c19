"""Hot answers are written down as shown by a thread of their own, from the bytes that went out."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from recsys.serving.api.handlers import ImpressionSink

log = logging.getLogger("recsys.serve")

HotAnswer = tuple[bytes, int, bytes, str, str]
"""Request id, time in microseconds, items as JSON without brackets, variant, model."""


class Shown:
    """Answers that wait to be written down.

    Args:
        exposures: where to.
        waiting: answers that may wait; the oldest are dropped, and counted.
        seconds: between two looks.
    """

    def __init__(
        self, exposures: ImpressionSink, *, waiting: int = 100_000, seconds: float = 0.1
    ) -> None:
        self._exposures, self._seconds = exposures, seconds
        self._waiting: deque[HotAnswer] = deque(maxlen=waiting)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.dropped = 0

    def add(self, one: HotAnswer) -> None:
        """Remember an answer; called by the event loop alone, and takes no lock."""
        if len(self._waiting) == self._waiting.maxlen:
            self.dropped += 1
        self._waiting.append(one)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shown", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write down all that waits, and end the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._drain()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self._drain()
            except Exception:  # what is shown to people goes on without its log, but not silently
                log.exception("what was shown could not be written down")

    def _drain(self) -> None:
        while self._waiting:
            request, time, items, variant, model = self._waiting.popleft()
            ids = [item["id"] for item in orjson.loads(b"[" + items + b"]")]
            if ids:
                self._exposures.shown(request.decode("ascii"), None, time, ids, variant, model)
