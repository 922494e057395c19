"""An event loop that stays awake for a moment after an answer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from time import monotonic


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


HELD = 0.0003
"""Seconds of a turn of the loop, which takes some microseconds, from which on another thread must
have had the interpreter."""


class Awake:
    """Keeps a loop from sleeping right after an answer.

    Whoever asks one question after the other leaves the core idle in between, and waking an idle
    core takes as long as finding similar items does. So the loop looks out for the next question
    instead of sleeping: for `seconds`, once for all answers of that time, which costs at most that
    much of a core for each answer. (Networks call it busy polling.) It ends at once where another
    thread wants the interpreter, such as one that publishes: it would take half of it.

    Args:
        seconds: how long; 0: never, and so where there is one core alone, which the caller needs.
        idle: whether nothing else of the service has work to do, which would need the interpreter.
    """

    def __init__(self, seconds: float, idle: Callable[[], bool]) -> None:
        self.seconds = seconds if cores() > 1 else 0.0
        self._idle = idle
        self._until = self._last = 0.0
        self._looking = False

    def answered(self, loop: asyncio.AbstractEventLoop) -> None:
        """An answer was written: stay awake from now on."""
        if not self.seconds:
            return
        self._last = monotonic()
        self._until = self._last + self.seconds
        if not self._looking:
            self._looking = True
            loop.call_soon(self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        # A loop that has something to call soon does not sleep; all that came in is read first.
        now = monotonic()
        alone, self._last = now - self._last < HELD, now
        if now < self._until and alone and self._idle():
            loop.call_soon(self._look, loop)
        else:
            self._looking = False
